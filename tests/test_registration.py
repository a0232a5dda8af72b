"""What importing the package brings"""
import subprocess
import sys

import pytest

PROGRAM = """
import timm_rs.switchable  # before timm, which it needs, and which needs it to register; conftest.py: after timm
import sys, timm
assert 'rs_resnet18' in timm.list_models('rs_*')
timm.create_model('rs_test_resnet')
assert not any('timm_rs' in type(f).__module__ for f in sys.meta_path)
"""


def test_models_are_registered_though_timm_comes_later():
    subprocess.run([sys.executable, '-W', 'ignore', '-c', PROGRAM], check=True)


def test_public_names_are_what_their_modules_define():
    import timm_rs
    from timm_rs.calibrate import add_resolution

    assert timm_rs.add_resolution is add_resolution and timm_rs.calibrate.add_resolution is add_resolution
    assert all(getattr(timm_rs, name) is not None for name in timm_rs.__all__)
    with pytest.raises(ImportError):
        from timm_rs import nonsense  # noqa: F401
