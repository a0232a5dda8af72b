"""Images decoded once, and training from them"""
import csv
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from command_lines import MODEL, TINY, fails, images, validated  # noqa: F401
from timm.data import create_dataset, resolve_model_data_config

import train_rs
from timm_rs.data import cache
from timm_rs.data.cache import Decoded, DecodedLoader, Squash
from timm_rs.data.crop import crop, random_boxes
from timm_rs.data.datasets import create_eval_loader
from timm_rs.train import MultiResolutionTask
from timm_rs.train.options import parse_args

CROPS = [*TINY, '--color-jitter', '0', '--train-interpolation', 'bilinear']


def run(images, tmp_path, name, *flags):
    train_rs.main([
        str(images), *CROPS, '--epochs', '2', '--output', str(tmp_path), '--experiment', name,
        '--decoded-cache', str(tmp_path / 'cache'), *flags])
    return torch.load(tmp_path / name / 'last.pth.tar', weights_only=False)['state_dict']


def listing(tmp_path):
    return {p: p.stat().st_mtime_ns for p in (tmp_path / 'cache').glob('*/*')}


def test_waiting_for_another_process_is_said(tmp_path, caplog):
    pytest.importorskip('fcntl')
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor() as pool:
        with cache._lock(str(tmp_path)):
            waiting = pool.submit(lambda: cache._lock(str(tmp_path)).__enter__())
            end = time.monotonic() + 60
            while f'Another process fills {tmp_path}' not in caplog.text:
                assert not waiting.done() and time.monotonic() < end
                time.sleep(0.01)
        waiting.result(timeout=60)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_crop_of_the_whole_image_is_the_resize():
    """Weights of antialiased bilinear interpolation from 4 to 2 pixels: triangles of 2 pixels to each side."""
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    image[0, 0, 0, :] = 70
    boxes = torch.tensor([[0., 1., 0., 1., 0.]]).T
    torch.testing.assert_close(crop(image, boxes, 2), torch.tensor([[[[30., 30.], [0., 0.]]]]))


def test_crop_is_the_resize_of_the_part_and_flips_it():
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    boxes = torch.tensor([[0.25, 0.5, 0.125, 0.75, 0.], [0., 0.25, 0.5, 0.5, 1.]]).T  # top, height, left, width, flip
    found = crop(pixels, boxes, 10)
    parts = [pixels[:1, :, 10:30, 5:35], pixels[1:, :, 0:10, 20:40].flip(-1)]
    inner = slice(2, -2)  # at its border the part lacks neighbours
    for image, part in zip(found, parts):
        expected = F.interpolate(part.float(), size=(10, 10), mode='bilinear', antialias=True)[0]
        torch.testing.assert_close(image[:, inner, inner], expected[:, inner, inner])


def test_boxes_have_the_area_and_shape_that_are_drawn():
    numbers = torch.rand(500, 5)
    aspects = torch.full((500,), 2.)  # twice as wide as high
    top, height, left, width, flip = random_boxes(numbers, aspects, (0.1, 0.3), (0.8, 1.25), hflip=0.25)
    torch.testing.assert_close(height * width, 0.1 + 0.2 * numbers[:, 0])
    torch.testing.assert_close(2 * width / height, 0.8 * (1.25 / 0.8) ** numbers[:, 1])
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 1 and (left + width).max() <= 1
    assert torch.equal(flip, (numbers[:, 4] < 0.25).float())
    tall = random_boxes(torch.tensor([[0.999, 0., 0.5, 0.5, 1.]]), torch.tensor([4.]), (0.5, 1.), (0.25, 4.))
    assert tall[1].item() == 1  # cut to the height of the image


