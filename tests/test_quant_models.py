"""Quantized networks: where they are quantized, how they are trained and copied"""
import copy
import pickle
from pathlib import Path

import command_lines
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from command_lines import images as photographs  # noqa: F401
from conftest import assert_equal, images, plain_model, randomize_bn, rs_model
from timm.models import is_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3

import train_rs
from timm_rs import add_resolution, make_switchable
from timm_rs.evaluate import count_madds
from timm_rs.load import load_model
from timm_rs.quant import ActivationQuantizer, QuantConv2d, fold, is_quantized, quantize
from timm_rs.train import MultiResolutionTask
from timm_rs.train.options import parse_args
from timm_rs_cli import main

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*_w*a*.yaml'))
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
    (dict(activation_bits=16), 'activation_bits is 16, expected an integer from 1 to 8'),
    (dict(skip='layer9.*'), "skip names 'layer9.*', which matches no convolution"),
    (dict(skip='*'), 'no convolution to quantize'),
    (dict(fixed_activation_basis=True), 'needs activation_bits'),
])
def test_bad_arguments(kwargs, message):
    model = rs_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message.replace('*', r'\*')) as e:
        quantize(model, **kwargs)
    assert '\n' not in str(e.value)
    assert not is_quantized(model)
    assert_equal(model.state_dict(), before)


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


# Training

def step(model, optimizer=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 3, 1, 2])
    model.zero_grad()
    MultiResolutionTask(model, verbose=False).train()(x, target)['loss'].backward()
    if optimizer is not None:
        optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_step_updates_each_basis_once_per_resolution_largest_first():
    model, order = preresnet(), []
    layer1 = model.layer1[0].conv1
    layer1.register_forward_hook(lambda m, x, y: order.append((model.resolution, m.basis_updates.item())))
    gradients = step(model)
    assert order == [(64, 1), (48, 2), (32, 3)]
    assert {m.basis_updates.item() for m in quantizers(model).values()} == {3}
    assert all(g.isfinite().all() for g in gradients.values())


