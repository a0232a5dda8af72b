"""What the commands share that read a folder of images"""
import argparse
from typing import Optional

from ..unreadable import MAX_UNREADABLE

__all__ = ['add_images', 'print_read']


def add_images(parser: argparse.ArgumentParser, what: str, split: str, most: Optional[int]) -> None:
    """Add the flags that say which images to read.

    Args:
        parser: Parser of the command.
        what: The images, for the help.
        split: Split that is read by default.
        most: Number of images that are read by default, all if None.
    """
    add = parser.add_argument
    add('--data-dir', metavar='DIR', help=f'{what}: a folder, or one that holds its splits')
    add('--split', default=split, metavar='NAME', help='split to read, where DIR holds splits (default: %(default)s)')
    add('--images', type=int, default=most, metavar='N',
        help=f"use at most N images (default: {most or 'all'})")
    add('--max-unreadable', type=int, default=MAX_UNREADABLE, metavar='N',
        help='images that may be left out because they cannot be read (default: %(default)s)')


def print_read(count: int, unreadable: int, folder: str) -> None:
    """Print how many images were read, and where."""
    left_out = f', {unreadable} more cannot be read' if unreadable else ''
    print(f'Read {count:,} images of {folder}{left_out}.')
