"""Images that cannot be read: named, counted, replaced in training and left out of evaluation"""
import contextlib
import io
import math
import multiprocessing
import random
import re
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from command_lines import fails, validated
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import train_rs
import validate_rs
from timm_rs.data.datasets import create_dataset
from timm_rs.data.readers import CheckedLoader, ReadableDataset
from timm_rs.evaluate import check_images, evaluate
from timm_rs_runtime import ImageError
from timm_rs_runtime.unreadable import ReadErrors, UnreadableError

TINY = (
    '--model rs_test_resnet --resolutions 32 16 --batch-size 4 --validation-batch-size 32 --device cpu --lr 0.05 '
    '--warmup-epochs 0 --epochs 1 --experiment run'
).split()
DECODING = [
    EOFError(), OSError('image file is truncated'), RuntimeError('Failed to decode frame 0'),
    SyntaxError('broken PNG file'), ValueError('Unsupported SGI image mode'), struct.error('unpack requires 4 bytes'),
    Image.DecompressionBombError('Image size exceeds limit'),
]


@pytest.fixture(autouse=True)
def alarm():
    """End a test that hangs."""
    def ring(*_):
        raise TimeoutError('the test hangs')

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_images(root, is_readable, **counts):
    """Write images of two classes, those that are not readable empty."""
    generator = random.Random(0)
    for split, count in counts.items():
        for i in range(count):
            folder = root / split / ('cat', 'dog')[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f'image_of_a_usual_name_{i:08d}.png'
            if is_readable(split, i):
                Image.frombytes('RGB', (10, 9), generator.randbytes(270)).save(path)
            else:
                path.touch()
    return root


class Nothing(Dataset):
    """Images none of which can be read."""
    transform = None

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        raise ImageError('No such device ' + 'or address' * 20)


def read_all(errors, first):
    ReadableDataset(Nothing(), errors, stand_in=True)[first]


def test_reports_wait_for_nobody():
    """From two processes far more of them than a pipe holds, and each is counted once."""
    errors = ReadErrors(999)
    processes = [multiprocessing.get_context('fork').Process(target=read_all, args=(errors, i)) for i in (0, 500)]
    for process in processes:
        process.start()
    read_all(errors, 0)
    for process in processes:
        process.join(30)
    exitcodes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exitcodes == [0, 0]
    with pytest.raises(UnreadableError, match='^1000 images cannot be read, expected at most 999 .--max-unreadable.'):
        errors.check()
    assert errors.summary().startswith('1000 unreadable images so far: number ')


@pytest.mark.parametrize('workers,split,count,is_readable', [
    (0, 'validation', 2100, lambda split, i: split == 'train' or i % 4 < 2),
    (1, 'validation', 2100, lambda split, i: split == 'train' or i % 4 < 2),
    (4, 'train', 1200, lambda split, i: split == 'validation'),
    (0, 'train', 40, lambda split, i: split == 'validation'),  # fewer than the limit
], ids=['validation in this process', 'validation', 'training', 'training on few images'])
def test_too_many_end_a_run_with_one_line(tmp_path, capfd, workers, split, count, is_readable):
    root = write_images(tmp_path / 'images', is_readable, **dict(dict(train=8, validation=8), **{split: count}))
    with pytest.raises(SystemExit) as e:
        train_rs.main([str(root), *TINY, '--workers', str(workers), '--output', str(tmp_path / 'output')])
    assert e.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if 'error: ' in line]
    assert len(lines) == 1
    number, rest = re.match(r'train_rs.py: error: (\d+) images cannot be read, (.*)', lines[0]).groups()
    if count > 100:
        assert rest.startswith('expected at most 100 (--max-unreadable): ')
        assert 100 < int(number) < (500 if split == 'validation' else count)  # at once, not behind the last batch
    else:
        assert int(number) == count and rest.startswith('and none is left to stand in: ')


def test_a_checked_loader_ends_at_the_batch_that_holds_too_many(tmp_path):
    write_images(tmp_path, lambda split, i: i % 8, train=24)  # the first, fifth and ninth of the cats are not
    data = create_dataset('', str(tmp_path), 'train')
    data.transform = lambda image: torch.zeros(3, 8, 8)
    for limit, given in ((3, 6), (2, 2), (0, 0)):
        errors = ReadErrors(limit)
        loader = CheckedLoader(ReadableDataset(data, errors, stand_in=True), errors, batch_size=4)
        assert len(loader) == 6
        batches = []
        with pytest.raises(UnreadableError) if limit < 3 else contextlib.nullcontext():
            for batch in loader:
                batches.append(batch)
        assert len(batches) == given


