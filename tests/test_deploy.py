"""The session that runs an exported file"""
import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import break_size, images, rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_int8, export_resolution, export_switchable  # noqa: E402
from timm_rs_runtime import (  # noqa: E402
    AdaptiveSession,
    CascadeSession,
    ClosedError,
    ImageError,
    InferenceError,
    NotFiniteError,
    Session,
    UserError,
    ort,
)
from timm_rs_runtime.predict import Predictor  # noqa: E402
from timm_rs_runtime.session import MODES, ahead  # noqa: E402

RESOLUTIONS = (64, 48, 32)
TINY = dict(channels=[16, 16, 24, 32], stem_width=8)  # of whole and of partly filled blocks


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return rs_model('resnet10t', **TINY)


@pytest.fixture(scope='module')
def file(model, tmp_path_factory):
    path = str(tmp_path_factory.mktemp('session') / 'all.onnx')
    export_switchable(model, path, [f'class {i}' for i in range(10)])
    return path


@pytest.fixture(scope='module')
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp('photograph') / 'a.jpg'
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8))
    coarse.resize((80, 70), Image.Resampling.BICUBIC).save(path)
    return str(path)


def expected(model, x):
    with torch.no_grad():
        return model.at(x.shape[-1])(x).numpy()


@pytest.mark.parametrize('mode', MODES)
def test_logits_of_batches(model, file, mode):
    opened = Session(file, threads=1, mode=mode)
    for n in (1, 3):
        for x in images(*RESOLUTIONS, n=n):
            np.testing.assert_allclose(opened.predict(x.numpy()), expected(model, x), rtol=1e-5, atol=1e-5)


def test_logits_of_images_as_timm_prepares_them(model, file, photograph):
    opened = Session(file, threads=1, decode='exact')
    config = timm.data.resolve_model_data_config(model)
    for resolution in (None, *RESOLUTIONS):
        size = resolution or 64
        transform = timm.data.create_transform(**dict(config, input_size=(3, size, size)))
        x = transform(Image.open(photograph).convert('RGB'))[None]
        np.testing.assert_array_equal(opened.preprocess(photograph, resolution), x[0].numpy())
        logits = expected(model, x)
        with open(photograph, 'rb') as f:
            binary = io.BytesIO(f.read())
        for given in (photograph, Image.open(photograph), binary):
            np.testing.assert_allclose(opened.predict(given, resolution), logits, rtol=1e-5, atol=1e-5)
        several = opened.predict([photograph, Image.open(photograph)], resolution)
        np.testing.assert_allclose(several, np.repeat(logits, 2, 0), rtol=1e-5, atol=1e-5)


def test_sessions_decode_at_the_scale_of_a_size(file, tmp_path):
    """Twice the 73 px that 64 px needs before its crop are 146: 600 / 4 are enough, 600 / 8 not. 32 px: 36, 600 / 8."""
    path = tmp_path / 'large.jpg'
    Image.effect_noise((800, 600), 50).resize((800, 600)).save(path)
    with Session(file, threads=1) as opened:
        assert opened.preprocessing.decode == 'scaled' and opened.preprocessing.crop_pct == 0.875
        assert [opened.read(path, r).size for r in (None, 64, 32)] == [(200, 150), (200, 150), (100, 75)]
        assert Session(file, threads=1, decode='exact').read(path).size == (800, 600)
        scaled = opened.predict(path, 64)
        np.testing.assert_array_equal(opened.predict(opened.read(path, 64), 64), scaled)
        np.testing.assert_array_equal(AdaptiveSession(opened, 1e6).predict(path).logits, scaled)
        np.testing.assert_array_equal(CascadeSession(opened, {32: 1., 64: 0.}).predict(path).logits, scaled)
        np.testing.assert_array_equal(Predictor(file, threads=1)(path)[0], scaled[0])
    exact = Predictor(file, threads=1, decode='exact')(path)[0]
    np.testing.assert_array_equal(exact, pickle.loads(pickle.dumps(
        CascadeSession(file, {64: 0.}, threads=1, decode='exact'))).predict(path).logits[0])
    assert not np.array_equal(exact, scaled[0])


