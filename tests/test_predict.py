"""The command that answers images"""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from command_lines import fails
from conftest import break_size, rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_cli import main  # noqa: E402
from timm_rs_runtime import Cascade, Session, UserError  # noqa: E402
from timm_rs_runtime.cascade import softmax, write_cascade  # noqa: E402
from timm_rs_runtime.predict import Predictor, top  # noqa: E402


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('predict') / 'all.onnx')
    export_switchable(
        rs_model('resnet10t', channels=[8, 8, 16, 16], stem_width=8), path, [f'class {i}' for i in range(10)])
    return path


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two photographs and a broken one."""
    noise = np.random.default_rng(0)
    for name in ('a.png', 'b.jpg'):
        Image.fromarray(noise.integers(0, 256, (70, 80, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / 'broken.jpg').write_bytes((tmp_path / 'b.jpg').read_bytes()[:900])
    (tmp_path / 'notes.txt').write_text('no image')
    return tmp_path


def predict(capsys, *argv, code=None):
    """Return lines of stdout and stderr."""
    argv = ['predict', '--threads', '1', *map(str, argv)]
    if code is None:
        main(argv)
    else:
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == code
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


@pytest.mark.parametrize('image, code', [('a.png', 0), ('broken.jpg', 1)])
def test_runs_where_there_is_no_torch(file, folder, image, code):
    program = f"""
