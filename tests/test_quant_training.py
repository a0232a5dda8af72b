"""Quantized networks: how they are trained"""
import copy
from pathlib import Path

import command_lines
import pytest
import timm
import torch
import torch.nn as nn
import yaml
from command_lines import images as photographs  # noqa: F401
from conftest import assert_equal, images
from test_quant_models import QUANTIZED, RESOLUTIONS, TINY, bases, preresnet, quantizers
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3

import train_rs
from timm_rs import make_switchable
from timm_rs.load import load_model
from timm_rs.quant import ActivationQuantizer, QuantConv2d, is_quantized, quantize
from timm_rs.train import MultiResolutionTask
from timm_rs.train.options import parse_args
from timm_rs_cli import main

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*_w*a*.yaml'))


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


def test_optimizer_decays_weights_of_convolutions_and_classifier_only():
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