def test_what_a_session_records(model, file):
    opened = Session(file, threads=1, warm_up=False)
    assert opened.resolutions == RESOLUTIONS and opened.num_classes == 10 and opened.batch_size is None
    assert opened.class_names[4] == 'class 4' and list(opened.madds) == list(RESOLUTIONS)
    config = timm.data.resolve_model_data_config(model)
    assert opened.mean == tuple(config['mean']) and opened.std == tuple(config['std'])
    assert 'fast' in repr(opened) and file in repr(opened)


def test_low_memory_holds_one_graph(file):
    opened = Session(file, threads=1, mode='low_memory')
    assert len({id(s) for s in opened._sessions.values()}) == 1
    assert len({id(s) for s in Session(file, threads=1)._sessions.values()}) == len(RESOLUTIONS)



def test_many_images_are_read_while_the_network_runs(file, tmp_path, monkeypatch):
    """40 images in runs of 16, 16 and 8: at least 32 are read before the end of the first, at most 40."""
    paths = []
    for i in range(40):
        paths.append(tmp_path / f'{i}.png')
        Image.effect_noise((40, 40), 50).save(paths[-1])
    opened = Session(file, threads=1)
    one_by_one = np.concatenate([opened.predict(path, 32) for path in paths])
    read, runs, enough = [], [], threading.Event()
    preprocess, run = opened.preprocess, opened._run

    def count(image, resolution):
        read.append(image)
        if len(read) == 32:
            enough.set()
        return preprocess(image, resolution)

    def wait(session, images):
        assert enough.wait(10)
        runs.append(len(images))
        return run(session, images)

    monkeypatch.setattr(opened, 'preprocess', count)
    monkeypatch.setattr(opened, '_run', wait)
    np.testing.assert_allclose(opened.predict(paths, 32), one_by_one, atol=1e-5)
    assert read == paths and runs == [16, 16, 8]
    monkeypatch.undo()
    cascade = CascadeSession(opened, {32: 1., 64: 0.}).predict(paths)
    np.testing.assert_allclose(cascade.logits, opened.predict(paths, 64), atol=1e-5)
    assert cascade.resolutions.tolist() == [64] * 40
    paths[20] = tmp_path / 'missing.png'
    for predict in (opened.predict, CascadeSession(opened, {64: 0.}).predict):
        with pytest.raises(ImageError, match='missing.png does not exist'):
            predict(paths)
    assert not [thread for thread in threading.enumerate() if 'ThreadPool' in thread.name]


def test_one_image_needs_no_thread(file, monkeypatch):
    opened = Session(file, threads=1)
    monkeypatch.setattr(threading.Thread, 'start', lambda self: pytest.fail('a thread'))
    assert opened.predict([Image.new('RGB', (9, 9))] * 16).shape[0] == 16


def test_few_items_are_made_ahead():
    made = []

    def make():
        for i in range(9):
            if i == 6:
                raise ImageError('6')
            made.append(i)
            yield i

    found = []
    with pytest.raises(ImageError, match='^6$'):
        for i in ahead(make()):
            assert len(made) <= i + 3  # this one and two more
            found.append(i)
    assert found == made == list(range(6))
    assert next(ahead(iter(range(10 ** 9)))) == 0  # and left
    assert list(ahead([])) == []


def test_threads_share_a_session(model, file):
    opened = Session(file, threads=1)
    batches = images(*RESOLUTIONS) * 8
    with ThreadPoolExecutor(8) as pool:
        for x, logits in zip(batches, pool.map(lambda x: opened.predict(x.numpy()), batches)):
            np.testing.assert_allclose(logits, expected(model, x), rtol=1e-5, atol=1e-5)


def test_warm_up_runs_every_size(file, monkeypatch):
    seen = []
    run = ort.run
    monkeypatch.setattr(
        ort, 'run', lambda session, inputs, name: seen.append(inputs['images'].shape) or run(session, inputs, name))
    Session(file, threads=1)
    assert seen == [(1, 3, r, r) for r in RESOLUTIONS]
    Session(file, threads=1, warm_up=False)
    assert len(seen) == 3


