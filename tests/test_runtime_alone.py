"""The runtime as it is installed by itself: without torch, in an environment of its own"""
import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from conftest import rs_model
from PIL import Image

pytest.importorskip('onnx')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import Session  # noqa: E402

ROOT = Path(__file__).parents[1]
MOST_MEGABYTES = 250
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(importlib.metadata.distributions(name='pip')), reason='needs pip')]


@pytest.fixture(scope='module')
def python(tmp_path_factory):
    """Return the Python of an environment that holds the runtime and what pip installs for it."""
    folder = tmp_path_factory.mktemp('alone')
    shutil.copytree(  # pip builds in the folder that it installs
        ROOT / 'runtime', folder / 'runtime', ignore=shutil.ignore_patterns('*.egg-info', 'build', '__pycache__'))
    venv.create(folder / 'venv', with_pip=False)
    python = folder / 'venv' / 'bin' / 'python'
    installed = subprocess.run(
        [*pip(python), 'install', '--quiet', './runtime'], cwd=folder, capture_output=True, text=True)
    if installed.returncode and ('No matching distribution' in installed.stderr or 'connection' in installed.stderr):
        pytest.skip(f'pip cannot reach a registry: {installed.stderr.splitlines()[-1]}')
    assert not installed.returncode, installed.stderr
    return python


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Return an exported file and a photograph."""
    folder = tmp_path_factory.mktemp('files')
    export_switchable(rs_model(), str(folder / 'm.onnx'))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)).save(folder / 'a.png')
    return str(folder / 'm.onnx'), str(folder / 'a.png')


def pip(python):
    """Return the command of this environment's pip on another one."""
    return [sys.executable, '-m', 'pip', '--python', python]


def run(python, *argv, code=0):
    found = subprocess.run([python, '-I', *argv], capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    return found.stdout, found.stderr


def test_holds_little(python):
    found = subprocess.run([*pip(python), 'list', '--format', 'json'], capture_output=True, text=True, check=True)
    installed = json.loads(found.stdout)
    names = {package['name'].lower() for package in installed}
    assert {'numpy', 'pillow', 'onnxruntime'} <= names and not {'torch', 'timm', 'onnx'} & names
    (packages,) = python.parents[1].glob('lib/python*/site-packages')
    megabytes = sum(path.lstat().st_size for path in packages.rglob('*')) / 1e6
    print(f'{megabytes:.0f} MB')
    assert megabytes < MOST_MEGABYTES


def test_imports(python):
    program = """
import time
start = time.perf_counter()
from timm_rs_runtime import AdaptiveSession, CascadeSession, Session
print(time.perf_counter() - start)
"""
    seconds, _ = run(python, '-c', program)
    print(f'imported in {float(seconds):.2f} s')


def test_predicts(python, files):
    model, photograph = files
    expected = Session(model, threads=1).predict(photograph, 48)[0].argmax()
    command = ('-m', 'timm_rs_runtime', 'predict', photograph, '--model', model, '--threads', '1', '--json')
    (best, *_) = json.loads(run(python, *command, '--resolution', '48')[0])['top']
    assert best['class'] == expected
    assert json.loads(run(python, *command, '--budget-ms', '1e6')[0])['resolution'] == 64
    _, error = run(python, '-m', 'timm_rs_runtime', 'predict', 'nowhere.jpg', '--model', model, code=1)
    assert error == 'python -m timm_rs_runtime predict: error: nowhere.jpg does not exist, expected an image.\n'


def test_fits_a_cascade_and_answers_by_it(python, files, tmp_path):
    model, photograph = files
    for i in range(10):
        (tmp_path / 'images' / str(i)).mkdir(parents=True)
        shutil.copy(photograph, tmp_path / 'images' / str(i) / 'a.png')
        shutil.copy(photograph, tmp_path / 'images' / str(i) / 'b.png')
    cascade = str(tmp_path / 'c.json')
    run(python, '-m', 'timm_rs_runtime', 'fit-cascade', model, '--data-dir', str(tmp_path / 'images'),
        '--target-madds', '1000', '-o', cascade)
    out, _ = run(python, '-m', 'timm_rs_runtime', 'predict', photograph, '--model', model, '--cascade', cascade)
    assert len(out.splitlines()) == 6
