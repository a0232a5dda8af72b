"""timm-rs export"""
import argparse
import os
from functools import partial
from pathlib import Path

from timm_rs_runtime.commands.images import add_images, print_read
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import check_new_file, check_new_folder, report_beside

from ._source import add_source, load, read_labels

EXAMPLES = [
    'output/train/RUN -o model.onnx',
    'model -o int8.onnx --quantize int8 --data-dir DIR',
    'model -o phone.pte',
    'model -o phone.mlpackage --precision fp16',
    'model -o small.pt2 --resolution 160',
]

SUFFIXES = {
    '.onnx': 'onnx', '.pte': 'executorch', '.tflite': 'litert', '.mlpackage': 'coreml', '.pt2': 'torch-export',
    '.pt': 'torchscript'}
PHONES = 'executorch', 'litert', 'coreml'  # a function for each resolution, of a fixed batch size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='FILE', help='file to write')
    add('--overwrite', action='store_true', help='replace a file of this name')
    add('--format', choices=sorted(SUFFIXES.values()),
        help=f"default: that of FILE's suffix, {', '.join(SUFFIXES)}; without one onnx")
    add('--resolution', type=int, metavar='N',
        help='take this resolution out (default: one file for all of them, ONNX, ExecuTorch, LiteRT or Core ML)')
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument('--batch-size', type=int, metavar='N',
        help='images of a batch, with --resolution, ExecuTorch, LiteRT or Core ML')
    batch.add_argument('--dynamic-batch', action='store_true',
        help='batches of any number of images (the default; one image with ExecuTorch, LiteRT and Core ML)')
    add('--tolerance', type=float, default=0., metavar='X',
        help='accept differences of logits between network and file up to X (default: what float32 rounding explains)')
    add('--precision', default='float32', choices=('float32', 'fp16'),
        help='fp16 halves a file of ONNX or Core ML; images and logits stay float32 (default: %(default)s)')
    add('--split-batch-norm', action='store_true',
        help='write each BatchNorm of the ONNX file for all resolutions as a multiplication and an addition, for MNN '
             'and tract')
    add('--quantize', choices=('int8',), help='all resolutions in int8, with --data-dir')
    add('--int8-format', choices=('qdq', 'qoperator'),
        help='ONNX of --quantize int8: qdq is for every runtime (the default), qoperator for low_memory sessions')
    add_images(parser, 'images like those to come, for the ranges of activations', 'train', 128)
    add('--calibration-data', dest='data_dir', help=argparse.SUPPRESS)  # earlier names
    add('--calibration-images', dest='images', type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    from timm_rs import export as exports
    from timm_rs_runtime.images import find_images, split_folder
    from timm_rs_runtime.unreadable import ReadErrors

    suffix = os.path.splitext(args.output)[1].lower()
    args.format = args.format or SUFFIXES.get(suffix or '.onnx')
    if args.format is None:
        raise UserError(f"--output {args.output}: unknown suffix, expected {', '.join(SUFFIXES)}, or --format.")
    if SUFFIXES.get(suffix, args.format) != args.format:
        raise UserError(f'--output {args.output}: {suffix} is for --format {SUFFIXES[suffix]}, not {args.format}.')
    is_program, is_package = args.format == 'executorch', args.format == 'coreml'
    if args.format in PHONES and (args.resolution is not None or args.dynamic_batch):
        what = '--dynamic-batch' if args.dynamic_batch else '--resolution'
        raise UserError(
            f'--format {args.format} does not go with {what}: it has all resolutions and a fixed batch size.')
    if args.quantize and args.format in ('litert', 'coreml'):
        raise UserError(
            f'--format {args.format} does not go with --quantize int8: int8 is for ONNX and ExecuTorch.')
    if is_package and args.overwrite:
        raise UserError(
            '--format coreml does not go with --overwrite: it is a folder, and no folder is overwritten.')
    if args.resolution is None and args.format not in PHONES and (args.format != 'onnx' or args.batch_size):
        what = f'--format {args.format}' if args.format != 'onnx' else '--batch-size'
        raise UserError(
            f'{what} needs --resolution: one file for all resolutions is ONNX, of any batch size, ExecuTorch, LiteRT '
            'or Core ML.')
    if bool(args.quantize) != bool(args.data_dir):
        raise UserError('--quantize int8 and --data-dir DIR need each other.')
    if args.quantize and args.resolution is not None:
        raise UserError('--quantize int8 writes all resolutions, leave --resolution out.')
    if args.precision != 'float32' and (args.quantize or args.format not in ('onnx', 'coreml')):
        what = '--quantize int8' if args.quantize else f'--format {args.format}, only with onnx and coreml'
        raise UserError(f'--precision {args.precision} does not go with {what}.')
    if args.int8_format and (not args.quantize or is_program):
        raise UserError('--int8-format needs --quantize int8 and --format onnx.')
    if args.split_batch_norm and (args.format != 'onnx' or args.quantize or args.resolution is not None):
        raise UserError('--split-batch-norm is for one ONNX file for all resolutions, without --quantize.')
    if is_package:
        check_new_folder(args.output)
    else:
        check_new_file(args.output, args.overwrite)
    labels = read_labels(args)
    if args.quantize:
        folder = split_folder(args.data_dir, args.split)
        images, errors = find_images(folder, args.images), ReadErrors(args.max_unreadable)
    model = load(args).model
    common = dict(class_names=labels, overwrite=args.overwrite)
    if args.format in PHONES:
        common.update(batch_size=args.batch_size or 1)
    if args.quantize:
        export = exports.export_executorch if is_program else partial(
            exports.export_int8, int8_format=args.int8_format or 'qdq')
        found = export(model, args.output, images, errors=errors, **common)
        count = len(images) - len(errors.names)
        count -= count % common.get('batch_size', 1)  # ExecuTorch takes only whole batches
        lines = {r: f"top-1 of {row['agreement']:.1%} of {count} images as the network's, "
                    f"logits {row['error']:.1%} off" for r, row in found.items()}
    elif is_package:
        exports.export_coreml(model, args.output, labels, args.batch_size or 1, args.tolerance, args.precision)
        lines = {r: f'function forward_{r}, not compared with the network, for only macOS and iOS run it'
                 for r in model.resolutions}
    elif args.resolution is None:
        phones = dict(executorch=exports.export_executorch, litert=exports.export_litert)
        export = phones.get(args.format) or partial(
            exports.export_switchable, precision=args.precision, split_batch_norm=args.split_batch_norm)
        errors = export(model, args.output, tolerance=args.tolerance, **common)
        lines = {r: f'differs from the network by at most {error:.2g}' for r, error in errors.items()}
    else:
        error = exports.export_resolution(
            model, args.resolution, args.output, args.format, args.batch_size, labels, args.tolerance, args.overwrite,
            args.precision)
        lines = {args.resolution: f'differs from the network by at most {error:.2g}'}
    output = Path(args.output)
    size = sum(path.stat().st_size for path in (output, *output.rglob('*')) if path.is_file())
    size = f', {size / 1e6:.1f} MB' * bool(size)  # what went through a pipe has none
    with report_beside(output):
        if args.quantize:
            print_read(count, len(errors.names), folder)
        for resolution, text in lines.items():
            print(f'{resolution} px: {text}')
        print(f"{output}: {model.pretrained_cfg['architecture']} at {' '.join(map(str, lines))}{size}")
