"""Resolutions: what they are, which one is near, and the switch that holds the active one"""
from numbers import Integral
from typing import Any, Iterable, Sequence, Tuple, Union

from timm_rs_runtime.errors import UserError

__all__ = ['Switch', 'UnknownResolutionError', 'check_resolutions', 'nearest_resolution', 'neighbours']


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


class Switch:
    """The active resolution, one object shared by all PrivateBN of a network: switching is one assignment.

    Args:
        resolutions: Input sizes in pixels, largest first.
    """

    def __init__(self, resolutions: Tuple[int, ...]):
        self.resolutions = resolutions
        self.active = resolutions[0]
        self.key = str(self.active)
        self.between = None  # keys of two resolutions and how far the input is from the first to the second
        self.checkpointing = False  # layers are recomputed in the backward pass
        self.recompute = False  # whole resolutions are
        self.warned = set()  # untrained input sizes that were warned about

    def to(self, resolution: int) -> None:
        if resolution not in self.resolutions:
            raise UnknownResolutionError(resolution, self.resolutions)
        self.active = int(resolution)
        self.key = str(self.active)


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
