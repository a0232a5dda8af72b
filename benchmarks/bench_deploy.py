#!/usr/bin/env python3
"""Deployment: one ONNX file for all sizes against a plain ONNX file for each

On the CPU, batch 1, five sizes, random weights, in ONNX Runtime except where OpenVINO is named. The scale is timm's
network at one size with its BatchNorms folded, in float32, as `timm-rs export --resolution` writes it. Beside it, from
one file for all sizes:

- fast: timm_rs_runtime.Session as it is by default, a folded graph for each size. Wanted: a ratio of at most 1.03.
- low_memory: one graph with the weights once. Wanted: at most 1.15.
- int8, int8_low_memory: the same two of an int8 file, low_memory of one with --int8-format qoperator, as it is meant.
  Wanted: at most 0.45.
- qoperator, qdq_low_memory: the other two pairs of form and mode.
- fp16, fp16_low_memory: of a file of 16 bits.

With --openvino, against the plain file of one size in OpenVINO, all with fixed sides:

- openvino: the float32 file for all sizes. Wanted: at most 1.03.
- openvino_int8, openvino_fp16: those in int8 and in fp16.

Files: the one for all sizes against a plain one of one size in float32 (wanted: at most 1.03), the int8 one against one
of the same kind for one size (at most 1.05) and against the float32 one for all sizes (at most 0.27). Memory: what a
process has resident after it opened a file and ran every size once, less what it has after the imports.

Contenders take turns (A B A B ...). n: 3 loads of all files, 20 rounds with each (--builds, --rounds). A ratio is the
median over loads of the median ratio within a round, with its range over loads. A second session of the plain file is a
control: its ratio to the first, ideally 1, shows what the machine can tell apart.

    python benchmarks/bench_deploy.py
    python benchmarks/bench_deploy.py --threads 2 --output results/bench_deploy_2threads.json
    python benchmarks/bench_deploy.py --openvino --kinds fast int8 fp16 --output results/bench_deploy_openvino.json

One run takes about ten minutes. Needs Linux for the memory.
"""
import os
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs.export.export import export_int8, export_resolution, export_switchable
from timm_rs_runtime import Session

# The end of a file's name and the mode of its session.
KINDS = dict(
    fast=('', 'fast'), low_memory=('', 'low_memory'),
    int8=('-int8', 'fast'), int8_low_memory=('-qoperator', 'low_memory'),
    qoperator=('-qoperator', 'fast'), qdq_low_memory=('-int8', 'low_memory'),
    fp16=('-fp16', 'fast'), fp16_low_memory=('-fp16', 'low_memory'),
)
OPENVINO = dict(openvino='', openvino_int8='-int8', openvino_fp16='-fp16')
WANTED = dict(fast=1.03, low_memory=1.15, int8=0.45, int8_low_memory=0.45, openvino=1.03)
FILE_COLUMNS = ('case', 'megabytes', 'scale', 'ratio', 'wanted')
MEMORY_COLUMNS = ('case', 'megabytes')
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
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'mobilenetv2_100'], metavar='NAME',
                        help='timm models (default: resnet18 resnet50 mobilenetv2_100)')
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=KINDS, metavar='NAME',
                        help='what to run in ONNX Runtime (default: all)')
    parser.add_argument('--openvino', action='store_true', help='run the files in OpenVINO too')
    args = parser.parse_args()
    latency, files, memory = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            resolutions = export_all(args, name, folder)
            latency += compare_latency(args, name, folder, resolutions)
            files += compare_files(name, folder)
            memory += measure_memory(args, name, folder, resolutions)
            write_results(args, latency + files + memory)
    print()
    for columns, rows in ((FILE_COLUMNS, files), (MEMORY_COLUMNS, memory)):
        print_table(columns, rows)
        print()


