"""Images that are decoded at the scale that their transforms need"""
import math
from typing import Any, Optional, Sequence, Tuple

from PIL import Image

from timm_rs_runtime.images import ImageSource, buffered, decode, name_of, open_header, open_image
from timm_rs_runtime.preprocess import MARGINS

__all__ = ['LazyImage', 'read_image']


def read_image(source: ImageSource, mode: str = 'RGB', decode: str = 'exact') -> Image.Image:
    """Return an image for transforms.

    Args:
        source: Name of a file, a binary file or its content, or an image.
        mode: RGB, L or another mode of 8 bits.
        decode: exact, or a margin of LazyImage by its name: scaled or fast.

    Raises:
        ImageError: See open_image; what is wrong behind the header is found by the transforms if it is not exact.
    """
    if MARGINS[decode] is None or isinstance(source, Image.Image):
        return open_image(source, mode)
    return LazyImage(_Encoded(source, mode, MARGINS[decode]))


class _Encoded:
    """An image file and what was decoded of it last."""

    def __init__(self, source: ImageSource, mode: str, margin: float):
        self.name = name_of(source)
        self.source = buffered(source)
        self.mode = mode
        self.margin = margin
        self.opened = open_header(self.source)
        self.size = self.opened.size
        self.decoded: Optional[Image.Image] = None

    def decode(self, needed: Tuple[int, int]) -> Image.Image:
        """Return the image with at least this width and height, or its own; decoded again only if it needs more."""
        if self.decoded is None:
            self.decoded = decode(self.opened, self.mode, lambda *_: needed, self.name)
            self.decoded.encoded = self.source
        else:
            self.decoded = open_image(self.decoded, self.mode, lambda *_: needed)
        return self.decoded


class LazyImage(Image.Image):
    """An image that is decoded when it is resized: a JPEG at the smallest scale that keeps a margin.

    For transforms it has its full size, so that they draw what they would draw otherwise. A crop only notes the part,
    and resizing that part decides about the scale: the part has to exceed its new size by the margin. Everything else
    decodes the whole image first.

    Args:
        encoded: The file.
        box: Left, top, right and lower edge of the part (default: all).
    """

    def __init__(self, encoded: _Encoded, box: Optional[Sequence[int]] = None):
        super().__init__()
        self.encoded = encoded
        self.box = box or (0, 0, *encoded.size)
        self.is_loaded = False

    @property
    def mode(self) -> str:
        return self.encoded.mode

    @property
    def size(self) -> Tuple[int, int]:
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    def load(self) -> Any:
        if not self.is_loaded:
            self.im = self.encoded.decode(self.encoded.size).crop(self.box).im
            self.is_loaded = True
        return super().load()

    def crop(self, box: Optional[Sequence[int]] = None) -> Image.Image:
        left, top, right, bottom = box or (0, 0, *self.size)
        if self.is_loaded or not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            return super().crop(box)
        x, y = self.box[:2]
        return LazyImage(self.encoded, (x + left, y + top, x + right, y + bottom))

    def resize(self, size, resample=None, box=None, reducing_gap=None) -> Image.Image:
        if self.is_loaded or box is not None or resample == Image.Resampling.NEAREST:
            return super().resize(size, resample, box, reducing_gap)
        margin = self.encoded.margin
        image = self.encoded.decode(tuple(
            math.ceil(margin * new * full / old) for new, full, old in zip(size, self.encoded.size, self.size)))
        return image.resize(size, resample, [edge / image.divisor for edge in self.box], margin)
