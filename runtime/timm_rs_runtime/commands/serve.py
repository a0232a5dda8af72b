"""serve"""
import argparse

from ..images import MAX_PIXELS

EXAMPLES = ['model.onnx --budget-ms 100 --replicas 4']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('file', metavar='FILE.onnx', help='file of timm-rs export')
    add('--budget-ms', type=float, required=True, metavar='T', help='answer within T ms of the end of an upload')
    add('--replicas', type=int, default=1, metavar='N',
        help='start up to N replicas, each on a core, as requests queue up (default: %(default)s)')
    add('--min-replicas', type=int, default=1, metavar='N', help='keep N at least (default: %(default)s)')
    add('--ray', metavar='ADDRESS', help='Ray cluster, auto for the one that runs here (default: start one)')
    add('--host', default='127.0.0.1', metavar='ADDRESS', help='address to listen at (default: %(default)s)')
    add('--port', type=int, default=8000, metavar='N', help='port to listen at (default: %(default)s)')
    add('--top', type=int, default=5, metavar='K', help='classes of an answer (default: %(default)s)')
    add('--max-bytes', type=int, default=2 ** 24, metavar='N', help='bytes of an upload (default: %(default)s)')
    add('--max-pixels', type=int, default=MAX_PIXELS, metavar='N', help='pixels of an image (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    from ..replicas import Settings, serve

    settings = Settings(
        path=args.file, budget_ms=args.budget_ms, replicas=args.replicas, min_replicas=args.min_replicas, k=args.top,
        max_bytes=args.max_bytes, max_pixels=args.max_pixels)
    serve(settings, args.ray, args.host, args.port)
