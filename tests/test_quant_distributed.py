"""Two gloo processes learn the bases that one learns from the whole batch"""
import pytest
import torch
import torch.distributed as dist
from conftest import assert_equal, rs_model
from processes import Job
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs.quant import ActivationQuantizer, QuantConv2d, quantize
from timm_rs.train import MultiResolutionTask

RESOLUTIONS = (48, 32)
STEPS = 2


def build(memory):
    """Return a task in training mode except for its BN, whose statistics are frozen."""
    torch.manual_seed(0)
    task = MultiResolutionTask(quantize(rs_model(resolutions=RESOLUTIONS), activation_bits=2), verbose=False).train()
    for module in task.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    task.trainable_module.set_resolution_checkpointing(memory == 'lean')
    return task


def train(task, shares, rank):
    """Run some steps on a share of the batch and return what was learned."""
    model = task.trainable_module
    model = getattr(model, 'module', model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, target = torch.randn(4, 3, 48, 48, generator=generator), torch.tensor([0, 3, 1, 2])
        optimizer.zero_grad()
        task(x.chunk(shares)[rank], target.chunk(shares)[rank])['loss'].backward()
        optimizer.step()
    return {n: t for n, t in model.state_dict().items() if n.endswith(('.basis', '.basis_updates'))}


def process(folder):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    for memory in ('default', 'lean'):
        task = build(memory).prepare_distributed(broadcast_buffers=False)
        torch.save(train(task, 2, rank), f'{folder}/{memory}-{rank}.pth')
    dist.destroy_process_group()


def alone(folder):
    for memory in ('default', 'lean'):
        torch.save(train(build(memory), 1, 0), f'{folder}/{memory}.pth')


@pytest.fixture(scope='module')
def learned(tmp_path_factory):
    """Learned in processes of their own: one that has run a backward pass may not fork one that runs another."""
    folder = tmp_path_factory.mktemp('learned')
    assert Job(process, str(folder)).finish() == [0, 0] and Job(alone, str(folder), world_size=1).finish() == [0]
    return folder


@pytest.mark.parametrize('memory', ['default', 'lean'])
def test_bases_of_two_processes_are_those_of_one(learned, memory):
    assert {type(m) for m in build(memory).modules()} >= {QuantConv2d, ActivationQuantizer}
    expected = torch.load(learned / f'{memory}.pth')
    found = [torch.load(learned / f'{memory}-{rank}.pth') for rank in range(2)]
    assert_equal(*found)
    assert {v.item() for k, v in expected.items() if k.endswith('updates')} == {STEPS * len(RESOLUTIONS)}
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
