"""timm's training options in the multi-resolution step: where the plain path must come to the same, it is compared"""
import copy
import math
from functools import partial

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import rs_model
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from timm_rs.data.datasets import PyramidNormalizer
from timm_rs.train import loop
from timm_rs.train.builders import build_optimizer, build_task
from timm_rs.train.loaders import Loaders
from timm_rs.train.loop import train_one_epoch
from timm_rs.train.options import parse_args
from timm_rs.train.preemption import Preemption
from timm_rs.train.saver import Progress
from timm_rs_runtime.unreadable import ReadErrors

RESOLUTIONS = (32, 24, 16)
LARGER = (64, 56, 48)  # for bfloat16: torch 2.15 miscomputes it on maps of 1x1, where channels come last
CPU = torch.device('cpu')
PLAIN = '--device cpu --lr 0.01 --weight-decay 0.01 --smoothing 0 --log-interval 1000'.split()


class Batches(list):
    """Stands for a loader."""
    dataset = sampler = None

    def to(self, dtype):
        return Batches((x.to(dtype), target) for x, target in self)


def batches(count=2, size=4, split=1, resolution=32):
    """Return batches, each cut into some parts."""
    generator = torch.Generator().manual_seed(1)
    found = Batches()
    for _ in range(count):
        x = torch.randn(size, 3, resolution, resolution, generator=generator)
        target = torch.randint(10, (size,), generator=generator)
        found.extend(zip(x.chunk(split), target.chunk(split)))
    return found


def build(*flags, name='test_resnet', frozen=False, resolutions=RESOLUTIONS, dtype=torch.float32, **kwargs):
    """Return the arguments of a run and its task, always of the same weights."""
    args = parse_args([*PLAIN, *flags, '--resolutions', *map(str, resolutions)])
    args.rank, args.world_size, args.distributed = 0, 1, False
    torch.manual_seed(0)
    model = rs_model(name, resolutions, **kwargs).to(dtype)
    model.alpha.data = torch.tensor([0.5, -0.5, 0.2][:len(resolutions)], dtype=dtype)
    if frozen:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train = lambda mode, bn=module: nn.Module.train(bn, False)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.memory == 'lean':
        model.set_resolution_checkpointing()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    task = build_task(args, model, CPU)
    task.verbose = False
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
    return args, task


def train(args, task, data, optimizer=None, scaler=None, autocast=None):
    """Train for an epoch and return the mean loss terms."""
    images = data[0][0]
    normalize = PyramidNormalizer([0.] * 3, [1.] * 3, images.device, images.dtype, args.channels_last)
    loaders = Loaders(data, None, normalize, None, None, None, ReadErrors(0), None)
    optimizer = optimizer or build_optimizer(args, task.trainable_module)
    if args.torchcompile:
        torch.compiler.reset()
        task.compile(backend=args.torchcompile)
    kwargs = dict(amp_autocast=autocast) if autocast else {}
    preemption = Preemption()
    try:
        return train_one_epoch(Progress(), task, loaders, optimizer, args, preemption, loss_scaler=scaler, **kwargs)
    finally:
        preemption.close()


