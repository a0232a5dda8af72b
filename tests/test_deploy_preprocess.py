"""Preprocessing against timm's own, on files as people have them"""
import io
import math
import warnings

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from timm_rs_runtime import ImageError, Preprocessing
from timm_rs_runtime.images import find_images, open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(width=91, height=67, channels=3):
    """Return smooth colours and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x * (c + 1)) + np.cos(5 * y + c) for c in range(channels)]
    pixels = np.stack(waves, -1) * 50 + 128 + rng.normal(size=(height, width, channels)) * 20
    return pixels.clip(0, 255).astype(np.uint8).squeeze()


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


def of_timm(path, size, mode='RGB', **config):
    transform = create_transform((3, size, size), is_training=False, **dict(dict(mean=MEAN, std=STD), **config))
    return transform(Image.open(path).convert(mode)).numpy()


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'])
@pytest.mark.parametrize('size, crop_pct', [(64, 0.875), (48, 1.0), (32, 0.95), (60, 1.1)])
def test_as_timm(tmp_path, interpolation, size, crop_pct):
    path = saved(tmp_path / 'a.jpg', Image.fromarray(photograph()), quality=90)
    ours = Preprocessing(MEAN, STD, interpolation, crop_pct)(path, size)
    theirs = of_timm(path, size, interpolation=interpolation, crop_pct=crop_pct)
    assert ours.dtype == np.float32 and np.array_equal(ours, theirs)


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('width, height', [(91, 67), (40, 93), (64, 64), (30, 200), (7, 5), (73, 74)])
def test_crop_modes_as_timm(tmp_path, crop_mode, width, height):
    path = saved(tmp_path / 'a.png', Image.fromarray(photograph(width, height)))
    for crop_pct in (0.875, 0.9, 1.0):
        config = dict(interpolation='bicubic', crop_pct=crop_pct, crop_mode=crop_mode)
        ours = Preprocessing(MEAN, STD, **config)(path, 32)
        assert np.array_equal(ours, of_timm(path, 32, **config))


def exif_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return exif


@pytest.mark.parametrize('name, image, options', [
    ('grey.jpg', Image.fromarray(photograph(channels=1)), {}),
    ('grey.png', Image.fromarray(photograph(channels=1)), {}),
    ('cmyk.jpg', Image.fromarray(photograph(channels=4), 'CMYK'), {}),
    ('alpha.png', Image.fromarray(photograph(channels=4), 'RGBA'), {}),
    ('grey_alpha.png', Image.fromarray(photograph(channels=2), 'LA'), {}),
    ('palette.png', Image.fromarray(photograph()).quantize(64), {}),
    ('palette.gif', Image.fromarray(photograph()).quantize(64), {}),
    ('black_white.png', Image.fromarray(photograph(channels=1)).convert('1'), {}),
    ('deep.png', Image.fromarray(photograph(channels=1).astype(np.uint16) * 257), {}),
    ('float.tiff', Image.fromarray(photograph(channels=1).astype(np.float32)), {}),
    ('rotated.jpg', Image.fromarray(photograph()), dict(exif=exif_rotated())),
    ('lossy.webp', Image.fromarray(photograph()), {}),
])
@pytest.mark.filterwarnings('ignore:.*mode.*parameter is deprecated')
def test_kinds_of_files_as_timm(tmp_path, name, image, options):
    path = saved(tmp_path / name, image, **options)
    ours = Preprocessing(MEAN, STD, 'bicubic', 0.875)(path, 48)
    assert np.array_equal(ours, of_timm(path, 48, interpolation='bicubic', crop_pct=0.875))
    with open(path, 'rb') as f:
        assert np.array_equal(Preprocessing(MEAN, STD, 'bicubic', 0.875)(io.BytesIO(f.read()), 48), ours)
    with Image.open(path) as opened:
        assert np.array_equal(Preprocessing(MEAN, STD, 'bicubic', 0.875)(opened, 48), ours)


def test_orientation_is_left_as_timm_leaves_it(tmp_path):
    path = saved(tmp_path / 'a.jpg', Image.fromarray(photograph()), exif=exif_rotated())
    assert open_image(path).size == (91, 67)


def test_one_channel():
    image = Image.fromarray(photograph(64, 64, 1))
    ours = Preprocessing((0.5,), (0.25,), crop_pct=1.0)(image, 64)
    assert ours.shape == (1, 64, 64)
    assert np.allclose(ours[0], (np.asarray(image) / 255 - 0.5) / 0.25, atol=1e-6)


def test_normalizes_by_hand():
    ours = Preprocessing((0.5, 0.0, 1.0), (0.5, 1.0, 2.0), 'nearest', 1.0)(Image.new('RGB', (9, 9), (255, 51, 0)), 4)
    assert np.allclose(ours[:, 2, 3], [1.0, 0.2, -0.5]) and ours.min() == -0.5


# What is no image

def broken_files(folder):
    whole = io.BytesIO()
    Image.fromarray(photograph(300, 300)).save(whole, 'JPEG')
    whole = whole.getvalue()
    (folder / 'truncated.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'text.jpg').write_text('no image at all')
    (folder / 'empty.png').write_bytes(b'')
    png = io.BytesIO()
    Image.fromarray(photograph()).save(png, 'PNG')
    (folder / 'flipped.png').write_bytes(png.getvalue()[:60] + bytes(200) + png.getvalue()[260:])
    return ('truncated.jpg', 'text.jpg', 'empty.png', 'flipped.png', 'missing.jpg', '')


def test_errors_name_the_file(tmp_path):
    preprocessing = Preprocessing(MEAN, STD)
    for name in broken_files(tmp_path):
        with pytest.raises(ImageError) as e:
            preprocessing(tmp_path / name, 32)
        assert str(tmp_path / name) in str(e.value) and '\n' not in str(e.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = saved(tmp_path / 'bomb.png', Image.new('1', (400, 300)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)  # from twice as many on Pillow refuses
    with pytest.raises(ImageError, match='bomb.png.*120000 pixels'):
        Preprocessing(MEAN, STD)(path, 32)


def test_long_and_thin(tmp_path):
    path = saved(tmp_path / 'line.png', Image.new('RGB', (100_000, 1)))  # 256 px high it would be 25,600,000 px wide
    with pytest.raises(ImageError, match='line.png is 100000x1'):
        Preprocessing(MEAN, STD)(path, 224)
    assert Preprocessing(MEAN, STD, crop_mode='squash')(path, 32).shape == (3, 32, 32)


@pytest.mark.parametrize('config, message', [
    (dict(mean=(0.5,), std=(0.5, 0.5)), 'channels'),
    (dict(interpolation='random'), "'random'"),
    (dict(crop_mode='middle'), "'middle'"),
    (dict(crop_pct=0), 'crop_pct is 0'),
    (dict(crop_pct=87.5), 'crop_pct is 87.5, expected a share'),
    (dict(std=(0., 1., 1.)), 'positive deviations'),
    (dict(mean=(math.nan,) * 3), 'are no means'),
])
def test_unusable_settings(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**dict(dict(mean=MEAN, std=STD), **config))


def test_find_images(tmp_path):
    for name in ('b/2.JPG', 'b/1.png', 'a/3.jpeg', 'a/notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    found = [p[len(str(tmp_path)) + 1:] for p in find_images(tmp_path)]
    assert found == ['a/3.jpeg', 'b/1.png', 'b/2.JPG']
    assert len(find_images(tmp_path, 2)) == 2 and find_images(tmp_path, 9) == find_images(tmp_path)
    with pytest.raises(ImageError, match='no images'):
        find_images((tmp_path / 'c').mkdir() or tmp_path / 'c')
    with pytest.raises(ImageError, match='does not exist'):
        find_images(tmp_path / 'd')


@pytest.mark.parametrize('error', [
    AttributeError, IndexError, NotImplementedError, OverflowError, RuntimeError, SyntaxError])
def test_whatever_a_reader_raises_names_the_image(error, tmp_path, monkeypatch):
    path = saved(tmp_path / 'a.png', Image.new('RGB', (4, 4)))

    def fail(*args):
        raise error('deep inside')

    monkeypatch.setattr(Image.Image, 'convert', fail)
    with pytest.raises(ImageError, match='a.png cannot be read as an image: deep inside'):
        open_image(path, 'L')


def test_bytes_and_what_is_no_image(tmp_path):
    path = saved(tmp_path / 'a.png', Image.effect_noise((9, 7), 50))
    with open(path, 'rb') as f:
        content = f.read()
    for kind in (bytes, bytearray, memoryview):
        assert open_image(kind(content)).tobytes() == open_image(path).tobytes()
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ImageError, match=f'The image is {size[0]}x{size[1]}, which holds no pixels'):
            Preprocessing(MEAN, STD)(Image.new('RGB', size), 32)
    for nothing in (3, None, ['a.png']):
        with pytest.raises(ImageError, match=f'Got {type(nothing).__name__}, expected the name of an image'):
            open_image(nothing)


def test_warnings_of_pillow_are_left_to_the_user(tmp_path, monkeypatch):
    path = saved(tmp_path / 'large.png', Image.new('L', (300, 200)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert Preprocessing(MEAN, STD)(path, 32).shape == (3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # as a server may want it
        with pytest.raises(ImageError, match='large.png'):
            Preprocessing(MEAN, STD)(path, 32)
