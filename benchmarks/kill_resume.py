#!/usr/bin/env python3
"""Exact resume: kill -9 a training run at random moments, resume it, and compare with the run that was left alone

train_rs.py trains rs_test_resnet on handwritten digits for three epochs on the CPU, with mixup, random erasing, drop
path, a moving average, two loader processes and a recovery checkpoint every second update. Each trial kills it and its
loader processes at a random moment between its first file and its end, starts it again with --resume auto,
and compares weights, moving average, optimizer state, best weights and summary.csv, bit for bit. Further trials do so
with more flags, and with two processes under DistributedDataParallel.

    python benchmarks/kill_resume.py

Writes results/kill_resume.json: a row per trial with the moment, what lay in the folder by then, and what was equal.
"""
import csv
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import create_parser, print_table, write_results

TRAIN = Path(__file__).parents[1] / 'train_rs.py'
FLAGS = shlex.split(
    '--dataset digits --model rs_test_resnet --resolutions 32 16 --num-classes 10 --batch-size 64 --workers 2 '
    '--device cpu --lr 0.05 --warmup-epochs 0 --epochs 3 --recovery-interval 2 --checkpoint-hist 2 --mixup 0.2 '
    '--reprob 0.5 --drop-path 0.2 --model-ema --model-ema-decay 0.9 --experiment run --resume auto')
VARIANTS = {  # name: further flags, processes
    'plain': ('', 1),
    'bfloat16': ('--amp --amp-dtype bfloat16', 1),
    'small steps': ('--small-steps 0.5', 1),
    'lean': ('--memory lean', 1),
    'all three': ('--amp --amp-dtype bfloat16 --small-steps 0.5 --memory lean', 1),
    'distributed': ('--workers 1', 2),
}
PARTS = ('state_dict', 'state_dict_ema', 'optimizer')
COLUMNS = ('variant', 'trial', 'seconds', 'last_file', 'kills', 'equal')


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--trials', default=20, type=int, metavar='N', help='plain runs to kill (default: %(default)s)')
    parser.add_argument('--further', default=3, type=int, metavar='N',
                        help='runs of each other variant to kill (default: %(default)s)')
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS, metavar='NAME',
                        help=f'of {", ".join(VARIANTS)} (default: all)')
    parser.add_argument('--seed', default=0, type=int, metavar='N', help='of the moments (default: %(default)s)')
    args = parser.parse_args()
    generator = random.Random(args.seed)

    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name, (flags, processes) in ((v, VARIANTS[v]) for v in args.variants):
            folder = Path(root) / name.replace(' ', '-')
            expected, duration = train_to_the_end(folder / 'alone', flags, processes)
            for trial in range(args.trials if name == 'plain' else args.further):
                for attempt in range(10):  # a run may end before its moment
                    output, moment = folder / f'{trial}-{attempt}', generator.uniform(0, duration)
                    process = start(output, flags, processes)
                    wait_for_start(process, output)
                    try:
                        process.wait(moment)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        if process.wait() == -signal.SIGKILL:  # and did not end in that instant
                            break
                files = sorted((output / 'run').glob('*.*'), key=lambda p: p.stat().st_mtime) if output.exists() else []
                last = files[-1].name if files else ''
                found, _ = train_to_the_end(output, flags, processes)
                equal = {part: same(found[part], expected[part]) for part in expected}
                rows.append(dict(
                    variant=name, trial=trial, seconds=round(moment, 2), last_file=last,
                    kills=int(process.returncode == -signal.SIGKILL),
                    equal=' '.join(f"{part}:{'yes' if e else 'NO'}" for part, e in equal.items())))
                print(rows[-1], flush=True)
    good = sum('NO' not in row['equal'] for row in rows)
    rows.append(dict(
        variant='all', kills=sum(row['kills'] for row in rows), equal=f'{good} of {len(rows)}'))
    print_table(COLUMNS, rows)
    write_results(args, rows)
    return 0 if good == len(rows) - 1 else 1


def start(output, flags, processes):
    launcher = [str(TRAIN)]
    if processes > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', str(TRAIN)]
    return subprocess.Popen(
        [sys.executable, *launcher, *FLAGS, *flags.split(), '--output', str(output)], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='1'))


def wait_for_start(process, output):
    while process.poll() is None and not (output / 'run' / 'args.yaml').exists():
        time.sleep(0.02)


def train_to_the_end(output, flags, processes):
    """Return what a run left behind, and how many seconds passed from its first file to its end."""
    process = start(output, flags, processes)
    wait_for_start(process, output)
    began = time.perf_counter()
    process.wait()
    duration = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f'{shlex.join(process.args)} ended with {process.returncode}.')
    folder = output / 'run'
    last = torch.load(folder / 'last.pth.tar', weights_only=False)
    best = torch.load(folder / 'model_best.pth.tar', weights_only=False)
    found = {part: last[part] for part in PARTS}
    found.update(best=best['state_dict'], summary=list(csv.reader((folder / 'summary.csv').open())))
    return found, duration


def same(a, b):
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    except (AssertionError, TypeError, ValueError):
        return a == b if not isinstance(a, dict) else False
    return True


if __name__ == '__main__':
    sys.exit(main())