def test_fixed_activation_basis():
    model, other = preresnet(), preresnet()
    quantization = dict(weight_bits=2, activation_bits=2, fixed_activation_basis=True)
    fixed = preresnet(quantization=quantization)
    for m in (fixed, other):
        m.load_state_dict(model.state_dict())
    step(model)
    step(fixed)
    assert {m.basis_updates.item() for m in quantizers(fixed, QuantConv2d).values()} == {3}
    assert {m.basis_updates.item() for m in quantizers(fixed, ActivationQuantizer).values()} == {1}
    other.switch_to(64)
    other.train().at(64)(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    first = quantizers(fixed, ActivationQuantizer)['layer1.0.quant1']
    torch.testing.assert_close(first.basis, quantizers(other)['layer1.0.quant1'].basis)
    for r in RESOLUTIONS:  # also when taken out
        before = first.basis.clone()
        fixed.train().at(r)(torch.rand(4, 3, r, r))
        assert torch.equal(first.basis, before) == (r != 64)


@pytest.mark.parametrize('how', ['lean', 'checkpointing', 'both'])
def test_recomputing_updates_nothing(how):
    models = [preresnet(), preresnet()]
    if how != 'checkpointing':
        models[1].set_resolution_checkpointing()
    if how != 'lean':
        models[1].set_grad_checkpointing()
    for seed in range(2):
        gradients = [step(m, seed=seed) for m in models]
        assert_equal(*gradients)
        assert_equal(*[bases(m) for m in models])
    assert {m.basis_updates.item() for m in quantizers(models[1]).values()} == {6}


def test_optimizer_decays_weights_of_convolutions_and_classifier_alone():
    model = preresnet()
    groups = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=5e-5).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    assert decayed == {f'{n}.weight' for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_recipes(path):
    args = parse_args(['--config', str(path)])
    assert args.model == path.stem and args.model in QUANTIZED and len(CONFIGS) == 4
    assert args.weight_decay == 5e-5 and args.batch_size * 8 == 256 and args.epochs == 120 and args.smoothing == 0
    optimizer = create_optimizer_v2(nn.Linear(2, 2), opt=args.opt, lr=args.lr, momentum=args.momentum)
    assert optimizer.param_groups[0]['nesterov'] and optimizer.param_groups[0]['momentum'] == 0.9
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    rates = []
    for epoch in range(120):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    assert epochs == 120
    expected = [0.1] * 30 + [1e-2] * 30 + [1e-3] * 25 + [1e-4] * 10 + [1e-5] * 10 + [1e-6] * 15
    assert rates == pytest.approx(expected)


def test_no_config_is_left_out():
    for path in CONFIGS:
        assert yaml.safe_load(path.read_text())['resolutions'] == [224, 192, 160, 128, 96]


def test_moving_average_of_bases():
    model = preresnet()
    ema = ModelEmaV3(model, decay=0.5)
    before = bases(model)
    step(model)
    ema.update(model)
    for name, basis in bases(ema.module).items():
        torch.testing.assert_close(basis, (before[name] + bases(model)[name]) / 2)
    x = images(32)
    before = bases(ema.module)
    ema.module(x)
    assert_equal(bases(ema.module), before)


def test_resuming_is_exact():
    def build():
        model = preresnet()
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    model, optimizer = build()
    step(model, optimizer, seed=0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, seed=1)
    other, other_optimizer = build()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    step(other, other_optimizer, seed=1)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_learns():
    torch.manual_seed(0)
    model = timm.create_model('rs_preresnet18_w2a2', resolutions=(32, 24), layers=(1, 1, 1, 1), **TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    task = MultiResolutionTask(model, verbose=False).train()
    x, target = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(task(x, target))
        losses[-1]['loss'].backward()
        optimizer.step()
    first, last = (row['classification'].item() for row in (losses[0], losses[-1]))
    assert last < 0.5 * first


def test_compiled_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10))
    model = quantize(make_switchable(model, RESOLUTIONS), activation_bits=2)
    compiled = copy.deepcopy(model)
    expected = step(model)
    task = MultiResolutionTask(compiled, verbose=False)
    task.compile(backend='eager', fullgraph=True)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    task.train()(x, torch.tensor([0, 3, 1, 2]))['loss'].backward()
    torch.testing.assert_close({n: p.grad for n, p in compiled.named_parameters()}, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bases(compiled), bases(model))


def test_scripts(photographs, tmp_path):
    flags = [str(photographs), *command_lines.TINY, *'--checkpoint-hist 1 --epochs 2 --experiment run --output'.split(),
             str(tmp_path), '--model-kwargs',
             "quantization={'weight_bits': 2, 'activation_bits': 2, 'skip': 'layer4.*'}"]
    train_rs.main([*flags, '--stop-epoch', '1', '--memory', 'lean'])
    train_rs.main([*flags, '--resume', 'auto'])
    last = tmp_path / 'run' / 'last.pth.tar'
    state = torch.load(last, weights_only=False)['state_dict']
    assert state['layer1.0.conv1.basis_updates'] == 2 * 2 * (10 // 4)  # sizes, epochs, batches
    assert list(command_lines.validated(photographs, tmp_path, '--checkpoint', str(last))) == [32, 16, 'ens']
    model = load_model(str(last)).model
    assert is_quantized(model) and 'layer4.0.conv1' not in quantizers(model)
    main(['convert', str(last), '--output', str(tmp_path / 'packed'), '--packed'])
    restored = timm.create_model(f"local-dir:{tmp_path / 'packed'}", pretrained=True).eval()
    x = images(24)
    assert_equal(restored(x), model(x))
    command_lines.validated(photographs, tmp_path, '--model', f"local-dir:{tmp_path / 'packed'}", '--pretrained')


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
