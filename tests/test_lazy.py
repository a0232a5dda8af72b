"""Images that are decoded at the scale that their transforms need"""
import io
import random
from functools import partialmethod

import numpy as np
import pytest
import torch
from command_lines import TINY, images, validated  # noqa: F401
from PIL import Image
from timm.data import create_transform

import train_rs
from timm_rs.data import lazy
from timm_rs.data.datasets import create_dataset, create_eval_loader
from timm_rs.data.lazy import LazyImage, read_image
from timm_rs_runtime.images import ImageError, open_image

BILINEAR = Image.Resampling.BILINEAR


def slopes(width, height):
    """Return an image whose red and green are the position, as shares of 255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


def encoded(width, height, format='JPEG', **options):
    file = io.BytesIO()
    slopes(width, height).save(file, format, **options)
    return file.getvalue()


PHOTOGRAPH = encoded(320, 240, quality=95)


@pytest.fixture
def divisors(monkeypatch):
    """The divisors of the scales at which images are decoded."""
    found, decode = [], lazy.decode

    def noted(*args):
        image = decode(*args)
        found.append(image.divisor)
        return image

    monkeypatch.setattr(lazy, 'decode', noted)
    return found


@pytest.mark.parametrize('decode, box, size, divisor', [
    ('scaled', None, (40, 30), 4),  # 80 x 60 pixels are needed, those of 1/4
    ('scaled', None, (41, 30), 2),  # 82 of a width of 80
    ('scaled', None, (40, 31), 2),
    ('scaled', None, (20, 15), 8),
    ('scaled', None, (5, 5), 8),  # there is no smaller scale
    ('scaled', (10, 20, 170, 140), (40, 30), 2),  # half of both sides
    ('scaled', (10, 20, 170, 140), (41, 30), 1),
    ('scaled', None, (400, 300), 1),
    ('fast', None, (64, 48), 4),
    ('fast', None, (65, 48), 2),
    ('fast', (10, 20, 170, 140), (32, 24), 4),
])
def test_the_part_exceeds_its_new_size_by_the_margin(divisors, decode, box, size, divisor):
    image = read_image(PHOTOGRAPH, decode=decode)
    part = image.crop(box) if box else image
    assert not divisors and part.size == ((160, 120) if box else (320, 240)) and part.mode == 'RGB'
    found = part.resize(size, BILINEAR)
    assert divisors == [divisor] and type(found) is Image.Image
    exact = slopes(320, 240).resize(size, BILINEAR, box)
    assert np.abs(np.asarray(found, int) - np.asarray(exact)).max() <= 3


def test_a_part_of_a_part(divisors):
    part = read_image(PHOTOGRAPH, decode='scaled').crop((100, 80, 300, 240)).crop((40, 20, 120, 80))
    exact = slopes(320, 240).resize((10, 10), BILINEAR, (140, 100, 220, 160))
    assert np.abs(np.asarray(part.resize((10, 10), BILINEAR), int) - np.asarray(exact)).max() <= 3
    assert divisors == [2]  # 20 of 60 pixels of height are needed


@pytest.mark.parametrize('change', [
    lambda image: image,
    lambda image: image.crop((-5, 10, 330, 250)),  # padded
    lambda image: image.crop((3, 5, 200, 100)).transpose(Image.Transpose.ROTATE_90),
    lambda image: image.crop(),
    lambda image: image.resize((30, 20), Image.Resampling.NEAREST),
    lambda image: image.resize((30, 20), BILINEAR, (1, 2, 300, 200)),
    lambda image: image.convert('L'),
    lambda image: image.copy().resize((30, 20), BILINEAR),
    lambda image: Image.blend(image, image, 0.5),
])
def test_for_everything_else_it_is_the_whole_image(change):
    found, exact = (change(read_image(PHOTOGRAPH, decode=decode)) for decode in ('scaled', 'exact'))
    assert found.size == exact.size and np.array_equal(found, exact)


def test_what_was_done_to_the_pixels_stays():
    image = read_image(PHOTOGRAPH, decode='scaled')
    image.paste((0, 0, 255), (0, 0, 320, 240))
    for seen in (image.resize((8, 8), BILINEAR), image.crop((5, 5, 20, 20))):
        assert seen.getextrema() == ((0, 0), (0, 0), (255, 255))


@pytest.mark.parametrize('format, mode', [('PNG', 'RGB'), ('WEBP', 'RGB'), ('JPEG', 'L')])
def test_formats_without_scales_and_modes(divisors, format, mode):
    found = read_image(encoded(320, 240, format), mode, 'scaled').resize((40, 30), BILINEAR)
    exact = read_image(encoded(320, 240, format), mode).resize((40, 30), BILINEAR)
    assert divisors == [4 if format == 'JPEG' else 1] and found.mode == mode
    assert np.abs(np.asarray(found, int) - np.asarray(exact)).max() <= 3


def test_an_opened_image_stays_as_it_is():
    image = slopes(32, 24)
    assert read_image(image, decode='scaled') is image


TRANSFORMS = dict(
    crop=dict(interpolation='random', color_jitter=0.4),
    auto_augment=dict(auto_augment='rand-m9-mstd0.5', interpolation='bicubic'),
    rkrc=dict(train_crop_mode='rkrc'),
    rkrr=dict(train_crop_mode='rkrr'),
    no_aug=dict(no_aug=True),
)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_timms_transforms_draw_the_same(name):
    """Random numbers are drawn in the same order, and what is seen shows the same part of the image."""
    transform = create_transform((3, 32, 32), is_training=True, use_prefetcher=True, **TRANSFORMS[name])
    for seed in range(20):
        seen, states = [], []
        for decode in ('exact', 'scaled', 'fast'):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            seen.append(np.asarray(transform(read_image(PHOTOGRAPH, decode=decode)), int))
            states.append((random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()))
        assert states[0] == states[1] == states[2]
        if name != 'auto_augment':  # which posterizes and solarizes levels
            assert np.abs(seen[1] - seen[0]).max() <= 4 and np.abs(seen[2] - seen[0]).max() <= 4


def test_crop_boxes_are_those_of_exact_decoding(monkeypatch):
    boxes = []

    def noted(image, box=None, crop=None):
        boxes.append(box)
        return crop(image, box)

    for owner in (Image.Image, LazyImage):
        monkeypatch.setattr(owner, 'crop', partialmethod(noted, crop=owner.crop))
    transform = create_transform((3, 32, 32), is_training=True, color_jitter=0.4)
    for decode in ('exact', 'scaled'):
        random.seed(0)
        for _ in range(10):
            transform(read_image(PHOTOGRAPH, decode=decode))
    assert len(boxes) == 20 and boxes[:10] == boxes[10:]


def test_evaluation_decodes_once_for_all_sizes(tmp_path, divisors):
    path = tmp_path / 'val' / 'cat' / '0.jpg'
    path.parent.mkdir(parents=True)
    path.write_bytes(PHOTOGRAPH)
    levels = []
    for decode in ('exact', 'scaled'):
        config = dict(input_size=(3, 32, 32), interpolation='bilinear', mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.)
        loader = create_eval_loader(
            create_dataset('', str(tmp_path), 'val', decode=decode), (48, 40, 32), 1, config)
        (images, _), = loader
        levels.append(images)
    assert divisors == [2]  # 96 of 240 pixels are needed
    assert all((found.int() - exact.int()).abs().max() <= 4 for exact, found in zip(*levels))


def test_it_is_decoded_again_for_more_pixels():
    image, found = read_image(PHOTOGRAPH, decode='scaled'), []
    for size in ((20, 15), (40, 30), (10, 10)):
        image.resize(size, BILINEAR)
        found.append(image.encoded.decoded.divisor)
    assert found == [8, 4, 4]


@pytest.mark.parametrize('content', [b'', b'no image', PHOTOGRAPH[:100], PHOTOGRAPH[:len(PHOTOGRAPH) // 2]])
def test_bad_images_have_the_same_errors(tmp_path, content):
    path = tmp_path / 'a.jpg'
    path.write_bytes(content)
    messages = []
    for read in (lambda: open_image(path), lambda: read_image(path, decode='scaled').resize((20, 15))):
        with pytest.raises(ImageError) as e:
            read()
        messages.append(str(e.value))
    assert messages[0] == messages[1] and str(path) in messages[0]


def test_training_and_validation(images, tmp_path):  # noqa: F811
    """Photographs that are too small for a smaller scale: as with exact decoding, to the image."""
    for decode in ('exact', 'fast'):
        train_rs.main([
            str(images), *TINY, '--epochs', '1', '--decode', decode, '--output', str(tmp_path), '--experiment', decode])
    rows = [
        validated(images, tmp_path, '--checkpoint', str(tmp_path / 'fast' / 'last.pth.tar'), '--decode', decode)
        for decode in ('exact', 'fast')]
    assert [row['top1'] for row in rows[0].values()] == [row['top1'] for row in rows[1].values()]
