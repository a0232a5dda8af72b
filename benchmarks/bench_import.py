#!/usr/bin/env python3
"""Import: what `import timm_rs` adds to `import timm`

Starts fresh processes that import timm and then timm_rs, and times both imports inside them. Wanted: at most 0.3 s for
timm_rs, which registers its models on import. The alternative is to do without: `import timm` alone is the scale.

n: 7 processes (--rounds), and one more before them, which fills the file cache and compiles the bytecode. Given are the
median and the slowest time on the wall, and the median CPU time, which programs that share the cores do not lengthen.

    python benchmarks/bench_import.py

One run takes about half a minute.
"""
import json
import statistics
import subprocess
import sys

from _common import create_parser, print_table, write_results

COLUMNS = ('case', 'median_s', 'slowest_s', 'cpu_s', 'wanted', 'n')
PROGRAM = """
import json
from time import perf_counter, process_time
ticks = [(perf_counter(), process_time())]
import timm
ticks.append((perf_counter(), process_time()))
import timm_rs
ticks.append((perf_counter(), process_time()))
print(json.dumps(ticks))
"""


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--rounds', default=7, type=int, metavar='N', help='processes (default: %(default)s)')
    args = parser.parse_args()
    runs = [import_in_new_process() for _ in range(1 + args.rounds)][1:]
    rows = [
        create_row('import timm', [(before, after) for before, after, _ in runs]),
        create_row('import timm_rs after it', [(before, after) for _, before, after in runs], wanted=0.3),
    ]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def import_in_new_process():
    """Return wall and CPU seconds before timm, between it and timm_rs, and after timm_rs."""
    result = subprocess.run([sys.executable, '-c', PROGRAM], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def create_row(case, spans, **extra):
    wall, cpu = zip(*([end - start for start, end in zip(before, after)] for before, after in spans))
    return dict(
        case=case,
        median_s=round(statistics.median(wall), 4),
        slowest_s=round(max(wall), 4),
        cpu_s=round(statistics.median(cpu), 4),
        **extra,
        n=len(spans),
    )


if __name__ == '__main__':
    main()
