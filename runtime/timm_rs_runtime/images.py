"""How images are found and read, in training, evaluation and serving"""
import io
import operator
import os
import stat
from contextlib import contextmanager
from typing import IO, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from .errors import UserError, one_line

__all__ = [
    'FORMATS',
    'MAX_ASPECT',
    'MAX_BYTES',
    'MAX_PIXELS',
    'MODES',
    'READER',
    'ImageError',
    'ImageSource',
    'extensions',
    'find_images',
    'open_image',
    'split_folder',
    'spread',
    'work_of',
]

ImageSource = Union[str, os.PathLike, bytes, bytearray, memoryview, IO[bytes], Image.Image]
Needed = Callable[[int, int], Tuple[int, int]]  # pixels of width and height that suffice, of those that an image has

# Formats of photographs, as far as Pillow has them; none of them needs another program.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'AVIF', 'HEIF', 'BMP', 'GIF', 'JPEG2000', 'PPM', 'TIFF')
MAX_BYTES = 2 ** 29  # of a file
MAX_PIXELS = MAX_BYTES // 3  # of an image: 178,956,970, the limit of Pillow too
MAX_ASPECT = 100  # longer side over shorter side of an image; the shorter one is resized to what a network needs
MODES = {1: 'L', 3: 'RGB'}  # of Pillow, by channels
READER = 1  # counts the changes of the pixels that open_image returns: images that were kept are then read again
SPLITS = (
    ('train', 'training'),
    ('val', 'valid', 'validation', 'eval', 'evaluation'),
    ('test',),
)  # names that mean the same split, timm's

_IN_MEMORY = (bytes, bytearray, memoryview)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


class ImageError(UserError):
    """An image cannot be used; the message names it."""


def open_image(
        source: ImageSource,
        mode: str = 'RGB',
        needed: Optional[Needed] = None,
) -> Image.Image:
    """Return an image, decoded and converted; every image is read by this function.

    The pixels are those that timm reads, byte for byte, with one exception: 16 bits per pixel are scaled to 8, while
    Pillow would make everything above 255 white. As in timm an image is not turned by its EXIF orientation, and only
    the first picture of an animation is read.

    Args:
        source: Name of a file, a binary file or its content, or an image.
        mode: RGB, L or another mode of 8 bits.
        needed: Returns from width and height how many pixels of each suffice. A JPEG is then decoded at the smallest
            of 1, 1/2, 1/4 and 1/8 of its size that has them; the image has this size as `full_size` and its divisor as
            `divisor`. It is decoded again if it comes back with a need for more pixels. An image that was opened by
            others keeps its pixels.

    Raises:
        ImageError: It is not an image in one of FORMATS, is damaged, has more than MAX_PIXELS or a larger aspect ratio
            than MAX_ASPECT, or the range of its pixels is unknown.
    """
    name = name_of(source)
    if needed is not None and getattr(source, 'divisor', 1) > 1 and any(
            more > side for more, side in zip(needed(*source.full_size), source.size)):
        source = source.encoded
    if not isinstance(source, Image.Image):
        content = buffered(source)
        image = decode(open_header(content), mode, needed, name)
        if image.divisor > 1:
            image.encoded = content
        return image
    with _explained(name):
        _check_size(source, name)
        source.load()
    return source if source.mode == mode else decode(source, mode, None, name)


def open_header(source: ImageSource) -> Image.Image:
    """Return an image in a file whose size is known and checked, for `decode`.

    Raises:
        ImageError: See open_image.
    """
    name = name_of(source)
    with _explained(name):
        content = buffered(source)
        file = io.BytesIO(content) if isinstance(content, _IN_MEMORY) else content
        image = Image.open(file, formats=_readable_formats())
        _check_size(image, name)
    return image


