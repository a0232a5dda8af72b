"""Two gloo processes come to what one comes to, and none of them waits for a dead one"""
import argparse
import copy
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import assert_equal, rs_model
from hub_server import TOKEN, HubServer
from PIL import Image
from processes import Job, free_port, models, outcome, train, train_and_signal
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch.nn.modules.batchnorm import _BatchNorm

import train_rs
import validate_rs
from timm_rs import EnsembleDistillationLoss
from timm_rs.private_bn import PrivateBN
from timm_rs.train import MultiResolutionTask
from timm_rs.train.loop import choose_statistics

ROOT = Path(__file__).parent.parent
RESOLUTIONS = (48, 32, 16)
MODES = ('none', 'ens', 'ens_topdown')
NUM_VALIDATION = 7
TINY = (
    '--model rs_test_resnet --resolutions 32 16 --num-classes 2 --batch-size 2 --workers 1 --device cpu --lr 0.01 '
    '--warmup-epochs 0 --epochs 2 --log-interval 1000 --checkpoint-hist 1'
).split()
RANDOM = (
    '--sched-on-updates --recovery-interval 1 --grad-accum-steps 2 --mixup 0.2 --reprob 0.5 --drop-path 0.2 --drop 0.1 '
    '--model-ema --model-ema-decay 0.5 --aa rand-m5 --small-steps 0.3'
).split()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    generator = random.Random(0)
    for split, count in (('train', 13), ('validation', NUM_VALIDATION)):
        for i in range(count):
            folder = root / split / ('cat', 'dog')[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.frombytes('RGB', (40, 36), generator.randbytes(40 * 36 * 3)).save(folder / f'{i}.png')
    return root


def start(images, output, *flags):
    """Start a run of two processes, whose models are saved beside its output."""
    return Job(train, arguments(images, output, *flags), str(output))


def arguments(images, output, *flags):
    return [str(images), *TINY, '--output', str(output), '--experiment', 'run', '--resume', 'auto', *flags]


@pytest.fixture(scope='module')
def uninterrupted(images, tmp_path_factory):
    output = tmp_path_factory.mktemp('uninterrupted')
    begin = time.monotonic()
    assert start(images, output, *RANDOM).finish() == [0, 0]
    return output, time.monotonic() - begin


def build(mode, memory):
    """Return a task in training mode except for its BN, whose statistics are frozen."""
    torch.manual_seed(0)
    task = MultiResolutionTask(rs_model(resolutions=RESOLUTIONS), EnsembleDistillationLoss(mode), verbose=False)
    task.train()
    for module in task.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    task.trainable_module.set_resolution_checkpointing(memory == 'lean')
    return task


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 48, 48, generator=generator), torch.tensor([0, 3, 1, 2])


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def half_of_a_step(folder):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    x, target = (t.chunk(2)[rank] for t in batch())
    for mode in MODES:
        for memory in ('default', 'lean'):
            task = build(mode, memory)
            model = task.trainable_module
            task.prepare_distributed()
            for _ in range(2):  # the second would wait forever if the first left out a parameter
                model.zero_grad()
                task(x, target)['loss'].backward()
            torch.save(gradients(model), f'{folder}/{mode}-{memory}-{rank}.pth')
        model.zero_grad()
        with task.no_sync():
            task(x[:1], target[:1])['loss'].div(2).backward()
        task(x[1:], target[1:])['loss'].div(2).backward()
        torch.save(gradients(model), f'{folder}/{mode}-accumulated-{rank}.pth')
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    assert Job(half_of_a_step, str(tmp_path)).finish() == [0, 0]
    for mode in MODES:
        task = build(mode, 'default')
        task(*batch())['loss'].backward()
        expected = gradients(task.trainable_module)
        assert ('alpha' in expected) == (mode != 'none')
        files = list(tmp_path.glob(f'{mode}-*.pth'))
        assert len(files) == 6
        for path in files:
            torch.testing.assert_close(torch.load(path), expected, rtol=1e-5, atol=1e-5)


class Similar:
    """Stands in for a task: its processes find other similarities, on their own images."""

    def measure_statistics(self, images):
        return [0.7 + 0.2 * dist.get_rank(), 0.6 + 0.2 * dist.get_rank()]