@pytest.mark.parametrize('mode', MODES)
def test_int8(model, photograph, tmp_path, mode):
    path = str(tmp_path / 'int8.onnx')
    export_int8(model, path, [photograph])
    opened = Session(path, threads=1, mode=mode)
    for resolution in RESOLUTIONS:
        logits = expected(model, torch.from_numpy(opened.preprocess(photograph, resolution))[None])
        assert np.abs(opened.predict(photograph, resolution) - logits).max() < 0.3 * logits.std()


def test_one_size_and_fixed_batches(model, tmp_path):
    path = str(tmp_path / 'one.onnx')
    export_resolution(model, 48, path, batch_size=2)
    opened = Session(path, threads=1)
    x = images(48)
    assert opened.resolutions == (48,) and opened.batch_size == 2
    np.testing.assert_allclose(opened.predict(x.numpy()), expected(model, x), rtol=1e-5, atol=1e-5)
    for count in (1, 3, 5):
        x = images(48, n=count)
        np.testing.assert_allclose(opened.predict(x.numpy()), expected(model, x), rtol=1e-5, atol=1e-5)


def test_channels_that_are_no_image(tmp_path, photograph):
    model = rs_model(in_chans=4)
    path = str(tmp_path / 'four.onnx')
    export_switchable(model, path)
    opened = Session(path, threads=1)
    x = torch.randn(2, 4, 48, 48)
    np.testing.assert_allclose(opened.predict(x.numpy()), expected(model, x), rtol=1e-5, atol=1e-5)
    for use in (opened.predict, lambda _: AdaptiveSession(opened, 100), lambda _: Predictor(opened),
                lambda _: CascadeSession(opened, {48: 0.})):
        with pytest.raises(ImageError, match='four.onnx takes 4 channels, expected float32 arrays instead of images'):
            use(photograph)
    with pytest.raises(ValueError, match='measured on images, but .*test_resnet takes 4 channels'):
        export_int8(model, str(tmp_path / 'int8.onnx'), [photograph])


def test_nothing_in_nothing_out(file):
    opened = Session(file, threads=1)
    assert opened.predict([]).shape == (0, 10)
    assert opened.predict(np.zeros((0, 3, 48, 48), np.float32)).shape == (0, 10)


# What is refused

@pytest.mark.parametrize('given, resolution, message', [
    (np.zeros((1, 3, 40, 40), np.float32), None, 'batch of 40x40, expected 64x64, 48x48, 32x32'),
    (np.zeros((1, 3, 48, 64), np.float32), None, 'batch of 48x64'),
    (np.zeros((1, 3, 48, 48), np.float32), 32, 'batch of 48x48, expected 32x32'),
    (np.zeros((3, 48, 48), np.float32), None, r'float32 \[3, 48, 48\], expected float32 \[N, 3, H, W\]'),
    (np.zeros((1, 48, 48, 3), np.uint8), None, 'array of uint8'),
    (np.zeros((1, 1, 48, 48), np.float32), None, r'expected float32 \[N, 3'),
    (['nowhere.jpg'], 40, 'Unknown resolution 40'),
])
def test_unusable_input(file, given, resolution, message):
    with pytest.raises(ValueError, match=message):
        Session(file, threads=1, warm_up=False).predict(given, resolution)


def test_a_bad_image_is_named_and_others_are_served(file, photograph, tmp_path):
    opened = Session(file, threads=1)
    (tmp_path / 'bad.jpg').write_text('nothing')
    with pytest.raises(ImageError, match='bad.jpg is not an image'):
        opened.predict([photograph, tmp_path / 'bad.jpg'])
    assert opened.predict(photograph).shape == (1, 10)


