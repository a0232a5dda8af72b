"""A run that is killed anywhere and resumed ends with the very bytes of the run that was not"""
import csv
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Job
from timm.utils import setup_default_logging

import train_rs
from timm_rs.records import read_summary
from timm_rs.train.options import parse_args
from timm_rs.train.resume import claim_output, find_whole, hold_folder
from timm_rs_runtime.errors import UserError

CONTEXT = multiprocessing.get_context('fork')  # the children need not import torch again
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
    for split, count in (('train', 6), ('validation', 3)):
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
    argv = [str(images), *FLAGS, '--epochs', str(EPOCHS), '--output', str(output), '--experiment', 'run']
    argv += ['--resume', 'auto', *flags]
    process = CONTEXT.Process(target=_child, args=(argv, kill_at_replace))
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


def test_kill_at_random_moments(images, tmp_path, uninterrupted):
    generator = random.Random(0)
    for _ in range(3):
        run(images, tmp_path, seconds=generator.uniform(0.3, uninterrupted[1]))
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)


# Before args.yaml, behind the first recovery checkpoint, behind summary.csv, before the numbered checkpoint.
@pytest.mark.parametrize('n', [1, 4.5, 9.5, 12])
def test_kill_within_a_save(images, tmp_path, uninterrupted, n):
    assert run(images, tmp_path, kill_at_replace=n) == -signal.SIGKILL
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)


def test_kill_between_the_first_row_and_the_first_checkpoint(images, tmp_path, uninterrupted):
    flags = ('--recovery-interval', '0')
    assert run(images, tmp_path, kill_at_replace=3.5, flags=flags) == -signal.SIGKILL
    assert len(read_summary(tmp_path / 'run' / 'summary.csv')) == 1 and find_whole(str(tmp_path / 'run')) == ([], [])
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)


def test_what_normalizes_is_chosen_once(images, tmp_path, capfd):
    flags = ('--bn-statistics', 'auto')
    assert run(images, tmp_path / 'whole', flags=flags) == 0
    assert capfd.readouterr().err.count('--bn-statistics') == 1
    assert run(images, tmp_path / 'parts', kill_at_replace=8, flags=flags) == -signal.SIGKILL
    assert capfd.readouterr().err.count('--bn-statistics') == 1
    assert run(images, tmp_path / 'parts', flags=flags) == 0
    assert '--bn-statistics' not in capfd.readouterr().err
    check(tmp_path / 'parts', (outcome(tmp_path / 'whole'),))
    choices = [torch.load(tmp_path / name / 'run' / 'last.pth.tar', weights_only=False)['args'].bn_statistics
               for name in ('whole', 'parts')]
    assert choices[0] == choices[1] != 'auto'


@pytest.fixture(scope='module')
def finished(images, uninterrupted, tmp_path_factory):
    """A finished run to copy from, whose files are as links and modes may differ."""
    output = tmp_path_factory.mktemp('finished')
    assert run(images, output) == 0
    return output / 'run'


