"""What ends a training run"""
import argparse
from contextlib import contextmanager
from typing import Iterator

import torch

from timm_rs_runtime.errors import UserError, one_line

__all__ = ['TrainingFault', 'name_flags', 'open_device']


class TrainingFault(UserError, RuntimeError):
    """Training cannot continue; the message says why and what may help."""


@contextmanager
def name_flags(args: argparse.Namespace, *flags: str) -> Iterator[None]:
    """Name the flags that a function of timm or torch refuses, by an error of any class.

    Example:
        >>> name_flags(argparse.Namespace(device='gpu'), 'device')(torch.device)('gpu')
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: --device gpu: Expected one of cpu, ...
    """
    try:
        yield
    except UserError:
        raise
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        values = {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
        given = ' '.join(
            f'{flag} {value}' for flag, value in values.items() if value is not False and value not in (None, {}))
        raise UserError(f'{given}: {one_line(e)}') from e


def open_device(args: argparse.Namespace) -> torch.device:
    """Return the device of --device.

    Raises:
        UserError: There is no such device here.
    """
    device = name_flags(args, 'device')(torch.device)(args.device)
    name_flags(args, 'device')(torch.zeros)(1, device=device)
    return device
