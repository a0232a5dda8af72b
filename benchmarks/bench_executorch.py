#!/usr/bin/env python3
"""ExecuTorch: one program with a method per size against a program of one size

Run by XNNPACK through ExecuTorch's Python runtime, batch 1, five sizes, random weights and BatchNorms that differ. The
scale is a program of the largest size only, which ExecuTorch may fuse as it likes: in float32 its BatchNorms are
fused into the convolutions. Wanted: a file of at most 1.02 times its size (int8: 1.06), and 1.10 times its latency.

If coremltools is installed, packages of Core ML are compared too, only in size: what runs them is not on this system.

    python benchmarks/bench_executorch.py --clock cpu
"""
import os
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs.export.batch_norm import fuse_batch_norms
from timm_rs.export.executorch import load, lower
from timm_rs.export.export import export_coreml, export_executorch
from timm_rs.export.trace import example_images
from timm_rs.switchable import make_switchable

COLUMNS = ('case', 'one_megabytes', 'size_ratio', 'one_ms', 'latency_ratio', 'latency_ratio_range')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=20)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'mobilenetv2_100'], metavar='NAME',
                        help='timm models (default: resnet18 resnet50 mobilenetv2_100)')
    parser.add_argument('--precisions', nargs='+', default=['float32', 'int8'], metavar='NAME',
                        help='of programs (default: float32 int8)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows += compare(args, name, folder)
            write_results(args, rows)
        for name in args.models if find_spec('coremltools') else ():
            rows += compare_packages(name, folder)
            write_results(args, rows)
    print_table(COLUMNS, rows)


def create(name):
    """Return a network whose BatchNorms are as different from size to size as training would make them."""
    torch.manual_seed(0)
    model = timm.create_model(f'rs_{name}').eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)
    return model


def compare(args, name, folder):
    """Return a row for each precision of a network."""
    model = create(name)
    largest = model.resolutions[0]
    plain = model.at(largest)
    images = [Image.effect_noise((16, 16), 80).convert('RGB').resize((256, 256)) for _ in range(8)]
    x = example_images(plain, largest, 1)
    rows = []
    for precision in args.precisions:
        paths = [f'{folder}/{name}-{precision}-{which}.pte' for which in ('all', 'one')]
        given = dict(images=images) if precision == 'int8' else {}
        export_executorch(model, paths[0], **given)
        if precision == 'int8':
            export_executorch(make_switchable(plain, (largest,)), paths[1], **given)
        else:
            lower({largest: torch.export.export(fuse_batch_norms(plain, x), (x,))}, {}, paths[1])

        runs = measure(lambda paths=paths: {path: partial(load(path), x) for path in paths}, args)
        sizes = [os.path.getsize(path) for path in paths]
        found = ratio(runs, *paths)
        rows.append(dict(
            case=f'{name}, {precision}', one_megabytes=round(sizes[1] / 1e6, 3),
            size_ratio=round(sizes[0] / sizes[1], 4), one_ms=median(runs, paths[1]), latency_ratio=found['ratio'],
            latency_ratio_range=found['range']))
    return rows


def compare_packages(name, folder):
    """Return a row for each precision of a network in Core ML."""
    from timm_rs.export.coreml import convert, save

    model = create(name)
    largest = model.resolutions[0]
    fused = fuse_batch_norms(model.at(largest), example_images(model, largest, 1))
    rows = []
    for precision in ('float32', 'fp16'):
        paths = [Path(folder, f'{name}-{precision}-{which}.mlpackage') for which in ('all', 'one')]
        export_coreml(model, str(paths[0]), precision=precision)
        save({largest: convert(fused, largest, 1, precision)}, {}, str(paths[1]))
        sizes = [sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) for path in paths]
        rows.append(dict(case=f'{name}, Core ML, {precision}', one_megabytes=round(sizes[1] / 1e6, 3),
                         size_ratio=round(sizes[0] / sizes[1], 4)))
    return rows


if __name__ == '__main__':
    main()
