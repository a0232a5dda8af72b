"""demo"""
import argparse

from ..web import serve

EXAMPLES = ['model.onnx']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('file', metavar='FILE.onnx', help='file of timm-rs export')
    add('--threads', type=int, metavar='N', help='threads of an inference (default: all cores)')
    add('--host', default='127.0.0.1', metavar='ADDRESS', help='address to listen at (default: %(default)s)')
    add('--port', type=int, metavar='N', help='port to listen at (default: a free one from 7860 on)')


def run(args: argparse.Namespace) -> None:
    serve(args.file, args.host, args.port, args.threads)
