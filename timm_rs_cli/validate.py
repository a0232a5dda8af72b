"""timm-rs validate"""
from functools import partial

from ._script import run_script

main = partial(run_script, 'validate_rs.py')