def test_evaluation_gives_the_batches_of_the_loader(images, tmp_path):
    run(images, tmp_path, 'r', '--val-interval', '2')
    config = resolve_model_data_config(timm.create_model(MODEL))
    expected = list(create_eval_loader(create_dataset('', str(images), 'validation'), (32, 16), 5, config))
    folder, = (tmp_path / 'cache').glob('validation-*')
    arrays = [np.load(folder / f'{i}.npy') for i in range(2)]
    found = list(DecodedLoader(Decoded(arrays, np.load(folder / 'targets.npy'), {}), 5))
    assert len(found) == len(expected) == 3
    for (levels, targets), (wanted, labels) in zip(found, expected):
        assert torch.equal(targets, labels)
        assert [x.shape[-1] for x in levels] == [32, 16]
        for level, want in zip(levels, wanted):
            assert level.dtype == torch.uint8 and torch.equal(level, want)


def test_accuracy_is_that_without_the_cache(images, tmp_path):
    run(images, tmp_path, 'r')
    rows = validated(images, tmp_path, '--checkpoint', str(tmp_path / 'r' / 'last.pth.tar'))
    *_, last = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
    for size in (32, 16):
        assert rows[size]['loss'] == pytest.approx(float(last[f'eval_loss_{size}']), rel=1e-5)
        assert rows[size]['top1'] == pytest.approx(float(last[f'eval_top1_{size}']), abs=1e-2)


def test_resumed_training_comes_to_the_same(images, tmp_path):
    expected = run(images, tmp_path, 'whole')
    run(images, tmp_path, 'parts', '--stop-epoch', '1')
    train_rs.main([
        str(images), *CROPS, '--epochs', '2', '--output', str(tmp_path), '--experiment', 'parts',
        '--decoded-cache', str(tmp_path / 'cache'), '--resume', 'auto'])
    assert_same(torch.load(tmp_path / 'parts' / 'last.pth.tar', weights_only=False)['state_dict'], expected)


def test_it_is_decoded_once(images, tmp_path, monkeypatch):
    expected = run(images, tmp_path, 'a')
    before = listing(tmp_path)
    monkeypatch.setattr(cache, '_decode', None)
    assert_same(run(images, tmp_path, 'b'), expected)
    assert listing(tmp_path) == before


@pytest.mark.parametrize('damage', ['truncated', 'shape', 'unfinished'])
def test_a_damaged_cache_is_made_again(images, tmp_path, damage):
    expected = run(images, tmp_path, 'a')
    folder, = (tmp_path / 'cache').glob('train-*')
    sound = (folder / '0.npy').read_bytes()
    if damage == 'truncated':
        os.truncate(folder / '0.npy', 1000)
    elif damage == 'shape':
        np.save(folder / '0.npy', np.zeros((2, 3, 64, 64), np.uint8))
    else:
        (folder / 'meta.json').unlink()
    assert_same(run(images, tmp_path, 'b'), expected)
    assert (folder / '0.npy').read_bytes() == sound


def test_other_images_have_a_cache_of_their_own(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / 'images')
    run(tmp_path / 'images', tmp_path, 'a')
    os.utime(tmp_path / 'images' / 'train' / 'cat' / '0.jpg')
    run(tmp_path / 'images', tmp_path, 'b')
    run(tmp_path / 'images', tmp_path, 'c', '--decoded-cache-side', '40')
    run(tmp_path / 'images', tmp_path, 'd', '--decode', 'fast')
    assert len([*(tmp_path / 'cache').glob('train-*')]) == 4
    assert len([*(tmp_path / 'cache').glob('validation-*')]) == 1
    monkeypatch.setattr(cache, 'READER', cache.READER + 1)
    run(tmp_path / 'images', tmp_path, 'e')
    assert len([*(tmp_path / 'cache').glob('train-*')]) == 5
    assert len([*(tmp_path / 'cache').glob('validation-*')]) == 2


def test_size_is_bounded(images, tmp_path, capfd):
    argv = [images, *CROPS, '--output', tmp_path, '--decoded-cache', tmp_path / 'cache', '--decoded-cache-gb', '1e-5']
    line = fails(train_rs.main, argv, capfd)
    assert 'the decoded images take 0.00 GB, expected at most 1e-05 GB (--decoded-cache-gb)' in line
    assert not listing(tmp_path)
    argv = [images, *CROPS, '--output', tmp_path, '--decoded-cache', tmp_path / 'cache', '--decoded-cache-side', '31']
    assert '--decoded-cache-side is 31, expected at least the largest of --resolutions, 32' in fails(
        train_rs.main, argv, capfd)
    argv = ['--dataset', 'digits', *CROPS, '--output', tmp_path, '--decoded-cache', tmp_path / 'cache']
    assert '--decoded-cache needs a folder of images' in fails(train_rs.main, argv, capfd)


