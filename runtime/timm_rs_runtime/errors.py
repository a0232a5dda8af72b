"""Errors for the user of a program: one line on stderr; a bug keeps its traceback"""
import argparse
import ast
import difflib
import os
import sys
from contextlib import contextmanager
from typing import Iterable, Iterator, Union

__all__ = ['KeyValues', 'OneLineParser', 'UserError', 'did_you_mean', 'one_line', 'one_line_errors']

_OURS = ('timm_rs', 'timm_rs_cli', 'timm_rs_runtime')


class UserError(ValueError):
    """What the user gave cannot be used; the message names it and says what was expected.

    It is the only class that our code raises for a user. Whatever else a program raises is a bug, except missing
    packages (ImportError) and errors of the operating system (OSError).
    """


def one_line(error: Union[BaseException, str], most: int = 1000) -> str:
    """Return an error's message in one printable line of at most `most` characters, its class if it has none.

    What a worker process of torch raised, whose message is a traceback here, gets its own message again.

    Example:
        >>> one_line(ValueError('two\\nlines')), one_line(KeyError())
        ('two lines', 'KeyError')
    """
    text, kind = str(error), type(error)
    if text.startswith('Caught '):
        prefix = '' if kind.__module__ == 'builtins' else f'{kind.__module__}.'
        text = text.rpartition(f'\n{prefix}{kind.__qualname__}: ')[2]
    text = ' '.join(text.split()) or kind.__name__
    text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f'{text[:most - 4]} ...'


@contextmanager
def one_line_errors(program: str, traceback: bool = False, quiet: bool = False) -> Iterator[None]:
    """Print what is raised for a user as one line on stderr and exit with status 1.

    Everything else keeps its traceback, followed by a line that asks to report it, and exits with status 70.

    Args:
        program: Name before the message.
        traceback: Show the traceback of every error (--traceback).
        quiet: Leave UserError to another process of the same job, which prints it.
    """
    try:
        yield
        if sys.stdout is not None:  # it may be closed from the start
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # SIGPIPE
    except KeyboardInterrupt:
        if traceback:
            raise
        print(f'{program}: interrupted.', file=sys.stderr)
        raise SystemExit(128 + 2) from None  # SIGINT
    except Exception as e:
        ours = isinstance(e, ImportError) and (e.name or '').partition('.')[0] in _OURS
        if ours or not isinstance(e, (ImportError, OSError, UserError)):
            sys.excepthook(*sys.exc_info())
            print(f'{program}: this is a bug, please report it with the lines above.', file=sys.stderr)
            raise SystemExit(70) from None  # EX_SOFTWARE
        if traceback:
            raise
        if not (quiet and isinstance(e, UserError)):
            print(f'{program}: error: {one_line(e)}', file=sys.stderr)
        raise SystemExit(1) from None


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the long usage, and suggests the flag that was meant.

    Args:
        quiet: Leave the line to another process of the same job, which prints it.
        kwargs: Arguments of ArgumentParser.
    """

    def __init__(self, *, quiet: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.quiet = quiet

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        flags = [name for action in self._actions for name in action.option_strings]
        for flag in (arg.partition('=')[0] for arg in args[:args.index('--') if '--' in args else None]):
            if flag.startswith('--') and ' ' not in flag and not any(name.startswith(flag) for name in flags):
                self.error(f'unknown flag {flag}{did_you_mean(flag, flags)}')
        return super().parse_args(args, namespace)

    def error(self, message: str):
        self.exit(2, None if self.quiet else f'{self.prog}: error: {one_line(message)}\n')


class KeyValues(argparse.Action):
    """Makes a dict of values like key=value, each a Python literal or else text."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = {}
        for text in values:
            key, equals, value = text.partition('=')
            if not equals or not key.isidentifier():
                parser.error(f'{option_string} {text}: expected key=value.')
            try:
                found[key] = ast.literal_eval(value)
            except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
                found[key] = value
        setattr(namespace, self.dest, found)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown name, with the nearest known one if there is one.

    Example:
        >>> did_you_mean('exprot', ['convert', 'export'])
        ', did you mean export?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f', did you mean {near[0]}?' if near else '.'
