#!/usr/bin/env python3
"""The one file for all sizes: today's form against another one's latency

Two questions, of one thread, batch 1, random weights, at the largest and the smallest of five sizes:

- now/before: does today's file take longer than that of an earlier commit, whose checkout is --before? Wanted: a ratio
  of at most 1.02.
- mul_add/now: what would BatchNormalization with picked rows cost if it were written as Mul and Add, which MNN and
  tract take too?

Each in ONNX Runtime with fixed sides, as Session does, and with free ones, and in OpenVINO reshaped to the size and
dynamic; 'row pick' is only what finds the row, with free sides, 20 times. Contenders take turns (A B A B ...). A ratio
is the median over loads of the median ratio within a round, with its range over loads. A second session of the earlier
file is a control: its ratio to the first, ideally 1, shows what the machine can tell apart.

    git worktree add --detach ../before 9522664
    python benchmarks/bench_row_pick.py --before ../before --clock cpu
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import openvino
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from onnx import helper

from timm_rs_runtime.format import INDEX
from timm_rs_runtime.ort import open_onnx

KINDS = ('row pick', 'fixed', 'free', 'openvino reshaped', 'openvino dynamic')
COLUMNS = ('case', 'ms', 'control', 'now/before', 'mul_add/now')
EXPORT = """
import sys, timm, torch
sys.path.insert(0, sys.argv[1])
import timm_rs
from torch.nn.modules.batchnorm import _BatchNorm
try:
    from timm_rs.export import export_switchable
except ImportError:
    from timm_rs.deploy.export import export_switchable  # before the package had rooms
torch.manual_seed(0)
model = timm.create_model(f'rs_{sys.argv[2]}').eval()
for module in model.modules():
    if isinstance(module, _BatchNorm):  # as different from size to size as training would make them
        module.weight.data.uniform_(0.8, 1.2)
        module.bias.data.normal_(std=0.1)
export_switchable(model, sys.argv[3])
print(*model.resolutions)
"""


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=20)
    parser.add_argument('--before', required=True, metavar='DIR', help='checkout of the earlier commit')
    parser.add_argument('--models', nargs='+', default=['resnet18', 'mobilenetv2_100'], metavar='NAME',
                        help='timm models (default: resnet18 mobilenetv2_100)')
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: f'{folder}/{kind}.onnx' for kind in ('before', 'now', 'mul_add')}
            here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            export(args.before, name, files['before'])
            sizes = export(here, name, files['now'])
            onnx.save(as_mul_add(onnx.load(files['now'])), files['mul_add'])
            for size in (sizes[0], sizes[-1]):
                rows += compare(args, name, files, size)
                write_results(args, rows)


def export(checkout, name, path):
    """Write a file as a checkout does and return its sizes."""
    command = [sys.executable, '-c', EXPORT, os.path.abspath(checkout), name, path]
    paths = os.pathsep.join(os.path.join(os.path.abspath(checkout), d) for d in ('', 'runtime'))
    environment = dict(os.environ, PYTHONPATH=paths)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [int(size) for size in output.stdout.split()]


def as_mul_add(model):
    """Return the model with each BatchNormalization whose scale and bias are picked written as Mul and Add."""
    rows = {name for n in model.graph.node if n.op_type == 'Split' for name in n.output}
    tables = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == 'Gather'}
    tables = {tables[n.input[0]] for n in model.graph.node if n.op_type == 'Split' and n.input[0] in tables}
    for tensor in model.graph.initializer:
        if tensor.name in tables:
            tensor.dims.extend([1, 1])  # rows of [C, 1, 1]
    nodes = []
    for node in model.graph.node:
        if node.op_type == 'BatchNormalization':
            x, scale, bias = node.input[:3]
            assert scale in rows and bias in rows
            product = f'{node.output[0]}.product'
            nodes.append(helper.make_node('Mul', [x, scale], [product]))
            nodes.append(helper.make_node('Add', [product, bias], node.output))
        else:
            assert not rows.intersection(node.input)
            nodes.append(node)
    model.graph.ClearField('node')
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def compare(args, name, files, size):
    """Return the rows of a network at a size."""
    images = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)

    def build():
        opened = {f'{form} {kind}': opener(file, kind, size, args.threads)
                  for kind in KINDS for form, file in {'control': files['before'], **files}.items()}
        return {case: lambda run=run: run(images) for case, run in opened.items()}

    runs = measure(build, args)
    rows = []
    for kind in KINDS:
        row = dict(case=f'{name} at {size}, {kind}', ms=median(runs, f'now {kind}'))
        for key, above, below in (('control', 'control', 'before'), ('now/before', 'now', 'before'),
                                  ('mul_add/now', 'mul_add', 'now')):
            found = ratio(runs, f'{above} {kind}', f'{below} {kind}')
            row.update({key: found['ratio'], f'{key}_range': found['range']})
        rows.append(dict(row, n=f'{args.builds} x {args.rounds}'))
    print_table(COLUMNS, rows)
    return rows


def opener(path, kind, size, threads):
    """Return a function of images."""
    if kind.startswith('openvino'):
        model = openvino.Core().read_model(path)
        if kind.endswith('reshaped'):
            model.reshape([1, 3, size, size])
        compiled = openvino.Core().compile_model(
            model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads})
        request = compiled.create_infer_request()
        return lambda images: request.infer([images], share_inputs=True)
    if kind == 'row pick':
        model = onnx.load(path)
        model.graph.ClearField('output')
        model.graph.output.append(helper.make_tensor_value_info(INDEX, onnx.TensorProto.INT64, []))
        session = open_onnx(model.SerializeToString(), threads)
        return lambda images: [session.run(None, {'images': images}) for _ in range(20)]
    session = open_onnx(path, threads, dict(height=size, width=size) if kind == 'fixed' else None)
    return lambda images: session.run(None, {'images': images})


if __name__ == '__main__':
    main()
