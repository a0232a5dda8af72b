"""Preprocessing against timm's own, on files as people have them"""
import io
import math
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from timm.data import create_transform

from timm_rs_runtime import ImageError, Preprocessing, images
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


# JPEGs that are decoded at a smaller scale

@pytest.mark.parametrize('size, needed, decoded, divisor', [
    ((800, 600), (101, 75), (200, 150), 4),  # 600 / 8 are 75, but 800 / 8 are not 101
    ((800, 600), (100, 75), (100, 75), 8),
    ((800, 600), (1, 1), (100, 75), 8),
    ((800, 600), (400, 301), (800, 600), 1),
    ((801, 599), (400, 299), (401, 300), 2),  # rounded up
])
def test_the_smallest_scale_that_has_enough_pixels(tmp_path, size, needed, decoded, divisor):
    path = saved(tmp_path / 'a.jpg', Image.new('RGB', size))
    image = open_image(path, 'RGB', lambda *full_size: full_size == size and needed)
    assert (image.size, image.full_size, image.divisor) == (decoded, size, divisor)
    assert open_image(path).size == size


@pytest.mark.parametrize('decode, resolution, decoded', [
    ('scaled', 96, (500, 375)),  # 109 px before the crop: 218 are needed
    ('fast', 96, (250, 188)),  # 137
    ('fast', 140, (500, 375)),  # 160: 200
    ('scaled', 40, (125, 94)),  # 45: 90
    ('exact', 8, (500, 375)),
])
def test_margins(tmp_path, decode, resolution, decoded):
    path = saved(tmp_path / 'a.jpg', Image.new('RGB', (500, 375)))
    assert Preprocessing(MEAN, STD, decode=decode).open(path, resolution).size == decoded
    assert Preprocessing(MEAN, STD, 'nearest', decode=decode).open(path, resolution).size == (500, 375)


