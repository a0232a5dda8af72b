#!/usr/bin/env python3
"""Import: what `import timm_rs` adds to `import timm`

Starts fresh processes that import timm and then timm_rs, and times both imports inside them. Wanted: at most 0.3 s for
timm_rs, which registers its models on import. The alternative is to do without: `import timm` alone is the scale.

One process is one round, 7 by default (--rounds); one more before them warms the file cache and compiles the bytecode.
Given are the medians and the slowest round.

    python benchmarks/bench_import.py

One run takes about half a minute.
"""
import json
import statistics
import subprocess
import sys

from _common import create_parser, print_table, write_results

COLUMNS = ('case', 'median_s', 'slowest_s', 'wanted', 'n')
PROGRAM = """
import json, time
start = time.perf_counter()
import timm
between = time.perf_counter()
import timm_rs
print(json.dumps([between - start, time.perf_counter() - between]))
"""


def main():
    args = create_parser(__doc__, rounds=7).parse_args()
    runs = [import_in_new_process() for _ in range(1 + args.rounds)][1:]
    timm_seconds, rs_seconds = zip(*runs)
    rows = [
        create_row('import timm', timm_seconds),
        create_row('import timm_rs after it', rs_seconds, wanted=0.3),
    ]
    print_table(COLUMNS, rows)
    write_results(args.output, args, rows)


def import_in_new_process():
    """Return the seconds for timm and for timm_rs after it."""
    result = subprocess.run([sys.executable, '-c', PROGRAM], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def create_row(case, seconds, **extra):
    return dict(
        case=case,
        median_s=round(statistics.median(seconds), 4),
        slowest_s=round(max(seconds), 4),
        **extra,
        n=len(seconds),
    )


if __name__ == '__main__':
    main()