def decode(image: Image.Image, mode: str, needed: Optional[Needed], name: str) -> Image.Image:
    """Decode an image of `open_header`, once, and convert it; see open_image."""
    with _explained(name):
        full_size, divisor = image.size, 1.
        if needed is not None:
            drafted = image.draft(mode, needed(*full_size))  # None if its format has no smaller scales
            divisor = full_size[0] / drafted[1][2] if drafted else divisor
        image.load()
        converted = image if image.mode == mode else _convert(image, mode, name)
    converted.filename = name  # for messages
    converted.full_size, converted.divisor = full_size, divisor
    return converted


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise an ImageError whatever goes wrong."""
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:  # its message names an object in memory
        raise ImageError(f"{name} is not an image, expected one of {', '.join(_readable_formats())}.") from None
    except Exception as e:  # Pillow's readers have no common class of what damaged files make them raise
        raise ImageError(f'{name} cannot be read as an image: {str(e) or type(e).__name__}.') from e


def work_of(source: ImageSource, needs: Sequence[Optional[Needed]]) -> Tuple[str, int, List[int]]:
    """Return what open_image will decode: format, bytes of the file, and pixels for each need.

    All are empty or 0 for an image that was opened before, and where there is no image, which open_image reports.

    Args:
        source: An image in memory.
        needs: See open_image.
    """
    if isinstance(source, Image.Image):
        return '', 0, [0] * len(needs)
    file = source if isinstance(source, io.BytesIO) else io.BytesIO(source)
    try:
        image = open_header(file)
    except ImageError:
        return '', 0, [0] * len(needs)
    pixels = []
    for needed in needs:
        scale = 1
        if needed is not None and image.format in ('JPEG', 'MPO'):
            scale = min(map(operator.floordiv, image.size, needed(*image.size)))
        divisor = next((d for d in (8, 4, 2) if d <= scale), 1)
        pixels.append(-(-image.width // divisor) * -(-image.height // divisor))
    return image.format, file.getbuffer().nbytes, pixels


def _readable_formats() -> List[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image, name: str) -> None:
    shorter, longer = sorted(image.size)
    if not shorter:
        raise ImageError(f'{name} is {image.width}x{image.height}, expected at least one pixel.')
    if shorter * longer > MAX_PIXELS or longer > MAX_ASPECT * shorter:
        raise ImageError(
            f'{name} is {image.width}x{image.height}, expected at most {MAX_PIXELS:,} pixels, and one side at most '
            f'{MAX_ASPECT} times the other.')


def _convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    if image.mode not in ('I', 'F') and not image.mode.startswith('I;'):
        return image.convert(mode)
    tags = getattr(image, 'tag_v2', {})  # of TIFF, where Pillow leaves 12 bits and white as 0 as they are
    if image.mode.startswith('I;16'):
        full_range = tags.get(_BITS_PER_SAMPLE, (16,)) == (16,) and tags.get(_PHOTOMETRIC, 1) == 1
    else:
        full_range = image.mode == 'I' and image.format in ('PNG', 'PPM')
    if not full_range:
        raise ImageError(
            f"{name} has pixels of Pillow's mode {image.mode!r}, whose range is unknown; expected 8 bits or the full "
            'range of 16 bits.')
    pixels = (np.asarray(image).astype(np.uint32) + 128) // 257  # rounded: 65535 is 255 times 257
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def is_in_memory(source: ImageSource) -> bool:
    """Return whether nothing has to be read from a disk or a client."""
    if isinstance(source, Image.Image):
        source = getattr(source, 'fp', None) or b''
    return isinstance(source, (*_IN_MEMORY, io.BytesIO))


def buffered(source: ImageSource) -> ImageSource:
    """Return an image that is in memory: what is in a file, a binary file from its beginning to its end.

    Names of pipes and devices are refused: they could keep their reader waiting for ever.

    Raises:
        ImageError: It cannot be read, or it is larger than MAX_BYTES.
    """
    if is_in_memory(source):
        return source
    if isinstance(source, Image.Image):
        return open_image(source, source.mode)
    if not is_image_source(source):
        raise ImageError(f'Got {type(source).__name__}, expected the name of an image, a binary file or an image.')
    name = name_of(source)
    try:
        if isinstance(source, (str, os.PathLike)):
            if not stat.S_ISREG(os.stat(source).st_mode):
                raise ImageError(f'{name} is not a regular file, expected an image.')
            with open(source, 'rb', opener=_open_without_waiting) as file:
                content = file.read(MAX_BYTES + 1)
        else:
            if getattr(source, 'seekable', bool)():
                source.seek(0)  # as Pillow does, so that a request can be made once more
            content = source.read(MAX_BYTES + 1) or b''
            if isinstance(content, str):
                raise ImageError(f'{name} was opened as text, expected a binary file.')
            if not isinstance(content, (bytes, bytearray, memoryview)):
                getattr(content, 'close', bool)()  # a coroutine, which would warn that nobody awaits it
                raise ImageError(f'{name}: read() gives {type(content).__name__}, expected bytes.')
    except ImageError:
        raise
    except FileNotFoundError as e:
        raise ImageError(f'{name} does not exist, expected an image.') from e
    except Exception as e:  # of any kind of file
        raise ImageError(f'{name} cannot be read: {one_line(e)}.') from e
    if len(content) > MAX_BYTES:
        raise ImageError(f'{name} is larger than the {MAX_BYTES:,} bytes that are read of an image.')
    buffer = io.BytesIO(content)
    buffer.name = name
    return buffer


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))  # it may have become a pipe


def split_folder(folder: Union[str, os.PathLike], split: str) -> str:
    """Return the folder with the images of a split: what DIR and --split mean in every command.

    If DIR holds folders of splits, it is the one of this split, under any of its names. Otherwise it is DIR itself,
    for example a folder of class folders.

    Args:
        folder: DIR.
        split: Name of the split, '' for DIR as it is.

    Raises:
        UserError: The folder does not exist, or it holds only other splits; splits are never pooled.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.makedirs(os.path.join(folder, 'val', 'cat'))
        ...     os.path.relpath(split_folder(folder, 'validation'), folder)
        'val'
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise UserError(f'{folder} does not exist, expected a folder of images.')
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    splits = names & set().union(*SPLITS)
    for name in (split, *next((same for same in SPLITS if split in same), ())):
        if name and name in names:
            return os.path.join(folder, name)
    if splits and (split or len(splits) > 1):
        raise UserError(
            f"{folder} holds {', '.join(sorted(splits))}; expected one of them as the split instead of {split!r}.")
    return folder