def test_failures_of_the_runtime_are_told(file, monkeypatch):
    class Broken:
        def run(self, *_):
            raise MemoryError('Failed to allocate memory\nand more')

    opened = Session(file, threads=1)
    monkeypatch.setitem(opened._sessions, 64, Broken())
    with pytest.raises(InferenceError, match=r'a batch of \(1, 3, 64, 64\) .*: Failed to allocate memory and more$'):
        opened.predict(np.zeros((1, 3, 64, 64), np.float32))
    assert opened.predict(np.zeros((1, 3, 48, 48), np.float32)).shape == (1, 10)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_other_files_are_refused(model, tmp_path):
    (tmp_path / 'text.onnx').write_text('no model')
    torch.onnx.export(
        model.at(32), (images(32),), str(tmp_path / 'foreign.onnx'), dynamo=False, input_names=['images'])
    for name, message in (('text.onnx', 'is not an ONNX file'), ('foreign.onnx', 'metadata lack resolutions'),
                          ('missing.onnx', 'does not exist')):
        with pytest.raises(ValueError, match=f'{name} .*{message}|{name} {message}'):
            Session(tmp_path / name)


def test_files_with_tensors_elsewhere_are_refused(file, tmp_path):
    import onnx

    onnx.save(onnx.load(file), tmp_path / 'a.onnx', save_as_external_data=True, location='a.data', size_threshold=0)
    with pytest.raises(ValueError, match='a.onnx keeps tensors in other files, expected one file'):
        Session(tmp_path / 'a.onnx')


@pytest.mark.parametrize('arguments, message', [
    (dict(mode='quick'), "Unknown mode 'quick', expected 'fast' or 'low_memory'"),
    (dict(threads=0), 'threads is 0, expected an integer from 1 to 1024'),
    (dict(threads=10 ** 9), 'threads is 1000000000'),
    (dict(threads='2'), "threads is '2'"),
])
def test_unusable_arguments(file, arguments, message):
    with pytest.raises(ValueError, match=message):
        Session(file, **arguments)


def test_runs_where_there_is_no_torch(file, photograph):
    program = f"""
import sys
sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'onnx', 'safetensors', 'huggingface_hub']))
from timm_rs_runtime import Session
for mode in ('fast', 'low_memory'):
    print(Session({file!r}, threads=1, mode=mode).predict({photograph!r}, 48).shape)
assert not any(name.startswith('timm.') for name in sys.modules)
"""
    result = subprocess.run([sys.executable, '-c', program], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout == '(1, 10)\n' * 2


# Logits that are not finite

@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    """Return a network of which 48 px are broken."""
    path = str(tmp_path_factory.mktemp('broken') / 'broken.onnx')
    export_switchable(rs_model(), path)
    break_size(path, RESOLUTIONS.index(48))
    return path


@pytest.mark.parametrize('mode', MODES)
def test_not_finite_logits_are_an_error(broken, photograph, mode):
    opened = Session(broken, threads=1, mode=mode)
    assert np.isfinite(opened.predict(photograph, 64)).all()
    with pytest.raises(NotFiniteError) as e:
        opened.predict([photograph, Image.open(photograph)], 48)
    assert str(e.value) == (
        f'{broken} at 48 px answers with logits that are not finite numbers: {photograph}, {photograph}.')
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_the_broken_images_of_a_batch_are_named(file):
    x = images(48, n=3).numpy()
    x[1, 0, 0, 0] = np.inf
    with pytest.raises(NotFiniteError, match='at 48 px .* finite numbers: image 1 of the batch.$') as e:
        Session(file, threads=1).predict(x)
    assert np.isfinite(e.value.logits).all(1).tolist() == [True, False, True]


# How it ends, and where it goes

def test_close(file, photograph):
    with Session(file, threads=1) as opened:
        assert opened.predict(photograph).shape == (1, 10)
    for call in (opened.predict, lambda _: opened.warm_up(), lambda _: pickle.dumps(opened)):
        with pytest.raises(ClosedError, match='all.onnx.* was closed, open another one'):
            call(photograph)
    opened.close()
    assert opened.resolutions == RESOLUTIONS and file in repr(opened)


def test_what_runs_at_close_is_answered(file, monkeypatch):
    opened = Session(file, threads=1)
    run = ort.run

    def close_and_run(*args):
        opened.close()
        return run(*args)

    monkeypatch.setattr(ort, 'run', close_and_run)
    assert opened.predict(np.zeros((2, 3, 48, 48), np.float32)).shape == (2, 10)


@pytest.mark.parametrize('duplicate', (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))))
def test_copies_are_sessions_of_their_own(file, photograph, duplicate, monkeypatch):
    monkeypatch.chdir(os.path.dirname(file))
    opened = Session('all.onnx', threads=1, mode='low_memory')
    monkeypatch.chdir('/')
    other = duplicate(opened)
    logits = opened.predict(photograph)
    opened.close()
    assert other.mode == 'low_memory'
    np.testing.assert_array_equal(other.predict(photograph), logits)


