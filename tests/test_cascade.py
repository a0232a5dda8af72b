"""Cascades: what they answer, and how thresholds are fitted"""
import numpy as np
import pytest
import torch
from conftest import images, rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import Cascade, CascadeSession, ImageError, NotFiniteError, Session  # noqa: E402
from timm_rs_runtime.cascade import read_cascade, softmax, write_cascade  # noqa: E402
from timm_rs_runtime.fitting import collect_logits, label_folders  # noqa: E402
from timm_rs_runtime.predict import Predictor  # noqa: E402

RESOLUTIONS = (64, 48, 32)
MADDS = {96: 1, 160: 3, 224: 6}


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('cascade') / 'all.onnx')
    model = rs_model('resnet10t', channels=[8, 8, 16, 16], stem_width=8)
    model.fc.weight.data.normal_()
    with torch.no_grad():  # sure of some images, not of all
        model.fc.weight /= max(model.at(r)(images(r)).abs().max() for r in RESOLUTIONS) / 6
    export_switchable(model, path, ['apple', 'pear', *(f'class {i}' for i in range(8))])
    return path


@pytest.fixture(scope='module')
def session(file):
    return Session(file, threads=1)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Return a folder of 12 photographs of two classes."""
    folder = tmp_path_factory.mktemp('photographs')
    noise = np.random.default_rng(0)
    for i in range(12):
        path = folder / ('pear', 'apple')[i % 2] / f'{i:02}.png'
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(noise.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((80, 70), Image.Resampling.BICUBIC).save(path)
    return folder


# What it answers

@pytest.mark.parametrize('average', (False, True))
def test_unsure_images_go_on(session, photographs, average):
    paths, _ = label_folders(photographs, session)
    logits, _ = collect_logits(session, paths, batch_size=5)
    thresholds = {32: np.median(softmax(logits[32]).max(-1)), 48: 0.6, 64: 0.}
    found = CascadeSession(session, Cascade(thresholds, average)).predict(paths)
    for i in range(len(paths)):  # one image at a time, by hand
        passed, spent = [], 0
        for r, threshold in thresholds.items():
            passed.append(logits[r][i])
            spent += session.madds[r]
            answer = np.mean(passed, 0) if average else passed[-1]
            exponentials = np.exp(answer - answer.max())
            if exponentials.max() / exponentials.sum() >= threshold:
                break
        np.testing.assert_allclose(found.logits[i], answer, rtol=1e-4, atol=1e-4)
        assert (found.resolutions[i], found.madds[i]) == (r, spent)
    assert len(set(found.resolutions)) > 1


def test_a_batch_runs_only_what_is_unsure(session, photographs, monkeypatch):
    paths, _ = label_folders(photographs, session)
    sure = softmax(session.predict(paths, 32)).max(-1)
    threshold = np.sort(sure)[3:5].mean()  # 4 are below
    ran = []
    predict = Session.predict
    monkeypatch.setattr(
        Session, 'predict', lambda self, x, r: ran.append((r, len(x))) or predict(self, x, r))
    CascadeSession(session, {32: threshold, 64: 0.}).predict(paths)
    assert ran == [(32, 12), (64, 4)]
    ran.clear()
    CascadeSession(session, {32: 0., 64: 0.}).predict(paths)
    assert ran == [(32, 12)]


def test_one_image_and_none(session, photographs):
    cascade = CascadeSession(session, {48: 1., 64: 0.})
    path = next(iter(photographs.glob('*/*.png')))
    found = cascade.predict(path)
    np.testing.assert_allclose(found.logits, session.predict(path, 64), rtol=1e-5)
    assert found.resolutions.tolist() == [64] and found.madds[0] == session.madds[48] + session.madds[64]
    assert cascade.predict([]).logits.shape == (0, 10)
    assert 'thresholds={48: 1.0, 64: 0.0}' in repr(cascade)


class Scripted:
    """Answers images, whose grey value is their index, with logits that are written down by resolution."""
    path, num_classes, mean, madds = 'm.onnx', 2, (0.5,), {32: 1, 48: 10, 64: 100}

    def __init__(self, logits):
        self.logits = {r: np.array(rows, np.float32) for r, rows in logits.items()}

    def check_resolution(self, resolution):
        return resolution

    def check_classifies(self):
        pass

    def read(self, image, resolution):
        return image

    def predict(self, images, resolution):
        found = self.logits[resolution][[image.getpixel((0, 0)) for image in images]]
        if not np.isfinite(found).all():
            raise NotFiniteError(self.path, resolution, found, [image.filename for image in images])
        return found


def numbered(count):
    found = [Image.new('L', (4, 4), i) for i in range(count)]
    for i, image in enumerate(found):
        image.filename = f'{i}.png'
    return found


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('average', (False, True))
def test_answers_that_are_not_finite_do_not_count(average):
    """Image 0 is sure at once, 1 broken at the first size, 2 unsure there and broken at the second."""
    logits = {32: [[9, 0], [NAN, 0], [2, 1]], 48: [[0, 0], [8, 0], [-INF, 0]], 64: [[0, 0], [0, 0], [0, 5]]}
    found = CascadeSession(Scripted(logits), Cascade({32: 0.9, 48: 0.9, 64: 0.}, average)).predict(numbered(3))
    assert found.resolutions.tolist() == [32, 48, 64] and found.madds.tolist() == [1, 11, 111]
    np.testing.assert_array_equal(found.logits, [[9, 0], [8, 0], [1, 3] if average else [0, 5]])


def test_an_image_fails_whose_last_answer_is_not_finite():
    logits = {32: [[0, 0], [0, 0]], 64: [[9, 0], [NAN, NAN]]}
    session = CascadeSession(Scripted(logits), {32: 0.9, 64: 0.})
    with pytest.raises(NotFiniteError, match='m.onnx at 64 px answers .* not finite numbers: 1.png.$'):
        session.predict(numbered(2))
    assert session.predict(numbered(1)).logits.tolist() == [[9, 0]]


def test_unusable_images(session, photographs, tmp_path):
    (tmp_path / 'bad.jpg').write_text('nothing')
    cascade = CascadeSession(session, {48: 1., 64: 0.})
    with pytest.raises(ImageError, match='bad.jpg is not an image'):
        cascade.predict([*photographs.glob('*/*.png'), tmp_path / 'bad.jpg'])
    with pytest.raises(ImageError, match='Got ndarray, expected images .Session.predict takes arrays too'):
        cascade.predict(np.zeros((1, 3, 48, 48), np.float32))


@pytest.mark.parametrize('thresholds, message', [
    ({}, 'is not a cascade, expected rising resolutions'),
    ([96, 224], 'is not a cascade, expected rising resolutions'),
    ({96: None, 224: 0}, 'is not a cascade, expected rising resolutions'),
    ({64: 0.5, 32: 0.}, 'expected rising resolutions'),
    ({32: 0.5, 64: 0.5}, 'the last with threshold 0'),
    ({32: 1.5, 64: 0.}, 'with thresholds from 0 to 1'),
    ({40: 0.5, 64: 0.}, 'Unknown resolution 40'),
    ({32.5: 0.5, 64: 0.}, 'is not a cascade, expected rising resolutions'),
])
def test_unusable_thresholds(session, thresholds, message):
    with pytest.raises(ValueError, match=message):
        CascadeSession(session, thresholds)


@pytest.mark.parametrize('answer', [lambda path: CascadeSession(path, {48: 0.}), Predictor])
@pytest.mark.parametrize('num_classes, message', [(0, 'no classes, expected a classifier'), (1, 'one class, which')])
def test_features_are_not_answers(tmp_path, answer, num_classes, message):
    export_switchable(rs_model(num_classes=num_classes), str(tmp_path / 'features.onnx'))
    with pytest.raises(ValueError, match=f'features.onnx has {message}'):
        answer(str(tmp_path / 'features.onnx'))


# Files and the command

def test_a_file_keeps_a_cascade(tmp_path):
    cascade = Cascade({np.int64(96): np.float32(0.25), 224.: 0}, True)
    assert repr(cascade.thresholds) == '{96: 0.25, 224: 0.0}'
    write_cascade(tmp_path / 'c.json', cascade, images=3)
    assert read_cascade(tmp_path / 'c.json') == cascade
    assert [p.name for p in tmp_path.iterdir()] == ['c.json']


@pytest.mark.parametrize('text', ('no json', '[1]', '{}', '{"thresholds": 3}', '{"thresholds": {"a": 1}}',
                                  '{"thresholds": {"96": null}}', '{"thresholds": {"96": 0.5}}'))
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / 'c.json').write_text(text)
    with pytest.raises(ValueError, match='c.json( is not valid JSON)?: '):
        read_cascade(tmp_path / 'c.json')
    with pytest.raises(ValueError, match='missing.json does not exist'):
        read_cascade(tmp_path / 'missing.json')
