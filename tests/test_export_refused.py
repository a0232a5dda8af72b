"""What export refuses: files that differ from the network, bad weights and arguments"""
import copy
import math
import os
import resource

import pytest
import torch
from conftest import images, plain_model, randomize_bn, rs_model

from timm_rs import make_switchable
from timm_rs.quant import quantize
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.format import read_metadata

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

from timm_rs.export import ExportError, export, export_int8, export_resolution, export_switchable  # noqa: E402
from timm_rs.export.batch_norm import fuse_batch_norms  # noqa: E402
from timm_rs.export.verify import verify  # noqa: E402


def test_a_file_that_differs_is_not_written(tiny, tmp_path, monkeypatch):
    real = export.reduce_batch_norms

    def reduce_wrongly(network):
        network = real(network)
        network.get_classifier().bias.data[3] += 2e-4
        return network

    monkeypatch.setattr(export, 'reduce_batch_norms', reduce_wrongly)
    message = ('by 0.0002 at 64 px, expected at most .*e-0., which rounding explains; no file was written. '
               '--tolerance accepts more')
    with pytest.raises(ExportError, match=message):
        export_switchable(tiny, str(tmp_path / 'all.onnx'))
    assert os.listdir(tmp_path) == []
    export_switchable(tiny, str(tmp_path / 'all.onnx'), tolerance=1e-3)
    assert os.listdir(tmp_path) == ['all.onnx']


def test_what_onnx_has_no_operator_for(tmp_path, capfd):
    """A mean to 3 x 3 of 16 x 16: one line that names formats which may have it."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())
    network.num_classes = 36
    network.pretrained_cfg = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    model = make_switchable(network.eval(), (16, 12))
    with pytest.raises(ExportError, match='cannot be traced at 16 px: .* for one size torch-export.$') as e:
        export_switchable(model, str(tmp_path / 'all.onnx'))
    assert '\n' not in str(e.value) and capfd.readouterr() == ('', '') and os.listdir(tmp_path) == []
    assert export_resolution(model, 16, str(tmp_path / 'one.pt2'), 'torch-export') < 1e-5


def amplify(model, factor):
    """Make each BatchNorm's output larger, as in trained networks whose logits are."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data *= factor
    return model


def test_rounding_of_large_logits_is_accepted(tmp_path):
    """A trained MobileNetV3 of timm has logits of about 200."""
    model = amplify(rs_model('mobilenetv3_small_050', (64, 48)), 1.13)
    with torch.no_grad():
        assert 100 < model.at(64)(images(64)).abs().max() < 500
    errors = export_switchable(model, str(tmp_path / 'all.onnx'))
    assert 1e-4 < max(errors.values()) < 1e-2


def one_weight_off(name, index):
    def change(model):
        model.get_parameter(name).data[index] += 1e-3
    return change


def largest_weight_off_by_a_thousandth(name):
    def change(model):
        weights = model.get_parameter(name).data.view(-1)
        weights[weights.abs().argmax()] *= 1.001
    return change


def other_eps(model):
    assert model.layer1[0].bn1[64].eps == 1e-5
    model.layer1[0].bn1[64].eps = 1e-3


def swap_rows(model):
    for key, value in model.layer1[0].bn1[64].state_dict().items():
        value.copy_(model.layer1[0].bn1[48].state_dict()[key])


@pytest.mark.parametrize('factor', [1, 2], ids=['logits to 2', 'logits to 900'])
@pytest.mark.parametrize('change', [
    one_weight_off('conv1.0.weight', (0, 0, 1, 1)),
    one_weight_off('layer2.0.conv1.weight', (0, 0, 0, 0)),
    one_weight_off('layer2.0.bn1.64.bias', 0),
    one_weight_off('fc.weight', (3, 5)),
    largest_weight_off_by_a_thousandth('conv1.0.weight'),
    largest_weight_off_by_a_thousandth('layer2.0.bn1.64.weight'),
    largest_weight_off_by_a_thousandth('fc.weight'),
    other_eps,
    swap_rows,
])
def test_a_real_difference_is_refused(tiny, factor, change):
    model = amplify(copy.deepcopy(tiny), factor)
    network, other = model.at(64), copy.deepcopy(model)
    assert verify(fuse_batch_norms(network, images(64)), {64: network}, 'rs_net')[64] > 0
    change(other)
    with pytest.raises(ExportError, match='The exported rs_net differs from the network by .* at 64 px'):
        verify(other.at(64), {64: network}, 'rs_net')


