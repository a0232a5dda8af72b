"""What the benchmarks share: timing in turns, medians and ratios with their spread, a table, and the JSON of a run"""
import argparse
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch

import timm_rs
from timm_rs_runtime.errors import OneLineParser
from timm_rs_runtime.files import atomic_write

__all__ = [
    'add_deployed_arguments', 'add_timing_arguments', 'compare', 'create_parser', 'environment', 'measure', 'median',
    'print_table', 'ratio', 'shell_command', 'write_json', 'write_results',
]

Contenders = Dict[str, Callable[[], Any]]
Seconds = Dict[str, List[float]]

_CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def create_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser described by the first line of a script's docstring, with the flag that every benchmark has."""
    parser = OneLineParser(description=doc.split('\n', 1)[0])
    parser.add_argument('--output', default=f'results/{Path(sys.argv[0]).stem}.json', type=Path, metavar='FILE',
                        help='JSON file to write (default: %(default)s)')
    return parser


def add_timing_arguments(parser: argparse.ArgumentParser, builds: int, rounds: int) -> None:
    """Add the flags that `measure` reads, with the defaults of a benchmark."""
    add = parser.add_argument
    add('--builds', default=builds, type=int, metavar='N', help='times to build all networks (default: %(default)s)')
    add('--rounds', default=rounds, type=int, metavar='N', help='rounds with each build (default: %(default)s)')
    add('--threads', default=1, type=int, metavar='N', help='threads of torch (default: %(default)s)')
    add('--clock', default='wall', choices=_CLOCKS,
        help='time on the wall, or CPU time of this process: with one thread the same, but that programs which share '
             'the cores do not count (default: %(default)s)')


def add_deployed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a benchmark that runs an exported file on real images."""
    add = parser.add_argument
    add('--model', required=True, metavar='FILE.onnx', help='file of timm-rs export')
    add('--data-dir', '--images', required=True, metavar='DIR', help='labelled images, in class folders')
    add('--split', default='validation', metavar='NAME', help='split of DIR (default: %(default)s)')
    add('--most', type=int, default=500, metavar='N', help='images to use (default: %(default)s)')
    add('--threads', type=int, default=1, metavar='N', help='threads of an inference (default: %(default)s)')


def measure(build: Callable[[], Contenders], args: argparse.Namespace, warmup: int = 3) -> List[Seconds]:
    """Time functions in turns, A B A B ..., so that what slows the machine down for a while slows all of them.

    Where a network lies in memory can make it some percent faster or slower than its twin for as long as it lives.
    Hence all are built several times.

    Args:
        build: Makes the functions to time, without arguments, by name.
        args: The flags of add_timing_arguments.
        warmup: Rounds with each build that are not counted.

    Returns:
        For each build, seconds of every round, in order, by name.
    """
    torch.set_num_threads(args.threads)
    clock = _CLOCKS[args.clock]
    runs = []
    for _ in range(args.builds):
        contenders = build()
        seconds = {name: [] for name in contenders}
        gc.collect()
        gc.disable()
        for index in range(warmup + args.rounds):
            for name, call in contenders.items():
                start = clock()
                call()
                elapsed = clock() - start
                if index >= warmup:
                    seconds[name].append(elapsed)
        gc.enable()
        runs.append(seconds)
    return runs


def median(runs: Sequence[Seconds], name: str, unit: float = 1e-3) -> float:
    """Return the median time of a contender over all rounds, in milliseconds or another unit given in seconds."""
    return round(statistics.median(s for run in runs for s in run[name]) / unit, 3)


def ratio(runs: Sequence[Seconds], numerator: str, denominator: str) -> Dict[str, Any]:
    """Return the median over builds of the median ratio within a round, and its range over builds.

    Both sides of a round ran one after the other, so a slow spell of the machine cancels out.

    Example:
        >>> ratio([dict(a=[1., 4., 5.], b=[1., 2., 2.]), dict(a=[3.], b=[1.])], 'a', 'b')
        {'ratio': 2.5, 'range': [2.0, 3.0]}
    """
    ratios = [statistics.median(a / b for a, b in zip(run[numerator], run[denominator])) for run in runs]
    return dict(
        ratio=round(statistics.median(ratios), 4),
        range=[round(min(ratios), 4), round(max(ratios), 4)],
    )


def compare(
        args: argparse.Namespace,
        runs: Sequence[Seconds],
        case: str,
        ours: str,
        theirs: str,
        unit: float = 1e-3,
        **others: Any,
) -> Dict[str, Any]:
    """Return the row of two contenders: their medians, as median gives them, and the ratio of ours to theirs.

    Others are further columns, or others of these.
    """
    return {
        'case': case, 'ours': median(runs, ours, unit), 'theirs': median(runs, theirs, unit),
        **ratio(runs, ours, theirs), **others, 'n': f'{args.builds} x {args.rounds}'}


def print_table(columns: Sequence[str], rows: Sequence[Dict[str, Any]]) -> None:
    """Print rows as aligned columns; what a row lacks stays empty, a range becomes '1.000 - 1.010'."""
    cells = [list(columns)] + [[_format(row.get(column, '')) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        aligned = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print('  '.join(aligned).rstrip())


def write_results(args: argparse.Namespace, rows: Sequence[Dict[str, Any]]) -> None:
    """Print the rows, and write them to --output with the command and the environment that they come from.

    Printed are numbers, texts and lists of two, without the columns whose names end in _range.
    """
    def columns_of(row):
        return [
            key for key, value in row.items() if not key.endswith('_range')
            and (isinstance(value, (str, int, float)) or isinstance(value, list) and len(value) == 2)]

    for columns, table in itertools.groupby(rows, columns_of):
        print_table(columns, list(table))
        print()
    settings = {k: v for k, v in vars(args).items() if k != 'output'}
    results = dict(command=shell_command(), environment=environment(), settings=settings, rows=list(rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, results)
    print(f'Written to {args.output}')


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path, overwrite=True) as f:
        f.write(json.dumps(content, indent=2) + '\n')


def shell_command() -> str:
    """Return the command of this run."""
    script = Path(sys.argv[0]).resolve()
    return shlex.join(['python', f'{script.parent.name}/{script.name}', *sys.argv[1:]])


def environment() -> Dict[str, Any]:
    """Return the versions and the machine of this run."""
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_rs=timm_rs.__version__,
        platform=f'{platform.system()} {platform.machine()}',
        cpu=_cpu_model(),
        cpu_count=os.cpu_count(),
        load_average=[round(load, 2) for load in os.getloadavg()],
        threads=torch.get_num_threads(),
    )


def _format(value: Any) -> str:
    if isinstance(value, list):
        return ' - '.join(map(_format, value))
    return f'{value:.3f}' if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
