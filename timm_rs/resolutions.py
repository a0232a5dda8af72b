"""Resolutions: what they are, which one is near, and the switch that holds the active one"""
import threading
from numbers import Integral
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Union

import torch

from timm_rs_runtime.errors import UserError

from ._compat import NO_GRAPH_TASK, current_graph_task

__all__ = [
    'Switch', 'UnknownResolutionError', 'check_resolutions', 'is_recomputing', 'nearest_resolution', 'neighbours']


class UnknownResolutionError(UserError, KeyError):
    """A resolution was asked for that the network does not have."""

    def __init__(self, resolution: Any, resolutions: Sequence[int]):
        known = ', '.join(map(str, resolutions))
        super().__init__(f'Unknown resolution {resolution!r}, this network has {known}.')

    def __str__(self) -> str:
        return self.args[0]  # KeyError would print the message in quotes


def check_resolutions(resolutions: Union[int, Sequence[int]]) -> Tuple[int, ...]:
    """Return resolutions largest first, as they are kept everywhere.

    Args:
        resolutions: Square input sizes in pixels.

    Raises:
        ValueError: There is none, or one is not an integer, not positive, or named twice.

    Example:
        >>> check_resolutions([96, 224, 160])
        (224, 160, 96)
    """
    resolutions = tuple(resolutions) if isinstance(resolutions, Iterable) else (resolutions,)
    if not resolutions:
        raise UserError('resolutions is empty, expected at least one input size in pixels such as (224, 160).')
    for r in resolutions:
        if not isinstance(r, Integral) or isinstance(r, bool) or r <= 0:
            raise UserError(f'resolutions {resolutions} holds {r!r}, expected positive integers (pixels).')
    if len(set(resolutions)) < len(resolutions):
        twice = sorted({r for r in resolutions if resolutions.count(r) > 1}, reverse=True)
        raise UserError(f'resolutions {resolutions} names {", ".join(map(str, twice))} twice.')
    return tuple(sorted(map(int, resolutions), reverse=True))


def is_recomputing() -> bool:
    """Return whether this is the backward pass, where a checkpointed layer runs its forward again."""
    return not torch.compiler.is_compiling() and current_graph_task() != NO_GRAPH_TASK


class Switch:
    """The active resolution, one object shared by all PrivateBN of a network: switching is one assignment.

    As PyTorch's grad mode and current device, it is one per thread: threads can run the same network at different
    resolutions. A thread that has not chosen takes the resolution that the network was last switched to.

    Args:
        resolutions: Input sizes in pixels, largest first.
        active: The one to begin with, the largest if None.
    """

    def __init__(self, resolutions: Tuple[int, ...], active: Optional[int] = None):
        self.resolutions = resolutions
        self.default = str(active or resolutions[0])
        self.last = self.default  # chosen by any thread, for a backward pass that has its own thread
        self.checkpointing = False  # layers are recomputed in the backward pass
        self.recompute = False  # whole resolutions are
        self.warned = set()  # untrained input sizes that were warned about
        # State of this thread, each attribute only once it is set: key, between and recomputed. Not an object of our
        # own class: torch.compile (2.14) would read its attributes, but forget to write them.
        self.thread = threading.local()

    @property
    def key(self) -> str:
        """The active resolution as the BN layers name it."""
        if self.checkpointing and is_recomputing():
            task, key = getattr(self.thread, 'recomputed', (None, None))
            return key if task == current_graph_task() else self.chosen or self.last
        return self.chosen or self.default

    @property
    def active(self) -> int:
        return int(self.key)

    @property
    def chosen(self) -> Optional[str]:
        """The key that this thread has chosen, None if it has not."""
        return getattr(self.thread, 'key', None)

    @chosen.setter
    def chosen(self, key: Optional[str]) -> None:
        self.thread.key = key

    @property
    def between(self) -> Optional[Tuple[str, str, float]]:
        """Keys of two resolutions and how far the input of this thread is from the first to the second."""
        return getattr(self.thread, 'between', None)

    @between.setter
    def between(self, value: Optional[Tuple[str, str, float]]) -> None:
        self.thread.between = value

    def to(self, resolution: int, everywhere: bool = False) -> None:
        """Choose for this thread, or also for those that have not chosen."""
        if resolution not in self.resolutions:
            raise UnknownResolutionError(resolution, self.resolutions)
        self.chosen = self.last = str(int(resolution))
        if everywhere:
            self.default = self.last

    def recompute_at(self, resolution: int) -> None:
        """Choose for what this thread recomputes in the present backward pass."""
        self.thread.recomputed = current_graph_task(), str(resolution)

    def __getstate__(self) -> Dict[str, Any]:
        return dict(vars(self), default=self.key, last=self.key, thread=None)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state, thread=threading.local())


def nearest_resolution(height: int, width: int, resolutions: Sequence[int]) -> int:
    """Return the resolution nearest to an input size by area, the larger one if two are equally near.

    Example:
        >>> nearest_resolution(200, 200, (224, 192, 160))
        192
    """
    return min(resolutions, key=lambda r: (abs(height * width - r * r), -r))


def neighbours(height: int, width: int, resolutions: Sequence[int]) -> Tuple[int, int, float]:
    """Return the resolutions below and above an input size by area, and how far it is from the first to the second.

    Outside of the range both are the nearest one.

    Example:
        >>> neighbours(200, 200, (224, 192, 160))
        (192, 224, 0.23557692307692307)
        >>> neighbours(256, 256, (224, 192, 160))
        (224, 224, 0.0)
    """
    area = height * width
    below = max((r for r in resolutions if r * r <= area), default=min(resolutions))
    above = min((r for r in resolutions if r * r >= area), default=max(resolutions))
    share = (area - below ** 2) / (above ** 2 - below ** 2) if above != below else 0.
    return below, above, share
