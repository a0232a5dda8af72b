"""summary.csv: a row per validated epoch, at any time whole"""
import csv
from typing import Any, Dict, List

from timm_rs_runtime.files import atomic_write

from ..records import read_summary

__all__ = ['append_summary', 'trim_summary']


def append_summary(path: str, row: Dict[str, Any]) -> None:
    """Add a row."""
    _write(path, [*read_summary(path), row])


def trim_summary(path: str, epoch: int) -> None:
    """Drop the rows of an epoch and of all later ones, which will be trained again."""
    rows = read_summary(path)
    kept = [row for row in rows if row['epoch'] < epoch]
    if len(kept) < len(rows):
        _write(path, kept)


def _write(path: str, rows: List[Dict[str, Any]]) -> None:
    with atomic_write(path, overwrite=True, newline='') as f:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)
