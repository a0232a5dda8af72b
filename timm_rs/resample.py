"""Downscale images that were resized before, as if the original had been resized once"""
from functools import lru_cache

import torch
import torch.nn.functional as F

__all__ = ['INTERPOLATIONS', 'downscale', 'matched_weights']

INTERPOLATIONS = ('bilinear', 'bicubic')


def downscale(images: torch.Tensor, size: int, interpolation: str = 'bilinear') -> torch.Tensor:
    """Estimate what resizing the original to a smaller size had given, from what resizing it to a larger one gave.

    An image that is resized twice is blurred twice: a network sees sharper ones where they are resized once, and
    loses accuracy. This is the linear map between both resizes of least squared error; like them it is antialiased and
    separable.

    Args:
        images: Square images [N, C, H, W], floating point.
        size: Height and width in pixels, H at most.
        interpolation: How the images were resized, 'bilinear' or 'bicubic', with antialiasing.

    Returns:
        Images [N, C, size, size] in the dtype and memory layout of the input.

    Example:
        >>> downscale(torch.rand(2, 3, 64, 64), 48).shape
        torch.Size([2, 3, 48, 48])
    """
    if images.shape[-1] == size:
        return images
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    dtype = torch.promote_types(images.dtype, torch.float32)
    weights = _weights_on(images.device, dtype, images.shape[-1], size, interpolation)
    with torch.autocast(images.device.type, enabled=False):
        resized = (weights @ images.to(dtype) @ weights.T).to(images.dtype)
    return resized.contiguous(memory_format=torch.channels_last) if channels_last else resized


@lru_cache(maxsize=64)
def _weights_on(device: torch.device, dtype: torch.dtype, *args) -> torch.Tensor:
    return matched_weights(*args).to(device, dtype)


def matched_weights(largest: int, size: int, interpolation: str = 'bilinear', oversampling: int = 8) -> torch.Tensor:
    """Return the matrix W [size, largest] that best makes the smaller resize of a signal out of the larger one.

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
