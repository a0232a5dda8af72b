"""Numbers from outside, checked against stated bounds"""
import math
import numbers
from typing import Any

from .errors import UserError

__all__ = ['MAX_THREADS', 'check_count', 'check_positive']

MAX_THREADS = 1024  # of an inference


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number that is within bounds.

    Args:
        name: Its name, for the message.
        value: The number.
        low: The smallest that is allowed.
        high: The largest.

    Raises:
        UserError: It is another value.

    Example:
        >>> check_count('--threads', 0, 1, 1024)
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: --threads is 0, expected a whole number from 1 to 1024.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise UserError(f'{name} is {value!r}, expected a whole number from {low} to {high}.')
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """Return a number that is above 0 and finite.

    Args:
        name: Its name, for the message.
        value: The number.

    Raises:
        UserError: It is another value.
    """
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise UserError(f'{name} is {value!r}, expected a positive number.')
    return value
