"""The commands of `python -m timm_rs_runtime`, which are commands of timm-rs too

A command is a row of COMMANDS and a module of its name with two functions: add_arguments(parser), which imports only
what is fast to import, and run(args), which imports what it needs. Its EXAMPLES end its help. A command that has a
parser of its own is a module with the function main(argv).
"""
import argparse
import importlib
import sys
from typing import Mapping, Optional, Sequence

from ..errors import OneLineParser, did_you_mean, one_line_errors
from ..fields import check_numbers
from ..version import __version__

__all__ = ['COMMANDS', 'run_command']

COMMANDS = {
    'demo': 'open a local web page that answers a picture at every size',
    'fit-cascade': 'fit thresholds at which an image goes on to a larger size',
    'predict': 'answer images with an exported file',
    'serve': 'answer images over HTTP within a latency budget, with Ray',
}


def run_command(
        program: str,
        description: str,
        packages: Mapping[str, Mapping[str, str]],
        argv: Optional[Sequence[str]] = None,
) -> None:
    """Run a command; errors for the user are one line on stderr and end with a status other than 0.

    Args:
        program: Name of the program.
        description: What it is for.
        packages: Commands by the package that holds their modules: what each does, by name.
        argv: Arguments, those of the process if None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {name: (what, package) for package, found in packages.items() for name, what in found.items()}

    def command(name: str) -> str:
        if name not in commands:
            raise argparse.ArgumentTypeError(f'there is no command {name!r}{did_you_mean(name, commands)}')
        return name

    parser = OneLineParser(
        prog=program,
        usage=f'{program} COMMAND ...',
        description=description,
        epilog='\n'.join(['commands:', *(f'  {name:12} {commands[name][0]}' for name in sorted(commands))]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'{program} {__version__}')
    parser.add_argument('command', type=command, metavar='COMMAND', help=f'see below, and {program} COMMAND --help')
    name = parser.parse_args(argv[:1]).command

    what, package = commands[name]
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    if hasattr(module, 'main'):
        module.main(argv[1:])
        return
    parser = OneLineParser(
        prog=f'{program} {name}', description=f'{what[0].upper()}{what[1:]}.',
        epilog='\n'.join(['examples:', *(f'  {program} {name} {example}' for example in module.EXAMPLES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    parser.set_defaults(argv=argv, program=parser.prog)
    args = parser.parse_args(argv[1:])
    with one_line_errors(parser.prog, args.traceback):
        check_numbers(args)
        module.run(args)
