"""timm-rs train"""
from functools import partial

from ._script import run_script

main = partial(run_script, 'train_rs.py')