def choose(folder):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    args = argparse.Namespace(distributed=True, world_size=2, rank=rank, local_rank=rank, resolutions=[32, 16])
    Path(folder, str(rank)).write_text(choose_statistics(Similar(), torch.zeros(1), args))
    dist.destroy_process_group()


def test_two_processes_choose_the_same_statistics(tmp_path):
    assert Job(choose, str(tmp_path)).finish() == [0, 0]
    # The mean is 0.75, though the second process by itself has 0.85.
    assert [(tmp_path / rank).read_text() for rank in '01'] == ['running', 'running']


def differ_in_statistics(rank):
    model = rs_model(resolutions=RESOLUTIONS)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += rank
    return model


def share_statistics(folder):
    dist.init_process_group('gloo')
    for reduce in (False, True):
        torch.manual_seed(0)
        model = differ_in_statistics(dist.get_rank())
        distribute_bn(model, 2, reduce)
        torch.save(dict(model.named_buffers()), f'{folder}/{dist.get_rank()}-{reduce}.pth')
    dist.destroy_process_group()


def test_every_private_bn_is_reduced_or_broadcast(tmp_path):
    torch.manual_seed(0)
    first = dict(differ_in_statistics(0).named_buffers())
    assert sum('running' in name for name in first) == 2 * len(RESOLUTIONS) * sum(
        isinstance(m, PrivateBN) for m in rs_model().modules())
    assert Job(share_statistics, str(tmp_path)).finish() == [0, 0]
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f'{rank}-False.pth'), first)
        mean = {n: b + 0.5 if b.is_floating_point() else b for n, b in first.items()}
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}-True.pth'), mean)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])  # with BatchNorm2d and BatchNormAct2d
def test_sync_bn_converts_every_private_bn(name):
    model = rs_model(name, resolutions=RESOLUTIONS)
    before = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    state = copy.deepcopy(model.state_dict())
    acts = {n: type(m.act) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and hasattr(m, 'act')}
    model = convert_sync_batchnorm(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert list(layers) == before and all(n.endswith(tuple(f'.{r}' for r in RESOLUTIONS)) for n in layers)
    assert {n: type(m.act) for n, m in layers.items() if hasattr(m, 'act')} == acts
    assert_equal(dict(model.state_dict()), dict(state))
    other = rs_model(name, resolutions=RESOLUTIONS)
    other.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert_equal(model(x), other(x))  # in eval mode on the CPU too


def test_sync_bn_on_a_cpu_is_refused_in_one_line(images, tmp_path, capfd):
    assert start(images, tmp_path, '--sync-bn').finish() == [1, 1]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith('train_rs.py')]
    assert errors == ['train_rs.py: error: --sync-bn needs GPUs: synchronized BatchNorm does not run on a CPU.']


def test_evaluation_counts_every_image_once(images, uninterrupted, tmp_path):
    """With seven images over two processes one is padding; the loss of uneven batches is that of all images."""
    results = tmp_path / 'results.json'
    output, _ = uninterrupted
    validate_rs.main([
        str(images), '--checkpoint', str(output / 'run' / 'last.pth.tar'), '--use-ema', '--workers', '0', '--device',
        'cpu', '--batch-size', '5', '--results-file', str(results)])
    row = outcome(output)[1][-1]
    for expected in json.loads(results.read_text()):
        where = expected['resolution']
        correct = float(row[f'eval_top1_{where}']) * NUM_VALIDATION / 100
        assert correct == pytest.approx(round(correct), abs=1e-9)
        assert float(row[f'eval_top1_{where}']) == expected['top1']
        assert float(row[f'eval_loss_{where}']) == pytest.approx(expected['loss'], rel=1e-5)


