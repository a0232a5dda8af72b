"""Ending all processes of a run at the same safe point"""
import signal
from typing import Any

import torch
import torch.distributed as dist

__all__ = ['Preempted', 'Preemption']


class Preempted(Exception):
    """The process was asked to end."""


class Preemption:
    """Notes a SIGTERM, so that all processes end at the same safe point, whichever of them it reached and when.

    Args:
        distributed: There are several processes; all of them make this object and later the same calls.
    """

    def __init__(self, distributed: bool = False):
        self.requested = False
        self._group = dist.new_group(backend='gloo') if distributed else None  # on the CPU, to wait for no GPU
        self._flag = self._work = None
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.requested = True

    def poll(self) -> bool:
        """Return whether to end, the same on all processes; they wait only for the last poll, not for each other."""
        if self._group is None:
            return self.requested
        end = self._work is not None and self._result()
        self._ask()
        return end

    def agree(self) -> bool:
        """Return whether to end, the same on all processes, once all of them are here."""
        if self._group is None:
            return self.requested
        if self._work is not None:
            self._work.wait()
        self._ask()
        return self._result()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self._group is not None:
            dist.barrier(self._group)

    def close(self) -> None:
        """Let a SIGTERM do what it did before."""
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self) -> None:
        self._flag = torch.tensor(int(self.requested))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)

    def _result(self) -> bool:
        self._work.wait()
        return bool(self._flag)