def weights(task, ema=False):
    return dict(task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict'])


def gradients(task):
    return {n: p.grad for n, p in task.trainable_module.named_parameters() if p.grad is not None}


def one_step(*flags, **kwargs):
    """Return a task after a backward pass, and its result."""
    _, task = build(*flags, **kwargs)
    result = task.train()(*batches(1, resolution=task.trainable_module.resolutions[0])[0])
    result['loss'].backward()
    return task, result


@pytest.mark.parametrize('flags', [
    '--grad-accum-steps 2',
    '--grad-accum-steps 4 --memory lean --grad-checkpointing',
    '--memory lean',
    '--memory lean --grad-checkpointing --channels-last',
    '--grad-checkpointing',
    '--channels-last',
    '--torchcompile eager',
    '--amp',
    '--amp --grad-accum-steps 2 --memory lean --clip-grad 0.5',
    '--opt adamw --clip-grad 0.5 --grad-accum-steps 2',
    '--opt adamw --clip-grad 0.01 --clip-mode value --memory lean',
    '--opt lamb --clip-grad 0.1 --clip-mode agc --grad-accum-steps 2 --layer-decay 0.8',
    '--distill none --grad-accum-steps 2 --memory lean',
    '--distill ens --grad-accum-steps 4 --amp',
])
def test_comes_to_what_the_plain_path_comes_to(flags):
    """Loss, weights, running statistics and moving average after two updates; --amp also with only its scaler.

    In float64, for a ReLU that rounding turns on or off would change float32 gradients.
    """
    flags = flags.split()
    same = {'--memory', 'lean', '--grad-checkpointing', '--channels-last', '--torchcompile', 'eager', '--amp'}
    ema = ('--model-ema', '--model-ema-decay', '0.5')
    accumulates = '--grad-accum-steps' in flags
    plain = [f for f in flags if f not in same]
    if accumulates:
        at = plain.index('--grad-accum-steps')
        del plain[at:at + 2]
    # parts of a batch have statistics and random numbers of their own
    kwargs = dict(frozen=True) if accumulates else dict(drop_path_rate=0.2)
    if '--torchcompile' in flags:
        kwargs.update(resolutions=RESOLUTIONS[:2])  # which are compiled one by one
    if '--channels-last' in flags:
        kwargs.update(resolutions=LARGER)
    elif not accumulates:
        kwargs.update(drop_rate=0.2)  # whose mask follows the memory format
    args, task = build(*flags, *ema, dtype=torch.float64, **kwargs)
    scaler, size = NativeScaler('cpu') if args.amp else None, args.resolutions[0]
    found = train(args, task, batches(split=args.grad_accum_steps, resolution=size).to(torch.float64), scaler=scaler)
    args, expected = build(*plain, *ema, dtype=torch.float64, **kwargs)
    terms = train(args, expected, batches(resolution=size).to(torch.float64))
    assert found == pytest.approx(terms, rel=1e-5)
    assert any(not torch.equal(v, weights(task)[k]) for k, v in weights(build(**kwargs)[1]).items())
    for average in (False, True):
        torch.testing.assert_close(weights(task, average), weights(expected, average), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients():
    """Two halves of a batch make exactly the update of the whole batch."""
    halves, whole = [], []
    for found, steps in ((halves, 2), (whole, 1)):
        args, task = build('--grad-accum-steps', str(steps), frozen=True)
        optimizer = build_optimizer(args, task.trainable_module)
        optimizer.register_step_pre_hook(lambda *_, f=found, t=task: f.append(copy.deepcopy(gradients(t))))
        train(args, task, batches(split=steps), optimizer)
    assert len(halves) == len(whole) == 2
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-6)


def test_moving_average_of_decay_0_is_the_model():
    args, task = build('--model-ema', '--model-ema-decay', '0', drop_path_rate=0.2)
    train(args, task, batches(3))
    torch.testing.assert_close(weights(task, ema=True), weights(task), rtol=0, atol=0)


@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name, flags', [
    ('test_resnet', ''), ('test_resnet', '--grad-checkpointing'), ('test_resnet', '--channels-last'),
    ('test_resnet', '--distill none'), ('test_efficientnet', '--grad-checkpointing --channels-last'),
])
def test_lean_memory_gives_the_same_gradients(name, flags, autocast):
    """With dropout and drop path; and the running statistics are updated once."""
    tasks = []
    for memory in ('default', 'lean'):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            tasks.append(one_step(
                '--memory', memory, *flags.split(), name=name, resolutions=LARGER if autocast else RESOLUTIONS,
                drop_rate=0.3, drop_path_rate=0.3)[0])
    default, lean = tasks
    for (name, found), (_, expected) in zip(gradients(lean).items(), gradients(default).items(), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm(), name
    buffers = dict(lean.trainable_module.named_buffers())
    torch.testing.assert_close(buffers, dict(default.trainable_module.named_buffers()), rtol=0, atol=0)
    assert {v.item() for k, v in buffers.items() if k.endswith('num_batches_tracked')} == {1}


def test_mixed_precision_in_bfloat16():
    args, task = build('--amp', '--amp-dtype', 'bfloat16', resolutions=LARGER)
    autocast, data = partial(torch.autocast, device_type='cpu', dtype=torch.bfloat16), batches(3, resolution=LARGER[0])
    assert all(map(math.isfinite, train(args, task, data, autocast=autocast).values()))
    with autocast():
        result = task(*data[0])
    assert {result[k].dtype for k in ('loss', 'classification', 'ensemble', 'distillation')} == {torch.float32}
    assert {z.dtype for z in result['output']} == {torch.bfloat16}
    assert {v.dtype for v in weights(task).values()} == {torch.float32, torch.int64}


def test_mixed_precision_in_float16():
    """The scaler finds its scale: a first update that overflows is left out, later ones are made."""
    args, task = build('--amp')
    before, scaler = copy.deepcopy(weights(task)), NativeScaler('cpu')
    scaler.load_state_dict(dict(scaler.state_dict(), scale=2. ** 40, growth_interval=1000))
    autocast = partial(torch.autocast, device_type='cpu', dtype=torch.float16)
    train(args, task, batches(1), scaler=scaler, autocast=autocast)
    parameters = [n for n, _ in task.trainable_module.named_parameters()]
    assert scaler.state_dict()['scale'] == 2. ** 39
    assert all(torch.equal(weights(task)[n], before[n]) for n in parameters)
    scaler.load_state_dict(dict(scaler.state_dict(), scale=2. ** 10))
    assert all(map(math.isfinite, train(args, task, batches(3), scaler=scaler, autocast=autocast).values()))
    assert scaler.state_dict()['scale'] == 2. ** 10
    assert not any(torch.equal(weights(task)[n], before[n]) for n in parameters)
    assert all(v.isfinite().all() for v in weights(task).values())


def test_weights_in_bfloat16():
    args, task = build('--model-dtype', 'bfloat16', '--opt', 'adamw', resolutions=LARGER, dtype=torch.bfloat16)
    data = batches(3, resolution=LARGER[0]).to(torch.bfloat16)
    assert all(map(math.isfinite, train(args, task, data).values()))
    assert {v.dtype for v in weights(task).values()} == {torch.bfloat16, torch.int64}


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping(mode, scaled):
    """An update at learning rate 1 without momentum is the clipped gradient."""
    gradient = gradients(one_step()[0])
    args, task = build('--clip-mode', mode, '--clip-grad', '0.02')
    before = copy.deepcopy(weights(task))
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1.)
    train(args, task, batches(1), optimizer, scaler=NativeScaler('cpu') if scaled else None)
    update = {n: before[n] - weights(task)[n] for n in gradient}
    if mode == 'norm':
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))
        assert norm > 0.02
        expected = {n: g * 0.02 / norm for n, g in gradient.items()}
    elif mode == 'value':
        expected = {n: g.clamp(-0.02, 0.02) for n, g in gradient.items()}
    else:  # per output channel, against the norm of its weights, except in the classifier and the ensemble
        expected = {}
        for name, g in gradient.items():
            dims = tuple(range(1, g.ndim)) or 0
            size = [v.square().sum(dims, keepdim=True).sqrt() for v in (before[name], g)]
            ratio = 0.02 * size[0].clamp(min=1e-3) / size[1]
            expected[name] = g if name.startswith('fc.') or name == 'alpha' else g * ratio.clamp(max=1)
    assert any(not torch.allclose(expected[n], g) for n, g in gradient.items())
    torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('flags', [
    '--mixup 0.8', '--cutmix 1', '--mixup 0.8 --cutmix 1 --smoothing 0.1', '--mixup 0.8 --bce-loss',
    '--smoothing 0.1', '--bce-loss', '--loss bce --smoothing 0.1 --bce-sum', '--bce-loss --bce-target-thresh 0.2',
])
def test_classification_loss(flags):
    args, task = build(*flags.split())
    np.random.seed(0)  # mixup's
    x, target = batches(1)[0]
    smooth = F.one_hot(target, 10) * (1 - args.smoothing) + args.smoothing / 10
    if args.mixup or args.cutmix:
        mixup = Mixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=10)
        x, target = mixup(x, target)
        smooth = target
        assert (target > args.smoothing / 10 + 1e-3).sum() > len(target)
    result = task(x, target)
    z, p = result['output'], [logits.softmax(1) for logits in result['output']]
    if args.loss == 'bce':
        hard = smooth if args.bce_target_thresh is None else (smooth > args.bce_target_thresh).float()
        reduce = (lambda v: v.sum(1).mean()) if args.bce_sum else torch.mean
        expected = sum(
            reduce(-hard * F.logsigmoid(logits) - (1 - hard) * F.logsigmoid(-logits)) for logits in z)
    else:
        expected = sum(-(smooth * q.log()).sum(1).mean() for q in p)
    torch.testing.assert_close(result['classification'], expected)
    result['loss'].backward()
    assert all(g.isfinite().all() for g in gradients(task).values())


