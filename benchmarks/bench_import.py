#!/usr/bin/env python3
"""Import: what `import timm_rs` adds to `import timm`, and how long the command takes to answer

Starts fresh processes that time a statement: imports, and calls of the command timm-rs that print help or report a
mistyped flag. Wanted: at most 0.2 s for timm_rs, which registers its models on import, 0.3 s for the runtime, 0.5 s for
the command. The alternative is to do without: `import timm` by itself, and a Python that does nothing, are the scale.

n: 7 processes (--rounds), and one more before them, which fills the file cache and compiles the bytecode. Given are the
median and the slowest time on the wall, and the median CPU time, which programs that share the cores do not lengthen.

    python benchmarks/bench_import.py

One run takes about a minute.
"""
import statistics
import subprocess
import sys

from _common import create_parser, write_results

PROGRAM = """
import resource, subprocess, sys, time
def now():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime
def run(*command):
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
{before}
start = now()
{statement}
print(*(after - before for after, before in zip(now(), start)))
"""
CASES = (  # name, what runs before, what is timed, seconds wanted
    ('import timm', '', 'import timm', ''),
    ('import timm_rs after it', 'import timm', 'import timm_rs', 0.2),
    ('import timm_rs_runtime', '', 'import timm_rs_runtime', 0.3),
    ('python -c pass', '', "run('-c', 'pass')", ''),
    ('timm-rs --help', '', "run('-m', 'timm_rs_cli', '--help')", 0.5),
    ('timm-rs export --help', '', "run('-m', 'timm_rs_cli', 'export', '--help')", 0.5),
    ('timm-rs export --outptu', '', "run('-m', 'timm_rs_cli', 'export', '--outptu')", 0.5),
)


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--rounds', default=7, type=int, metavar='N', help='processes (default: %(default)s)')
    args = parser.parse_args()
    rows = []
    for case, before, statement, wanted in CASES:
        command = [sys.executable, '-c', PROGRAM.format(before=before, statement=statement)]
        times = [subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout for _ in range(1 + args.rounds)]
        wall, cpu = zip(*(map(float, line.split()) for line in times[1:]))
        rows.append(dict(
            case=case, median_s=round(statistics.median(wall), 4), slowest_s=round(max(wall), 4),
            cpu_s=round(statistics.median(cpu), 4), wanted=wanted, n=args.rounds))
    write_results(args, rows)


if __name__ == '__main__':
    main()