@pytest.fixture
def dataset(tmp_path):
    return create_dataset('', str(write_images(tmp_path, lambda *_: True, train=4)), 'train')


def fail_at(monkeypatch, path, error):
    """Let Pillow raise an error for a file."""
    opens, content = Image.open, Path(path).read_bytes()

    def fail_or_open(f, *args, **kwargs):
        if isinstance(f, io.BytesIO) and f.getvalue() == content:
            raise error
        return opens(f, *args, **kwargs)

    monkeypatch.setattr(Image, 'open', fail_or_open)


@pytest.mark.parametrize('error', DECODING, ids=lambda e: type(e).__name__)
def test_whatever_decoding_raises_another_image_stands_in(dataset, monkeypatch, caplog, error):
    fail_at(monkeypatch, dataset.filename(1, absolute=True), error)
    errors = ReadErrors(1)
    images = ReadableDataset(dataset, errors, stand_in=True)
    assert images[1] == images[2]
    errors.check()
    assert f'Cannot read image {dataset.filename(1, absolute=True)} ({str(error) or "EOFError"})' in caplog.text
    assert list(errors.names) == [dataset.filename(1, absolute=True)]


def test_a_block_of_zeros_and_a_huge_image(dataset, monkeypatch):
    zeros, huge = (dataset.filename(i, absolute=True) for i in (0, 2))
    Image.frombytes('RGB', (200, 300), random.Random(0).randbytes(180_000)).save(zeros)
    with open(zeros, 'r+b') as f:
        f.seek(f.read().rindex(b'IDAT') - 2000)
        f.write(bytes(4096))
    Image.new('RGB', (1000, 300)).save(huge)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000)
    errors = ReadErrors(2)
    images = ReadableDataset(dataset, errors, stand_in=True)
    assert [images[i] for i in range(4)] == [images[i] for i in (1, 1, 3, 3)]
    errors.check()
    assert list(errors.names) == [zeros, huge]
    assert errors.names[zeros].startswith('broken PNG file') and 'exceeds limit' in errors.names[huge]


@pytest.mark.parametrize('error', DECODING, ids=lambda e: type(e).__name__)
def test_an_error_of_a_transform_is_none_of_reading(dataset, error):
    def transform(image):
        raise error

    errors = ReadErrors(0)
    images = ReadableDataset(dataset, errors, stand_in=True)
    images.transform = transform
    with pytest.raises(type(error)):
        images[0]
    errors.check()


def test_an_image_that_can_be_read_the_next_time(dataset, monkeypatch):
    """Counts: the storage fails now and then."""
    opens, calls = Image.open, []

    def fail_once(f, *args, **kwargs):
        calls.append(f)
        if len(calls) == 1:
            raise OSError('Stale file handle')
        return opens(f, *args, **kwargs)

    monkeypatch.setattr(Image, 'open', fail_once)
    errors = ReadErrors(0)
    ReadableDataset(dataset, errors, stand_in=True)[0]
    with pytest.raises(UnreadableError, match='1 images cannot be read'):
        errors.check()


def test_a_data_set_without_names():
    errors = ReadErrors(0)

    class Damaged(Nothing):
        def __getitem__(self, index):
            if index == 7:
                raise ImageError('broken PNG file')
            return torch.tensor(index), 0

    assert ReadableDataset(Damaged(), errors, stand_in=True)[7][0] == 8
    with pytest.raises(UnreadableError, match='number 7'):
        errors.check()


# Validation leaves them out

class Brightness(nn.Module):
    """Logits of two classes by the mean of an image: 1 where it is light."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean = self.scale * x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def evaluate_shades(errors=None, **kwargs):
    """Evaluate six images, light and dark, of which numbers 1 and 4 cannot be read."""
    class Shades(Dataset):
        transform = None
        shades, targets = [2, 2, -1, 3, 3, -2], [1, 0, 0, 0, 1, 0]

        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index in (1, 4):
                raise ImageError('broken')
            return torch.full((3, 8, 8), float(self.shades[index])), self.targets[index]

    readable = ReadableDataset(Shades(), errors or ReadErrors(), stand_in=False)
    readable.dataset.transform = lambda image: torch.zeros(3, 8, 8)
    batches = DataLoader(readable, batch_size=3)
    return evaluate(Brightness(), (([x], y) for x, y in batches), (8,), lambda x: x, **kwargs)[8]


def test_means_are_those_of_the_other_images():
    """Three of four are right: 2, -1, -2, and not 3, which is of class 0."""
    row = evaluate_shades()
    losses = [math.log1p(math.exp(x)) for x in (-4, -2, 6, -4)]  # of logits -m and m
    assert (row['top1'], row['images'], row['unreadable']) == (75., 4, 2)
    assert row['loss'] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_padding_is_not_unreadable():
    """Number 5 of the five images in this process is the loader's padding."""
    row = evaluate_shades(max_samples=4)
    assert (row['images'], row['unreadable']) == (3, 1)
    assert row['top1'] == pytest.approx(200 / 3)