def smooth(width, height, channels=3):
    """Return waves that even an eighth of the pixels shows."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (90 + 20 * c)) + np.cos(y / (110 - 20 * c)) for c in range(channels)]
    return (np.stack(waves, -1) * 50 + 128).astype(np.uint8).squeeze()


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('width, height', [(803, 601), (401, 990), (700, 700)])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0, 1.2])
def test_scaled_shows_what_exact_shows(tmp_path, crop_mode, width, height, crop_pct):
    """A shift by one pixel of the input would be 5 levels."""
    image = Image.fromarray(smooth(width, height))
    config = dict(mean=(0.,) * 3, std=(1 / 255,) * 3, crop_pct=crop_pct, crop_mode=crop_mode)
    for path in (saved(tmp_path / 'a.jpg', image, quality=95), saved(tmp_path / 'a.png', image)):
        exact = Preprocessing(**config)(path, 48)
        for decode in ('scaled', 'fast'):
            difference = np.abs(Preprocessing(**config, decode=decode)(path, 48) - exact)
            assert difference.mean() < 0.6 and difference.max() < 8


@pytest.mark.parametrize('name, image, options', [
    ('grey.jpg', Image.fromarray(smooth(640, 480, 1)), {}),
    ('cmyk.jpg', Image.fromarray(smooth(640, 480, 4), 'CMYK'), {}),
    ('progressive.jpg', Image.fromarray(smooth(640, 480)), dict(progressive=True)),
    ('rotated.jpg', Image.fromarray(smooth(640, 480)), dict(exif=exif_rotated())),
    ('telephone.jpg', Image.fromarray(smooth(640, 480)), dict(
        format='MPO', save_all=True, append_images=[Image.new('RGB', (640, 480))])),
    ('16_bits.png', Image.fromarray(smooth(640, 480, 1).astype(np.uint16) * 257), {}),
])
@pytest.mark.filterwarnings('ignore:.*mode.*parameter is deprecated')
def test_kinds_of_files_at_a_smaller_scale(tmp_path, name, image, options):
    path = saved(tmp_path / name, image, **options)
    for config in (dict(mean=(0.,) * 3, std=(1 / 255,) * 3), dict(mean=(0.,), std=(1 / 255,))):
        scaled = Preprocessing(**config, decode='scaled')
        assert scaled.open(path, 48).size == ((640, 480) if name.endswith('png') else (160, 120))
        assert np.abs(scaled(path, 48) - Preprocessing(**config)(path, 48)).mean() < 0.6


def test_an_image_that_was_given_keeps_its_pixels(tmp_path):
    path = saved(tmp_path / 'a.jpg', Image.fromarray(smooth(640, 480)))
    scaled = Preprocessing(MEAN, STD, decode='scaled')
    with Image.open(path) as given:
        scaled(given, 24)
        assert given.size == (640, 480) and np.array_equal(given, open_image(path))
    image = scaled.open(path, 48)
    for size in (48, 24):  # it serves the smaller sizes too
        assert scaled(image, size).shape == (3, size, size) and image.size == (160, 120)


def test_a_larger_size_decodes_again(tmp_path):
    """640 x 480 at 1/4 serve 48 px, which need 108; 96 px need 218 and 240 px need 548."""
    path = saved(tmp_path / 'a.jpg', Image.fromarray(smooth(640, 480)))
    with open(path, 'rb') as f:
        content = f.read()
    scaled = Preprocessing(MEAN, STD, decode='scaled')
    for source in (path, content, io.BytesIO(content)):
        image = scaled.open(source, 48)
        for size, decoded in ((48, (160, 120)), (96, (320, 240)), (240, (640, 480))):
            assert scaled.open(image, size).size == decoded and image.size == (160, 120)
            assert np.array_equal(scaled(image, size), scaled(path, size))
    whole = scaled.open(path, 240)
    assert scaled.open(whole, 500) is whole


@pytest.mark.parametrize('name, size', [('a.jpg', (801, 599)), ('a.png', (801, 599)), ('a.mpo', (640, 480))])
def test_what_will_be_decoded_is_known_before(tmp_path, name, size):
    options = dict(save_all=True, append_images=[Image.new('RGB', size)]) if name.endswith('mpo') else {}
    path = saved(tmp_path / name, Image.fromarray(smooth(*size)), **options)
    with open(path, 'rb') as f:
        content = f.read()
    for decode in ('scaled', 'fast', 'exact'):
        preprocessing = Preprocessing(MEAN, STD, decode=decode)
        opened = [preprocessing.open(path, r) for r in (160, 96, 48, 24)]
        for source in (content, io.BytesIO(content), memoryview(content)):
            form, length, pixels = images.work_of(source, [preprocessing.needed(r) for r in (160, 96, 48, 24)])
            assert (length, pixels) == (len(content), [image.width * image.height for image in opened])
            assert form == {'jpg': 'JPEG', 'png': 'PNG', 'mpo': 'MPO'}[name[-3:]]
    for nothing in (b'text', content[:20], Image.new('RGB', (9, 9))):
        assert images.work_of(nothing, [None, None]) == ('', 0, [0, 0])


@pytest.mark.parametrize('decode', ['scaled', 'fast'])
def test_bounds_and_damage_are_those_of_exact(tmp_path, monkeypatch, decode):
    scaled = Preprocessing(MEAN, STD, decode=decode)
    for name in broken_files(tmp_path):
        with pytest.raises(ImageError) as exact:
            Preprocessing(MEAN, STD)(tmp_path / name, 32)
        with pytest.raises(ImageError) as e:
            scaled(tmp_path / name, 32)
        assert str(e.value) == str(exact.value)
    path = saved(tmp_path / 'large.jpg', Image.new('RGB', (400, 300)))
    monkeypatch.setattr(images, 'MAX_PIXELS', 100_000)  # counted before it is decoded
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'load', lambda self: pytest.fail('decoded'))
    with pytest.raises(ImageError, match='large.jpg is 400x300, expected at most 100,000 pixels'):
        scaled(path, 32)


# 16 bits, and ranges that nobody knows

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = GRADIENT.astype(np.uint16) * 257  # the same from 0 to 65535


def write_tiff(path, pixels, photometric=1, bits=None, byte_order='<'):
    """Write grey pixels as the plainest TIFF."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(byte_order)).tobytes()
    bits = bits or 8 * pixels.itemsize
    values = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    values[273] = 10 + 12 * len(values) + 4
    entries = [struct.pack(f'{byte_order}HHII', tag, 4, 1, value) for tag, value in values.items()]
    order = {'<': b'II', '>': b'MM'}[byte_order]
    head = order + struct.pack(f'{byte_order}HIH', 42, 8, len(entries))
    path.write_bytes(head + b''.join(entries) + bytes(4) + data)
    return str(path)


@pytest.mark.parametrize('name', ['a.png', 'a.pgm', 'a.jp2', 'little.tiff', 'big.tiff', 'in memory'])
def test_a_16_bit_gradient_is_its_8_bit_twin(tmp_path, name):
    image = Image.fromarray(DEEP)
    if name.endswith('.tiff'):
        source = write_tiff(tmp_path / name, DEEP, byte_order='<' if name.startswith('little') else '>')
    else:
        source = image if name == 'in memory' else saved(tmp_path / name, image)
    assert np.array_equal(open_image(source, 'L'), GRADIENT)
    assert np.array_equal(open_image(source), np.stack([GRADIENT] * 3, -1))
    for size in (8, 16):
        twin = Preprocessing(MEAN, STD)(Image.fromarray(GRADIENT), size)
        assert np.array_equal(Preprocessing(MEAN, STD)(source, size), twin)


def test_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)  # 128 / 257 = 0.498, 129 / 257 = 0.502
    assert np.asarray(open_image(Image.fromarray(values), 'L')).tolist() == [[0, 0, 1, 1, 2, 254, 255, 255]]