def export_all(args, name, folder):
    """Write the files of a network and return its resolutions."""
    torch.manual_seed(0)
    model = timm.create_model(f'rs_{name}').eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # as different from size to size as training would make them
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    images = [Image.fromarray(n).resize((256, 256), Image.Resampling.BICUBIC) for n in noise]
    export_switchable(model, f'{folder}/{name}.onnx')
    export_switchable(model, f'{folder}/{name}-fp16.onnx', precision='fp16')
    export_int8(model, f'{folder}/{name}-int8.onnx', images)
    if '-qoperator' in [KINDS[kind][0] for kind in args.kinds]:
        export_int8(model, f'{folder}/{name}-qoperator.onnx', images, int8_format='qoperator')
    for resolution in model.resolutions:
        export_resolution(model, resolution, f'{folder}/{name}-{resolution}.onnx')
    single = timm.create_model(f'rs_{name}', resolutions=model.resolutions[:1]).eval()
    export_int8(single, f'{folder}/{name}-int8-one.onnx', images)
    return model.resolutions


def compare_latency(args, name, folder, resolutions):
    """Return the rows of a network."""
    def build(resolution):
        x = np.random.default_rng(0).standard_normal((1, 3, resolution, resolution), np.float32)
        files = dict.fromkeys(('plain', 'control'), (f'-{resolution}', 'fast'))
        files.update({kind: KINDS[kind] for kind in args.kinds})
        contenders = {}
        for kind, (end, mode) in files.items():
            session = Session(f'{folder}/{name}{end}.onnx', args.threads, mode, warm_up=False)
            contenders[kind] = lambda s=session: s.predict(x)
        for kind, end in dict(openvino_plain=f'-{resolution}', **OPENVINO).items() if args.openvino else ():
            run = open_openvino(f'{folder}/{name}{end}.onnx', resolution, args.threads)
            contenders[kind] = lambda run=run: run([x])
        return contenders

    rows = []
    for resolution in resolutions:
        runs = measure(partial(build, resolution), args)
        row = dict(case=f'{name} at {resolution}', plain_ms=median(runs, 'plain'))
        if args.openvino:
            row['openvino_plain_ms'] = median(runs, 'openvino_plain')
        for key in ('control', *args.kinds, *(OPENVINO if args.openvino else ())):
            found = ratio(runs, key, 'openvino_plain' if key in OPENVINO else 'plain')
            row.update({key: found['ratio'], f'{key}_range': found['range']})
        rows.append(dict(row, wanted=WANTED, n=f'{args.builds} x {args.rounds}'))
    print_table([key for key in rows[0] if not key.endswith('_range') and key not in ('wanted', 'n')], rows)
    return rows


def open_openvino(path, resolution, threads):
    """Return a model of OpenVINO for one image of a size."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, 3, resolution, resolution])
    return core.compile_model(
        model, 'CPU',
        {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY'})


def compare_files(name, folder):
    def megabytes(file):
        return round(os.path.getsize(f'{folder}/{file}.onnx') / 1e6, 3)

    plain, one, int8, int8_one, fp16 = (
        megabytes(name + end) for end in ('-224', '', '-int8', '-int8-one', '-fp16'))
    return [
        dict(case=f'{name}: file for five sizes', megabytes=one, scale='plain file of one size',
             ratio=round(one / plain, 4), wanted=1.03),
        dict(case=f'{name}: int8 file for five sizes', megabytes=int8, scale='int8 file of one size',
             ratio=round(int8 / int8_one, 4), wanted=1.05),
        dict(case=f'{name}: int8 file for five sizes', megabytes=int8, scale='float32 file for five sizes',
             ratio=round(int8 / one, 4), wanted=0.27),
        dict(case=f'{name}: fp16 file for five sizes', megabytes=fp16, scale='float32 file for five sizes',
             ratio=round(fp16 / one, 4)),
    ]


def measure_memory(args, name, folder, resolutions):
    cases = [('plain file of one size', f'{name}-{resolutions[0]}', 'fast')]
    cases += [(kind, name + KINDS[kind][0], KINDS[kind][1]) for kind in args.kinds]
    rows = []
    for case, file, mode in cases:
        command = [sys.executable, '-c', PROGRAM, f'{folder}/{file}.onnx', mode, str(args.threads)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(dict(case=f'{name} resident: {case}', megabytes=round(float(result.stdout), 1)))
    return rows


if __name__ == '__main__':
    main()