def test_unreadable_images_of_all_processes_are_left_out(images, tmp_path):
    """Each process cannot read some; the means are those of one process, over the readable images."""
    shutil.copytree(images, tmp_path / 'images')
    cut = sorted((tmp_path / 'images' / 'validation').glob('*/*'))[1:6:2]
    for path in cut:
        path.write_bytes(path.read_bytes()[:40])
    assert start(tmp_path / 'images', tmp_path, '--epochs', '1').finish() == [0, 0]
    results = tmp_path / 'results.json'
    validate_rs.main([
        str(tmp_path / 'images'), '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '--use-ema', '--workers', '0',
        '--device', 'cpu', '--results-file', str(results)])
    row = outcome(tmp_path)[1][-1]
    for expected in json.loads(results.read_text()):
        assert (expected['images'], expected['unreadable']) == (NUM_VALIDATION - 3, 3)
        assert float(row[f"eval_top1_{expected['resolution']}"]) == expected['top1']
        assert float(row[f"eval_loss_{expected['resolution']}"]) == pytest.approx(expected['loss'], rel=1e-5)


def test_a_new_classifier_is_the_same_everywhere(images, tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    output = tmp_path / 'output'
    flags = ['--pretrained-path', str(tmp_path / 'weights.pth'), '--epochs', '1', '--lr', '0', '--opt', 'sgd']
    assert start(images, output, *flags).finish() == [0, 0]
    (first, _), (second, _) = models(output)
    assert first['fc.weight'].any() and torch.equal(first['fc.weight'], second['fc.weight'])


def test_processes_are_equal_and_only_the_first_writes(uninterrupted):
    """The second would have ended with status 97."""
    output, _ = uninterrupted
    first, second = models(output)
    assert_equal(first, second)
    assert_equal(dict(outcome(output)[0]['state_dict']), dict(first[0]))
    assert_equal(dict(outcome(output)[0]['state_dict_ema']), dict(first[1]))
    assert sorted(p.name for p in output.iterdir()) == ['run']


def test_one_process_pushes(images, tmp_path, monkeypatch):
    hub = HubServer()
    for name, value in dict(
        HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path / 'home'),
    ).items():
        monkeypatch.setenv(name, value)
    try:
        job = start(images, tmp_path, '--epochs', '1', '--push-to-hub', 'user/net')
        assert job.finish(180) == [0, 0]
        pushed = hub.files('user/net', 'main')
        messages = hub.repos['user/net'].messages
    finally:
        hub.close()
    assert messages.count('Add model') == 1 and len(messages) <= 3  # the initial commit, the model, its card
    (tmp_path / 'model').mkdir()
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / 'model' / name).write_bytes(pushed[name])
    restored = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).state_dict()
    assert_equal(dict(restored), dict(models(tmp_path)[0][0]))


@pytest.mark.parametrize('flags', [
    ('--dist-bn', 'broadcast'), ('--dist-bn', ''), ('--no-ddp-bb', '--dist-bn', 'reduce'),
], ids=' '.join)
def test_statistics_after_an_epoch(images, tmp_path, flags):
    output = tmp_path / 'o'
    assert start(images, output, *RANDOM, *flags, '--epochs', '1').finish() == [0, 0]
    first, second = models(output)
    assert_equal(first, second)
    assert_equal(dict(outcome(output)[0]['state_dict']), dict(first[0]))


def check(output, uninterrupted):
    found, expected = outcome(output), outcome(uninterrupted[0])
    assert found[1] == expected[1]
    assert_equal(found[0], expected[0])
    assert_equal(models(output), models(uninterrupted[0]))


def test_resume_after_the_job_was_killed(images, tmp_path, uninterrupted):
    generator, output = random.Random(0), tmp_path / 'o'
    for _ in range(2):
        job = start(images, output, *RANDOM)
        job.wait(generator.uniform(0.3, 0.9) * uninterrupted[1])
        job.kill()
        assert set(job.finish()) <= {0, -signal.SIGKILL}
    assert start(images, output, *RANDOM).finish() == [0, 0]
    check(output, uninterrupted)


def test_resume_at_the_last_batch_of_an_epoch(images, tmp_path, uninterrupted):
    """Killed while validating: the statistics in the recovery checkpoint are those of both processes already."""
    output = tmp_path / 'o'
    assert Job(die_in_validation, arguments(images, output, *RANDOM)).finish() == [-signal.SIGKILL] * 2
    assert [p.name for p in (output / 'run').glob('last*')] == []
    assert start(images, output, *RANDOM).finish() == [0, 0]
    check(output, uninterrupted)


