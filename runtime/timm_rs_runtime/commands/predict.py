"""predict"""
import argparse
import sys
import warnings

from ..fields import check_argument, integer
from ..predict import Predictor, predict_all
from ..preprocess import MARGINS

MAX_TOP = 1000

EXAMPLES = [
    'photo.jpg --model model.onnx',
    'DIR --model model.onnx --budget-ms 20 --json',
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


def run(args: argparse.Namespace) -> None:
    check_argument('--top', args.top, integer(1, MAX_TOP))
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
