"""One augmented batch at every resolution"""
from functools import lru_cache
from typing import List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..private_bn import check_resolutions

__all__ = ['ResolutionPyramid']


class ResolutionPyramid(nn.Module):
    """Bring a batch of the largest resolution to every resolution, on its device.

    The network sees the same image instances at all sizes (section 3.1). Because the batch comes augmented at the
    largest size, every dataset, loader and augmentation of timm, mixup and cutmix included, serves unchanged.

    An image that was resized twice is blurred twice, and a network that was trained on such images loses accuracy on
    those of evaluation, which were resized once. 'matched' therefore estimates what the original crop had given at each
    size: the linear map between both resizes of least squared error. Like them it is antialiased and separable.

    Args:
        resolutions: Square output sizes in pixels.
        flip: 'shared' keeps the images as they come; 'independent' flips each image anew at every size, as the
            authors' code does: the loader should not flip then.
        hflip: Probability of an independent flip.
        resample: 'matched', or 'antialiased' for plain antialiased bilinear interpolation of the largest size.
        interpolation: How the images were resized to the largest size, 'bilinear' or 'bicubic'; 'matched' needs it.

    Raises:
        ValueError: The flip policy, the resampling or the interpolation is none of these.

    Example:
        >>> pyramid = ResolutionPyramid((64, 32))
        >>> [tuple(x.shape) for x in pyramid(torch.rand(2, 3, 64, 64))]
        [(2, 3, 64, 64), (2, 3, 32, 32)]
    """

    FLIPS = ('shared', 'independent')
    RESAMPLES = ('matched', 'antialiased')
    INTERPOLATIONS = ('bilinear', 'bicubic')

    def __init__(
            self,
            resolutions: Sequence[int],
            flip: str = 'shared',
            hflip: float = 0.5,
            resample: str = 'matched',
            interpolation: str = 'bilinear',
    ):
        super().__init__()
        for value, known, title in (
                (flip, self.FLIPS, 'flip policy'), (resample, self.RESAMPLES, 'resampling'),
                (interpolation, self.INTERPOLATIONS, 'interpolation')):
            if value not in known:
                raise ValueError(f'Unknown {title} {value!r}, expected one of {", ".join(known)}.')
        self.resolutions = check_resolutions(resolutions)
        self.flip = flip
        self.hflip = hflip
        self.resample = resample
        self.interpolation = interpolation
        if resample == 'matched':
            for s in self.resolutions[1:]:
                weights = matched_weights(self.resolutions[0], s, interpolation)
                self.register_buffer(f'weights_{s}', weights, persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Resize.

        Args:
            x: Images [N, C, H, W] at the largest resolution, floating point.

        Returns:
            Images [N, C, s, s] for every resolution s, largest first, in the memory layout of the input.

        Raises:
            ValueError: The images are of another size.
        """
        largest = self.resolutions[0]
        if tuple(x.shape[-2:]) != (largest, largest):
            raise ValueError(f'Got images of {x.shape[-2]}x{x.shape[-1]}, expected the largest resolution {largest}.')
        pyramid = [x] + [self._resize(x.float(), s).to(x.dtype) for s in self.resolutions[1:]]
        if self.flip == 'independent':
            pyramid = [self._flip_some(y) for y in pyramid]
        return pyramid

    def _resize(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if self.resample == 'antialiased':
            return F.interpolate(x, size=(size, size), mode='bilinear', antialias=True)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        weights = getattr(self, f'weights_{size}').to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            y = weights @ x @ weights.T
        return y.contiguous(memory_format=torch.channels_last) if channels_last else y

    def _flip_some(self, x: torch.Tensor) -> torch.Tensor:
        flipped = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.hflip
        return torch.where(flipped, x.flip(-1), x)

    def extra_repr(self) -> str:
        return (f'resolutions={self.resolutions}, flip={self.flip}, resample={self.resample}, '
                f'interpolation={self.interpolation}')


@lru_cache
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
