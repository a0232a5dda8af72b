"""Images: how they are found and read"""
import io
import os
from typing import IO, Iterator, List, Optional, Sequence, Union

from PIL import Image

from .errors import UserError

__all__ = ['MODES', 'ImageError', 'ImageSource', 'find_images', 'open_image', 'spread']

ImageSource = Union[str, os.PathLike, bytes, bytearray, memoryview, IO[bytes], Image.Image]

_IN_MEMORY = (bytes, bytearray, memoryview)
MODES = {1: 'L', 3: 'RGB'}  # of Pillow, by channels


class ImageError(UserError):
    """An image cannot be used; the message names it."""


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
                raise ImageError(f'{name_of(source)} is {source.width}x{source.height}, which holds no pixels.')
            source.load()
            return source if source.mode == mode else source.convert(mode)
        if not is_image_source(source):
            raise ImageError(f'Got {type(source).__name__}, expected the name of an image, a binary file or an image.')
        with Image.open(io.BytesIO(source) if isinstance(source, _IN_MEMORY) else source) as image:
            converted = image.convert(mode)
            converted.filename = name_of(source)  # for messages
            return converted
    except ImageError:
        raise
    except FileNotFoundError as e:
        raise ImageError(f'{name_of(source)} does not exist, expected an image.') from e
    except Image.UnidentifiedImageError as e:
        raise ImageError(f'{name_of(source)} is no image that Pillow can read.') from e
    except Exception as e:  # Pillow's readers have no common class of what damaged files make them raise
        raise ImageError(f'{name_of(source)} cannot be read as an image: {str(e) or type(e).__name__}.') from e


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
        raise ImageError(f'{name_of(source)} cannot be read: {str(e) or type(e).__name__}.') from e
    buffer.name = name_of(source)
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


def name_of(source: ImageSource) -> str:
    """Return the name of an image for messages."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, 'filename', '') or getattr(source, 'name', '') or 'The image')


def is_image_source(value: object) -> bool:
    """Return whether a value is one image, not several."""
    return isinstance(value, (str, os.PathLike, Image.Image, *_IN_MEMORY)) or hasattr(value, 'read')
