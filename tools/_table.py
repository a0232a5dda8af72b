"""Tables that a sweep writes after every row, whole or not at all"""
import csv
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Sequence

__all__ = ['write_json', 'write_rows']


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Dict[str, Any]]) -> None:
    partial_path = path.with_name(f'{path.name}.part')
    with open(partial_path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial_path, path)


def write_json(path: Path, content: Dict[str, Any]) -> None:
    partial_path = path.with_name(f'{path.name}.part')
    partial_path.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(partial_path, path)