import sys
import threading
sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'onnx', 'safetensors', 'huggingface_hub']))
from timm_rs_cli import main
main(['predict', {str(folder / image)!r}, '--model', {file!r}, '--threads', '1'])
"""
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert result.returncode == code
    assert len(result.stdout.splitlines()) == (0 if code else 6) and len(result.stderr.splitlines()) == code


def test_top_classes(file, folder, capsys):
    lines, errors = predict(capsys, folder / 'a.png', '--model', file, '--resolution', 48, '--top', 3)
    probabilities = softmax(Session(file, threads=1).predict(folder / 'a.png', 48)[0])
    assert not errors and lines[0].startswith(f"{folder / 'a.png'}: 48 px, ") and lines[0].endswith(' ms')
    best = np.argsort(-probabilities)[:3]
    assert [line.split() for line in lines[1:]] == [[f'{probabilities[i]:.2%}', 'class', str(i)] for i in best]


def test_the_largest_size_and_five_classes_by_default(file, folder, capsys):
    lines, _ = predict(capsys, folder / 'a.png', '--model', file)
    assert ': 64 px,' in lines[0] and len(lines) == 6


def test_decode(file, folder, tmp_path, capsys):
    Image.effect_noise((800, 600), 50).save(tmp_path / 'a.jpg')
    rows = {}
    for decode in ('scaled', 'fast', 'exact'):
        (line,), _ = predict(capsys, tmp_path / 'a.jpg', '--model', file, '--json', '--decode', decode)
        logits = Session(file, threads=1, decode=decode).predict(tmp_path / 'a.jpg')[0]
        rows[decode] = json.loads(line)['top']
        assert rows[decode] == top(logits, [f'class {i}' for i in range(10)])
    assert rows['scaled'] != rows['exact']


def test_one_error_line_for_a_broken_image(file, folder, capsys):
    lines, (error,) = predict(
        capsys, folder / 'a.png', folder / 'broken.jpg', folder / 'b.jpg', '--model', file, code=1)
    assert [line.split(':')[0] for line in lines[::6]] == [str(folder / 'a.png'), str(folder / 'b.jpg')]
    assert error.startswith('timm-rs predict: error: ') and 'broken.jpg cannot be read as an image' in error


def test_names_that_are_no_text(file, folder):
    name = os.fsencode(folder) + b'/caf\xe9.png'
    shutil.copy(folder / 'a.png', name)
    result = subprocess.run(
        [sys.executable, '-m', 'timm_rs_cli', 'predict', name, folder / 'a.png', '--model', file, '--threads', '1'],
        env=dict(os.environ, PYTHONIOENCODING='utf-8:strict', PYTHONUTF8='1'), capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr
    assert len(result.stdout.splitlines()) == 12 and 'caf\\udce9.png: 64 px' in result.stdout


def test_folders_and_json(file, folder, capsys):
    lines, errors = predict(capsys, folder, folder / 'nowhere.jpg', '--json', '--model', file, code=1)
    rows = [json.loads(line) for line in lines]
    assert not errors
    assert [row['image'].rpartition('/')[2] for row in rows] == ['a.png', 'b.jpg', 'broken.jpg', 'nowhere.jpg']
    assert ['error' in row for row in rows] == [False, False, True, True]
    assert rows[0]['resolution'] == 64 and rows[0]['milliseconds'] > 0 and len(rows[0]['top']) == 5
    logits = Session(file, threads=1).predict(folder / 'a.png')[0]
    assert rows[0]['top'] == top(logits, [f'class {i}' for i in range(10)])
    assert 'nowhere.jpg does not exist' in rows[3]['error']


@pytest.mark.parametrize('size', [('--resolution', '64'), ('--cascade',)])
def test_the_next_images_are_read_meanwhile(file, tmp_path, capsys, monkeypatch, size):
    """The second is read before the first is answered, the fourth is not."""
    if size == ('--cascade',):
        write_cascade(tmp_path / 'c.json', Cascade({32: 1., 64: 0.}))
        size = (*size, tmp_path / 'c.json')
    names, read, seen, second = 'abcdef', [], [], threading.Event()
    for name in names:
        Image.effect_noise((40, 40), 50).save(tmp_path / f'{name}.png')
    (tmp_path / 'c.png').write_text('nothing')

    def count(self, image, read_one=Predictor.read):
        read.append(image[-5])
        if len(read) == 2:
            second.set()
        return read_one(self, image)

    def answer(self, image, answer_one=Predictor.__call__):
        assert second.wait(10)
        seen.append(len(read))
        return answer_one(self, image)

    monkeypatch.setattr(Predictor, 'read', count)
    monkeypatch.setattr(Predictor, '__call__', answer)
    lines, errors = predict(capsys, tmp_path, '--model', file, *size, '--json', code=1)
    rows = [json.loads(line) for line in lines]
    assert [row['image'][-5] for row in rows] == read == list(names)
    assert ['error' in row for row in rows] == [False, False, True, False, False, False]
    assert 2 <= seen[0] <= 3 and max(seen) == 6


def test_an_empty_folder_is_an_error(file, tmp_path, capsys):
    lines, (error,) = predict(capsys, tmp_path, '--model', file, code=1)
    assert not lines and 'holds no images' in error


@pytest.mark.parametrize('content', ('image', 'text'))
def test_standard_input(file, folder, capsys, monkeypatch, content):
    name = 'a.png' if content == 'image' else 'notes.txt'
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO((folder / name).read_bytes())))
    lines, errors = predict(capsys, '-', folder / 'a.png', '--model', file, code=None if content == 'image' else 1)
    if content == 'image':
        assert lines[0].startswith('standard input: 64 px') and lines[1:6] == lines[7:]
    else:
        (error,) = errors
        assert error.startswith('timm-rs predict: error: standard input is not an image, expected one of JPEG, ')
        assert len(lines) == 6


INTERRUPTED = """
import io, os, signal, sys
from timm_rs_cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background of a script ignores

class Stdin(io.RawIOBase):
    def readable(self):
        return True

    def readinto(self, buffer):
        print('reading', flush=True)
        return os.readv(0, [buffer])

