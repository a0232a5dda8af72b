"""Images that cannot be read: named, counted and limited in number"""
import json
import logging
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple, Union

from PIL import Image

from .errors import UserError, one_line
from .images import ImageError, ImageSource, name_of, open_image

__all__ = ['MAX_UNREADABLE', 'ReadErrors', 'UnreadableError']

_logger = logging.getLogger(__name__)
MAX_UNREADABLE = 100  # default of --max-unreadable


class UnreadableError(UserError, RuntimeError):
    """Too many images cannot be read."""


class ReadErrors:
    """Images that could not be read, reported by all loader workers.

    Args:
        limit: Distinct images that may fail before check raises.
        instead: What happens instead, for the log.

    Attributes:
        names: Why each of them failed, by name, in the order in which they failed.
    """

    def __init__(self, limit: int = MAX_UNREADABLE, instead: str = 'it is left out'):
        if limit < 0:
            raise UserError(f'--max-unreadable is {limit}, expected at least 0.')
        self.limit = limit
        self.instead = instead
        self.names: Dict[str, str] = {}
        self._stuck = False
        self._reported = set()  # by this process
        self._path = Path(tempfile.gettempdir(), f'timm_rs-{uuid.uuid4().hex}')  # never full, unlike a pipe
        self._position = 0
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def open(self, source: ImageSource, mode: str = 'RGB') -> Optional[Image.Image]:
        """Return an image, or None if it cannot be read, which is noted.

        Raises:
            UnreadableError: See check.
        """
        try:
            return open_image(source, mode)
        except ImageError as e:
            self.report(name_of(source), e)
            self.check()

    def report(self, name: str, reason: Union[str, ImageError], is_last: bool = False) -> None:
        """Note, in any process, that an image cannot be read, and whether no other one stands in for it."""
        if is_last or name not in self._reported:
            self._reported.add(name)
            reason = one_line(getattr(reason, '__cause__', None) or reason).rstrip('.')
            reason = reason.removeprefix(f'{name} ').removeprefix('is ')
            with open(self._path, 'ab', buffering=0) as f:  # each line in one piece, behind those of the others
                f.write(json.dumps([name, reason, is_last]).encode() + b'\n')

    def check(self) -> None:
        """Log what was reported.

        Raises:
            UnreadableError: More images failed than the limit, or there is none to stand in for one.
        """
        for name, reason, is_last in self._reports():
            if name not in self.names:
                _logger.warning(f'Cannot read image {name} ({reason}), {self.instead}.')
            self.names[name] = reason
            self._stuck |= is_last
        if len(self.names) > self.limit:
            expected = f'expected at most {self.limit} (--max-unreadable)'
        elif self._stuck:
            expected = 'and none is left to stand in'
        else:
            return
        names = list(self.names)
        listed = ', '.join(names[:3]) + ', ...' * (len(names) > 3)
        raise UnreadableError(f'{len(names)} images cannot be read, {expected}: {listed}')

    def _reports(self) -> Iterator[Tuple[str, str, bool]]:
        """Give what was reported since the last call."""
        if not self._path.exists():
            return
        with open(self._path, 'rb') as f:
            f.seek(self._position)
            lines = f.read()
        lines = lines[:lines.rfind(b'\n') + 1]
        self._position += len(lines)
        yield from map(json.loads, lines.splitlines())

    def summary(self) -> str:
        """Return one line on all failures so far, empty if there is none."""
        if not self.names:
            return ''
        names = list(self.names)
        return f"{len(names)} unreadable images so far: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
