"""How the thresholds of a cascade are fitted, and the command that does it"""
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from test_cascade import file, photographs, session  # noqa: F401
from timm.data import ImageNetInfo, create_dataset

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs_cli import main  # noqa: E402
from timm_rs_runtime import Cascade, CascadeSession, Session, UserError  # noqa: E402
from timm_rs_runtime.cascade import read_cascade, softmax  # noqa: E402
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

MADDS = {96: 1, 160: 3, 224: 6}


def certain(*rows):
    """Return logits [N, 2] whose softmax is these (probability of class 0)."""
    p = np.array(rows)
    return np.log(np.stack([p, 1 - p], -1)).astype(np.float32)


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


def test_folders_in_the_order_of_classes(file, tmp_path):
    session = Session(file, threads=1)
    session.class_names = None
    for i in range(10):
        (tmp_path / f'{i}x').mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / f'{i}x' / 'a.png')
    assert label_folders(tmp_path, session)[1].tolist() == list(range(10))
    (tmp_path / '.empty').mkdir()
    assert label_folders(tmp_path, session)[1].tolist() == list(range(10))
    (tmp_path / 'more').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path / 'more' / 'a.png')
    with pytest.raises(ValueError, match='0x is not a class folder: .* 10 folders .*, found 11'):
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
    with pytest.raises(ValueError, match='Church is not a class folder: expected the names of classes, such as dog'):
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
    *sizes, cascade = found['rows']
    better = [r['network'] for r in sizes if r['accuracy'] >= cascade['accuracy'] and r['madds'] <= cascade['madds']]
    assert lines[7:-1] == [
        f'Without a cascade, {name} is at least as accurate and at most as expensive.' for name in better]
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


def test_folders_of_other_classes_are_not_numbered_by_their_order(session, tmp_path):
    for i in range(10):
        (tmp_path / f'{i}x').mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / f'{i}x' / 'a.png')
    with pytest.raises(UserError, match='0x is not a class folder: expected the names of classes, such as apple, or'):
        label_folders(tmp_path, session)


@pytest.mark.parametrize('target', ['nan', '-5', '0.8', '101'])
def test_a_target_is_in_percent(file, tmp_path, capsys, target):
    with pytest.raises(SystemExit):
        main(['fit-cascade', file, '--data-dir', str(tmp_path), '--target-accuracy', target, '-o', 'c.json'])
    assert '--target-accuracy is ' in capsys.readouterr().err


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
        (['--target-accuracy', '100'], 'No cascade reaches an accuracy of 100.00%'),
        (['--target-madds', '1', '--data-dir', str(tmp_path / 'nowhere')], 'nowhere does not exist'),
        (['--target-madds', '100', '--images', '4'], '4 labelled images are too few to judge a cascade, expected at'),
        (['--target-madds', '100', '--data-dir', str(tmp_path / 'cut'), '--max-unreadable', '3'],
         '4 images cannot be read, expected at most 3 (--max-unreadable): '),
        (['--target-madds', '100', '--data-dir', str(tmp_path / 'cut')], 'None of the 12 images can be read'),
        (['--target-madds', '100', '--max-unreadable', '-1'], '--max-unreadable is -1, expected an integer from 0'),
    ):
        with pytest.raises(SystemExit) as e:
            main(['fit-cascade', file, '--data-dir', str(photographs), *arguments, '-o', str(tmp_path / 'c.json')])
        *_, line = capsys.readouterr().err.splitlines()
        assert e.value.code == 1 and message in line and not (tmp_path / 'c.json').exists()
