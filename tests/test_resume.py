"""A run that is killed anywhere and resumed ends with the very bytes of the run that was not"""
import csv
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.utils import setup_default_logging

import train_rs
from timm_rs.train.saver import find_latest

CONTEXT = multiprocessing.get_context('fork')  # the children need not import torch anew
EPOCHS = 3
FLAGS = (
    '--model rs_test_resnet --resolutions 32 16 --num-classes 2 --batch-size 4 --workers 2 --device cpu --lr 0.05 '
    '--warmup-epochs 0 --sched-on-updates --recovery-interval 1 --checkpoint-hist 2 --log-interval 1000 '
    '--mixup 0.2 --reprob 0.5 --drop-path 0.2 --drop 0.1 --model-ema --model-ema-decay 0.9 --aa rand-m5'
).split()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    generator = random.Random(0)
    for split, count in (('train', 10), ('validation', 3)):
        for name in ('cat', 'dog'):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.frombytes('RGB', (40, 36), generator.randbytes(40 * 36 * 3)).save(folder / f'{i}.png')
    return root


def _child(argv, kill_at_replace):
    os.setsid()
    setup_default_logging()
    torch.set_num_threads(1)
    if kill_at_replace is not None:
        _kill_at_replace(kill_at_replace)
    train_rs.main(argv)


def _kill_at_replace(n):
    """Die before the n-th file is put in its place, or behind it for the halves."""
    replace, calls = os.replace, 0

    def replace_or_die(src, dst, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(n) and n == int(n):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(src, dst, **kwargs)
        if calls == int(n):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def run(images, output, seconds=None, kill_at_replace=None, sigterm_at=None, flags=()):
    """Train in a process of its own and return its exit code; end it after some seconds, or once a file is there."""
    argv = [str(images), *FLAGS, '--epochs', str(EPOCHS), '--output', str(output), '--experiment', 'run', *flags]
    process = CONTEXT.Process(target=_child, args=([*argv, '--resume', 'auto'], kill_at_replace))
    process.start()
    while sigterm_at is not None and not sigterm_at.exists() and process.is_alive():
        time.sleep(0.01)
    if sigterm_at is not None:
        os.kill(process.pid, signal.SIGTERM)
    process.join(seconds if seconds is not None else 120)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def outcome(output):
    """Return the weights, their average, the best ones, and the summary."""
    folder = Path(output) / 'run'
    last = torch.load(folder / 'last.pth.tar', weights_only=False)
    best = torch.load(folder / 'model_best.pth.tar', weights_only=False)
    summary = list(csv.reader((folder / 'summary.csv').open()))
    names = sorted(p.name for p in folder.glob('checkpoint-*'))
    return dict(weights=last['state_dict'], ema=last['state_dict_ema'], best=best['state_dict'],
                momentum=last['optimizer']['state'], summary=summary, names=names)


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope='module')
def uninterrupted(images, tmp_path_factory):
    output = tmp_path_factory.mktemp('uninterrupted')
    start = time.perf_counter()
    assert run(images, output) == 0
    return outcome(output), time.perf_counter() - start


def check(output, uninterrupted):
    found, expected = outcome(output), uninterrupted[0]
    assert found.pop('summary') == expected['summary']
    assert found.pop('names') == expected['names']
    for name, value in found.items():
        assert_equal(value, expected[name])


def test_summary_and_repeatability(images, tmp_path, uninterrupted):
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)
    header, *rows = uninterrupted[0]['summary']
    assert [row[0] for row in rows] == ['0', '1', '2']
    assert {'eval_top1_32', 'eval_top5_16', 'eval_top1_ens', 'eval_top1_mean', 'train_alpha_16', 'lr'} <= set(header)


@pytest.mark.parametrize('seed', range(4))
def test_kill_at_random_moments(images, tmp_path, uninterrupted, seed):
    generator = random.Random(seed)
    for _ in range(5):
        run(images, tmp_path, seconds=generator.uniform(0.3, uninterrupted[1]))
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)


@pytest.mark.parametrize('n', [1, 1.5, 2, 5, 5.5, 7, 7.5, 8, 8.5, 9, 9.5])
def test_kill_within_a_save(images, tmp_path, uninterrupted, n):
    assert run(images, tmp_path, kill_at_replace=n) == -signal.SIGKILL
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)


def test_sigterm_saves_and_tells(images, tmp_path, uninterrupted, capfd):
    flags = ('--recovery-interval', '0')
    code = run(images, tmp_path, sigterm_at=tmp_path / 'run' / 'checkpoint-0.pth.tar', flags=flags)
    assert code == 128 + signal.SIGTERM
    assert '--resume auto' in capfd.readouterr().err
    assert find_latest(str(tmp_path / 'run'))
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)
