#!/usr/bin/env python3
"""Deployment: one ONNX file for all sizes against a plain ONNX file for each

In ONNX Runtime on the CPU, batch 1, five sizes, random weights (other runtimes: tools/runtimes.py). The scale is
timm's network at one size with its BatchNorms folded, in float32, as `timm-rs export --resolution` writes it. Beside
it, from one file for all sizes:

- fast: timm_rs_runtime.Session as it is by default, a folded graph for each size. Wanted: a ratio of at most 1.03.
- low_memory: one graph with the weights once. Wanted: at most 1.15.
- int8, int8_low_memory: the same two of an int8 file, low_memory of one with --int8-format qoperator, as it is meant.
  Wanted: at most 0.45.
- qoperator, qdq_low_memory: the other two pairs of form and mode.
- fp16, fp16_low_memory: of a file of 16 bits.

Files: the one for all sizes against a plain one of one size in float32 (wanted: at most 1.03), the int8 one against one
of the same kind for one size (at most 1.05) and against the float32 one for all sizes (at most 0.27). Memory: what a
process has resident after it opened a file and ran every size once, less what it has after the imports.

Contenders take turns (A B A B ...). n: 3 loads of all files, 20 rounds with each (--builds, --rounds). A ratio is the
median over loads of the median ratio within a round, with its range over loads. A second session of the plain file is a
control: its ratio to the first, ideally 1, shows what the machine can tell apart.

    python benchmarks/bench_deploy.py
    python benchmarks/bench_deploy.py --threads 2 --output results/bench_deploy_2threads.json

One run takes about ten minutes. Needs Linux for the memory.
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, ratio, write_results
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

import timm_rs  # noqa: F401  registers rs_*
from timm_rs.export.export import export_int8, export_resolution, export_switchable
from timm_rs_runtime import Session

KINDS = dict(  # the end of a file's name, the mode of its session, the ratio that is wanted
    fast=('', 'fast', 1.03), low_memory=('', 'low_memory', 1.15),
    int8=('-int8', 'fast', 0.45), int8_low_memory=('-qoperator', 'low_memory', 0.45),
    qoperator=('-qoperator', 'fast', None), qdq_low_memory=('-int8', 'low_memory', None),
    fp16=('-fp16', 'fast', None), fp16_low_memory=('-fp16', 'low_memory', None),
)
MODELS = ['resnet18', 'resnet50', 'mobilenetv2_100']
PROGRAM = """
import sys
import numpy as np, onnxruntime, onnx
from timm_rs_runtime import Session
def resident():
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmRSS')) / 1e3
before = resident()
session = Session(sys.argv[1], threads=int(sys.argv[3]), mode=sys.argv[2])
for r in session.resolutions:
    session.predict(np.zeros((1, 3, r, r), np.float32))
print(resident() - before)
"""


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=20)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help=f'default: {" ".join(MODELS)}')
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=KINDS, metavar='NAME', help='default: all')
    args = parser.parse_args()
    latency, files, memory = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path = f'{folder}/{name}'
            resolutions = export_all(name, path)
            latency += [compare_latency(args, path, resolution) for resolution in resolutions]
            files += compare_files(path)
            memory += measure_memory(args, path, resolutions[0])
            write_results(args, latency + files + memory)


def export_all(name, path):
    """Write the files of a network and return its resolutions."""
    torch.manual_seed(0)
    model = timm.create_model(f'rs_{name}').eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # as different from size to size as training would make them
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)
    images = [Image.effect_noise((16, 16), 80).convert('RGB').resize((256, 256)) for _ in range(8)]
    export_switchable(model, f'{path}.onnx')
    export_switchable(model, f'{path}-fp16.onnx', precision='fp16')
    export_int8(model, f'{path}-int8.onnx', images)
    export_int8(model, f'{path}-qoperator.onnx', images, int8_format='qoperator')
    for resolution in model.resolutions:
        export_resolution(model, resolution, f'{path}-{resolution}.onnx')
    single = timm.create_model(f'rs_{name}', resolutions=model.resolutions[:1]).eval()
    export_int8(single, f'{path}-int8-one.onnx', images)
    return model.resolutions


def compare_latency(args, path, resolution):
    """Return the row of a network at a size."""
    x = np.random.default_rng(0).standard_normal((1, 3, resolution, resolution), np.float32)
    plain = f'-{resolution}', 'fast', None
    contenders = dict(plain=plain, control=plain, **{kind: KINDS[kind] for kind in args.kinds})

    def build():
        sessions = {
            kind: Session(f'{path}{end}.onnx', args.threads, mode, warm_up=False)
            for kind, (end, mode, _) in contenders.items()}
        return {kind: lambda s=session: s.predict(x) for kind, session in sessions.items()}

    runs = measure(build, args)
    row = dict(case=f'{os.path.basename(path)} at {resolution}', plain_ms=median(runs, 'plain'))
    for kind in list(contenders)[1:]:
        found = ratio(runs, kind, 'plain')
        row.update({kind: found['ratio'], f'{kind}_range': found['range']})
    wanted = {kind: KINDS[kind][2] for kind in args.kinds if KINDS[kind][2]}
    return dict(row, wanted=wanted, n=f'{args.builds} x {args.rounds}')


def compare_files(path):
    """Return the rows of the sizes of files."""
    pairs = (
        ('file for five sizes', '', 'plain file of one size', '-224', 1.03),
        ('int8 file for five sizes', '-int8', 'int8 file of one size', '-int8-one', 1.05),
        ('int8 file for five sizes', '-int8', 'float32 file for five sizes', '', 0.27),
        ('fp16 file for five sizes', '-fp16', 'float32 file for five sizes', '', ''))
    rows = []
    for case, end, scale, scale_end, wanted in pairs:
        size, against = (os.path.getsize(f'{path}{each}.onnx') for each in (end, scale_end))
        rows.append(dict(case=f'{os.path.basename(path)}: {case}', megabytes=round(size / 1e6, 3), scale=scale,
                         ratio=round(size / against, 4), wanted=wanted))
    return rows


def measure_memory(args, path, largest):
    """Return the rows of resident memory."""
    cases = {'plain file of one size': (f'-{largest}', 'fast'), **{kind: KINDS[kind][:2] for kind in args.kinds}}
    rows = []
    for case, (end, mode) in cases.items():
        command = [sys.executable, '-c', PROGRAM, f'{path}{end}.onnx', mode, str(args.threads)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(dict(case=f'{os.path.basename(path)} resident: {case}', megabytes=round(float(result.stdout), 1)))
    return rows


if __name__ == '__main__':
    main()
