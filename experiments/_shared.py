"""What experiments share with benchmarks"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))

from _common import *  # noqa: E402, F403
