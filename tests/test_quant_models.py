"""Quantized networks: where they are quantized, those of the paper, one resolution and copies"""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from command_lines import images as photographs  # noqa: F401
from conftest import assert_equal, images, plain_model, randomize_bn, rs_model
from timm.models import is_model
from timm.utils import reparameterize_model

from timm_rs import add_resolution, make_switchable
from timm_rs.evaluate import count_madds
from timm_rs.quant import ActivationQuantizer, QuantConv2d, fold, is_quantized, quantize
from timm_rs_runtime import UserError

RESOLUTIONS = (64, 48, 32)
QUANTIZED = ('rs_preresnet18_w2a2', 'rs_preresnet50_w2a2', 'rs_resnet18_w2a32', 'rs_resnet50_w2a32')
TINY = dict(channels=(8, 16, 16, 24), num_classes=10)


def q_model(name='test_resnet', resolutions=RESOLUTIONS, model_kwargs=None, **kwargs):
    """Return a quantized network in eval mode that has seen a batch at each resolution."""
    torch.manual_seed(0)
    return settle(quantize(rs_model(name, resolutions, **model_kwargs or {}), **kwargs))


def settle(model):
    with torch.no_grad():
        model.train()(images(*model.resolutions, n=4))
    return model.eval()


def preresnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('rs_preresnet18_w2a2', resolutions=RESOLUTIONS, **TINY, **kwargs)


def quantizers(model, kind=(QuantConv2d, ActivationQuantizer)):
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


def bases(model):
    return {n: m.basis.clone() for n, m in quantizers(model).items()}


# Where

def test_all_but_the_first_convolution_and_the_classifier():
    model = q_model('dla46x_c', (64,))  # whose classifier is a convolution
    float_ones = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not isinstance(m, QuantConv2d)]
    assert float_ones == ['base_layer.0', 'fc']
    assert not quantizers(model, ActivationQuantizer)


def test_parameters_stay_the_same_ones():
    model = rs_model()
    parameters, keys = dict(model.named_parameters()), set(model.state_dict())
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    assert quantize(model) is model
    assert all(p is parameters[n] for n, p in model.named_parameters()) and len(parameters) == len(
        list(model.parameters()))
    assert set(model.state_dict()) - keys == {f'{n}.{b}' for n in convs for b in ('basis', 'basis_updates')}


def test_inputs_of_convolutions_are_quantized():
    model = q_model(activation_bits=3, weight_bits=4)
    for conv in quantizers(model, QuantConv2d).values():
        assert conv.bits == 4 and conv.input_quantizer.bits == 3
    seen = []
    hook = model.layer1[0].conv1.input_quantizer.register_forward_hook(lambda m, x, y: seen.append(y))
    model(images(32))
    hook.remove()
    assert 2 < seen[0].unique().numel() <= 8


def test_skip():
    model = q_model(skip=['layer1.*', 'layer4.0.conv2'])
    assert not any(n.startswith('layer1.') or n == 'layer4.0.conv2' for n in quantizers(model))
    assert 'layer4.0.conv1' in quantizers(model)


def test_same_padding():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), timm.layers.Conv2dSame(4, 6, 3, stride=2)
    model = settle(quantize(make_switchable(nn.Sequential(*layers), (32, 24))))
    x, folded = images(32), fold(model)
    assert model(x).shape[-2:] == (15, 15) and type(folded[2]) is timm.layers.Conv2dSame
    assert_equal(folded(x), model(x))


@pytest.mark.parametrize('kwargs, message', [
    (dict(weight_bits=0), 'weight_bits is 0, expected an integer from 1 to 8'),
    (dict(weight_bits=9), 'weight_bits is 9'),
    (dict(weight_bits=32), 'weight_bits is 32'),
    (dict(activation_bits=16), 'activation_bits is 16, expected an integer from 1 to 8, or 32'),
    (dict(skip='layer9.*'), "skip names 'layer9.*', which matches no convolution"),
    (dict(skip='*'), 'no convolution to quantize'),
    (dict(fixed_activation_basis=True), 'needs activation_bits'),
    (dict(skip=5), 'skip is 5, expected names of layers'),
])
def test_bad_arguments(kwargs, message):
    model = rs_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message.replace('*', r'\*')) as e:
        quantize(model, **kwargs)
    assert '\n' not in str(e.value)
    assert not is_quantized(model)
    assert_equal(model.state_dict(), before)


def test_no_fields_are_the_defaults():
    for quantization in ({}, None):
        model = timm.create_model('rs_test_resnet', resolutions=(64, 32), quantization=quantization)
        assert is_quantized(model) == (quantization is not None)


