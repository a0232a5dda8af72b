"""Cascades: what they answer, and how thresholds are fitted"""
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import images, rs_model
from PIL import Image
from timm.data import ImageNetInfo, create_dataset

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_cli import main  # noqa: E402
from timm_rs_runtime import Cascade, CascadeSession, ImageError, NotFiniteError, Session  # noqa: E402
from timm_rs_runtime.cascade import read_cascade, softmax, write_cascade  # noqa: E402
from timm_rs_runtime.fitting import (  # noqa: E402
    collect_logits,
    compare,
    cross_fit,
    evaluate_cascade,
    fit,
    label_folders,
    measure_images,
    sweep,
)

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


def certain(*rows):
    """Return logits [N, 2] whose softmax is these (probability of class 0)."""
    p = np.array(rows)
    return np.log(np.stack([p, 1 - p], -1)).astype(np.float32)


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

    def check_takes_images(self):
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
    ({64: 0.5, 32: 0.}, 'expected rising resolutions'),
    ({32: 0.5, 64: 0.5}, 'the last with threshold 0'),
    ({32: 1.5, 64: 0.}, 'with thresholds from 0 to 1'),
    ({40: 0.5, 64: 0.}, 'Unknown resolution 40'),
])
def test_unusable_thresholds(session, thresholds, message):
    with pytest.raises(ValueError, match=message):
        CascadeSession(session, thresholds)


def test_no_cascade_without_classes(tmp_path):
    export_switchable(rs_model(num_classes=0), str(tmp_path / 'features.onnx'))
    with pytest.raises(ValueError, match='features.onnx has no classes, expected a classifier'):
        CascadeSession(str(tmp_path / 'features.onnx'), {48: 0.})


# How it is fitted

def test_fit_by_hand():
    """The small size errs on the two of four images of class 0 that it is unsure of."""
    logits = {96: certain(.9, .8, .4, .3), 160: certain(.9, .9, .45, .9), 224: certain(.9, .9, .9, .9)}
    found = fit(logits, np.zeros(4, int), MADDS, target_accuracy=1.)
    assert found.cascade.resolutions == (96, 224) and not found.cascade.average
    assert 0.7 < found.cascade.thresholds[96] <= 0.8
    assert (found.accuracy, found.madds, found.shares) == (1., 1 + 6 / 2, {96: 1., 224: 0.5})
    found = fit(logits, np.zeros(4, int), MADDS, target_accuracy=0.75)
    # 96 and, of the two unsure ones, 160 is right on the second only: 1 + 3 / 2.
    assert found.accuracy == 0.75 and found.madds == 2.5 and found.cascade.resolutions == (96, 160)
    found = fit(logits, np.zeros(4, int), MADDS, target_madds=1)
    assert found.accuracy == 0.5 and found.cascade == Cascade({96: 0.})
    assert fit(logits, np.zeros(4, int), MADDS, target_madds=5.9).accuracy == 1.


def test_cross_fitting_by_hand():
    """Five images of class 0, a fold each. The small size errs on the last one, of which it is unsure.

    Fitted on all, only the last one goes on. Each of the others is answered rightly by the small size, by a cascade
    that is fitted on the last one too. The last one is answered wrongly, by the small size: the others do not need 224.
    """
    logits = {96: certain(.9, .9, .9, .9, .45), 224: certain(.9, .9, .9, .9, .9)}
    found = cross_fit(logits, np.zeros(5, int), MADDS, target_accuracy=1.)
    assert found.cascade == fit(logits, np.zeros(5, int), MADDS, target_accuracy=1.).cascade
    assert found.cascade.resolutions == (96, 224)
    assert (found.accuracy, found.madds, found.shares) == (0.8, 1., {96: 1.})
    assert found.standard_error == pytest.approx((0.8 * 0.2 / 4) ** 0.5)


def test_a_fold_that_does_not_reach_the_target_is_answered_all_the_same():
    """Four of five are right at most; without one of these three of four, less than 80 percent."""
    logits = {96: certain(.9, .9, .9, .9, .2)}
    found = cross_fit(logits, np.zeros(5, int), MADDS, target_accuracy=.8)
    assert (found.accuracy, found.cascade) == (0.8, Cascade({96: 0.}))