def test_layer_decay():
    """A private BN belongs to its layer; the ensemble weights learn at the full rate and never decay."""
    args, task = build('--layer-decay', '0.5')
    model = task.trainable_module
    groups = {id(p): g for g in build_optimizer(args, model).param_groups for p in g['params']}
    scale = {n: groups[id(p)]['lr_scale'] for n, p in model.named_parameters()}
    decay = {n: groups[id(p)]['weight_decay'] for n, p in model.named_parameters()}
    assert (scale['alpha'], decay['alpha']) == (1, 0) and scale['fc.weight'] == 1
    for n in ('layer1.0', 'layer3.0'):
        assert len({scale[f'{n}.conv1.weight'], *(scale[f'{n}.bn1.{r}.weight'] for r in RESOLUTIONS)}) == 1
    assert scale['layer1.0.conv1.weight'] < scale['layer3.0.conv1.weight'] < 1
    assert {d for n, d in decay.items() if '.bn' in n or n.endswith('bias')} == {0}
    assert decay['layer1.0.conv1.weight'] == 0.01


def creatable(name):
    try:
        timm.optim.create_optimizer_v2(nn.Linear(2, 2), opt=name, lr=0.01)
    except Exception as e:
        return str(e).splitlines()[0] or type(e).__name__
    return None


