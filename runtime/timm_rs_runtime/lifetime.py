"""What sessions have in common: they end, they survive a fork, and they travel to other processes"""
import os
import weakref
from typing import Any, Callable, Tuple

from .errors import UserError

__all__ = ['Closable', 'ClosedError']

_alive = weakref.WeakSet()


class ClosedError(UserError, RuntimeError):
    """A session was closed; it does not answer any more."""


class Closable:
    """A session that is closed by close or at the end of a with block.

    A copy of it, even a pickled one, is a session of its own. In a forked process it starts again.

    Args:
        reopen: Opens an equal session; it can be pickled.
    """

    def __init__(self, reopen: Callable[[], Any]):
        self._reopen = reopen
        self._closed = False
        _alive.add(self)

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __reduce__(self) -> Tuple[Callable, Tuple]:
        self._check_open()
        return self._reopen, ()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f'{self!r} was closed, open another one.')

    def close(self) -> None:
        """Stop answering."""
        self._closed = True

    def _after_fork(self) -> None:
        """Drop what only the parent process has: threads, and locks that they hold."""


def _after_fork() -> None:
    for session in list(_alive):
        session._after_fork()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)