def extensions() -> List[str]:
    """Return the file extensions of FORMATS, in small letters, with the dot."""
    return sorted(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def find_images(folder: Union[str, os.PathLike], most: Optional[int] = None) -> List[str]:
    """Return the image files below a folder, sorted by name, at most `most`, spread evenly; links are followed.

    Raises:
        ImageError: The folder does not exist, holds no images, or one below it cannot be read.
        UserError: `most` is less than 1.
    """
    if not os.path.isdir(folder):
        raise ImageError(f'{folder} does not exist, expected a folder of images.')
    known, paths, seen = extensions(), [], set()
    for root, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # each folder once, however many links lead to it
            folders.clear()
            continue
        seen.add(real)
        paths += [os.path.join(root, name) for name in names if os.path.splitext(name)[1].lower() in known]
    if not paths:
        raise ImageError(f'{folder} holds no images.')
    return spread(sorted(paths), most)


def _refuse_folder(e: OSError) -> None:
    raise ImageError(f'{e.filename} cannot be read, its images would be left out: {e.strerror}.')


def spread(paths: Sequence[str], most: Optional[int]) -> List[str]:
    """Return at most `most` of the paths, evenly spread."""
    if most is not None and most < 1:
        raise UserError(f'{most} images are asked for, expected a positive number.')
    if most is None or most >= len(paths):
        return list(paths)
    return [paths[i * len(paths) // most] for i in range(most)]


def name_of(source: ImageSource) -> str:
    """Return the name of an image for messages."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, 'filename', '') or getattr(source, 'name', '') or 'The image')


def is_image_source(value: object) -> bool:
    """Return whether a value is one image, not several."""
    return isinstance(value, (str, os.PathLike, Image.Image, *_IN_MEMORY)) or hasattr(value, 'read')
