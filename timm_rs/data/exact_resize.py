"""Pillow's resize followed by a centre crop, to the same bytes, in less time where several sizes are made of one image

Pillow resizes 8-bit images in two passes, along the rows and then along the columns. In each a pixel is a sum of bytes
times integers of 22 fractional bits, rounded to a byte, and it computes what a crop then throws away. Here a pass makes
the pixels of the crop alone, as products of float32 matrices that lose nothing: the integers are split into a high part
and a low part of 8 bits, so that all sums are multiples of one power of two and have at most 24 bits.
"""
from functools import cache, lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

__all__ = ['ResizeAndCrop', 'to_planes']

_FRACTION = 22  # bits of Pillow's weights
_LOW = 8  # of them in the low part
_BLOCK = 16  # pixels of a product
_MAX_TAPS = 256  # that a float32 holds the sum of
_REACH = {InterpolationMode.BILINEAR: 1., InterpolationMode.BICUBIC: 2.}


def to_planes(image: Image.Image) -> torch.Tensor:
    """Return the bytes of an RGB image [H, 3, W] as float32, what every size begins with."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(0, 2, 1).to(torch.float32, memory_format=torch.contiguous_format)


class ResizeAndCrop:
    """The transforms Resize(size) and CenterCrop(crop) of torchvision, from planes to a uint8 tensor.

    Args:
        size: Size of the shorter side in pixels.
        crop: Height and width in pixels.
        interpolation: Bilinear or bicubic.
    """

    def __init__(self, size: int, crop: Tuple[int, int], interpolation: InterpolationMode):
        self.size = size
        self.crop = crop
        self.interpolation = interpolation

    @classmethod
    def of(cls, transform: transforms.Compose) -> Optional['ResizeAndCrop']:
        """Return what does the same as timm's transform for evaluation, if this class can.

        Example:
            >>> from timm.data import create_transform
            >>> transform = create_transform((3, 64, 64), use_prefetcher=True, interpolation='bicubic', crop_pct=0.875)
            >>> ResizeAndCrop.of(transform).size
            73
        """
        steps = getattr(transform, 'transforms', ())
        if [type(s).__name__ for s in steps] != ['Resize', 'CenterCrop', 'MaybePILToTensor']:
            return None
        resize, crop = steps[:2]
        if not isinstance(resize.size, int) or resize.max_size is not None or resize.interpolation not in _REACH:
            return None
        if max(crop.size) > resize.size or not _agrees_with_pillow(resize.interpolation):
            return None
        return cls(resize.size, tuple(crop.size), resize.interpolation)

    def fits(self, image: Image.Image) -> bool:
        """Return whether an image can be resized here: one in RGB that does not shrink beyond measure.

        None can where torch is allowed to multiply float32 in a lower precision on the CPU.
        """
        if not _multiplies_float32():
            return False
        return image.mode == 'RGB' and _REACH[self.interpolation] * min(image.size) / self.size < _MAX_TAPS / 2 - 2

    @torch.no_grad()
    def __call__(self, planes: torch.Tensor) -> torch.Tensor:
        """Return the crop [3, h, w] of planes [H, 3, W]."""
        height, _, width = planes.shape
        shorter = min(height, width)
        resized = [self.size if n == shorter else int(self.size * n / shorter) for n in (height, width)]
        down, across = (
            _plan(n, m, int(round((m - c) / 2.)), c, self.interpolation)
            for n, m, c in zip((height, width), resized, self.crop))
        first, last = down.starts[0], down.starts[-1] + down.taps
        rows = planes[first:last].view(-1, width)
        sums = rows.new_empty(len(rows), len(across.starts), 2, _BLOCK)
        for start, weights, out in zip(across.starts, across.weights, sums.flatten(2).unbind(1)):
            torch.mm(rows.narrow(1, start, across.taps), weights.T, out=out)
        rows = _round(sums[:, :, 0], sums[:, :, 1]).floor_().view(last - first, -1)
        sums = rows.new_empty(len(down.starts), 2, _BLOCK, rows.shape[1])
        for start, weights, out in zip(down.starts, down.weights, sums.flatten(1, 2).unbind()):
            torch.mm(weights, rows.narrow(0, start - first, down.taps), out=out)
        pixels = _round(sums[:, 0], sums[:, 1]).byte()  # rounds down
        height, width = self.crop
        return pixels.view(-1, 3, len(across.starts) * _BLOCK)[:height, :, :width].permute(1, 0, 2)


def _multiplies_float32() -> bool:
    """Return whether matrix products on the CPU are those of float32 throughout."""
    matmul = getattr(torch.backends.mkldnn, 'matmul', None)
    if hasattr(matmul, 'fp32_precision'):  # the getter below includes GPUs, and may raise
        return matmul.fp32_precision in ('none', 'ieee')
    return torch.get_float32_matmul_precision() == 'highest'


class _Plan(NamedTuple):
    """One pass.

    Attributes:
        starts: First pixel that matters to each block of _BLOCK pixels.
        weights: Weights of each block [2 * _BLOCK, taps], the high parts before the low ones.
        taps: Pixels that matter to a block.
    """
    starts: List[int]
    weights: Sequence[torch.Tensor]
    taps: int


@lru_cache(maxsize=256)
def _plan(length: int, resized: int, first: int, count: int, interpolation: InterpolationMode) -> _Plan:
    """Return the pass that gives `count` pixels from the first on, of `length` pixels resized to `resized`."""
    begin, weights = _pillow_weights(length, resized, interpolation)
    begin, weights = begin[first:first + count], weights[first:first + count]
    starts = begin[::_BLOCK]
    taps = min(length, int((np.maximum.reduceat(begin, np.arange(0, count, _BLOCK)) - starts).max()) + weights.shape[1])
    starts = np.minimum(starts, length - taps)
    blocks, pixels = np.divmod(np.arange(count), _BLOCK)
    columns = (begin - starts[blocks])[:, None] + np.arange(weights.shape[1])
    high, low = weights >> _LOW, weights & (2 ** _LOW - 1)
    table = np.zeros((len(starts), 2, _BLOCK, taps + weights.shape[1]), np.float32)  # zeros behind the last pixel
    table[blocks[:, None], 0, pixels[:, None], columns] = high * 2. ** (_LOW - _FRACTION)
    table[blocks[:, None], 1, pixels[:, None], columns] = low * 2. ** -_LOW
    weights = torch.from_numpy(table[..., :taps].reshape(len(starts), 2 * _BLOCK, taps))
    return _Plan(starts.tolist(), weights.unbind(), taps)


def _pillow_weights(length: int, resized: int, interpolation: InterpolationMode) -> Tuple[np.ndarray, np.ndarray]:
    """Return the first pixel that counts [resized] and the integers [resized, taps] of a pass of Pillow's.

    All in float64 and in Pillow's order of operations, so that the integers come out the same.
    """
    scale = length / resized
    stretch = max(scale, 1.)
    reach = _REACH[interpolation] * stretch
    centers = (np.arange(resized) + 0.5) * scale
    begin = np.maximum((centers - reach + 0.5).astype(int), 0)
    end = np.minimum((centers + reach + 0.5).astype(int), length)
    offsets = np.arange((end - begin).max())
    weights = _kernel((offsets + begin[:, None] - centers[:, None] + 0.5) * (1 / stretch), interpolation)
    weights[offsets >= (end - begin)[:, None]] = 0.
    weights = weights / np.cumsum(weights, axis=1)[:, -1:]  # one after the other, not in pairs
    return begin, np.trunc(weights * 2 ** _FRACTION + np.where(weights < 0, -0.5, 0.5)).astype(int)


def _kernel(x: np.ndarray, interpolation: InterpolationMode) -> np.ndarray:
    x = np.abs(x)
    if interpolation is InterpolationMode.BILINEAR:
        return np.maximum(1. - x, 0.)
    a = -0.5
    inner = ((a + 2.) * x - (a + 3.)) * x * x + 1.
    outer = (((x - 5.) * x + 8.) * x - 4.) * a
    return np.where(x < 1., inner, np.where(x < 2., outer, 0.))


def _round(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return 0.5 more than the sums of both parts, from 0 to 255.5; low is overwritten."""
    return torch.add(high, low.floor_(), alpha=2. ** (_LOW - _FRACTION)).add_(0.5).clamp_(0.5, 255.5)


@cache
def _agrees_with_pillow(interpolation: InterpolationMode) -> bool:
    """Return whether it gives Pillow's bytes here: a compiler may have reordered its operations."""
    generator = np.random.default_rng(0)
    for width, height in ((97, 61), (50, 201)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        steps = transforms.Compose([transforms.Resize(40, interpolation), transforms.CenterCrop(37)])
        found = ResizeAndCrop(40, (37, 37), interpolation)(to_planes(image))
        if not np.array_equal(np.asarray(steps(image)), found.permute(1, 2, 0).numpy()):
            return False
    return True
