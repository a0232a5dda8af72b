"""Commands that are scripts of their own"""
import os
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn, Sequence

__all__ = ['run_script']


def run_script(name: str, argv: Sequence[str]) -> NoReturn:
    """Become a script of the checkout, or of the installation."""
    paths = [Path(__file__).parents[1] / name, Path(sysconfig.get_path('scripts')) / name]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        sys.exit(f'timm-rs: error: {name} is not installed: pip install ./runtime .')
    os.execv(sys.executable, [sys.executable, str(path), *argv])
