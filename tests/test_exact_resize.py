"""Crops of resized images equal Pillow's byte for byte"""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_rs.data.datasets import PyramidTransform
from timm_rs.data.exact_resize import ResizeAndCrop, to_planes

of_new_torch = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, 'matmul', None), 'fp32_precision'), reason='needs torch 2.9')


def create_image(width, height, seed=0, kind='smooth'):
    generator = np.random.default_rng(seed)
    if kind == 'extreme':
        return Image.fromarray(generator.choice(np.array([0, 255], np.uint8), (height, width, 3)))
    coarse = generator.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def create_timm_transform(size, **kwargs):
    return create_transform((3, size, size), use_prefetcher=True, **kwargs)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0])
@pytest.mark.parametrize('size', [32, 97, 224])
def test_equals_timm(size, crop_pct, interpolation):
    transform = create_timm_transform(size, interpolation=interpolation, crop_pct=crop_pct)
    faster = ResizeAndCrop.of(transform)
    generator = np.random.default_rng(size)
    shapes = [(500, 375), (375, 500), (256, 256), (1, 1), (size, size + 1)]
    shapes += generator.integers(2, 700, (12, 2)).tolist()
    for seed, (width, height) in enumerate(shapes):
        for kind in ('smooth', 'extreme'):
            image = create_image(width, height, seed, kind)
            assert torch.equal(faster(to_planes(image)), transform(image)), (width, height, kind)


def test_large_reductions():
    transform = create_timm_transform(8, interpolation='bicubic', crop_pct=1.0)
    faster = ResizeAndCrop.of(transform)
    image = create_image(480, 450, kind='extreme')
    assert faster.fits(image)
    assert torch.equal(faster(to_planes(image)), transform(image))
    assert not faster.fits(create_image(600, 600))


@pytest.mark.parametrize('kwargs', [
    dict(interpolation='lanczos'),
    dict(crop_mode='squash'),
    dict(crop_mode='border'),
    dict(crop_pct=1.2),
])
def test_leaves_other_transforms_alone(kwargs):
    transform = create_timm_transform(32, **dict(dict(interpolation='bicubic', crop_pct=0.9), **kwargs))
    assert ResizeAndCrop.of(transform) is None


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_pyramid_of_any_mode(mode):
    transforms = [create_timm_transform(s, interpolation=i) for s, i in ((64, 'bicubic'), (32, 'lanczos'))]
    image = create_image(90, 70).convert(mode)
    for found, transform in zip(PyramidTransform(transforms)(image), transforms):
        assert torch.equal(found, transform(image))


def fits_after(code):
    """Return what `fits` says in a process of its own, whose precision cannot outlive the test."""
    script = f'''if True:
        import torch
        from PIL import Image
        from timm.data import create_transform
        from timm_rs.data.exact_resize import ResizeAndCrop
        transform = create_transform((3, 32, 32), use_prefetcher=True, interpolation='bicubic')
        {code}
        print(ResizeAndCrop.of(transform).fits(Image.new('RGB', (90, 70))))'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    return {'True': True, 'False': False}[done.stdout.strip()]


@pytest.mark.parametrize('code,expected', [
    ("torch.set_float32_matmul_precision('medium')", False),
    ("torch.set_float32_matmul_precision('highest')", True),
    pytest.param('torch.backends.cuda.matmul.allow_tf32 = True', True, marks=of_new_torch),
    pytest.param("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True, marks=of_new_torch),
    pytest.param("torch.backends.mkldnn.fp32_precision = 'bf16'", False, marks=of_new_torch),
])
def test_only_where_the_cpu_multiplies_float32(code, expected):
    assert fits_after(code) is expected
