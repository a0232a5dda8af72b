#!/usr/bin/env python3
"""What the blocked form of a low-memory session gains over the file as it is

Both hold the weights once for all sizes (timm_rs_runtime.Session, mode='low_memory'), in ONNX Runtime on the CPU, batch
1, five sizes, random weights. The blocked form writes BatchNorms as depthwise convolutions, so that ONNX Runtime keeps
its channels blocked. Contenders take turns; a ratio is the median over loads of the median ratio within a round, with
its range over loads. A second session of the file as it is is a control. Wanted: a ratio of at most 0.90. Memory is what
a process has resident after it opened the file and ran every size once, and its peak, less what it has after imports.

    python benchmarks/bench_low_memory.py
"""
import subprocess
import sys
import tempfile

import numpy as np
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs.export.export import export_switchable
from timm_rs_runtime.low_memory import blocked_model
from timm_rs_runtime.session import open_onnx

COLUMNS = ('case', 'plain_ms', 'control', 'blocked', 'blocked_range')
MEMORY_COLUMNS = ('case', 'resident_megabytes', 'peak_megabytes')
PROGRAM = """
import sys
import numpy as np, onnxruntime, onnx
from timm_rs_runtime.low_memory import blocked_model
from timm_rs_runtime.session import open_onnx
def status(key):
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1e3
before = status('VmRSS')
path, kind, *sizes = sys.argv[1:]
session = open_onnx(path, 1) if kind == 'plain' else open_onnx(blocked_model(path), 1, optimize=False)
for r in map(int, sizes):
    session.run(None, {'images': np.zeros((1, 3, r, r), np.float32)})
print(status('VmRSS') - before, status('VmHWM') - before)
"""


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=20)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'mobilenetv2_100'], metavar='NAME',
                        help='timm models (default: resnet18 resnet50 mobilenetv2_100)')
    parser.add_argument('--sizes', nargs='+', type=int, default=[224, 160, 96], metavar='N', help='sizes to time')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path, resolutions = export(name, folder)
            rows += compare(args, name, path, args.sizes)
            if args.threads == 1:
                rows += measure_memory(name, path, resolutions)
            write_results(args, rows)


def export(name, folder):
    torch.manual_seed(0)
    model = timm.create_model(f'rs_{name}').eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)
    export_switchable(model, f'{folder}/{name}.onnx')
    return f'{folder}/{name}.onnx', model.resolutions


def compare(args, name, path, resolutions):
    blocked = blocked_model(path)

    def build():
        sessions = dict(plain=open_onnx(path, args.threads), control=open_onnx(path, args.threads),
                        blocked=open_onnx(blocked, args.threads, optimize=False))
        contenders = {}
        for resolution in resolutions:
            x = np.random.default_rng(0).standard_normal((1, 3, resolution, resolution), np.float32)
            for kind, session in sessions.items():
                contenders[f'{kind} {resolution}'] = lambda s=session, x=x: s.run(None, {'images': x})
        return contenders

    runs = measure(build, args)
    rows = []
    for resolution in resolutions:
        row = dict(case=f'{name} at {resolution}, threads: {args.threads}', plain_ms=median(runs, f'plain {resolution}'))
        for key in ('control', 'blocked'):
            found = ratio(runs, f'{key} {resolution}', f'plain {resolution}')
            row.update({key: found['ratio'], f'{key}_range': found['range']})
        rows.append(dict(row, wanted=0.9, n=f'{args.builds} x {args.rounds}'))
    print_table(COLUMNS, rows)
    return rows


def measure_memory(name, path, resolutions):
    rows = []
    for kind in ('plain', 'blocked'):
        command = [sys.executable, '-c', PROGRAM, path, kind, *map(str, resolutions)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        resident, peak = map(float, result.stdout.split())
        rows.append(dict(case=f'{name}, {kind}', resident_megabytes=round(resident, 1), peak_megabytes=round(peak, 1)))
    print_table(MEMORY_COLUMNS, rows)
    return rows


if __name__ == '__main__':
    main()
