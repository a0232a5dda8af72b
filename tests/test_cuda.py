"""What only a GPU runs: synchronized BatchNorm, the prefetcher, float16 with its scaler, the quantizers, resuming"""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from command_lines import MODEL, images  # noqa: F401
from conftest import assert_equal, rs_model
from timm.layers import convert_sync_batchnorm

import train_rs
from timm_rs.quant import ActivationQuantizer, QuantConv2d
from timm_rs.train import MultiResolutionTask

DEVICE = 'cuda'
RESOLUTIONS = (48, 32)
FLAGS = (
    f'--model {MODEL} --resolutions 32 16 --batch-size 4 --workers 1 --device {DEVICE} --lr 0.05 --warmup-epochs 0 '
    '--experiment run'
).split()

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


def train(images, output, *flags):
    """Train and return the last checkpoint."""
    train_rs.main([str(images), *FLAGS, '--output', str(output), *flags])
    return torch.load(output / 'run' / 'last.pth.tar', map_location='cpu', weights_only=False)


@pytest.fixture
def steps(monkeypatch):
    """The images of each step of a training, and the dtype of its autocast if there is one."""
    seen, forward = [], MultiResolutionTask.forward

    def record(self, input, target):
        autocast = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
        seen.append((input.clone(), autocast))
        return forward(self, input, target)

    monkeypatch.setattr(MultiResolutionTask, 'forward', record)
    return seen


def step(part, convert):
    """Return the network after a forward and backward pass of a part of a batch."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = convert(rs_model(resolutions=RESOLUTIONS).to(DEVICE).train())
    pyramid = [torch.randn(8, 3, r, r)[part].to(DEVICE) for r in RESOLUTIONS]
    sum(z.square().sum() for z in model(pyramid)).backward()
    return model


def half_of_a_step(rank, folder):
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    model = step(slice(4 * rank, 4 * rank + 4), convert_sync_batchnorm)
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules()) > len(RESOLUTIONS)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    torch.save((model.state_dict(), gradients), f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def test_synchronized_batch_norm(tmp_path):
    """Two processes come to the statistics and gradients of the whole batch, at every size."""
    multiprocessing.spawn(half_of_a_step, (str(tmp_path),), nprocs=2)
    whole = step(slice(None), lambda model: model)
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    for rank in range(2):
        state, gradients = torch.load(tmp_path / f'{rank}.pth')
        torch.testing.assert_close(state, dict(whole.state_dict()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-3)


def test_prefetcher_with_erasing(images, tmp_path, steps):
    """It normalizes on the device, where no pixel is 0 unless it is erased."""
    train(images, tmp_path / 'a', '--epochs', '1')
    plain = len(steps)
    assert plain == 2 and all(x.device.type == DEVICE and not (x == 0).any() for x, _ in steps)
    for folder in 'bc':
        train(images, tmp_path / folder, '--epochs', '1', '--reprob', '1', '--remode', 'const')
    first, second = steps[plain:2 * plain], steps[2 * plain:]
    assert all((x == 0).all(1).flatten(1).any(1).all() for x, _ in first)
    for (x, _), (again, _) in zip(first, second):
        assert_equal(x, again)


def test_float16_with_its_scaler(images, tmp_path, steps, monkeypatch):
    init = torch.amp.GradScaler.__init__

    def begin_at(scale):
        monkeypatch.setattr(
            torch.amp.GradScaler, '__init__', lambda self, **kwargs: init(self, init_scale=scale, **kwargs))

    expected = train(images, tmp_path / 'float32', '--epochs', '1')
    begin_at(2. ** 6)
    found = train(images, tmp_path / 'float16', '--epochs', '1', '--amp')
    assert {dtype for _, dtype in steps} == {False, torch.float16}
    assert found['amp_scaler']['scale'] == 2 ** 6 and 'amp_scaler' not in expected
    for key, value in expected['state_dict'].items():
        torch.testing.assert_close(found['state_dict'][key], value, rtol=0.05, atol=0.02)
    begin_at(2. ** 60)  # all gradients overflow: no step is taken, and the scale is halved each time
    skipped = train(images, tmp_path / 'overflow', '--epochs', '2', '--amp')
    first = torch.load(
        tmp_path / 'overflow' / 'run' / 'checkpoint-0.pth.tar', map_location='cpu', weights_only=False)
    assert skipped['amp_scaler']['scale'] == 2. ** (60 - 4)
    assert_equal(skipped['state_dict']['fc.weight'], first['state_dict']['fc.weight'])


@pytest.mark.parametrize('bits', [1, 2, 7])
def test_quantizers(bits):
    """They learn on a GPU what they learn on a CPU, with few and with many levels."""
    torch.manual_seed(0)
    x = torch.rand(4, 8, 9, 9)
    conv, activation = QuantConv2d(8, 6, 3, bits=bits), ActivationQuantizer(bits)
    results = {}
    for device in ('cpu', DEVICE):
        layers = torch.nn.Sequential(activation, conv).to(device).train()
        for buffer in layers.buffers():
            buffer.data = buffer.data.clone()
        image = x.to(device).requires_grad_()
        layers(image).square().sum().backward()
        trained = {k: v.detach().cpu().clone() for k, v in layers.state_dict().items()}
        results[device] = trained, image.grad.cpu(), layers.eval()(x.to(device)).detach().cpu()
        layers.zero_grad()
        activation, conv = ActivationQuantizer(bits), conv.cpu()
        conv.setup(bits)
    torch.testing.assert_close(results[DEVICE], results['cpu'], rtol=1e-3, atol=1e-4)
    assert results[DEVICE][0]['0.basis_updates'] == 1 == results[DEVICE][0]['1.basis_updates']


def test_resumed_run_ends_as_the_whole_one(images, tmp_path):
    flags = '--epochs 3 --amp --model-ema --model-ema-decay 0.9 --mixup 0.2 --reprob 0.5 --drop-path 0.2'.split()
    expected = train(images, tmp_path / 'whole', *flags)
    train(images, tmp_path / 'parts', *flags, '--stop-epoch', '1')
    found = train(images, tmp_path / 'parts', *flags, '--resume', 'auto')
    assert found['epoch'] == expected['epoch'] == 2 and found['amp_scaler'] == expected['amp_scaler']
    for part in ('state_dict', 'state_dict_ema', 'optimizer'):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-5)
