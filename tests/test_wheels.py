"""What is built: two wheels that install together"""
import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ('timm_rs', 'timm_rs_cli', 'runtime')
pytestmark = [
    pytest.mark.slow,
    # Importing pip would take setuptools' distutils from tests that compile.
    pytest.mark.skipif(not any(importlib.metadata.distributions(name='pip')), reason='needs pip')]


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    """Return the two wheels, built from a copy of the sources."""
    source, output = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    ignored = shutil.ignore_patterns('__pycache__', '*.egg-info', 'build')
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in (p for p in ROOT.iterdir() if p.is_file()):
        shutil.copy(path, source)
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation', '-w', output,
         './runtime', '.'],
        cwd=source, check=True)
    return {path.name.split('-')[0]: path for path in output.iterdir()}


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if '.dist-info/' not in name}


def metadata_of(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        found = (n for n in archive.namelist() if '.dist-info/' in n and n.endswith(f'/{name}'))
        return archive.read(next(found)).decode()


def files_in(folder, *packages):
    paths = (path for package in packages for path in (folder / package).rglob('*') if path.is_file())
    return {str(path.relative_to(folder)) for path in paths if '__pycache__' not in path.parts}


def test_each_holds_all_of_its_files_and_none_of_the_others(wheels):
    assert set(wheels) == {'timm_rs', 'timm_rs_runtime'}
    assert files_of(wheels['timm_rs_runtime']) == files_in(ROOT / 'runtime', 'timm_rs_runtime')
    scripts = {name for name in files_of(wheels['timm_rs']) if '.data/scripts/' in name}
    assert {name.rpartition('/')[2] for name in scripts} == {'distributed_train.sh', 'train_rs.py', 'validate_rs.py'}
    assert files_of(wheels['timm_rs']) - scripts == files_in(ROOT, 'timm_rs', 'timm_rs_cli')


def test_they_are_of_one_version_and_bring_their_license(wheels):
    version = metadata_of(wheels['timm_rs_runtime'], 'METADATA').split('\nVersion: ')[1].split()[0]
    assert f'Requires-Dist: timm_rs_runtime=={version}\n' in metadata_of(wheels['timm_rs'], 'METADATA')
    for wheel in wheels.values():
        assert metadata_of(wheel, 'LICENSE') == (ROOT / 'LICENSE').read_text()


PROGRAM = """
import sys
import timm, timm_rs, timm_rs_cli, timm_rs_runtime
for package in (timm_rs, timm_rs_cli, timm_rs_runtime):
    assert package.__file__.startswith(sys.argv[1]), package
timm.create_model('rs_resnet10t.imagenette', pretrained=True)
for name in timm_rs_cli.COMMANDS:
    try:
        timm_rs_cli.main([name, '--help'])
    except SystemExit as e:
        assert not e.code, name
"""


def test_they_work_together(wheels, tmp_path):
    for wheel in wheels.values():
        zipfile.ZipFile(wheel).extractall(tmp_path)
    entry_points = configparser.ConfigParser()
    entry_points.read_string(metadata_of(wheels['timm_rs'], 'entry_points.txt'))
    assert dict(entry_points['console_scripts']) == {'timm-rs': 'timm_rs_cli:main'}
    subprocess.run(
        [sys.executable, '-c', PROGRAM, str(tmp_path)], env=dict(os.environ, PYTHONPATH=str(tmp_path)), cwd=tmp_path,
        check=True, stdout=subprocess.DEVNULL)
