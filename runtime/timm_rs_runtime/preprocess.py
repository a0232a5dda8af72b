"""timm's evaluation preprocessing with Pillow and NumPy alone"""
import io
import math
import os
from dataclasses import dataclass
from typing import IO, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from .errors import UserError

__all__ = ['MODES', 'ImageError', 'Preprocessing', 'find_images', 'open_image']

ImageSource = Union[str, os.PathLike, bytes, bytearray, memoryview, IO[bytes], Image.Image]

_IN_MEMORY = (bytes, bytearray, memoryview)
_MAX_CROP_PCT = 4  # the crop may be larger than the image
MODES = {1: 'L', 3: 'RGB'}  # of Pillow, by channels


class ImageError(UserError):
    """An image cannot be used; the message names it."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the input of a network, bit by bit what timm.data.create_transform makes of it.

    Attributes:
        mean: Pixel mean of each channel, of values in [0, 1].
        std: Pixel standard deviation of each channel.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: Side of the crop as a share of the resized image.
        crop_mode: center (the shorter side is resized), squash (both are) or border (the longer is, the rest is
            filled).

    Raises:
        ValueError: A value is not usable.

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

    def __post_init__(self):
        if len(self.mean) != len(self.std) or len(self.mean) not in MODES:
            raise UserError(f'mean {self.mean} and std {self.std} are not of 1 or 3 channels each.')
        if self.interpolation.upper() not in Image.Resampling.__members__:
            known = ', '.join(Image.Resampling.__members__).lower()
            raise UserError(f'Unknown interpolation {self.interpolation!r}, expected one of {known}.')
        if self.crop_mode not in ('center', 'squash', 'border'):
            raise UserError(f'Unknown crop mode {self.crop_mode!r}, expected center, squash or border.')
        if not all(map(math.isfinite, self.mean)) or not all(0 < v < math.inf for v in self.std):
            raise UserError(f'mean {self.mean} and std {self.std} are no means and positive deviations.')
        if not 0 < self.crop_pct <= _MAX_CROP_PCT:
            raise UserError(
                f'crop_pct is {self.crop_pct}, expected a share: more than 0, {_MAX_CROP_PCT} at most.')

    def __call__(self, image: ImageSource, resolution: int) -> np.ndarray:
        """Return the input of a network.

        Args:
            image: Name of a file, a binary file or what is in it, or an image.
            resolution: Side of the square in pixels.

        Returns:
            Array of float32 [C, resolution, resolution].

        Raises:
            ImageError: It is no image, or a broken or too large one.
        """
        name = _name(image)
        image = open_image(image, MODES[len(self.mean)])
        width, height = self._resized(*image.size, resolution)
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ImageError(f'{name} is {image.width}x{image.height}, too long and thin to be resized.')
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        image = self._cropped(image, resolution)
        array = np.asarray(image, np.float32).reshape(resolution, resolution, -1).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return np.ascontiguousarray((array - mean) / std)

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
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == 'border' else (0,) * len(self.mean)
        square = Image.new(image.mode, (resolution, resolution), fill if len(fill) > 1 else fill[0])
        square.paste(image, tuple(_offset(size, resolution) for size in image.size))
        return square


def open_image(source: ImageSource, mode: str = 'RGB') -> Image.Image:
    """Return an image as timm reads it: decoded and converted, not turned by its EXIF orientation.

    Args:
        source: Name of a file, a binary file or what is in it, or an image.
        mode: RGB or L.

    Raises:
        ImageError: It is no image, or a broken or too large one.
    """
    try:
        if isinstance(source, Image.Image):
            if not all(source.size):
                raise ImageError(f'{_name(source)} is {source.width}x{source.height}, which holds no pixels.')
            source.load()
            return source if source.mode == mode else source.convert(mode)
        if not is_image_source(source):
            raise ImageError(f'Got {type(source).__name__}, expected the name of an image, a binary file or an image.')
        with Image.open(io.BytesIO(source) if isinstance(source, _IN_MEMORY) else source) as image:
            converted = image.convert(mode)
            converted.filename = _name(source)  # for messages
            return converted
    except ImageError:
        raise
    except FileNotFoundError as e:
        raise ImageError(f'{_name(source)} does not exist, expected an image.') from e
    except Image.UnidentifiedImageError as e:
        raise ImageError(f'{_name(source)} is no image that Pillow can read.') from e
    except Exception as e:  # Pillow's readers have no common class of what damaged files make them raise
        raise ImageError(f'{_name(source)} cannot be read as an image: {str(e) or type(e).__name__}.') from e


def buffered(source: ImageSource) -> ImageSource:
    """Return what is in a binary file, from its beginning to its end; other images as they are.

    Raises:
        ImageError: It cannot be read.
    """
    if not hasattr(source, 'read'):
        return source
    try:
        if getattr(source, 'seekable', bool)():
            source.seek(0)  # as Pillow does, so that a request can be made once more
        buffer = io.BytesIO(source.read())
    except Exception as e:  # of any kind of file
        raise ImageError(f'{_name(source)} cannot be read: {str(e) or type(e).__name__}.') from e
    buffer.name = _name(source)
    return buffer


def find_images(folder: Union[str, os.PathLike], most: Optional[int] = None) -> List[str]:
    """Return the image files below a folder by name, at most so many, spread evenly; links are followed.

    Raises:
        ImageError: There is no such folder, or no image in it.
        ValueError: Not even one is asked for.
    """
    if not os.path.isdir(folder):
        raise ImageError(f'{folder} does not exist, expected a folder of images.')
    known = Image.registered_extensions()
    paths = sorted(p for p in _walk(folder) if os.path.splitext(p)[1].lower() in known)
    if not paths:
        raise ImageError(f'{folder} holds no images.')
    return spread(paths, most)


def spread(paths: Sequence[str], most: Optional[int]) -> List[str]:
    """Return so many of them at most, evenly spread."""
    if most is not None and most < 1:
        raise UserError(f'{most} images are asked for, expected a positive number.')
    if most is None or most >= len(paths):
        return list(paths)
    return [paths[i * len(paths) // most] for i in range(most)]


def _walk(folder: Union[str, os.PathLike]) -> Iterator[str]:
    """Yield all files below a folder, each folder once however many links lead to it."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(root, name) for name in names)


def _offset(size: int, crop: int) -> int:
    """Return where an image starts in its central crop, negative where it is cut."""
    return (crop - size) // 2 if crop > size else -round((size - crop) / 2)


def _name(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, 'filename', '') or getattr(source, 'name', '') or 'The image')


def is_image_source(value: object) -> bool:
    """Return whether a value is one image, not several."""
    return isinstance(value, (str, os.PathLike, Image.Image, *_IN_MEMORY)) or hasattr(value, 'read')


def stack(images: Sequence[ImageSource], preprocessing: Preprocessing, resolution: int) -> np.ndarray:
    """Return a batch of float32 [N, C, resolution, resolution]."""
    return np.stack([preprocessing(image, resolution) for image in images])
