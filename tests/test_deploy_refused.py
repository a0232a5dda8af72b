"""What a session refuses, and answers that are not finite"""
import pickle

import numpy as np
import pytest
import torch
from conftest import break_size, images, rs_model
from PIL import Image
from test_deploy import RESOLUTIONS, expected, file, model, photograph  # noqa: F401

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import ImageError, InferenceError, NotFiniteError, Session  # noqa: E402
from timm_rs_runtime.session import MODES  # noqa: E402

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