def die_in_validation(argv):
    train_rs.validate = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    train_rs.main(argv)


@pytest.mark.parametrize('step', [1, 2])  # within an epoch, and while the evaluation of both processes is under way
def test_sigterm_to_one_process_ends_all_at_the_same_batch(images, tmp_path, uninterrupted, capfd, step):
    output = tmp_path / 'o'
    argv = arguments(images, output, *RANDOM, '--recovery-interval', '0')
    assert Job(train_and_signal, argv, 1, step, signal.SIGTERM).finish() == [128 + signal.SIGTERM] * 2
    assert capfd.readouterr().err.count('--resume auto') == 1
    assert start(images, output, *RANDOM).finish() == [0, 0]
    check(output, uninterrupted)


def test_resume_with_another_number_of_processes(images, tmp_path, capfd):
    """About as many images of the epoch are left, and the run comes to its end."""
    output = tmp_path / 'o'
    argv = arguments(images, output, '--recovery-interval', '2', '--epochs', '1')
    assert Job(die_in_validation, argv).finish() == [-signal.SIGKILL] * 2  # behind batch 2 of 3
    capfd.readouterr()
    assert Job(train_rs.main, argv, world_size=1).finish() == [0]
    assert 'epoch 0 continues at batch 4 instead of 2' in capfd.readouterr().err
    summary = list(csv.DictReader((output / 'run' / 'summary.csv').open()))
    assert len(summary) == 1 and 0 < float(summary[0]['train_loss']) < 100


@pytest.mark.parametrize('rank', [0, 1])
def test_a_dead_process_ends_the_others(images, tmp_path, rank):
    """Also without torchrun, which would end them itself."""
    codes = Job(train_and_signal, arguments(images, tmp_path / 'o'), rank, 1, signal.SIGKILL).finish(60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, -signal.SIGKILL)


def test_a_fault_of_one_process_ends_the_others(images, tmp_path, capfd):
    codes = Job(train_on_nothing, arguments(images, tmp_path / 'o')).finish(60)
    assert codes[1] == 1 and codes[0] != 0
    assert re.search(r'error: The loss is not finite at batch \d', capfd.readouterr().err)


def train_on_nothing(argv):
    """Train, the second process with weights that are not numbers in its copy."""
    fit = train_rs.fit

    def break_and_fit(run, *args):
        if run.saver is None:
            nn.init.constant_(run.model.fc.bias, float('nan'))
        fit(run, *args)

    train_rs.fit = break_and_fit
    train_rs.main(argv)


def test_batches_for_every_process(images, tmp_path, capfd):
    assert start(images, tmp_path / 'o', '--batch-size', '8').finish() == [1, 1]
    assert '--batch-size 8 of 2 processes: expected at most the 13 training images' in capfd.readouterr().err


def test_batches_of_repeated_images(tmp_path, capfd):
    """A process takes fewer of them than its share of the images: their number is rounded."""
    argv = ['--dataset', 'digits', *TINY, '--num-classes', '10', '--output', str(tmp_path / 'o'), '--aug-repeats', '3']
    assert Job(train_rs.main, [*argv, '--batch-size', '641']).finish() == [1, 1]
    errors = [line for line in capfd.readouterr().err.splitlines() if 'error: ' in line]
    assert errors == [
        'train_rs.py: error: --batch-size 641 of 2 processes: expected at most the 640 images that each takes per '
        'epoch with --aug-repeats 3.']


def test_two_machines(images, tmp_path):
    """The script, once for each of two machines that are both this one."""
    command = [
        str(ROOT / 'distributed_train.sh'), '1', str(images), *TINY, '--workers', '0', '--epochs', '1', '--output',
        str(tmp_path), '--experiment', 'run']
    environment = dict(
        os.environ, NNODES='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1', PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]))
    nodes = [
        subprocess.Popen(command, env=dict(environment, NODE_RANK=str(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(2)]
    logs = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], logs
    assert 'Output: ' in logs[0] and 'Test: Acc@1' in logs[0]
    assert 'Output: ' not in logs[1] and 'Test: Acc@1' not in logs[1]
    assert len(list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))) == 1