def test_averaging_is_found_where_it_pays():
    """The small size is equally sure where it is right and where the large one is."""
    logits = {96: certain(.9, .1), 224: certain(.4, .99)}
    found = fit(logits, np.zeros(2, int), MADDS, target_accuracy=1.)
    assert found.cascade.average and found.accuracy == 1. and found.madds == 7


def test_the_best_of_all_thresholds_for_a_price_of_cost():
    """Two stages are few enough to try every threshold."""
    noise = np.random.default_rng(0)
    labels = noise.integers(0, 3, 60)
    logits = {r: (noise.normal(0, s, (60, 3)) + 2 * np.eye(3)[labels]).astype(np.float32)
              for r, s in ((96, 1.5), (224, 0.8))}
    sure = np.append(softmax(logits[96]).max(-1), (0., 1.))
    every = [evaluate_cascade(Cascade({96: t, 224: 0.}, a), logits, labels, MADDS)
             for a, t in itertools.product((False, True), sure)]
    every.append(evaluate_cascade(Cascade({224: 0.}), logits, labels, MADDS))
    found = sweep(logits, labels, MADDS)
    for price in np.geomspace(0.01, 3, 60)[::5]:
        worth = [max(f.accuracy - price * f.madds / MADDS[224] for f in fits) for fits in (every, found)]
        assert worth[1] == pytest.approx(worth[0])


def test_what_a_fit_tells_is_what_the_cascade_does(session, photographs):
    paths, labels = label_folders(photographs, session)
    logits, _ = collect_logits(session, paths)
    for f in sweep(logits, labels, session.madds)[::7]:
        answer = CascadeSession(session, f.cascade).predict(paths)
        assert f.accuracy == pytest.approx((answer.logits.argmax(-1) == labels).mean())
        assert f.madds == pytest.approx(answer.madds.mean())
        assert evaluate_cascade(f.cascade, logits, labels, session.madds) == f


def test_start_is_kept():
    logits = {r: certain(.9, .4) for r in MADDS}
    assert {f.cascade.resolutions[0] for f in sweep(logits, np.zeros(2, int), MADDS, start=160)} == {160}


@pytest.mark.parametrize('kwargs, message', [
    (dict(), 'one of the two'),
    (dict(target_accuracy=1., target_madds=1), 'one of the two'),
    (dict(target_accuracy=1.), 'No cascade reaches an accuracy of 100.00% on these images, the best has 50.00%'),
    (dict(target_madds=0.5), 'No cascade stays below 0.5 multiply-adds, the cheapest takes 1'),
    (dict(target_madds=2, start=64), 'Unknown start 64, expected one of 96, 160, 224'),
])
def test_targets_out_of_reach(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit({r: certain(.9, .4) for r in MADDS}, np.zeros(2, int), MADDS, **kwargs)


def test_unusable_data():
    logits = {r: certain(.9, .4) for r in MADDS}
    with pytest.raises(ValueError, match='as many logits as labels'):
        sweep(logits, np.zeros(3, int), MADDS)
    with pytest.raises(ValueError, match='Multiply-adds of a resolution are unknown'):
        sweep(logits, np.zeros(2, int), {224: 6})


# Labels

def test_class_folders(session, photographs):
    paths, labels = label_folders(photographs, session)
    assert len(paths) == 12 and all((label == 0) == ('apple' in path) for path, label in zip(paths, labels))
    assert len(label_folders(photographs, session, most=5)[0]) == 5


def test_folders_in_the_order_of_classes(session, tmp_path):
    for i in range(10):
        (tmp_path / f'{i}x').mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / f'{i}x' / 'a.png')
    assert label_folders(tmp_path, session)[1].tolist() == list(range(10))
    (tmp_path / '.empty').mkdir()
    assert label_folders(tmp_path, session)[1].tolist() == list(range(10))
    (tmp_path / 'more').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path / 'more' / 'a.png')
    with pytest.raises(ValueError, match='0x is not a class folder: .* 10 folders .*, found 11 folders'):
        label_folders(tmp_path, session)
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='a.png is not in a class folder'):
        label_folders(tmp_path, session)


