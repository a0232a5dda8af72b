"""One Core ML package for all sizes; what runs it is only on Apple's systems, so its operators are computed by torch"""
import copy
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mixed_network

from timm_rs import make_switchable
from timm_rs.export import ExportError, export_coreml
from timm_rs_cli import main
from timm_rs_runtime.errors import UserError

SIZES = (16, 12)
coremltools = pytest.importorskip('coremltools')


@pytest.fixture(scope='module')
def small():
    model = mixed_network(SIZES)
    for private in (model[1], model[5]):
        for resolution in SIZES:
            private[resolution].weight.data.uniform_(-1.5, 1.5)
            private[resolution].bias.data.normal_(std=0.5)
            private[resolution].running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope='module')
def exported(small, tmp_path_factory):
    path = tmp_path_factory.mktemp('coreml') / 'all.mlpackage'
    export_coreml(small, str(path), class_names=list('abcde'))
    return path


def load(path):
    """Return the description of a package and its functions with their weights."""
    from coremltools.converters.mil.frontend.milproto import load as milproto

    spec = coremltools.utils.load_spec(str(path))
    weights = os.path.join(path, 'Data', 'com.apple.CoreML', 'weights')
    return spec.description, milproto.load(spec, spec.specificationVersion, weights).functions


def pair(value):
    return tuple(int(v) for v in value)


OPERATORS = {
    'relu': lambda x: F.relu(x),
    'batch_norm': lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
        x, mean, variance, gamma, beta, eps=float(epsilon)),
    'linear': lambda x, weight, bias: F.linear(x, weight, bias),
    'reduce_mean': lambda x, axes, keep_dims: x.mean(pair(axes), bool(keep_dims)),
    'reshape': lambda x, shape: x.reshape(pair(shape)),
    'pad': lambda x, pad, mode, constant_val: F.pad(x, pad.view(-1, 2).flip(0).ravel().tolist()),
    'cast': lambda x, dtype: x.to(dict(fp16=torch.float16, fp32=torch.float32)[dtype]),
}


def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    top, bottom, left, right = pair(pad) if pad_type == 'custom' else (0,) * 4
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)), weight, bias, pair(strides), 0, pair(dilations), int(groups))


def compute(function, x):
    """Return what a function's operators compute."""
    values = {'images': x}
    for op in function.operations:
        if op.op_type == 'const':
            value = op.outputs[0].val
            values[op.outputs[0].name] = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            continue
        arguments = {name: values[var.name] for name, var in op.inputs.items() if var is not None}
        values[op.outputs[0].name] = (conv if op.op_type == 'conv' else OPERATORS[op.op_type])(**arguments)
    return values[function.outputs[0].name]


def test_functions_compute_what_the_network_does(small, exported):
    _, functions = load(exported)
    for size in SIZES:
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(
                compute(functions[f'forward_{size}'], x), small.at(size)(x), rtol=1e-5, atol=1e-5)


def test_a_package_says_what_it_needs(exported):
    description, functions = load(exported)
    described = {function.name: function for function in description.functions}
    assert set(described) == set(functions) == {'forward_16', 'forward_12'}
    assert description.defaultFunctionName == 'forward_16'
    for size in SIZES:
        (images,), (logits,) = described[f'forward_{size}'].input, described[f'forward_{size}'].output
        assert (images.name, list(images.type.multiArrayType.shape)) == ('images', [1, 3, size, size])
        assert (logits.name, list(logits.type.multiArrayType.shape)) == ('logits', [1, 5])
    metadata = {key: json.loads(text) for key, text in description.metadata.userDefined.items()}
    assert (metadata['resolutions'], metadata['class_names'], metadata['mean']) == ([16, 12], list('abcde'), [0.5] * 3)


def weights_of(path):
    return os.path.getsize(os.path.join(path, 'Data', 'com.apple.CoreML', 'weights', 'weight.bin'))


def test_shared_weights_are_in_the_package_once(small, exported):
    weights = sum(p.numel() * 4 for p in small.at(16).parameters())
    assert weights < weights_of(exported) < 1.1 * weights


def test_fp16_halves_the_weights_but_images_and_logits_stay_float32(small, exported, tmp_path):
    path = tmp_path / 'half.mlpackage'
    export_coreml(small, str(path), precision='fp16')
    assert weights_of(path) < 0.55 * weights_of(exported)
    description, functions = load(path)
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        found, expected = compute(functions['forward_12'], x), small.at(12)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert json.loads(description.metadata.userDefined['precision']) == 'fp16'


def test_a_network_beyond_the_range_of_16_bits_is_refused(small, tmp_path):
    large = copy.deepcopy(small)
    large[1][12].weight.data *= 1e6
    with pytest.raises(ExportError, match='differs from the network by (inf|nan) at 12 px'):
        export_coreml(large, str(tmp_path / 'a.mlpackage'), precision='fp16')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name, change, message', [
    ('a.mlpackage', dict(batch_size=0), 'batch_size is 0, expected a positive number'),
    ('a.mlpackage', dict(precision='int8'), "Unknown precision 'int8'"),
    ('a.mlmodel', {}, 'expected a name that ends in .mlpackage'),
])
def test_bad_arguments(small, tmp_path, name, change, message):
    with pytest.raises(UserError, match=message):
        export_coreml(small, str(tmp_path / name), **change)
    assert os.listdir(tmp_path) == []


def test_a_layer_that_cannot_be_converted_leaves_nothing(small, tmp_path):
    class Unknown(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), Unknown(), torch.nn.Flatten())
    network.num_classes, network.pretrained_cfg = 5, small.pretrained_cfg
    with pytest.raises(ExportError, match='bessel_j0'):
        export_coreml(make_switchable(network.eval(), SIZES), str(tmp_path / 'a.mlpackage'))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('flags, message', [
    (['--resolution', '16'], 'does not go with --resolution'),
    (['--dynamic-batch'], 'does not go with --dynamic-batch'),
    (['--quantize', 'int8', '--data-dir', '.'], 'does not go with --quantize int8: int8 is for ONNX and ExecuTorch'),
    (['--overwrite'], 'does not go with --overwrite'),
])
def test_command_tells_what_is_wrong(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(['export', 'rs_resnet10t.imagenette', '-o', str(tmp_path / 'a.mlpackage'), *flags])
    assert message in capsys.readouterr().err
