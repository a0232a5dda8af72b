"""Runs of train_rs.py: planned, started side by side, and read again"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
import yaml
from _shared import ROOT

from timm_rs.evaluate import count_madds
from timm_rs.records import read_summary
from timm_rs.train.options import parse_args

__all__ = ['Run', 'count_classes', 'evaluation_flags', 'hold_out', 'madds', 'parse_known', 'train_all']

_FREE = ('resume', 'output', 'experiment', 'config', 'data', 'num_classes', 'in_chans', 'workers', 'device')


def evaluation_flags(recipe: argparse.Namespace) -> List[str]:
    """Return the flags of validate_rs.py for what train_rs.py evaluates of a network."""
    use_ema = recipe.model_ema and not recipe.model_ema_force_cpu
    return [*['--use-ema'] * use_ema, *(['--tta', str(recipe.tta)] if recipe.tta else [])]


@dataclass(frozen=True)
class Run:
    """A run of train_rs.py.

    Attributes:
        folder: Its output folder.
        flags: Its flags, without those of the output.
    """
    folder: Path
    flags: Sequence[str]

    @property
    def command(self) -> List[str]:
        return [
            'train_rs.py', *self.flags, '--output', str(self.folder.parent), '--experiment', self.folder.name,
            '--resume', 'auto']

    def check(self) -> None:
        """End the program in one line if train_rs.py refuses the flags, or if the folder holds a run of others."""
        now, path = vars(parse_args(self.flags)), self.folder / 'args.yaml'
        if not path.exists():
            return
        before = yaml.safe_load(path.read_text())
        for name, value in now.items():
            if name not in _FREE and before.get(name) != value:
                raise SystemExit(
                    f"{self.folder} was trained with --{name.replace('_', '-')} {before.get(name)}, not {value}: "
                    'choose another --work.')

    def result(self) -> Optional[Dict[str, Dict[str, float]]]:
        """Return the metrics after the last epoch, each by size, None if it has not finished."""
        rows = read_summary(str(self.folder / 'summary.csv'))
        if not rows or rows[-1]['epoch'] + 1 < parse_args(self.flags).epochs:
            return None
        found = {}
        for key, value in rows[-1].items():
            if key.startswith('eval_') and not key.endswith('_mean'):
                metric, _, size = key.removeprefix('eval_').rpartition('_')
                found.setdefault(metric, {})[size] = value
        return found


def parse_known(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]], work: str) -> argparse.Namespace:
    """Parse the flags of a program that keeps its runs in a folder; `flags` has those that are left for train_rs.py."""
    add = parser.add_argument
    add('--seeds', type=int, nargs='+', default=[0], metavar='N')
    add('--jobs', type=int, default=1, metavar='N', help='runs side by side, which share the threads or the GPU')
    add('--work', type=Path, default=Path(work), metavar='DIR', help=f'where runs are kept (default: {work})')
    add('--table-only', action='store_true', help='write the table of the runs that are done')
    args, args.flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f'--jobs is {args.jobs}, expected at least 1.')
    args.work = args.work.resolve()
    return args


def count_classes(parser: argparse.ArgumentParser, data_dir: str) -> int:
    """Return the number of folders of images in train/."""
    classes = {p.parent.name for p in Path(data_dir, 'train').glob('*/*')}
    if not classes:
        parser.error(f'{data_dir} does not hold train/ with a folder of images per class.')
    return len(classes)


def madds(recipe: argparse.Namespace, size: int, **kwargs: Any) -> int:
    """Return the multiply-adds of the network of these flags for an image of a size."""
    return count_madds(timm.create_model(recipe.model, resolutions=(size,), **recipe.model_kwargs, **kwargs), size)


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Start the runs that are not done, `jobs` at a time; they share the threads, and a failed one ends all.

    A run that was stopped continues from its last checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    env = dict(os.environ)
    env.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // jobs)))
    todo, running, children = [run for run in runs if run.result() is None], {}, {}

    def start(run):
        run.folder.mkdir(parents=True, exist_ok=True)
        started, path = time.time(), run.folder / 'spent.json'
        with open(run.folder / 'train.log', 'ab') as log:
            children[run] = subprocess.Popen(
                [sys.executable, *run.command], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(children[run].pid, 0)
        spent = dict(seconds=time.time() - started, process_seconds=usage.ru_utime + usage.ru_stime)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value + before.get(key, 0.) for key, value in spent.items()}))
        children[run].returncode = os.waitstatus_to_exitcode(status)
        if children[run].returncode:
            last = (run.folder / 'train.log').read_text().strip().split('\n')[-1]
            raise SystemExit(f'{run.folder} failed: {last}')
        if run.result() is None:
            raise SystemExit(f'{run.folder} has not trained all its epochs, see its train.log.')

    began, count = time.time(), len(todo)
    with ThreadPoolExecutor(jobs) as executor:
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    run = todo.pop(0)
                    print(f'{run.folder.name}: started', flush=True)
                    running[run] = executor.submit(start, run)
                wait(running.values(), return_when=FIRST_COMPLETED)
                for run in [run for run, future in running.items() if future.done()]:
                    running.pop(run).result()
                    left = len(todo) + len(running)
                    hours = (time.time() - began) / (count - left) * left / 3600
                    found = run.result()
                    found = found.get('top1') or found['map']
                    scores = '  '.join(f'{size}: {value:.2f}' for size, value in found.items())
                    print(f'{run.folder.name}: {scores}; {left} runs left, about {hours:.1f} h', flush=True)
        finally:
            for child in children.values():
                child.terminate()


def hold_out(data_dir: str, folder: Path, share: float = 0.1) -> Path:
    """Return a folder of links to the training images, a random share of each class as its validation split."""
    made = folder / 'done'
    if not made.exists():
        for name in sorted(p for p in Path(data_dir, 'train').iterdir() if p.is_dir()):
            images = sorted(p.resolve() for p in name.iterdir())
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
            for i, index in enumerate(order):
                split = 'validation' if i < max(1, round(share * len(images))) else 'train'
                link = folder / split / name.name / images[index].name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(images[index])
        made.touch()
    return folder