def test_folders_stand_for_the_classes_that_training_sees(tmp_path):
    class Twelve:
        num_classes, class_names, metadata = 12, None, {}

    names = [*map(str, range(8, 18)), 'Birch', 'ash']
    for name in names:
        (tmp_path / 'data' / 'more' / name).mkdir(parents=True)
        Image.new('RGB', (4, 4)).save(tmp_path / 'data' / 'more' / name / 'a.png')
    (tmp_path / 'data' / 'more' / 'ash').rename(tmp_path / 'ash')
    (tmp_path / 'data' / 'more' / 'ash').symlink_to(tmp_path / 'ash')
    (tmp_path / 'data' / 'more' / '9' / 'round').symlink_to(tmp_path / 'data')
    reader = create_dataset('', str(tmp_path / 'data')).reader
    expected = {os.path.basename(os.path.dirname(path)): target for path, target in reader.samples}
    for most in (None, 5):
        paths, labels = label_folders(tmp_path / 'data', Twelve, most)
        assert {os.path.basename(os.path.dirname(path)): label for path, label in zip(paths, labels)}.items() <= (
            expected.items())
    assert len(expected) == 12 and len(paths) == 5


def test_one_folder_is_none_of_the_known_classes(tmp_path):
    class Named:
        num_classes, class_names, metadata = 3, ['church', 'dog', 'tench'], {}

    for name in ('Church', 'dog', 'tench'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / name / 'a.png')
    with pytest.raises(ValueError, match='Church is not a class folder: expected the names of classes, as dog is one'):
        label_folders(tmp_path, Named)


def test_wordnet_folders(session, tmp_path):
    class ImageNet:
        num_classes, class_names = 1000, None
        metadata = dict(class_ids=ImageNetInfo('imagenet-1k').label_names())

    (tmp_path / 'n01440764').mkdir()
    (tmp_path / 'n02102040').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path / 'n02102040' / 'a.png')
    assert label_folders(tmp_path, ImageNet)[1].tolist() == [217]
    with pytest.raises(ValueError, match='n02102040 is not a class folder'):
        label_folders(tmp_path, session)


# Files and the command

def test_a_file_keeps_a_cascade(tmp_path):
    cascade = Cascade({96: 0.25, 224: 0.}, True)
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


def fit_by_command(capsys, *argv):
    """Return the lines that fit-cascade prints."""
    main(['fit-cascade', *map(str, argv), '--target-madds', '100', '--threads', '1'])
    return capsys.readouterr().out.splitlines()


def test_command(file, session, photographs, tmp_path, capsys):
    output = tmp_path / 'c.json'
    lines = fit_by_command(capsys, file, '--data-dir', photographs, '-o', output)
    assert lines[0] == f'Read 12 images of {photographs}.'
    assert lines[1] == "The cascade's accuracy is that of images it was not fitted on: 5-fold cross-fitting."
    assert [line.split()[0] for line in lines[3:7]] == ['64', '48', '32', 'cascade']
    found = json.loads(output.read_text())
    assert (found['images'], found['unreadable'], found['note']) == (12, 0, lines[1])
    paths, labels = label_folders(photographs, session)
    for row, r in zip(found['rows'], (64, 48, 32)):
        right = np.mean(session.predict(paths, r).argmax(-1) == labels)
        assert row['accuracy'] == pytest.approx(right, abs=1e-6)
        assert row['standard_error'] == pytest.approx((right * (1 - right) / 11) ** 0.5, abs=1e-6)
    logits, _ = collect_logits(session, paths)
    expected = cross_fit(logits, labels, session.madds, target_madds=100e6)
    assert found['rows'][-1]['accuracy'] == pytest.approx(expected.accuracy, abs=1e-6)
    assert read_cascade(output) == fit(logits, labels, session.madds, target_madds=100e6).cascade


def test_splits_are_never_pooled(file, photographs, tmp_path, capsys):
    """Of DIR with training and validation images the cascade is fitted on the latter, unless --split says otherwise."""
    shutil.copytree(photographs, tmp_path / 'val')
    shutil.copytree(photographs, tmp_path / 'train')
    for path in sorted((tmp_path / 'train').glob('*/*.png'))[:3]:
        path.unlink()
    for flags, folder, count in (([], 'val', 12), (['--split', 'train'], 'train', 9)):
        lines = fit_by_command(capsys, file, '--data-dir', tmp_path, *flags, '-o', tmp_path / f'{folder}.json')
        assert lines[0] == f'Read {count} images of {tmp_path}/{folder}.'
        assert json.loads((tmp_path / f'{folder}.json').read_text())['folder'] == str(tmp_path / folder)


