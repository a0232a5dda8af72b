"""summary.csv: a row per validated epoch, at any time whole"""
import csv
from typing import Any, Dict

from timm_rs_runtime.files import atomic_write

from ..records import read_summary

__all__ = ['append_summary']


def append_summary(path: str, row: Dict[str, Any]) -> None:
    """Add the row of an epoch; rows of it and of later ones are from before a run was resumed, and dropped."""
    rows = [*(r for r in read_summary(path) if r['epoch'] < row['epoch']), row]
    with atomic_write(path, overwrite=True, newline='') as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for r in rows for name in r)))
        writer.writeheader()
        writer.writerows(rows)
