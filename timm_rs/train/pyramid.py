"""One augmented batch at every resolution"""
from typing import List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_rs_runtime.errors import UserError

from ..data.resample import INTERPOLATIONS, downscale
from ..resolutions import check_resolutions

__all__ = ['ResolutionPyramid']


class ResolutionPyramid(nn.Module):
    """Bring a batch of the largest resolution to every resolution, on its device.

    The network sees the same image instances at all sizes (section 3.1). Because the batch comes augmented at the
    largest size, every dataset, loader and augmentation of timm works unchanged, including mixup and cutmix.

    The smaller images are resized twice, so they would be blurrier than those of evaluation, which are resized once; a
    network that learned from them is less accurate there. 'matched' estimates what one resize of the crop would give.

    Args:
        resolutions: Square output sizes in pixels.
        flip: 'shared' keeps the images as they come; 'independent' decides for each image again at every size, as the
            authors' code does; the loader should then not flip.
        hflip: Probability of an independent flip.
        resample: 'matched' (timm_rs.data.resample), or 'antialiased', plain bilinear interpolation of the largest size.
        interpolation: How the images were resized to the largest size, 'bilinear' or 'bicubic'; 'matched' needs it.

    Raises:
        ValueError: The flip policy, the resampling or the interpolation is unknown.

    Example:
        >>> pyramid = ResolutionPyramid((64, 32))
        >>> [tuple(x.shape) for x in pyramid(torch.rand(2, 3, 64, 64))]
        [(2, 3, 64, 64), (2, 3, 32, 32)]
    """

    FLIPS = ('shared', 'independent')
    RESAMPLES = ('matched', 'antialiased')
    INTERPOLATIONS = INTERPOLATIONS

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
                raise UserError(f'Unknown {title} {value!r}, expected one of {", ".join(known)}.')
        self.resolutions = check_resolutions(resolutions)
        self.flip = flip
        self.hflip = hflip
        self.resample = resample
        self.interpolation = interpolation

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Resize.

        Args:
            x: Images [N, C, H, W] at the largest resolution, floating point.

        Returns:
            Images [N, C, s, s] for every resolution s, largest first, in the memory layout of the input.

        Raises:
            ValueError: The images have another size.
        """
        largest = self.resolutions[0]
        if tuple(x.shape[-2:]) != (largest, largest):
            raise UserError(f'Got images of {x.shape[-2]}x{x.shape[-1]}, expected the largest resolution {largest}.')
        pyramid = [x] + [self._resize(x, s) for s in self.resolutions[1:]]
        if self.flip == 'independent':
            pyramid = [self._flip_some(y) for y in pyramid]
        return pyramid

    def _resize(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if self.resample == 'matched':
            return downscale(x, size, self.interpolation)
        return F.interpolate(x.float(), size=(size, size), mode='bilinear', antialias=True).to(x.dtype)

    def _flip_some(self, x: torch.Tensor) -> torch.Tensor:
        flipped = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.hflip
        return torch.where(flipped, x.flip(-1), x)

    def extra_repr(self) -> str:
        return (f'resolutions={self.resolutions}, flip={self.flip}, resample={self.resample}, '
                f'interpolation={self.interpolation}')
