"""Tables that a sweep writes after every row, whole or not at all"""
import csv
import json
from pathlib import Path
from typing import Any, Dict, Iterable, Sequence

from timm_rs_runtime.files import atomic_write

__all__ = ['write_json', 'write_rows']


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Dict[str, Any]]) -> None:
    with atomic_write(path, overwrite=True, newline='') as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Dict[str, Any]) -> None:
    with atomic_write(path, overwrite=True) as f:
        f.write(json.dumps(content, indent=2) + '\n')
