"""What experiments share with benchmarks"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))

from _common import (  # noqa: E402
    add_deployed_arguments,
    create_parser,
    environment,
    print_table,
    shell_command,
    write_json,
    write_results,
)

__all__ = [
    'ROOT', 'add_deployed_arguments', 'create_parser', 'environment', 'print_table', 'shell_command', 'write_json',
    'write_results',
]
