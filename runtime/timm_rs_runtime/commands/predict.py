"""predict"""
import argparse
import sys
import warnings

from ..errors import UserError
from ..fields import check_argument, integer
from ..predict import Predictor, predict_all
from ..preprocess import MARGINS

MAX_TOP = 1000

EXAMPLES = [
    'photo.jpg --model model.onnx',
    'DIR --model model.onnx --budget-ms 20 --json',
    'DIR --model model.onnx --ray --output answers',
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='files, folders, or - for an image on stdin')
    add('--model', required=True, metavar='FILE.onnx', help='file of timm-rs export')
    add('--threads', type=int, metavar='N', help='threads of an inference (default: all cores)')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--resolution', type=int, metavar='N', help='input size in pixels (default: the largest)')
    size.add_argument('--budget-ms', type=float, metavar='T', help='take the largest size that answers in T ms')
    size.add_argument('--cascade', metavar='FILE', help='take larger sizes only for unsure images; file of fit-cascade')
    add('--mode', default='fast', choices=('fast', 'low_memory'), help='default: %(default)s')
    add('--decode', default='scaled', choices=MARGINS,
        help="how JPEGs are decoded: at a smaller scale that keeps a margin, with 'fast' less, or as timm "
             '(default: %(default)s)')
    add('--top', type=int, default=5, metavar='K', help='classes to print (default: %(default)s)')
    add('--json', action='store_true', help='print a line of JSON for each image')
    add('--ray', nargs='?', const='', metavar='ADDRESS',
        help='after IMAGE: write Parquet files with Ray Data, from a folder, a Parquet file or WebDataset shards; on '
             'the cluster at ADDRESS, auto for the one that runs here (default: start one)')
    add('-o', '--output', metavar='DIR', help='folder of --ray; it goes on where it stopped')
    add('--workers', type=int, metavar='N', help='processes of --ray, each on a core (default: all but one)')


def run(args: argparse.Namespace) -> None:
    check_argument('--top', args.top, integer(1, MAX_TOP))
    if args.ray is not None:
        predict_on_ray(args)
        return
    for flag, value in (('--output', args.output), ('--workers', args.workers)):
        if value is not None:
            raise UserError(f'{flag} needs --ray: without it answers are printed.')
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f'{args.program}: {message}', file=sys.stderr)
        warnings.simplefilter('always', RuntimeWarning)
        predictor = Predictor(
            args.model, args.resolution, args.budget_ms, args.cascade, args.threads, args.mode, args.decode)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Palette images with Transparency')  # by Pillow
        failed = predict_all(predictor, args.images, args.top, args.json, args.program)
    if failed:
        raise SystemExit(1)


def predict_on_ray(args: argparse.Namespace) -> None:
    if args.output is None or len(args.images) != 1:
        raise UserError('--ray takes one source, and --output.')
    if args.json or args.threads is not None:
        what, why = ('--json', 'it writes Parquet') if args.json else ('--threads', 'each of --workers has one thread')
        raise UserError(f'--ray does not go with {what}: {why}.')
    from ..ray import predict  # needs Ray

    found = predict(
        args.images[0], args.model, args.output, args.resolution, args.budget_ms, args.cascade, args.top, args.workers,
        address=args.ray or None, mode=args.mode, decode=args.decode)
    print(f"{args.output}: {found['images']:,} images in {found['seconds']:.1f} s, {found['failed']:,} failed, "
          f"{found['before']:,} were there before")
