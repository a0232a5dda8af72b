"""The examples in docstrings run"""
import doctest
import importlib
import pkgutil

import pytest
import torch

import timm_rs

MODULES = [m.name for m in pkgutil.walk_packages(timm_rs.__path__, 'timm_rs.')]


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=flags, extraglobs=dict(torch=torch)).failed == 0
