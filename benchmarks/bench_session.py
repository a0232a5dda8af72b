#!/usr/bin/env python3
"""timm_rs_runtime.Session.predict against that of another build of the project

One thread, batch 1, CPU time of the process, so that programs which share the cores do not count. Each build runs in a
process of its own that starts --builds times; the two take turns, round by round. A ratio is the median over starts of
the median ratio within a round, with its range over starts. Both builds open the same file, and each the file that it
exports itself; a case is a preprocessed batch of a size, or a photograph by name. Wanted: a ratio of at most 1.02.

    git worktree add --detach BEFORE 9522664
    python benchmarks/bench_session.py --baseline BEFORE
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _common import create_parser, median, print_table, ratio, write_results
from PIL import Image

COLUMNS = ('case', 'baseline_ms', 'ratio', 'range')
ROOT = Path(__file__).parents[1]
EXPORT = """
import sys
import timm, torch, timm_rs
try:
    from timm_rs.deploy.export import export_switchable
except ImportError:
    from timm_rs.export.export import export_switchable
torch.manual_seed(0)
export_switchable(timm.create_model(sys.argv[1], pretrained='.' in sys.argv[1]).eval(), sys.argv[2])
"""
SERVE = """
import sys, time
import numpy as np
try:
    from timm_rs.deploy import Session
except ImportError:
    from timm_rs_runtime import Session
assert sys.modules[Session.__module__].__file__.startswith(sys.argv[2])
session = Session(sys.argv[1], threads=1)
print(*session.resolutions, flush=True)
for line in sys.stdin:
    what, resolution, count = line.split()
    resolution = int(resolution)
    image = what if what != 'batch' else (
        np.random.default_rng(0).standard_normal((1, 3, resolution, resolution), np.float32))
    start = time.process_time()
    for _ in range(int(count)):
        session.predict(image, resolution)
    print((time.process_time() - start) / int(count), flush=True)
"""


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--baseline', required=True, metavar='DIR', help='checkout of the other build')
    add('--models', nargs='+', default=['rs_resnet10t.imagenette', 'rs_mobilenetv2_100'], metavar='NAME')
    add('--builds', type=int, default=5, metavar='N', help='starts of each process (default: %(default)s)')
    add('--rounds', type=int, default=15, metavar='N', help='rounds of each start (default: %(default)s)')
    add('--seconds', type=float, default=0.1, metavar='T', help='CPU time of a turn (default: %(default)s)')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photograph = f'{folder}/photograph.jpg'
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(photograph)
        for model in args.models:
            files = {name: f'{folder}/{model}-{name}.onnx' for name in ('baseline', 'now')}
            for name, tree in (('baseline', args.baseline), ('now', ROOT)):
                subprocess.run([sys.executable, '-c', EXPORT, model, files[name]], check=True, **place(tree))
            for what, now in (('same file', files['baseline']), ('own files', files['now'])):
                rows += compare(args, f'{model}, {what}', files['baseline'], now, photograph)
                write_results(args, rows)


def place(tree):
    """Return where a process has to run so that it imports this tree."""
    tree = os.path.abspath(tree)
    paths = os.pathsep.join([tree, os.path.join(tree, 'runtime')])
    return dict(cwd=tree, env=dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS='1'))


def compare(args, case, before, now, photograph):
    """Return the rows of a pair of files."""
    runs = []
    for _ in range(args.builds):
        servers = {name: Server(tree, file)
                   for name, tree, file in (('baseline', args.baseline, before), ('now', ROOT, now))}
        sizes = servers['now'].resolutions
        whats = {f'batch at {r}': ('batch', r) for r in (sizes[0], sizes[-1])}
        whats[f'photograph at {sizes[0]}'] = (photograph, sizes[0])
        counts = {key: max(1, round(args.seconds / servers['now'].seconds(*what, 3))) for key, what in whats.items()}
        seconds = {f'{name} {key}': [] for key in whats for name in servers}
        for _ in range(args.rounds):
            for key, what in whats.items():
                for name, server in servers.items():
                    seconds[f'{name} {key}'].append(server.seconds(*what, counts[key]))
        for server in servers.values():
            server.close()
        runs.append(seconds)
    rows = [
        dict(case=f'{case}, {key}', baseline_ms=median(runs, f'baseline {key}'),
             **ratio(runs, f'now {key}', f'baseline {key}'), wanted=1.02, n=f'{args.builds} x {args.rounds}')
        for key in whats]
    print_table(COLUMNS, rows)
    return rows


class Server:
    """A process with a session of a build."""

    def __init__(self, tree, file):
        self.process = subprocess.Popen(
            [sys.executable, '-c', SERVE, file, os.path.abspath(tree)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, **place(tree))
        self.resolutions = [int(r) for r in self.process.stdout.readline().split()]

    def seconds(self, what, resolution, count):
        """Return the CPU time of an answer."""
        self.process.stdin.write(f'{what} {resolution} {count}\n')
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


if __name__ == '__main__':
    main()
