"""The console command timm-rs

A sub-command is a row of COMMANDS and a module of its name with two functions: add_arguments(parser), which imports
only what is fast to import, and run(args), which imports what it needs.
"""
import argparse
import importlib
import sys
from typing import Optional, Sequence

try:
    from timm_rs_runtime.errors import OneLineParser, did_you_mean, one_line_errors
    from timm_rs_runtime.version import __version__
except ModuleNotFoundError as e:
    if e.name != 'timm_rs_runtime':
        raise
    sys.exit('timm-rs: error: timm_rs needs timm_rs_runtime: pip install ./runtime .')

__all__ = ['COMMANDS', 'main']

COMMANDS = {
    'calibrate': 'add a resolution that was not trained',
    'convert': 'make a model folder from a checkpoint, or from one resolution of it',
    'demo': 'open a local web page that answers a picture at every size',
    'export': 'write a file that runs without timm: ONNX, torch.export or TorchScript',
    'fit-cascade': 'fit thresholds at which an image goes on to a larger size',
    'plot': 'draw figures of training runs',
    'predict': 'answer images with an exported file',
    'push': 'push a checkpoint to the Hugging Face Hub',
}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a sub-command; errors for the user are one line on stderr and end with a status other than 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(
        prog='timm-rs',
        usage='timm-rs COMMAND ...',
        description='Resolution Switchable Networks for timm.',
        epilog='\n'.join(['commands:', *(f'  {name:12} {what}' for name, what in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'timm-rs {__version__}')
    parser.add_argument('command', type=_command, metavar='COMMAND', help='see below, and timm-rs COMMAND --help')
    name = parser.parse_args(argv[:1]).command

    command = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    parser = OneLineParser(prog=f'timm-rs {name}', description=f'{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.')
    command.add_arguments(parser)
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    parser.set_defaults(argv=argv)
    args = parser.parse_args(argv[1:])
    with one_line_errors(parser.prog, args.traceback):
        command.run(args)


def _command(name: str) -> str:
    if name not in COMMANDS:
        raise argparse.ArgumentTypeError(f'there is no command {name!r}{did_you_mean(name, COMMANDS)}')
    return name
