"""fit-cascade"""
import argparse
from typing import Any, Mapping, Sequence

from ..cascade import write_cascade
from ..errors import UserError
from ..fields import check_argument, number
from ..files import check_new_file, report_beside
from ..fitting import FOLDS, collect_logits, compare, cross_fit, label_folders, measure_images
from ..images import split_folder, spread
from ..session import Session
from ..unreadable import ReadErrors
from .images import add_images, print_read

_TIMED = 24  # images
_NOTE = f"The cascade's accuracy is that of images it was not fitted on: {FOLDS}-fold cross-fitting."

EXAMPLES = ['model.onnx --data-dir DIR --target-accuracy 85 -o cascade.json']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('file', metavar='FILE.onnx', help='file of timm-rs export')
    add('--threads', type=int, metavar='N', help='threads of an inference (default: all cores)')
    add_images(parser, 'labelled images, in class folders', 'validation', None)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--target-accuracy', type=float, metavar='A', help='accuracy in percent to reach, cheaply')
    target.add_argument('--target-madds', type=float, metavar='M',
        help='mean multiply-adds of an image to stay below, in millions')
    add('--start', type=int, metavar='N', help='first input size in pixels (default: fitted)')
    add('-o', '--output', required=True, metavar='FILE', help='file to write')
    add('--overwrite', action='store_true', help='replace a file of this name')


def run(args: argparse.Namespace) -> None:
    if args.data_dir is None:
        raise UserError('Expected --data-dir, labelled images.')
    check_new_file(args.output, args.overwrite)
    if args.target_accuracy is not None:
        check_argument('--target-accuracy', args.target_accuracy, number(1, 100))
    session = Session(args.file, args.threads, decode='exact')
    session.check_classifies()
    errors = ReadErrors(args.max_unreadable)
    folder = split_folder(args.data_dir, args.split)
    images, labels = label_folders(folder, session, args.images)
    logits, readable = collect_logits(session, images, errors)
    images, labels = [images[i] for i in readable], labels[readable]
    accuracy = None if args.target_accuracy is None else args.target_accuracy / 100
    madds = None if args.target_madds is None else args.target_madds * 1e6
    found = cross_fit(logits, labels, session.madds, accuracy, madds, args.start)
    rows = compare(session, found, logits, labels, *measure_images(session, spread(images, _TIMED)))
    write_cascade(
        args.output, found.cascade, args.overwrite, folder=folder, images=len(images), unreadable=len(errors.names),
        target_accuracy=accuracy, target_madds=madds, note=_NOTE, rows=rows)
    with report_beside(args.output):
        print_read(len(images), len(errors.names), folder)
        print_table(rows)
        print(f'{args.output}: thresholds of a cascade for {args.file}')


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how the cascade, the last row, compares with each size."""
    print(_NOTE)
    print('network  accuracy +- standard error  mean MAdds  mean ms  images through each size')
    for row in rows:
        shares = ', '.join(f'{r} px {share:.0%}' for r, share in row['shares'].items())
        print(f"{row['network']:8} {row['accuracy']:8.2%} +- {row['standard_error']:<14.2%} "
              f"{row['madds'] / 1e6:10.1f}M {row['milliseconds']:8.2f}  {shares}")
    *sizes, cascade = rows
    for row in sizes:
        if row['accuracy'] >= cascade['accuracy'] and row['madds'] <= cascade['madds']:
            print(f"Without a cascade, {row['network']} is at least as accurate and at most as expensive.")
