"""What sessions have in common: they end, they survive a fork, and they travel to other processes"""
import os
import weakref
from abc import ABC, abstractmethod
from typing import Any, Callable, Tuple

from .errors import UserError

__all__ = ['ClosedError', 'Closable']

_alive = weakref.WeakSet()


class ClosedError(UserError, RuntimeError):
    """A session was closed; it does not answer any more."""


class Closable(ABC):
    """A session that is closed by close or at the end of a with block.

    In a process that was forked it starts again as it was opened. Copies, pickled ones too, are opened in the same way.
    """

    def __init__(self):
        _alive.add(self)

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __reduce__(self) -> Tuple[Callable, Tuple]:
        return self._reopening(), ()

    @abstractmethod
    def close(self) -> None:
        """Answer nobody any more, and give the memory back."""

    @abstractmethod
    def _reopening(self) -> Callable:
        """Return what opens an equal session; it can be pickled."""

    @abstractmethod
    def _after_fork(self) -> None:
        """Forget what only the parent has: threads, and locks that they hold."""


def _after_fork() -> None:
    for session in list(_alive):
        session._after_fork()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)