def test_unreadable_images_are_left_out(file, session, photographs, tmp_path, capsys, caplog):
    shutil.copytree(photographs, tmp_path / 'all')
    cut = sorted((tmp_path / 'all').glob('*/*.png'))[2:9:3]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-200])
    output = tmp_path / 'c.json'
    lines = fit_by_command(capsys, file, '--data-dir', tmp_path / 'all', '-o', output)
    assert lines[0] == f'Read 9 images of {tmp_path}/all, 3 more cannot be read.'
    found = json.loads(output.read_text())
    assert (found['images'], found['unreadable']) == (9, 3)
    assert all(f'Cannot read image {path} (image file is truncated), it is left out.' in caplog.text for path in cut)
    for path in cut:
        path.unlink()
    paths, labels = label_folders(tmp_path / 'all', session)
    right = np.mean(session.predict(paths, 48).argmax(-1) == labels)
    assert found['rows'][1]['accuracy'] == pytest.approx(right, abs=1e-6)


def test_command_overwrites_nothing(file, photographs, tmp_path, capsys):
    before = open(file, 'rb').read()
    for output, message in ((file, 'exists and is not overwritten'), (tmp_path / 'no' / 'c.json', 'no does not exist')):
        with pytest.raises(SystemExit):
            main(['fit-cascade', 'nowhere.onnx', '--data-dir', str(photographs), '--target-madds', '9', '-o',
                  str(output)])
        assert message in capsys.readouterr().err
    assert open(file, 'rb').read() == before


def test_told_latency_is_that_of_answers(session, photographs, monkeypatch):
    """Each size takes a second per pixel, reading takes half a second."""
    now = [0.]

    def predict(image, resolution):
        now[0] += resolution

    def read(name, mode):
        now[0] += 0.5

    monkeypatch.setattr('timm_rs_runtime.fitting.time.perf_counter', lambda: now[0])
    monkeypatch.setattr('timm_rs_runtime.fitting.open_image', read)
    monkeypatch.setattr(session, 'predict', predict)
    latency, reading = measure_images(session, ['a.png', 'b.png'])
    assert latency == {64: 64., 48: 48., 32: 32.} and reading == 0.5
    monkeypatch.undo()
    paths, labels = label_folders(photographs, session)
    logits, _ = collect_logits(session, paths)
    always = Cascade({32: 1., 64: 0.})
    rows = compare(session, evaluate_cascade(always, logits, labels, session.madds), logits, labels, latency, reading)
    assert [row['milliseconds'] for row in rows] == [64500., 48500., 32500., 96500.]


def test_command_refuses_in_one_line(file, photographs, tmp_path, capsys):
    for path in photographs.glob('*/*.png'):
        (tmp_path / 'cut' / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'cut' / path.parent.name / path.name).touch()
    for arguments, message in (
        (['--target-madds', '100', '--images', '0'], '0 images are asked for'),
        (['--target-accuracy', '101'], 'No cascade reaches an accuracy of 101.00%'),
        (['--target-madds', '1', '--data-dir', str(tmp_path / 'nowhere')], 'nowhere does not exist'),
        (['--target-madds', '100', '--images', '4'], '4 labelled images are too few to judge a cascade, expected at'),
        (['--target-madds', '100', '--data-dir', str(tmp_path / 'cut'), '--max-unreadable', '3'],
         '4 images cannot be read, expected at most 3 (--max-unreadable): '),
        (['--target-madds', '100', '--data-dir', str(tmp_path / 'cut')], 'None of the 12 images can be read'),
        (['--target-madds', '100', '--max-unreadable', '-1'], '--max-unreadable is -1, expected at least 0'),
    ):
        with pytest.raises(SystemExit) as e:
            main(['fit-cascade', file, '--data-dir', str(photographs), *arguments, '-o', str(tmp_path / 'c.json')])
        *_, line = capsys.readouterr().err.splitlines()
        assert e.value.code == 1 and message in line and not (tmp_path / 'c.json').exists()
