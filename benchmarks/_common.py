"""What the benchmarks share: timing in turns, medians and ratios with their uncertainty, and the JSON that records a run"""
import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch

import timm_rs

__all__ = ['create_parser', 'measure', 'median_with_interval', 'print_table', 'ratio', 'summarize', 'write_results']


def create_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has.

    Args:
        doc: Docstring of the script; its first line describes the program.
        rounds: Default number of rounds.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=doc.split('\n', 1)[0])
    parser.add_argument('--rounds', default=rounds, type=int, metavar='N',
                        help='rounds, each of which times every contender once (default: %(default)s)')
    parser.add_argument('--output', default=f'results/{name}.json', type=Path, metavar='FILE',
                        help='JSON file to write (default: %(default)s)')
    return parser


def measure(contenders: Dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> Dict[str, List[float]]:
    """Time functions in turns, A B A B ..., so that what slows the machine down for a while slows all of them.

    Args:
        contenders: Functions without arguments by name.
        rounds: How many times each is timed.
        warmup: Rounds before these that are not counted.

    Returns:
        Seconds of every round, in order, by name.
    """
    seconds = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if index >= warmup:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


def median_with_interval(values: Sequence[float]) -> Tuple[float, float, float]:
    """Return the median and a 95% interval for it, from order statistics: no distribution is assumed.

    Example:
        >>> median_with_interval([5, 1, 2, 4, 3, 7, 6, 8, 9])
        (5, 2, 8)
    """
    values = sorted(values)
    n = len(values)
    low = max(round(n / 2 - 0.98 * n ** 0.5) - 1, 0)
    return statistics.median(values), values[low], values[n - 1 - low]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Dict[str, Any]:
    """Return the median over rounds of the ratio within a round, and its 95% interval.

    Both sides of a round ran one after the other, so a slow spell of the machine cancels out.
    """
    median, low, high = median_with_interval([a / b for a, b in zip(numerator, denominator)])
    return dict(ratio=round(median, 4), interval=[round(low, 4), round(high, 4)])


def summarize(seconds: Dict[str, List[float]], unit: float = 1e-3) -> Dict[str, float]:
    """Return the median time of every contender, in milliseconds unless another unit is given in seconds."""
    return {name: round(statistics.median(values) / unit, 3) for name, values in seconds.items()}


def print_table(columns: Sequence[str], rows: Sequence[Dict[str, Any]]) -> None:
    """Print rows as aligned columns; what a row lacks stays empty, an interval becomes '1.00 - 1.01'."""
    cells = [list(columns)] + [[_cell(row.get(column, '')) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print('  '.join(f'{cell:<{width}}' if i == 0 else f'{cell:>{width}}'
                        for i, (cell, width) in enumerate(zip(line, widths))).rstrip())


def write_results(
        path: Path,
        args: argparse.Namespace,
        rows: Sequence[Dict[str, Any]],
        threads: Optional[int] = None,
) -> None:
    """Write the rows with the command and the environment that they come from.

    Args:
        path: File to write.
        args: The parsed flags.
        rows: Measurements.
        threads: Threads of torch, where they matter.
    """
    results = dict(
        command=shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        environment=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            timm=timm.__version__,
            timm_rs=timm_rs.__version__,
            platform=f'{platform.system()} {platform.machine()}',
            cpu=_cpu_model(),
            cpu_count=os.cpu_count(),
            load_average=[round(load, 2) for load in os.getloadavg()],
            threads=threads,
        ),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'output'},
        rows=list(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + '\n')
    print(f'\nWritten to {path}')


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ' - '.join(map(_cell, value))
    return f'{value:.3f}' if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