def test_no_image_at_all():
    with pytest.raises(UnreadableError, match='None of the 3 images can be read'):
        check_images({8: dict(images=0, unreadable=3)})
    with pytest.raises(UnreadableError, match='The data set gave no images to evaluate on'):
        check_images({8: dict(images=0, unreadable=0)})
    check_images({8: dict(images=1, unreadable=3)})


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model.pth'
    torch.manual_seed(0)
    model = timm.create_model('rs_test_resnet', resolutions=(32, 16), num_classes=2)
    model.fc.weight.data.normal_()
    torch.save(model.state_dict(), path)
    return ['--model', 'rs_test_resnet', '--resolutions', '32', '16', '--num-classes', '2', '--checkpoint', str(path)]


def test_validation_of_one_cut_image_of_41(tmp_path, checkpoint, caplog):
    """Its row is that of the 40 others."""
    write_images(tmp_path / 'all', lambda *_: True, val=41)
    shutil.copytree(tmp_path / 'all', tmp_path / 'others')
    cut = sorted((tmp_path / 'all').glob('val/*/*.png'))[7]
    cut.write_bytes(cut.read_bytes()[:-150])
    (tmp_path / 'others' / cut.relative_to(tmp_path / 'all')).unlink()
    flags = [*checkpoint, '--batch-size', '6']
    caplog.set_level('INFO', 'validate')
    found, expected = (validated(tmp_path / name, tmp_path, *flags) for name in ('all', 'others'))
    for size in (32, 16, 'ens'):
        assert found[size]['top1'] == expected[size]['top1'] and found[size]['top5'] == expected[size]['top5']
        assert found[size]['loss'] == pytest.approx(expected[size]['loss'], rel=1e-6)
        assert (found[size]['images'], found[size]['unreadable']) == (40, 1)
        assert (expected[size]['images'], expected[size]['unreadable']) == (40, 0)
    assert f'Cannot read image {cut} (image file is truncated), it is left out.' in caplog.text
    assert f'Validation reads 41 images of {tmp_path}/all/val.' in caplog.text


def test_validation_of_ten_in_a_row(tmp_path, checkpoint, capfd):
    write_images(tmp_path / 'images', lambda split, i: i % 2 or i >= 20, val=41)
    assert validated(tmp_path / 'images', tmp_path, *checkpoint)[32]['unreadable'] == 10
    argv = [str(tmp_path / 'images'), *checkpoint, '--device', 'cpu', '--workers', '0']
    line = fails(validate_rs.main, [*argv, '--max-unreadable', '9'], capfd)
    assert line.startswith('validate_rs.py: error: 10 images cannot be read, expected at most 9 (--max-unreadable): ')
    line = fails(validate_rs.main, [*argv, '--max-unreadable', '-1'], capfd)
    assert '--max-unreadable is -1, expected an integer from 0' in line


def test_validation_of_nothing_but_unreadable_images(tmp_path, checkpoint, capfd):
    write_images(tmp_path / 'images', lambda *_: False, val=5)
    argv = [str(tmp_path / 'images'), *checkpoint, '--device', 'cpu', '--workers', '2']
    assert fails(validate_rs.main, argv, capfd) == 'validate_rs.py: error: None of the 5 images can be read.'


def test_a_deep_image_is_its_8_bit_twin_in_training_and_validation(tmp_path):
    """The batches that a run sees are the same, byte for byte."""
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 256, (20, 24), np.uint8)
        for name, values in (('deep', pixels.astype(np.uint16) * 257), ('twin', pixels)):
            for split in ('train', 'val'):
                path = tmp_path / name / split / ('cat', 'dog')[i % 2] / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    for name in ('deep', 'twin'):
        train_rs.main([str(tmp_path / name), *TINY, '--workers', '0', '--output', str(tmp_path / 'output' / name)])
    rows = [(tmp_path / 'output' / name / 'run' / 'summary.csv').read_text() for name in ('deep', 'twin')]
    assert rows[0] == rows[1]
