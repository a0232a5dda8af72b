"""Downscale images that were resized before"""
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal

from timm_rs.data.resample import downscale, matched_weights


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('sizes', [(48, 40), (48, 24), (224, 192), (224, 96)])
def test_is_nearer_to_one_resize_of_the_original(sizes, interpolation):
    # Noise whose amplitude falls with its frequency, as that of photographs does.
    largest, size = sizes
    spectrum = torch.fft.rfft2(torch.randn(3, 3, 4 * largest, 4 * largest, generator=torch.Generator().manual_seed(0)))
    frequency = (torch.fft.fftfreq(4 * largest)[:, None] ** 2 + torch.fft.rfftfreq(4 * largest) ** 2).sqrt()
    original = torch.fft.irfft2(spectrum / frequency.clamp(min=1e-3))
    once, x = (F.interpolate(original, (s, s), mode=interpolation, antialias=True) for s in (size, largest))
    error = (downscale(x, size, interpolation) - once).square().mean().sqrt()
    assert error < 0.7 * (F.interpolate(x, (size, size), mode='bilinear', antialias=True) - once).square().mean().sqrt()


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_weights_leave_the_least_squared_error(interpolation):
    fine = torch.eye(80, dtype=torch.float64)[None, None]
    larger, smaller = (
        F.interpolate(fine, (s, 80), mode=interpolation, antialias=True)[0, 0].float() for s in (10, 7))
    weights = matched_weights(10, 7, interpolation)
    torch.testing.assert_close(weights.sum(1), torch.ones(7), rtol=0, atol=1e-6)
    residual = (weights @ larger - smaller) @ larger.T  # zero except for the scaling of rows
    assert residual.abs().max() < 0.01 * (smaller @ larger.T).abs().max()


def test_is_not_rounded_under_autocast():
    x = torch.rand(2, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16):
        y = downscale(x, 8)
    assert_equal(y, downscale(x, 8))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_keeps_dtype(dtype):
    x = torch.rand(2, 3, 16, 16, dtype=dtype)
    tolerance = dict(rtol=0, atol=1e-6) if dtype == torch.float64 else {}  # of the float32 it is compared with
    torch.testing.assert_close(downscale(x, 8), downscale(x.float(), 8).to(dtype), **tolerance)


def test_same_size():
    x = torch.rand(2, 3, 16, 16)
    assert downscale(x, 16) is x


def test_is_the_product_with_the_weights():
    x, weights = torch.rand(2, 3, 56, 56), matched_weights(56, 40)
    torch.testing.assert_close(downscale(x, 40), weights @ x @ weights.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize('shape, size', [((1, 3, 16, 16), 24), ((1, 3, 16, 12), 8), ((1, 3, 16, 16), 0)])
def test_images_that_cannot_be_downscaled(shape, size):
    with pytest.raises(ValueError, match=f'{shape[2]}x{shape[3]} to {size}, expected square ones'):
        downscale(torch.rand(shape), size)
