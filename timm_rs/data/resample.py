"""Downscale images that were resized before, as if the original had been resized once"""
from functools import lru_cache
from typing import Any, List, Tuple

import torch
import torch.nn.functional as F

from timm_rs_runtime.errors import UserError

__all__ = ['INTERPOLATIONS', 'downscale', 'matched_weights']

INTERPOLATIONS = ('bilinear', 'bicubic')

Bands = List[Tuple[slice, torch.Tensor]]


def downscale(images: torch.Tensor, size: int, interpolation: str = 'bilinear') -> torch.Tensor:
    """Estimate what resizing the original to a smaller size would give, from what resizing it to a larger one gave.

    An image that is resized twice is blurred twice. A network trained on such images loses accuracy on sharper ones
    that are resized once. This is the linear map between both resizes of least squared error; like them it is
    antialiased and separable.

    Args:
        images: Square images [N, C, H, W], floating point.
        size: Height and width in pixels, at most H.
        interpolation: How the images were resized, 'bilinear' or 'bicubic', with antialiasing.

    Returns:
        Images [N, C, size, size] in the dtype and memory layout of the input.

    Raises:
        ValueError: The images are not square, or smaller.

    Example:
        >>> downscale(torch.rand(2, 3, 64, 64), 48).shape
        torch.Size([2, 3, 48, 48])
    """
    height, width = images.shape[-2:]
    if not 0 < size <= height == width:
        raise UserError(
            f'Cannot downscale images of {height}x{width} to {size}, expected square ones of at least that size.')
    if size == width:
        return images
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    dtype = torch.promote_types(images.dtype, torch.float32)
    bands = _bands(images.device, dtype, width, size, interpolation)
    with torch.autocast(images.device.type, enabled=False):
        x = images.to(dtype)
        x = torch.cat([weights @ x[..., used, :] for used, weights in bands], -2)
        x = torch.cat([x[..., used] @ weights.T for used, weights in bands], -1)
    resized = x.to(images.dtype)
    return resized.contiguous(memory_format=torch.channels_last) if channels_last else resized


@lru_cache(maxsize=64)
def _bands(device: torch.device, dtype: torch.dtype, *args: Any) -> Bands:
    """Return the rows of matched_weights in groups, with the columns that matter to each.

    A pixel depends on about ten of the larger image. A CPU skips the others; elsewhere one product is faster.
    """
    weights = matched_weights(*args)
    found = []
    for rows in weights.split(16 if device.type == 'cpu' else len(weights)):
        (used,) = (rows.abs() > 1e-6).any(0).nonzero(as_tuple=True)
        columns = slice(int(used[0]), int(used[-1]) + 1)
        found.append((columns, rows[:, columns].to(device, dtype)))
    return found


def matched_weights(largest: int, size: int, interpolation: str = 'bilinear', oversampling: int = 8) -> torch.Tensor:
    """Return the matrix W [size, largest] that best makes the smaller resize of a signal from the larger one.

    With the antialiased resizes L [largest, n] and S [size, n] of n fine samples, W minimizes the Frobenius norm of
    W L - S; its rows are then scaled to sum to one, so that a constant stays constant.

    Args:
        largest: Samples of the larger resize.
        size: Samples of the smaller one.
        interpolation: 'bilinear' or 'bicubic'.
        oversampling: n / largest.

    Example:
        >>> matched_weights(4, 2)
        tensor([[ 0.4321,  0.4756,  0.1095, -0.0172],
                [-0.0172,  0.1095,  0.4756,  0.4321]])
    """
    fine = torch.eye(oversampling * largest, dtype=torch.float64)[None, None]
    larger, smaller = (
        F.interpolate(fine, size=(s, fine.shape[-1]), mode=interpolation, antialias=True)[0, 0]
        for s in (largest, size))
    weights = torch.linalg.lstsq(larger.T, smaller.T).solution.T
    return (weights / weights.sum(1, keepdim=True)).float()
