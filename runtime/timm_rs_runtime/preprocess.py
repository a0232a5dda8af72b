"""timm's evaluation preprocessing with Pillow and NumPy only"""
import math
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import numpy as np
from PIL import Image

from . import fields
from .errors import UserError
from .images import MAX_PIXELS, MODES, ImageError, ImageSource, name_of, open_image

__all__ = ['MARGINS', 'PREPROCESSING', 'Preprocessing']

# By how much a JPEG that is decoded at a smaller scale still exceeds the resized image, by values of `decode`.
MARGINS = {'scaled': 2., 'fast': 1.25, 'exact': None}

PREPROCESSING = dict(
    mean=fields.array(fields.number(), 1, fields.MAX_SIZE),
    std=fields.array(fields.number(0, above=True), 1, fields.MAX_SIZE),
    interpolation=fields.text(choices=[name.lower() for name in Image.Resampling.__members__]),
    crop_pct=fields.crop_share(),
    crop_mode=fields.text(choices=('center', 'squash', 'border')),
)
_ATTRIBUTES = fields.record(dict(PREPROCESSING, decode=fields.text(choices=tuple(MARGINS))))


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the input of a network.

    With decode='exact' it is bit for bit that of timm.data.create_transform. Otherwise a JPEG is decoded at the
    smallest scale that keeps a margin over the resized image, and only what the crop shows is resized. Other formats
    are decoded whole, then reduced by a whole factor that keeps the same margin. 'nearest' is always exact.

    Attributes:
        mean: Pixel mean of each channel, of values in [0, 1].
        std: Pixel standard deviation of each channel.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: Side of the crop as a share of the resized image.
        crop_mode: center (the shorter side is resized), squash (both are) or border (the longer is, the rest is
            filled).
        decode: scaled (a margin of 2), fast (1.25) or exact.

    Raises:
        UserError: A value is not usable.

    Example:
        >>> preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.875)
        >>> preprocessing(Image.new('RGB', (300, 200)), 160).shape
        (3, 160, 160)
    """
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    decode: str = 'exact'

    def __post_init__(self):
        fields.check_fields(vars(self), _ATTRIBUTES, 'Preprocessing')
        if len(self.mean) != len(self.std) or len(self.mean) not in MODES:
            raise UserError(f'mean is {self.mean} and std is {self.std}, expected 1 or 3 channels each.')

    def __call__(self, image: ImageSource, resolution: int) -> np.ndarray:
        """Return the input of a network.

        Args:
            image: Name of a file, a binary file or its content, or an image.
            resolution: Side of the square in pixels.

        Returns:
            Array of float32 [C, resolution, resolution].

        Raises:
            ImageError: See open_image; or resizing would need more than MAX_PIXELS.
        """
        name = name_of(image)
        image = self.open(image, resolution)
        width, height = self._resized(*getattr(image, 'full_size', image.size), resolution)
        if width * height > MAX_PIXELS:
            raise ImageError(f'{name} would be resized to {width}x{height}, expected at most {MAX_PIXELS:,} pixels.')
        image = self._cropped(self._shown(image, (width, height), resolution), resolution)
        pixels = np.asarray(image).reshape(resolution, resolution, -1)
        mean, std = (np.array(v, np.float32)[:, None] for v in (self.mean, self.std))
        levels = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std  # [C, 256]
        array = np.empty((len(mean), resolution, resolution), np.float32)
        for channel, values in enumerate(levels):
            np.take(values, pixels[..., channel], out=array[channel], mode='clip')  # other modes make a copy
        return array

    def open(self, image: ImageSource, resolution: int) -> Image.Image:
        """Return an image that is decoded for this resolution, and for smaller ones.

        Raises:
            ImageError: See open_image.
        """
        return open_image(image, MODES[len(self.mean)], self.needed(resolution))

    def needed(self, resolution: int) -> Optional[Callable[[int, int], Tuple[int, int]]]:
        """Return the function that open_image takes: how many pixels of each side suffice. None for all of them."""
        margin = self._margin
        return margin and (
            lambda *size: tuple(math.ceil(margin * side) for side in self._resized(*size, resolution)))

    @property
    def _margin(self) -> Optional[float]:
        return None if self.interpolation == 'nearest' else MARGINS[self.decode]

    def _shown(self, image: Image.Image, size: Tuple[int, int], resolution: int) -> Image.Image:
        """Return the image resized to width and height, or as much of that as the crop shows."""
        interpolation = Image.Resampling[self.interpolation.upper()]
        if self._margin is None:
            return image.resize(size, interpolation)
        divisor = getattr(image, 'divisor', 1)
        shown = [min(side, resolution) for side in size]
        start = [max(-_offset(side, resolution), 0) for side in size]
        full_size = getattr(image, 'full_size', image.size)
        box = [
            full / divisor * (edge / side) for edges in (start, map(sum, zip(start, shown)))
            for edge, side, full in zip(edges, size, full_size)]
        return image.resize(shown, interpolation, box, self._margin)

    def _resized(self, width: int, height: int, resolution: int) -> Tuple[int, int]:
        """Return width and height before the crop."""
        target = math.floor(resolution / self.crop_pct)
        if self.crop_mode == 'squash':
            return target, target
        if self.crop_mode == 'border':
            ratio = max(height / target, width / target)
            return max(round(width / ratio), 1), max(round(height / ratio), 1)
        if width <= height:
            return target, int(target * height / width)
        return int(target * width / height), target

    def _cropped(self, image: Image.Image, resolution: int) -> Image.Image:
        if image.size == (resolution, resolution):
            return image
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == 'border' else 0
        square = Image.new(image.mode, (resolution, resolution), fill)
        square.paste(image, tuple(_offset(size, resolution) for size in image.size))
        return square


def _offset(size: int, crop: int) -> int:
    """Return where an image starts in its central crop; negative if it is cut."""
    return (crop - size) // 2 if crop > size else -round((size - crop) / 2)
