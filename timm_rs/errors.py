"""Errors of the command line: one line on stderr, no traceback"""
import argparse
import logging
import os
import sys
import textwrap
from contextlib import contextmanager
from typing import Iterator

__all__ = ['OneLineParser', 'TrainingFault', 'check_folder_of', 'check_new_file', 'one_line_errors']

_logger = logging.getLogger(__name__)


class TrainingFault(RuntimeError):
    """Training cannot go on; the message says why and what may help."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what a user's input can raise into one line on stderr and exit status 1.

    Meant for the setting up of a program, where what fails is what it was given. The traceback is logged at DEBUG.

    Args:
        program: Name that stands before the message.
    """
    try:
        yield
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        _logger.debug('Traceback of the error below', exc_info=True)
        message = textwrap.shorten(str(e), 1000, placeholder=' ...') or type(e).__name__
        if _tells() or isinstance(e, (ImportError, OSError, RuntimeError)):  # which can befall one process alone
            print(f'{program}: error: {message}', file=sys.stderr)
        raise SystemExit(1) from None


def check_new_file(path: str) -> None:
    """Raise ValueError if there is something of this name, which is never overwritten, or no folder for it."""
    if os.path.lexists(path):
        raise ValueError(f'{path} exists and is not overwritten, give another output.')
    check_folder_of(path)


def check_folder_of(path: str) -> None:
    """Raise ValueError if there is no folder for a file."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} does not exist, expected a folder for {os.path.basename(path)}.')


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the long usage."""

    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message}\n' if _tells() else None)


def _tells() -> bool:
    """Return whether this is the process of its machine that tells what is wrong with the arguments of all."""
    if 'timm' not in sys.modules:  # it takes seconds to import, and trains nothing here
        return True
    from timm.utils.distributed import world_info_from_env

    return world_info_from_env()[0] == 0
