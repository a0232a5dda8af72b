"""The console command timm-rs

A command is a row of _COMMANDS and a module of its name, see timm_rs_runtime.commands, which brings more of them.
"""
import sys
from typing import Optional, Sequence

try:
    from timm_rs_runtime import commands
except ModuleNotFoundError as e:
    if e.name != 'timm_rs_runtime':
        raise
    sys.exit('timm-rs: error: timm_rs needs timm_rs_runtime: pip install ./runtime .')

__all__ = ['COMMANDS', 'main']

_COMMANDS = {
    'calibrate': 'add a resolution that was not trained',
    'convert': 'make a model folder from a checkpoint, or from one resolution of it',
    'export': 'write a file that runs without timm: ONNX, torch.export or TorchScript',
    'plot': 'draw figures of training runs',
    'push': 'push a checkpoint to the Hugging Face Hub',
}
_SCRIPTS = {
    'train': 'train a network; it is train_rs.py',
    'validate': 'measure accuracy at every size; it is validate_rs.py',
}
COMMANDS = {**_COMMANDS, **commands.COMMANDS}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a command; errors for the user are one line on stderr and end with a status other than 0."""
    packages = {__name__: {**_COMMANDS, **_SCRIPTS}, commands.__name__: commands.COMMANDS}
    commands.run_command('timm-rs', 'Resolution Switchable Networks for timm.', packages, argv)
