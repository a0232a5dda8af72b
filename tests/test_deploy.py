"""The session that runs an exported file"""
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import images, rs_model
from PIL import Image

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_int8, export_resolution, export_switchable  # noqa: E402
from timm_rs_runtime import AdaptiveSession, CascadeSession, ImageError, Session, ort  # noqa: E402
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


def test_files_that_other_tools_have_changed(model, file, tmp_path):
    changed = onnx.load(file)
    changed.metadata_props.add(key='tool.notes', value='')  # as onnxsim does
    for axis in changed.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_value = 48
    onnx.save(changed, tmp_path / 'fixed.onnx')
    opened = Session(tmp_path / 'fixed.onnx', threads=1)
    assert opened.resolutions == (48,) and 'tool.notes' not in opened.metadata
    x = images(48)
    np.testing.assert_allclose(opened.predict(x.numpy()), expected(model, x), rtol=1e-5, atol=1e-5)


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