def test_bad_networks():
    with pytest.raises(ValueError, match='is quantized already'):
        quantize(q_model())
    with pytest.raises(ValueError, match='plain network, expected a switchable one'):
        quantize(plain_model())
    with pytest.raises(ValueError, match='no convolution to quantize'):
        quantize(make_switchable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (32,)))

    class Odd(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match='2 is a Odd, which cannot be quantized: name it in skip'):
        quantize(make_switchable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Odd(4, 4, 3)), (32,)))


def test_trained_weights_set_the_scale():
    small = rs_model()
    with torch.no_grad():
        small.layer2[0].conv1.weight *= 0.01
    model = quantize(copy.deepcopy(small), trained=True)
    conv = model.layer2[0].conv1
    for row, basis in zip(conv.weight, conv.basis):
        deviation = row.square().mean().sqrt().item()
        assert basis.tolist() == pytest.approx([deviation * 0.6745 / 2, deviation * 0.6745])
    assert [r.unique().numel() for r in conv.eval().quantized_weight] == [4] * len(conv.weight)


# The networks of the paper

@pytest.mark.parametrize('name', QUANTIZED)
def test_entrypoints(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    plain = model.at(160)
    assert is_model(name) and type(plain).__name__ == ('PreActResNet' if 'pre' in name else 'ResNet')
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    deep = '50' in name
    assert len(convs) == (53 if deep else 20) and len(quantizers(model, QuantConv2d)) == len(convs) - 1
    assert len(quantizers(model, ActivationQuantizer)) == ('a2' in name and 'a32' not in name) * (48 if deep else 16)
    assert {m.bits for m in quantizers(model).values()} == {2}
    if not deep:
        with torch.device('meta'):
            plain = timm.create_model(name.rpartition('_')[0].removeprefix('rs_'))
        assert count_madds(plain, 96) == count_madds(model, 96)


def test_zero_initialized_residuals():
    model = timm.create_model('rs_resnet18_w2a32', resolutions=RESOLUTIONS)
    pre = preresnet()
    assert not any(bn.weight.any() for bn in model.layer3[1].bn2.children())
    assert all(bn.weight.all() for m in pre.modules() for n, bn in m.named_children() if n in map(str, RESOLUTIONS))
    pre = timm.create_model('preresnet18', zero_init_last=True, **TINY)
    assert pre.layer3[1].conv1.weight.any() and not pre.layer3[1].conv2.weight.any()


def layer(state, name, resolution):
    """Return what follows a convolution: the BN of a resolution in eval mode and a ReLU."""
    def apply(x):
        p = {k: state[f'{name}.{resolution}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')}
        return F.relu(F.batch_norm(x, **p))
    return apply


@pytest.mark.parametrize('bottleneck', [False, True])
def test_preresnet_is_the_specified_one(bottleneck):
    model = preresnet(bottleneck=bottleneck, layers=(2, 1, 1, 2))
    model = settle(randomize_bn(settle(model)))
    state, x, r = model.state_dict(), images(48), 48
    quant = {n: m for n, m in quantizers(model, ActivationQuantizer).items()}
    used = []

    def q(name, y):
        used.append(name)
        return quant[name](y)

    def conv(name, y, **kwargs):
        return F.conv2d(y, model.get_submodule(name).quantized_weight, **kwargs)

    def block(name, main, shortcut, stride):
        chain = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        for i, (kernel, step) in enumerate(chain, start=1):
            if i > 1:
                main = q(f'{name}.quant{i}', layer(state, f'{name}.bn{i}', r)(main))
            main = conv(f'{name}.conv{i}', main, stride=step, padding=kernel // 2)
        if f'{name}.downsample.weight' in state:
            shortcut = conv(f'{name}.downsample', shortcut, stride=stride)
        return main + shortcut

    y = F.conv2d(x, state['conv1.weight'], stride=2, padding=3)
    y = F.max_pool2d(layer(state, 'bn1', r)(y), 3, stride=2, padding=1)
    for group, depth in enumerate((2, 1, 1, 2), start=1):
        for i in range(depth):
            name = f'layer{group}.{i}'
            main = y
            if i > 0:
                main = q(f'{name}.quant1', layer(state, f'{name}.bn1', r)(y))
            elif group == 1:
                main = q(f'{name}.quant1', y)
            y = block(name, main, y, stride=2 if group > 1 and i == 0 else 1)
        y = layer(state, f'layer{group}.bn', r)(y)
        if group < 4:
            y = q(f'layer{group}.quant', y)
    logits = F.linear(y.mean((2, 3)), state['fc.weight'], state['fc.bias'])
    assert sorted(used) == sorted(quant)
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)


def test_float_preresnet():
    model = timm.create_model('rs_preresnet18', resolutions=RESOLUTIONS, **TINY).eval()
    assert not is_quantized(model)
    x = images(48)
    features = model.forward_features(x)
    assert_equal(model(x), model.fc(features.mean((2, 3))))
    assert_equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    _, intermediates = model.forward_intermediates(x)
    net = timm.create_model('rs_preresnet18', resolutions=RESOLUTIONS, features_only=True, **TINY).eval()
    channels = [i.shape[1] for i in intermediates]
    assert [f['num_chs'] for f in model.feature_info] == channels == net.feature_info.channels()
    assert [48 // f['reduction'] for f in model.feature_info][:-1] == [i.shape[-1] for i in intermediates][:-1]
    assert [i.shape for i in net(x)] == [i.shape for i in intermediates]
    only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert_equal(only, intermediates[1:2])
    model.reset_classifier(3, 'max')
    assert model(x).shape == (2, 3) and model.get_classifier() is model.fc
    groups = timm.models.group_parameters(model, model.group_matcher())
    names = [groups[k] for k in sorted(groups)]
    assert 'conv1.weight' in names[0] and 'layer1.0.conv1.weight' in names[1] and 'fc.weight' in names[-1]
    assert all(any('layer2.bn' in n for n in g) <= any('layer2' in n for n in g) for g in names)


def test_float_names_of_plain_networks():
    plain = timm.create_model('preresnet50')
    assert sum(p.numel() for p in plain.parameters()) == 25_549_352
    assert plain.pretrained_cfg['architecture'] == 'preresnet50'


# One resolution, copies

def test_at_shares_all():
    model = q_model(activation_bits=2)
    for r in RESOLUTIONS:
        plain, x = model.at(r), images(r)
        assert_equal(plain(x), model(x))
        tensors = {t.data_ptr() for t in (*plain.parameters(), *plain.buffers())}
        assert tensors <= {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        assert not hasattr(plain, '_switch')
    plain.train()(x)
    assert_equal(bases(plain), bases(model))


@pytest.mark.parametrize('copy_model', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_model):
    model = q_model(activation_bits=2)
    other = copy_model(model)
    for x in images(*RESOLUTIONS):
        assert_equal(other(x), model(x))
    before = bases(model)
    other.train()(x)
    assert_equal(bases(model), before)
    other.switch_to(48)
    assert {m._switch.active for m in quantizers(other).values()} == {48} and model.resolution == 32


def test_branches_are_fused_after_folding():
    """timm's reparameterization would take the weights, not their levels."""
    model = quantize(timm.create_model('rs_repghostnet_050', resolutions=(64, 32), num_classes=3), weight_bits=2).eval()
    x = torch.randn(2, 3, 32, 32)
    for network in (model, model.at(32), pickle.loads(pickle.dumps(model.at(32)))):
        with pytest.raises(UserError, match='fold the network first'):
            reparameterize_model(network)
    folded = fold(model)
    with pytest.raises(UserError, match='take a resolution out'):
        reparameterize_model(folded)
    for network in (folded.at(32), fold(model.at(32))):
        torch.testing.assert_close(reparameterize_model(network)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_new_resolution():
    model = q_model()
    add_resolution(model, 40, [torch.rand(32, 3, 64, 64)] * 2, epochs=1)
    assert model.at(40)(images(40)).isfinite().all()
    assert {m._switch for m in quantizers(model).values()} == {model._switch}


def test_half():
    model = q_model(activation_bits=2).bfloat16()
    assert model(images(32).bfloat16()).dtype == torch.bfloat16
    assert model.layer1[0].conv1.quantized_weight[0].unique().numel() <= 4


@pytest.mark.parametrize('activation_bits', [32, 2])
def test_fold(activation_bits):
    model = q_model(activation_bits=activation_bits)
    folded, x = fold(model.at(32)), images(32)
    assert not is_quantized(folded) and is_quantized(model)
    assert_equal(folded(x), model(x))
    if activation_bits == 32:
        assert set(folded.state_dict()) == set(plain_model().state_dict())
    assert_equal(fold(model)(x), model(x))


@pytest.mark.parametrize('activation_bits, file_format', [(32, 'torchscript'), (2, 'onnx')])
def test_export(activation_bits, file_format, tmp_path):
    if file_format == 'onnx':
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')
    from timm_rs.export.export import export_resolution, export_switchable

    model = settle(preresnet(layers=(1, 1, 1, 1), quantization=dict(weight_bits=2, activation_bits=activation_bits)))
    assert export_resolution(model, 32, str(tmp_path / 'one'), file_format) < 1e-5  # what the file and the model differ
    if file_format == 'onnx':
        assert max(export_switchable(model, str(tmp_path / 'all')).values()) < 1e-5