def test_a_network_that_asks_for_float32(tmp_path):
    """It does not run in float64, so the reference is the network as it is."""
    class Mixed(torch.nn.Sequential):
        num_classes = 4

        def forward(self, x):
            return super().forward(x).mean((2, 3)) @ torch.eye(4, dtype=torch.float32)

    model = make_switchable(Mixed(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval(), (16, 12))
    assert max(export_switchable(model, str(tmp_path / 'all.onnx')).values()) < 1e-6


@pytest.mark.parametrize('key, message', [
    ('conv1.0.weight', r'conv1\.0\.weight'),
    ('layer2.0.bn1.48.running_var', r'layer2\.0\.bn1\.running_var'),
])
def test_weights_that_are_not_finite_are_refused(tiny, photographs, tmp_path, key, message):
    model = copy.deepcopy(tiny)
    model.state_dict()[key].view(-1)[1] = math.nan
    for write in (lambda: export_switchable(model, str(tmp_path / 'all.onnx')),
                  lambda: export_int8(model, str(tmp_path / 'all.onnx'), [str(next(photographs.iterdir()))]),
                  lambda: export_resolution(model, 48, str(tmp_path / 'one.onnx'))):
        with pytest.raises(UserError, match=f'ResNet at .* px: {message} holds'):
            write()
    assert os.listdir(tmp_path) == []


def test_levels_of_activations_may_flip():
    """Rounding moves some a whole level; a file of another network is farther off."""
    def verify_off(model, share):
        plain = {32: export._take(model, 32)}
        return verify(lambda x: off(plain[32](x).detach(), share), plain, 'rs_net')

    def off(logits, share):
        deviation = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
        return logits + share * deviation * torch.ones_like(logits)

    quantized = quantize(rs_model(), weight_bits=2, activation_bits=2)
    assert verify_off(quantized, 0.1)[32] > 1e-3
    for model, share in ((quantized, 0.2), (quantized, math.nan), (rs_model(), 0.1)):
        with pytest.raises(ExportError, match='The exported rs_net differs from the network by .* at 32 px'):
            verify_off(model, share)


@pytest.mark.parametrize('change, message', [
    (dict(resolution=47), 'Unknown resolution 47'),
    (dict(format='caffe'), "Unknown format 'caffe'"),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(format='torch-export'), r'one: expected a name that ends in \.pt2'),
    (dict(path='nowhere/one.onnx'), 'nowhere does not exist'),
    (dict(class_names=['a', 'b']), '2 class names'),
    (dict(class_names=[*'abcdefghi', 9]), r'class_names\[9\] is 9, expected text of at most 1000 characters'),
])
def test_bad_arguments(tiny, tmp_path, change, message):
    with pytest.raises((ValueError, KeyError), match=message):
        export_resolution(**dict(dict(model=tiny, resolution=48, path=str(tmp_path / 'one')), **change))
    assert os.listdir(tmp_path) == []


class TwoReaders(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (x + self.bn(x)).mean((2, 3))


@pytest.mark.parametrize('network', [
    torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten()), TwoReaders()], ids=['changed in place', 'two readers'])
def test_batch_norms_that_cannot_be_fused(network, tmp_path):
    model = randomize_bn(make_switchable(network.eval(), (16, 12)))
    for name, format in ('one.pt2', 'torch-export'), ('one.pt', 'torchscript'):
        assert export_resolution(model, 12, str(tmp_path / name), format) < 1e-5


class Wrapped(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.bn, self.wrap = torch.nn.BatchNorm2d(3), wrap

    def forward(self, x):
        return self.wrap(self.bn(x).mean((2, 3)))


@pytest.mark.parametrize('wrap, kind', [(lambda x: dict(logits=x), 'dict'), (lambda x: (x, x), 'tuple')])
def test_answers_that_are_not_one_tensor(wrap, kind, tmp_path):
    model = make_switchable(Wrapped(wrap).eval(), (16, 12))
    with pytest.raises(ExportError, match=f'Wrapped returns a {kind}, expected one tensor of logits'):
        export_switchable(model, str(tmp_path / 'all.onnx'))
    with pytest.raises(ExportError, match='returns a list, expected one tensor of logits'):
        export_switchable(rs_model(features_only=True), str(tmp_path / 'all.onnx'))


def test_the_number_of_classes_is_that_of_the_answers(tmp_path):
    export_switchable(make_switchable(Wrapped(lambda x: x).eval(), (16, 12)), str(tmp_path / 'all.onnx'))
    assert read_metadata(str(tmp_path / 'all.onnx'))['num_classes'] == 3


@pytest.mark.parametrize('format', ['onnx', 'torch-export', 'torchscript'])
def test_a_disk_that_is_full(tiny, tmp_path, format):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            export_resolution(tiny, 48, str(tmp_path / 'one.pt2'), format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_files_are_not_written_over(tiny, photographs, tmp_path):
    path = tmp_path / 'all.onnx'
    path.write_text('mine')
    for write in (lambda: export_switchable(tiny, str(path)),
                  lambda: export_int8(tiny, str(path), [str(next(photographs.iterdir()))]),
                  lambda: export_resolution(tiny, 48, str(path))):
        with pytest.raises(UserError, match='all.onnx exists and is not overwritten'):
            write()
    assert path.read_text() == 'mine' and os.listdir(tmp_path) == ['all.onnx']


def test_plain_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match='ResNet is not switchable'):
        export_resolution(plain_model(), 48, tmp_path / 'm.onnx')
    with pytest.raises(ValueError, match='ResNet is not switchable'):
        export_switchable(plain_model(), str(tmp_path / 'all.onnx'))