def test_what_wraps_a_session_is_copied_too(file, photograph):
    for opened in (AdaptiveSession(file, 1e6, max_queue=3, threads=1, patience=2),
                   CascadeSession(file, {48: 0.5, 64: 0.}, threads=1)):
        other = pickle.loads(pickle.dumps(opened))
        np.testing.assert_allclose(other.predict(photograph).logits, opened.predict(photograph).logits, atol=1e-5)
        opened.close()
        with pytest.raises(ClosedError, match='was closed'):
            opened.predict(photograph)
        with pytest.raises(ClosedError):
            opened.session.predict(photograph)
    with CascadeSession(Session(file, threads=1), {64: 0.}) as given:
        pass
    assert given.session.predict(photograph).shape == (1, 10)  # it is closed by its owner


@pytest.mark.parametrize('threads', (1, 2))
def test_forked_processes_answer_and_end(file, photograph, threads):
    """While a thread of the parent is inside a session, and another holds the place in its line."""
    program = f"""
import os, sys, threading, time
from timm_rs_runtime import AdaptiveSession, CascadeSession, Session
session = Session({file!r}, threads={threads})
services = [session, AdaptiveSession(session, 1e6), CascadeSession(session, {{48: 1., 64: 0.}})]
expected = session.predict({photograph!r}).argmax()
def work(service):
    while True:
        service.predict({photograph!r})
for service in services:
    threading.Thread(target=work, args=(service,), daemon=True).start()
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        for service in services:
            answer = service.predict({photograph!r})
            assert getattr(answer, 'logits', answer).argmax() == expected
        assert sum(services[1].stats()['requests'].values()) == 1
        sys.exit(7)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
print(codes, flush=True)
os._exit(0)
"""
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, text=True, timeout=240)
    assert process.stdout == f'{[7] * 8}\n'


def test_contacts_nobody():
    """ONNX Runtime from 1.29 on would report its use, from a thread of its own."""
    program = """
import numpy, os
before = len(os.listdir('/proc/self/task'))
import timm_rs_runtime
print(os.environ['ORT_DISABLE_TELEMETRY'], len(os.listdir('/proc/self/task')) - before)
"""
    result = subprocess.run([sys.executable, '-c', program], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout == '1 0\n'


# Bounds

def test_more_threads_than_cores_come_back(file, photograph):
    start = time.monotonic()
    assert Session(file, threads=64).predict(photograph).shape == (1, 10)
    assert time.monotonic() - start < 60


def test_opens_names_only():
    with pytest.raises(UserError, match='Got bytes, expected the name of a file of timm-rs export'):
        Session(b'onnx')


def test_images_of_a_request_are_bounded(file):
    opened = Session(file, threads=1)
    with pytest.raises(UserError, match='number of images is 4097, expected an integer from 0 to 4096'):
        opened.predict('a.jpg' for _ in itertools.count())
    with pytest.raises(ImageError, match='Got NoneType, expected images'):
        opened.predict(None)


def test_pipes_are_refused_at_once(file, tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    opened = Session(file, threads=1)
    for call in (opened.predict, AdaptiveSession(opened, 1e6).predict, CascadeSession(opened, {48: 0.}).predict):
        with pytest.raises(ImageError, match='pipe.png is not a regular file, expected an image'):
            call(tmp_path / 'pipe.png')
