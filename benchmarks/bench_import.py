#!/usr/bin/env python3
"""Import: what `import timm_rs` adds to `import timm`, and how long the command takes to answer

Starts fresh processes that import timm and then timm_rs, or the runtime, and times these imports inside them; and
processes of the command timm-rs that print help or report a mistyped flag, timed from outside. Wanted: at most 0.2 s
for timm_rs, which registers its models on import, 0.3 s for the runtime, 0.5 s for the command. The alternative is to
do without: `import timm` by itself, and a Python that does nothing, are the scale.

n: 7 processes (--rounds), and one more before them, which fills the file cache and compiles the bytecode. Given are the
median and the slowest time on the wall, and the median CPU time, which programs that share the cores do not lengthen.

    python benchmarks/bench_import.py

One run takes about a minute.
"""
import json
import resource
import statistics
import subprocess
import sys
import time

from _common import create_parser, print_table, write_results

COLUMNS = ('case', 'median_s', 'slowest_s', 'cpu_s', 'wanted', 'n')
PROGRAM = """
import json
from time import perf_counter, process_time
ticks = []
for module in ({}):
    ticks.append((perf_counter(), process_time()))
    __import__(module)
ticks.append((perf_counter(), process_time()))
print(json.dumps(ticks))
"""
COMMANDS = {
    'python -c pass': ['-c', 'pass'],
    'timm-rs --help': ['-m', 'timm_rs_cli', '--help'],
    'timm-rs export --help': ['-m', 'timm_rs_cli', 'export', '--help'],
    'timm-rs export --outptu': ['-m', 'timm_rs_cli', 'export', '--outptu'],
}


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--rounds', default=7, type=int, metavar='N', help='processes (default: %(default)s)')
    args = parser.parse_args()
    both = [import_in_new_process('timm', 'timm_rs') for _ in range(1 + args.rounds)][1:]
    runtime = [import_in_new_process('timm_rs_runtime') for _ in range(1 + args.rounds)][1:]
    rows = [
        create_row('import timm', [(before, after) for before, after, _ in both]),
        create_row('import timm_rs after it', [(before, after) for _, before, after in both], wanted=0.2),
        create_row('import timm_rs_runtime', runtime, wanted=0.3),
    ]
    for case, command in COMMANDS.items():
        spans = [run_in_new_process(command) for _ in range(1 + args.rounds)][1:]
        rows.append(create_row(case, spans, **(dict(wanted=0.5) if 'timm-rs' in case else {})))
    print_table(COLUMNS, rows)
    write_results(args, rows)


def import_in_new_process(*modules):
    """Return wall and CPU seconds before each import and after the last."""
    program = PROGRAM.format(''.join(f'{module!r}, ' for module in modules))
    result = subprocess.run([sys.executable, '-c', program], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def run_in_new_process(command):
    """Return wall and CPU seconds before and after a process."""
    ticks = []
    for run in (False, True):
        if run:
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        ticks.append((time.perf_counter(), used.ru_utime + used.ru_stime))
    return ticks


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