def test_what_it_does_not_go_with(capfd):
    line = fails(parse_args, ['x', '--decoded-cache', 'y', '--aa', 'rand-m9'], capfd)
    assert '--color-jitter 0.4 (give 0.0), --aa rand-m9 (give None), --train-interpolation random (give bil' in line
    assert 'needs --decoded-cache' in fails(parse_args, ['x', '--decoded-cache-side', '64'], capfd)


@pytest.mark.parametrize('flags', [
    ['--mixup', '0.4', '--cutmix', '1', '--reprob', '0.5', '--flip', 'independent'],
    ['--in-chans', '1', '--channels-last', '--model-dtype', 'bfloat16', '--resolutions', '96', '64'],
])
def test_flags_together(images, tmp_path, flags):
    run(images, tmp_path, 'r', *flags)
    rows = list(csv.DictReader((tmp_path / 'r' / 'summary.csv').open()))
    assert len(rows) == 2 and float(rows[-1]['train_loss']) > 0


def test_crops_follow_from_seed_epoch_and_image(images, tmp_path, monkeypatch):
    """However large the batches are."""
    crops = []
    forward = MultiResolutionTask.forward

    def record(self, input, target):
        crops[-1].extend(input.clone())
        return forward(self, input, target)

    monkeypatch.setattr(MultiResolutionTask, 'forward', record)
    for flags in (['--batch-size', '5'], ['--batch-size', '2'], ['--batch-size', '2', '--seed', '1']):
        crops.append([])
        run(images, tmp_path, f'r{len(crops)}', *flags, '--hflip', '0.5')
    first, second, other = (torch.stack(c) for c in crops)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(first[:10].sum(0), first[10:].sum(0))  # of the other epoch


def test_unreadable_images_are_named_each_time(images, tmp_path, caplog):
    shutil.copytree(images, tmp_path / 'images')
    broken = tmp_path / 'images' / 'train' / 'dog' / '3.jpg'
    broken.write_bytes(b'no image')
    for name in 'ab':
        caplog.clear()
        run(tmp_path / 'images', tmp_path, name)
        assert f'Cannot read image {broken}' in caplog.text
        assert '1 unreadable images so far' in caplog.text


def test_too_many_unreadable_images(images, tmp_path, capfd):
    shutil.copytree(images, tmp_path / 'images')
    for path in (tmp_path / 'images' / 'train').glob('*/[12].jpg'):
        path.write_bytes(b'no image')
    argv = [tmp_path / 'images', *CROPS, '--output', tmp_path, '--decoded-cache', tmp_path / 'cache',
            '--max-unreadable', '3']
    assert '4 images cannot be read, expected at most 3 (--max-unreadable)' in fails(train_rs.main, argv, capfd)
    assert not listing(tmp_path)


def test_each_process_evaluates_its_share():
    decoded = Decoded([np.arange(7)[:, None, None, None].astype(np.uint8)], np.arange(7), {})
    for rank, expected in ((0, [0, 2, 4, 6]), (1, [1, 3, 5])):
        loader = DecodedLoader(decoded, 3, rank, 2)
        batches = list(loader)
        assert len(batches) == len(loader) == 2 - rank
        assert torch.cat([targets for _, targets in batches]).tolist() == expected
        assert torch.cat([level.flatten() for (level,), _ in batches]).tolist() == expected


def test_squash_keeps_the_shape(images):
    image, _ = create_dataset('', str(images), 'train')[1]
    pixels, aspect = Squash(20)(image)
    assert pixels.shape == (3, 20, 20) and aspect == np.float32(image.width / image.height)