def truncate(path):
    """Cut a file in place: those that are links to it are cut too."""
    os.truncate(path, path.stat().st_size * 2 // 3)


def copy_run(finished, tmp_path):
    """Copy a run, its links as links."""
    subprocess.run(['cp', '-a', str(finished), str(tmp_path / 'run')], check=True)
    return tmp_path / 'run'


@pytest.mark.parametrize('damaged, resumed', [
    (['last'], 'recovery-2-2'),
    (['last', 'recovery-2-2'], 'recovery-2-1'),
    (['last', 'recovery-2-2', 'recovery-2-1'], 'checkpoint-'),
])
def test_a_damaged_checkpoint_is_passed_over(images, tmp_path, finished, uninterrupted, capfd, damaged, resumed):
    folder = copy_run(finished, tmp_path)
    for name in damaged:
        truncate(folder / f'{name}.pth.tar')
    whole, passed = find_whole(str(folder))
    assert os.path.basename(whole[0]).startswith(resumed)
    assert {f'{folder}/{name}.pth.tar' for name in damaged} <= set(passed)
    capfd.readouterr()
    assert run(images, tmp_path) == 0
    printed = capfd.readouterr().err
    assert all(f'{folder}/{name}.pth.tar is damaged' in printed for name in damaged)
    check(tmp_path, uninterrupted)


def test_a_damaged_best_checkpoint_is_replaced(images, tmp_path, finished, uninterrupted):
    folder = copy_run(finished, tmp_path)
    assert os.path.samefile(folder / 'model_best.pth.tar', folder / 'checkpoint-0.pth.tar')
    for name in ('model_best', 'last'):
        truncate(folder / f'{name}.pth.tar')
    assert run(images, tmp_path) == 0
    assert find_whole(str(folder))[1] == [f'{folder}/checkpoint-0.pth.tar']
    assert os.path.samefile(folder / 'model_best.pth.tar', folder / 'checkpoint-1.pth.tar')
    assert_equal(outcome(tmp_path)['weights'], uninterrupted[0]['weights'])


@pytest.mark.parametrize('how', ['truncated', 'deleted'])
def test_a_run_without_a_whole_checkpoint_is_not_trained_over(images, tmp_path, finished, capfd, how):
    folder = copy_run(finished, tmp_path)
    for path in folder.glob('*.pth.tar'):
        truncate(path) if how == 'truncated' else path.unlink()
    before = contents(folder)
    capfd.readouterr()
    assert run(images, tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    what = 'none of its checkpoints is whole (' if how == 'truncated' else 'summary.csv has 3 epochs, but there is no'
    assert f'train_rs.py: error: {folder}: {what}' in line
    assert contents(folder) == before


@pytest.mark.parametrize('resume', ['auto', 'last.pth.tar'])
def test_another_metric_does_not_replace_the_best_checkpoint(images, tmp_path, finished, capfd, resume):
    folder = copy_run(finished, tmp_path)
    before = contents(folder)
    resume = str(folder / resume) if resume != 'auto' else resume
    assert run(images, tmp_path, flags=('--resume', resume, '--eval-metric', 'loss', '--epochs', '4')) == 1
    assert 'was trained with --eval-metric top1_mean, but now it is loss_mean' in capfd.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize('flags, message', [
    ('--in-chans 1', 'was trained with --in-chans 3, but now it is 1'),
    ('--gp max', 'was trained with --gp None, but now it is max'),
])
def test_another_network_does_not_resume(images, tmp_path, finished, capfd, flags, message):
    copy_run(finished, tmp_path)
    assert run(images, tmp_path, flags=('--resume', 'auto', *flags.split())) == 1
    assert message in capfd.readouterr().err


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != '.lock'}


def test_a_damaged_file_to_resume_is_named(images, tmp_path, finished, capfd):
    path = copy_run(finished, tmp_path) / 'last.pth.tar'
    truncate(path)
    with pytest.raises(SystemExit):
        train_rs.main([str(images), *FLAGS, '--output', str(tmp_path), '--experiment', 'b', '--resume', str(path)])
    assert f'train_rs.py: error: {path} is damaged' in capfd.readouterr().err.splitlines()[-1]


def test_a_folder_to_resume_gives_its_furthest_whole_checkpoint(tmp_path, finished):
    folder = copy_run(finished, tmp_path)
    truncate(folder / 'last.pth.tar')
    args = parse_args(['--output', str(tmp_path), '--experiment', 'b', '--resume', str(folder)])
    args.distributed, args.rank = False, 0
    with ExitStack() as held:
        assert claim_output(args, held).resume == find_whole(str(folder))[0][0]
    args.resume = str(tmp_path)
    with ExitStack() as held, pytest.raises(UserError, match='the folder holds no whole checkpoint'):
        claim_output(args, held)


def test_a_path_is_not_the_name_of_a_model(tmp_path):
    args = parse_args(['--output', str(tmp_path), '--model', 'user/name'])
    args.distributed, args.rank = False, 0
    with ExitStack() as held, pytest.raises(UserError, match='--model user/name: .*hf-hub:user/name'):
        claim_output(args, held)


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    """Where the content of the file has changed, it is known; elsewhere, such as in dates, it does not matter."""
    path, generator = tmp_path / 'last.pth.tar', random.Random(0)
    weights = {f'layer{i}.weight': torch.full((70,), float(i)) for i in range(4)}
    state = dict(state_dict=weights, task_state=dict(epoch=3))
    torch.save(state, path)
    whole, size = path.read_bytes(), path.stat().st_size
    noticed = 0
    for position in generator.sample(range(size), 300):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        found, damaged = find_whole(str(tmp_path))
        assert found + damaged == [str(path)]
        if found:
            assert_equal(torch.load(path), state)
        noticed += len(damaged)
    assert noticed > 100


def test_the_second_run_on_a_folder_says_who_holds_it(images, tmp_path, finished, capfd):
    folder = copy_run(finished, tmp_path)
    ready, go = CONTEXT.Event(), CONTEXT.Event()

    def hold():
        with hold_folder(str(folder)):
            ready.set()
            go.wait(100)

    holder = CONTEXT.Process(target=hold, daemon=True)
    holder.start()
    assert ready.wait(30)
    before = contents(folder)
    capfd.readouterr()
    assert run(images, tmp_path) == 1
    argv = [str(images), *FLAGS, '--epochs', '9', '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    assert Job(train_rs.main, argv).finish() == [1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if 'error' in line]
    assert len(lines) == 2 and len(set(lines)) == 1
    assert f'{folder} is in use by process {holder.pid} on {socket.gethostname()} since 20' in lines[0]
    assert contents(folder) == before
    holder.kill()
    holder.join()
    with hold_folder(str(folder)):  # a lock dies with its process
        pass


def test_a_run_that_cannot_start_leaves_no_folder(images, tmp_path, capfd):
    argv = [str(images), *FLAGS, '--output', str(tmp_path), '--experiment', 'run', '--initial-checkpoint', 'no.pth']
    with pytest.raises(SystemExit):
        train_rs.main(argv)
    assert 'no.pth' in capfd.readouterr().err and os.listdir(tmp_path) == []


def test_children_of_a_killed_run_do_not_keep_its_folder(tmp_path):
    pids = CONTEXT.Queue()

    def hold():
        with hold_folder(str(tmp_path)):
            child = CONTEXT.Process(target=time.sleep, args=(100,))
            child.start()
            pids.put(child.pid)
            child.join()

    holder = CONTEXT.Process(target=hold)
    holder.start()
    child = pids.get(timeout=30)
    with pytest.raises(UserError, match=f'in use by process {holder.pid}'), hold_folder(str(tmp_path)):
        pass
    holder.kill()
    holder.join()
    with hold_folder(str(tmp_path)):
        pass
    os.kill(child, signal.SIGKILL)


def test_sigterm_saves_and_says_so(images, tmp_path, uninterrupted, capfd):
    flags = ('--recovery-interval', '0')
    code = run(images, tmp_path, sigterm_at=tmp_path / 'run' / 'checkpoint-0.pth.tar', flags=flags)
    assert code == 128 + signal.SIGTERM
    assert '--resume auto' in capfd.readouterr().err
    assert find_whole(str(tmp_path / 'run'))[0]
    assert run(images, tmp_path) == 0
    check(tmp_path, uninterrupted)
