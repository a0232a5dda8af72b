"""Several labels per image: from WebDataset shards to an answer"""
import argparse
import csv
import io
import json
import logging
import random
import tarfile
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import rs_model
from PIL import Image

import train_rs
import validate_rs
from timm_rs.data.classes import check_labels, encode_labels
from timm_rs.data.datasets import create_dataset
from timm_rs.evaluate import create_evaluator, evaluate
from timm_rs.hub.card import model_card
from timm_rs.load import load_model
from timm_rs.plot import read_run
from timm_rs.train.builders import build_task
from timm_rs.train.options import parse_args
from timm_rs_cli import main
from timm_rs_runtime import CascadeSession, Session
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.predict import top

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
TINY = (
    '--task multilabel --model rs_test_resnet --resolutions 32 16 --batch-size 4 --workers 0 --device cpu --no-aug '
    '--opt adamw --lr 0.003 --warmup-epochs 0 --epochs 2 --num-classes 3 --checkpoint-hist 1').split()


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Images of up to three stripes, whose colours are their labels."""
    pytest.importorskip('webdataset')
    root, generator = tmp_path_factory.mktemp('shards'), random.Random(0)
    for split, count in (('train', 24), ('validation', 9)):
        with tarfile.open(root / f'{split}-0000.tar', 'w') as tar:
            for i in range(count):
                labels = sorted(generator.sample(range(3), i % 4))
                pixels, image = np.zeros((36, 36, 3), np.uint8), io.BytesIO()
                for label in labels:
                    pixels[12 * label:12 * label + 12] = COLORS[label]
                Image.fromarray(pixels).save(image, 'png')
                hot = [float(label in labels) for label in range(3)]
                content = dict(png=image.getvalue(), json=json.dumps(dict(labels=labels, hot=hot)).encode())
                if i == 5 and split == 'validation':
                    content['png'] = b'not an image'
                for name, value in content.items():
                    info = tarfile.TarInfo(f'{i:03d}.{name}')
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))
    return root


def source(shards, key='labels'):
    return ['--dataset', 'wds/stripes', '--data-dir', str(shards), '--target-key', key]


@pytest.fixture(scope='module')
def run(shards, tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    splits = '--train-split train-0000.tar --val-split validation-0000.tar --train-num-samples 24 --val-num-samples 9'
    train_rs.main([*source(shards), *splits.split(), *TINY, '--output', str(output), '--experiment', 'run'])
    return output / 'run'


def test_training_and_validation_agree(shards, run, tmp_path):
    *_, last = csv.DictReader((run / 'summary.csv').open())
    assert 'eval_top1_32' not in last
    path = tmp_path / 'rows.csv'
    flags = '--split validation-0000.tar --num-samples 9 --workers 0 --device cpu --target-format'.split()
    for key, target_format in (('labels', 'indices'), ('hot', 'multihot')):
        validate_rs.main([
            *source(shards, key), *flags, target_format, '--checkpoint', str(run / 'last.pth.tar'), '--results-file',
            str(path), '--overwrite'])
        rows = {row['resolution']: row for row in csv.DictReader(path.open())}
        assert set(rows) == {'32', '16', 'ens'} and {row['unreadable'] for row in rows.values()} == {'1'}
        for place, row in rows.items():
            for name in ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss'):
                assert float(row[name]) == pytest.approx(float(last[f'eval_{name}_{place}']), rel=1e-5)
    history = read_run(str(run))
    assert history.metric == 'map' and history.best['eval_map_mean'] == max(r['eval_map_mean'] for r in history.rows)


def test_valid_labels(shards, tmp_path):
    path, flags = tmp_path / 'rows.csv', '--split validation-0000.tar --num-samples 9 --workers 0 --device cpu'.split()
    (tmp_path / 'labels.txt').write_text('3\n0\n1\n')
    args = argparse.Namespace(
        model='rs_test_resnet', resolutions=[32, 16], num_classes=4, task='multilabel', multilabel_threshold=0.5)
    network = timm.create_model(args.model, resolutions=args.resolutions, num_classes=args.num_classes)
    torch.save(dict(state_dict=network.state_dict(), args=args), tmp_path / 'four.pth')
    validate_rs.main([
        *source(shards), *flags, '--task', 'multilabel', '--checkpoint', str(tmp_path / 'four.pth'), '--valid-labels',
        str(tmp_path / 'labels.txt'), '--results-file', str(path)])
    rows = {row['resolution']: float(row['map']) for row in csv.DictReader(path.open())}
    assert set(rows) == {'32', '16', 'ens'} and all(0 < value <= 100 for value in rows.values())


def test_from_a_run_to_answers(run, tmp_path, capsys):
    folder, path = tmp_path / 'model', tmp_path / 'model.onnx'
    main(['convert', str(run), '--output', str(folder)])
    config = json.loads((folder / 'config.json').read_text())
    assert (config['problem_type'], config['multilabel_threshold']) == ('multi_label_classification', 0.5)
    assert load_model(str(run)).model.multilabel_threshold == 0.5
    loaded = load_model(str(folder)).model
    assert loaded.multilabel_threshold == loaded.at(16).multilabel_threshold == 0.5
    main(['export', str(folder), '-o', str(path)])
    capsys.readouterr()

    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[12:24] = COLORS[1]
    Image.fromarray(pixels).save(tmp_path / 'green.png')
    with Session(path, threads=1) as session:
        logits = session.predict(str(tmp_path / 'green.png'))[0]
        with pytest.raises(UserError, match='has several labels per image, a cascade needs a network of one'):
            CascadeSession(session, {16: 0.5, 32: 0.})
    main(['predict', str(tmp_path / 'green.png'), '--model', str(path), '--threads', '1', '--json'])
    answers = json.loads(capsys.readouterr().out)['top']
    expected = {i: 1 / (1 + np.exp(-z)) for i, z in enumerate(logits.tolist()) if z >= 0}
    assert {found['class']: found['probability'] for found in answers} == pytest.approx(expected, abs=1e-5)

    text, metadata = model_card(loaded, 'user/name', {32: dict(map=50., macro_f1=40.)}, load_model(str(run)).args)
    assert '| resolution | mAP (%) | macro F1 (%) | millions of MAdds |' in text and '| 32 | 50.00 | 40.00 | ' in text
    assert 'with 3 independent labels (from a probability of 0.5 on)' in text and 'task: multilabel' in text
    assert 'eval_metric' not in text and 'multi-label' in metadata.tags


def test_labels_from_a_threshold_on():
    logits = np.log(np.array([1., 9., 3.]))  # sigmoids of 1/2, 9/10 and 3/4
    assert top(logits, ['a', 'b', 'c'], threshold=0.75) == [
        dict(name='b', probability=0.9, **{'class': 1}), dict(name='c', probability=0.75, **{'class': 2})]
    assert [found['class'] for found in top(logits, k=1, threshold=0.)] == [1]
    assert top(logits, threshold=0.95) == []


def test_mean_average_precision_of_each_size():
    """Logits are the two channels of an image; small images swap the first two in the order of class 0."""
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.mean((2, 3))

    large = torch.tensor([[3., 1.], [2., -1.], [1., 2.]])
    small = torch.tensor([[2., 1.], [3., -1.], [1., 2.]])
    target = torch.tensor([[1., 1.], [0., 0.], [0., 1.]])
    images = [z[:, :, None, None].expand(-1, -1, r, r) for z, r in ((large, 2), (small, 1))]
    found = evaluate(
        Mean(), [(images, target)], (2, 1), lambda x: x, evaluator=partial(create_evaluator, 'multilabel'))
    # class 0: its one positive is first, then second; class 1: both positives come first
    assert found[2]['map'] == pytest.approx(100) and found[1]['map'] == pytest.approx((50 + 100) / 2)
    assert found[2]['images'] == 3


def test_criterion_and_distillation_reduce_alike():
    def labels(*flags):
        args = parse_args(['--resolutions', '32', '16', *flags])
        args.num_classes, args.rank = 3, 0
        return build_task(args, rs_model('test_resnet', (32, 16), num_classes=3), torch.device('cpu')).criterion.labels

    assert labels() == 'one'
    for expected, loss in (('mean', ''), ('mean', '--loss asl --asl-reduction mean'), ('mean', '--loss poly'),
                           ('sum', '--bce-sum'), ('sum', '--loss asl')):
        assert labels('--task', 'multilabel', *loss.split()) == expected


def test_labels_that_are_wrong(shards, caplog):
    kwargs = dict(num_samples=9, is_training=False)
    dataset = create_dataset('wds/stripes', str(shards), 'validation-0000.tar', target_key='labels', **kwargs)
    check_labels(dataset, 3)
    with pytest.raises(UserError, match='wds/stripes has several labels per image, which needs --task multilabel'):
        list(dataset)
    encode_labels(dataset, 2)
    with caplog.at_level(logging.WARNING), pytest.raises(
            UserError, match=r'wds/stripes: the labels \[.*2.*\] of an image: .*must be in \[0, 2\)'):
        list(dataset)
