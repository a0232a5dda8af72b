"""The examples in docstrings run"""
import doctest
import importlib
import pkgutil

import pytest
import torch

import timm_rs
import timm_rs_runtime

MODULES = [
    m.name for package in (timm_rs, timm_rs_runtime)
    for m in pkgutil.walk_packages(package.__path__, f'{package.__name__}.') if m.name.rpartition('.')[2] != '__main__']


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        if 'the packages of: pip install' in str(e):  # an extra that is not installed
            pytest.skip(str(e))
        raise
    assert doctest.testmod(module, optionflags=flags, extraglobs=dict(torch=torch)).failed == 0
