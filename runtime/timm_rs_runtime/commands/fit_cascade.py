"""fit-cascade"""
import argparse

from ..errors import UserError
from ..fitting import fit_cascade
from .images import add_images, print_read


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
    found = fit_cascade(
        args.file,
        args.data_dir,
        args.output,
        None if args.target_accuracy is None else args.target_accuracy / 100,
        None if args.target_madds is None else args.target_madds * 1e6,
        args.start,
        args.images,
        args.threads,
        args.overwrite,
        args.split,
        args.max_unreadable,
    )
    print_read(found['images'], found['unreadable'], found['folder'])
    print(found['note'])
    print('network  accuracy +- standard error  mean MAdds  mean ms  images through each size')
    for row in found['rows']:
        shares = ', '.join(f'{r} px {share:.0%}' for r, share in row['shares'].items())
        print(f"{row['network']:8} {row['accuracy']:8.2%} +- {row['standard_error']:<14.2%} "
              f"{row['madds'] / 1e6:10.1f}M {row['milliseconds']:8.2f}  {shares}")
    print(f'{args.output}: thresholds of a cascade for {args.file}')