# One name of each class; the other names are the same classes with other defaults.
OPTIMIZERS = {str(timm.optim.get_optimizer_info(name).opt_class): name for name in timm.optim.list_optimizers()}


@pytest.mark.parametrize('name', OPTIMIZERS.values())
def test_optimizers(name, monkeypatch):
    reason = creatable(name)
    if reason:
        pytest.skip(f'timm cannot create it here: {reason}')
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)  # Kron's would take minutes
    args, task = build('--opt', name, '--lr', '0.001', channels=[8, 8, 8, 8], stem_width=8)
    before = copy.deepcopy(weights(task))
    train(args, task, batches(2, size=2))
    after = weights(task)
    assert all(v.isfinite().all() for v in after.values())
    changed = {n for n, _ in task.trainable_module.named_parameters() if not torch.equal(after[n], before[n])}
    assert {'alpha', 'conv1.0.weight', 'fc.bias'} <= changed


@pytest.mark.parametrize('on_updates', [False, True], ids=['epochs', 'updates'])
@pytest.mark.parametrize('name', [
    'cosine', 'tanh', 'step', 'constant', 'multistep', 'plateau', 'poly', 'wsd', 'rsqrt', 'none'])
def test_schedules(name, on_updates):
    """Each runs through three epochs of two updates, every parameter at its share of the rate."""
    flags = '--epochs 3 --warmup-epochs 1 --decay-epochs 1 --decay-milestones 2 --layer-decay 0.5 --sched'.split()
    args, task = build(*flags, name, *['--sched-on-updates'] * on_updates)
    if on_updates and name == 'plateau':
        pytest.skip('timm has it only by epochs')
    optimizer = build_optimizer(args, task.trainable_module)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
    assert epochs == 3 and (scheduler is None) == (name == 'none')
    rates = []
    for epoch in range(epochs):
        for update in range(2):
            rates.append([g['lr'] for g in optimizer.param_groups])
            if scheduler is not None:
                scheduler.step_update(2 * epoch + update + 1)
        if scheduler is not None:
            scheduler.step(epoch + 1, 50.)
    scales = torch.tensor([g.get('lr_scale', 1.) for g in optimizer.param_groups])
    assert len(set(scales.tolist())) > 1
    top = [max(r) for r in rates]
    assert all(math.isfinite(r) and 0 <= r <= 0.01 + 1e-9 for r in top) and max(top) > 0.0005
    if scheduler is not None:
        torch.testing.assert_close(torch.tensor(rates), torch.tensor(top)[:, None] * scales)


@pytest.mark.parametrize('flags, expected', [
    ((), ('matched', 'bilinear')),  # timm draws it for each image: then that of evaluation
    (('--train-interpolation', 'bicubic'), ('matched', 'bicubic')),
    (('--interpolation', 'bicubic'), ('matched', 'bicubic')),
    (('--train-interpolation', 'bicubic', '--no-aug'), ('matched', 'bilinear')),
    (('--interpolation', 'lanczos'), ('matched', 'bicubic')),  # the nearest of the two
    (('--resample', 'antialiased'), ('antialiased', 'bilinear')),
])
def test_pyramid_is_matched_to_how_images_are_resized(flags, expected):
    pyramid = build(*flags)[1].pyramid
    assert (pyramid.resample, pyramid.interpolation) == expected


class NoFloat64(TorchFunctionMode):
    """Refuses float64 on the device, as MPS does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError('Cannot convert a MPS Tensor to float64 dtype')
        return result


def test_a_device_without_float64(monkeypatch):
    assert loop._sum_dtype(torch.device('mps')) == torch.float32 and loop._sum_dtype(CPU) == torch.float64
    expected = train(*build(), batches())
    monkeypatch.setattr(loop, '_sum_dtype', lambda device: torch.float32)
    args, task = build()
    with NoFloat64():
        assert train(args, task, batches()) == pytest.approx(expected, rel=1e-6)
        sums = loop._own_sums([1., 2., 3., 4.], args, CPU)
    assert sums.dtype == torch.float32 and loop._all_sums(sums, args) == [1, 2, 3, 4]
