"""Errors for the user of a program: one line on stderr; a bug keeps its traceback"""
import argparse
import sys
import textwrap
from contextlib import contextmanager
from typing import Iterator, Union

__all__ = ['OneLineParser', 'UserError', 'one_line', 'one_line_errors']



class UserError(ValueError):
    """What the user gave cannot be used; the message names it and says what was expected.

    The only class that our code raises for a user. Whatever else a program raises is a bug of ours, except missing
    packages (ImportError) and the operating system's errors (OSError).
    """


def one_line(error: Union[BaseException, str], most: int = 1000) -> str:
    """Return an error's message in one line of at most `most` characters, its class if it has none.

    Example:
        >>> one_line(ValueError('two\\nlines')), one_line(KeyError())
        ('two lines', 'KeyError')
    """
    return textwrap.shorten(str(error), most, placeholder=' ...') or type(error).__name__


@contextmanager
def one_line_errors(program: str, traceback: bool = False) -> Iterator[None]:
    """Print what is raised for a user as one line on stderr and exit with status 1.

    Everything else keeps its traceback, followed by a line that asks to report it.

    Args:
        program: Name that stands before the message.
        traceback: Show the traceback of every error (--traceback).
    """
    try:
        yield
    except (ImportError, OSError, UserError) as e:
        if traceback:
            raise
        if _prints() or isinstance(e, (ImportError, OSError)):  # which can happen to one process of several
            print(f'{program}: error: {one_line(e)}', file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        sys.excepthook(*sys.exc_info())
        print(f'{program}: this is a bug, please report it with the lines above.', file=sys.stderr)
        raise SystemExit(70) from None  # EX_SOFTWARE


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the long usage."""

    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message}\n' if _prints() else None)


def _prints() -> bool:
    """Return whether this is the process of its machine that prints what is wrong with the arguments of all."""
    if 'timm' not in sys.modules:  # it takes seconds to import, and trains nothing here
        return True
    from timm.utils.distributed import world_info_from_env

    return world_info_from_env()[0] == 0