def test_pixels_of_no_known_range_are_refused(tmp_path):
    folder = tmp_path
    for path in (
        saved(folder / 'float.tiff', Image.fromarray(GRADIENT.astype(np.float32))),
        saved(folder / 'float.pfm', Image.fromarray(GRADIENT.astype(np.float32) / 255)),
        saved(folder / '32_bits.tiff', Image.fromarray(GRADIENT.astype(np.int32))),
        write_tiff(folder / 'white_is_0.tiff', DEEP, photometric=0),  # which Pillow reads as a negative
        write_tiff(folder / '12_bits.tiff', DEEP, bits=12),
        Image.fromarray(GRADIENT.astype(np.int32)),
    ):
        with pytest.raises(ImageError, match="has pixels of Pillow's mode '(F|I|I;16)', whose range is unknown"):
            open_image(path)


# What is not an image

def broken_files(folder):
    whole = io.BytesIO()
    Image.fromarray(photograph(300, 300)).save(whole, 'JPEG')
    whole = whole.getvalue()
    (folder / 'truncated.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'text.jpg').write_text('not an image')
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


@pytest.mark.parametrize('name', ['a.eps', 'a.pdf', 'a.ico', 'a.tga', 'a.pcx', 'a.sgi', 'a.dds'])
def test_other_formats_are_not_opened(tmp_path, name):
    path = saved(tmp_path / name, Image.new('RGB', (16, 16)))
    with open(path, 'rb') as f:
        content = f.read()
    for source in (path, content):
        with pytest.raises(ImageError, match='is not an image, expected one of JPEG, PNG, '):
            open_image(source)
    with pytest.raises(ImageError, match='no images'):
        find_images(tmp_path)


def test_a_text_that_is_too_long(tmp_path, monkeypatch):
    info = PngInfo()
    info.add_text('Comment', 'x' * 1000, zip=True)
    path = saved(tmp_path / 'text.png', Image.new('RGB', (4, 4)), pnginfo=info)
    assert open_image(path).size == (4, 4)
    monkeypatch.setattr(PngImagePlugin, 'MAX_TEXT_CHUNK', 100)
    with pytest.raises(ImageError, match='text.png cannot be read as an image: Decompressed data too large'):
        open_image(path)


def test_too_many_pixels(tmp_path, monkeypatch):
    path = saved(tmp_path / 'bomb.png', Image.new('1', (400, 300)))
    with monkeypatch.context() as patch:
        patch.setattr(images, 'MAX_PIXELS', 100_000)
        for source in (path, Image.new('L', (400, 300))):
            with pytest.raises(ImageError, match='is 400x300, expected at most 100,000 pixels'):
                open_image(source)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)  # from twice as many on Pillow refuses
    with pytest.raises(ImageError, match='bomb.png.*120000 pixels'):
        Preprocessing(MEAN, STD)(path, 32)


def test_long_and_thin(tmp_path):
    path = saved(tmp_path / 'line.png', Image.new('RGB', (1001, 10)))
    with pytest.raises(ImageError, match='line.png is 1001x10, expected .* one side at most 100 times the other'):
        Preprocessing(MEAN, STD)(path, 224)
    longest = Image.new('RGB', (1000, 10))
    assert Preprocessing(MEAN, STD)(longest, 32).shape == (3, 32, 32)
    with pytest.raises(ImageError, match='would be resized to 200000x2000, expected at most 178,956,970 pixels'):
        Preprocessing(MEAN, STD, crop_pct=1.0)(longest, 2000)


def test_a_photograph_of_a_telephone_is_read(tmp_path):
    """JPEGs of several pictures are JPEGs."""
    picture = Image.fromarray(photograph())
    path = saved(tmp_path / 'a.jpg', picture, format='MPO', save_all=True, append_images=[picture])
    with Image.open(path) as opened:
        assert opened.format == 'MPO'
        assert np.array_equal(open_image(path), opened)


@pytest.mark.parametrize('config, message', [
    (dict(mean=(0.5,), std=(0.5, 0.5)), 'channels'),
    (dict(interpolation='random'), "interpolation is 'random', expected one of nearest"),
    (dict(decode='half'), "decode is 'half', expected one of scaled, fast, exact"),
    (dict(crop_mode='middle'), "crop_mode is 'middle', expected one of center"),
    (dict(crop_pct=0), 'crop_pct is 0'),
    (dict(crop_pct=87.5), 'crop_pct is 87.5, expected a number of at least 0.1 and at most 4'),
    (dict(std=(0., 1., 1.)), r'std\[0\] is 0.0, expected a finite number above 0'),
    (dict(mean=(math.nan,) * 3), r'mean\[0\] is nan, expected a finite number'),
])
def test_unusable_settings(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**dict(dict(mean=MEAN, std=STD), **config))


def test_find_images(tmp_path):
    for name in ('b/2.JPG', 'b/1.png', 'a/3.webp', 'a/notes.txt', 'a/.png', 'a/4.eps'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    found = [p[len(str(tmp_path)) + 1:] for p in find_images(tmp_path)]
    assert found == ['a/3.webp', 'b/1.png', 'b/2.JPG']
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
        with pytest.raises(ImageError, match=f'The image is {size[0]}x{size[1]}, expected at least one pixel'):
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