sys.stdin = io.TextIOWrapper(io.BufferedReader(Stdin()))
main(sys.argv[1:])
"""


def test_standard_input_and_output_that_are_closed(file, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    _, (error,) = predict(capsys, '-', '--model', file, code=1)
    assert error.endswith('Standard input is closed, expected an image.')
    monkeypatch.setattr(sys, 'stdout', None)
    main(['predict', str(folder / 'a.png'), '--model', str(file)])


def test_two_ways_to_choose_a_size(file):
    with pytest.raises(UserError, match='Got resolution 32 and budget_ms 20, expected one of resolution, budget_ms, '):
        Predictor(file, resolution=32, budget_ms=20)


def test_folders_that_cannot_be_read_are_named(file, tmp_path, capsys, monkeypatch):
    (tmp_path / 'closed').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    _, (error,) = predict(capsys, tmp_path, '--model', file, code=1)
    assert 'closed cannot be read, its images would be left out: Permission denied' in error


def test_an_interrupt_ends_waiting_for_standard_input(file):
    with subprocess.Popen(
            [sys.executable, '-c', INTERRUPTED, 'predict', '-', '--model', file], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == 'reading\n'
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == 'timm-rs predict: interrupted.\n'
        finally:
            process.kill()


def test_a_pipe_is_refused_at_once(file, folder, capsys):
    os.mkfifo(folder / 'pipe.png')
    lines, (error,) = predict(capsys, folder / 'pipe.png', folder / 'a.png', '--model', file, code=1)
    assert len(lines) == 6
    assert error == f"timm-rs predict: error: {folder / 'pipe.png'} is not a regular file, expected an image."


def test_no_answer_is_not_a_number(folder, capsys, tmp_path):
    """A network of which 48 px are broken answers at 64 px; a cascade goes on to them."""
    path = tmp_path / 'broken.onnx'
    export_switchable(rs_model(), str(path))
    break_size(path, 1)
    image = folder / 'a.png'
    lines, errors = predict(capsys, image, '--model', path, '--resolution', 64)
    assert len(lines) == 6 and not errors
    lines, (error,) = predict(capsys, image, '--model', path, '--resolution', 48, code=1)
    assert not lines and error == (
        f'timm-rs predict: error: {path} at 48 px answers with logits that are not finite numbers: {image}.')
    (line,), errors = predict(capsys, image, '--json', '--model', path, '--resolution', 48, code=1)
    assert not errors and 'not finite' in json.loads(line, parse_constant=pytest.fail)['error']
    for thresholds, code in (({48: 0.5, 64: 0.}, None), ({48: 0.}, 1)):
        write_cascade(tmp_path / 'c.json', Cascade(thresholds), overwrite=True)
        lines, errors = predict(capsys, image, '--cascade', tmp_path / 'c.json', '--model', path, code=code)
        assert ((': 64 px,' in lines[0]) if code is None else 'not finite' in errors[0])


def test_budgets(file, folder, capsys):
    lines, errors = predict(capsys, folder / 'a.png', '--budget-ms', 1e6, '--model', file)
    assert ': 64 px,' in lines[0] and not errors
    lines, (line,) = predict(capsys, folder / 'a.png', '--budget-ms', 1e-3, '--model', file)
    assert ': 32 px,' in lines[0] and len(lines) == 6
    assert line.startswith('timm-rs predict: A budget of 0.001 ms is below the')


def test_cascades(file, folder, capsys, tmp_path):
    for thresholds, resolution in (({32: 0., 64: 0.}, 32), ({32: 1., 64: 0.}, 64)):
        write_cascade(tmp_path / f'{resolution}.json', Cascade(thresholds))
        lines, _ = predict(capsys, folder / 'a.png', '--cascade', tmp_path / f'{resolution}.json', '--model', file)
        assert f': {resolution} px,' in lines[0]


@pytest.mark.parametrize('arguments, code, message', [
    (['--resolution', '40'], 1, 'Unknown resolution 40'),
    (['--budget-ms', '-1'], 1, 'budget_ms is -1.0, expected a finite number above 0'),
    (['--cascade', 'nowhere.json'], 1, 'nowhere.json does not exist'),
    (['--top', '0'], 1, '--top is 0'),
    (['--budget-ms', '5', '--resolution', '64'], 2, 'not allowed with argument'),
])
def test_unusable_arguments(file, capsys, arguments, code, message):
    lines, (error,) = predict(capsys, 'a.png', '--model', file, *arguments, code=code)
    assert not lines and message in error


def test_another_file_is_refused(capsys, tmp_path):
    (tmp_path / 'text.onnx').write_text('no model')
    _, (error,) = predict(capsys, 'a.png', '--model', tmp_path / 'text.onnx', code=1)
    assert 'text.onnx is not an ONNX file' in error


@pytest.mark.parametrize('flags, message', [
    ('--output out', '--output needs --ray'),
    ('--workers 2', '--workers needs --ray'),
    ('--ray', '--ray takes one source, and --output'),
    ('--ray --output out --json', '--ray does not go with --json: it writes Parquet'),
    ('--ray --output out --threads 2', '--ray does not go with --threads'),
])
def test_flags_of_ray(flags, message, capfd):
    assert message in fails(main, ['predict', 'photo.jpg', '--model', 'm.onnx', *flags.split()], capfd)
