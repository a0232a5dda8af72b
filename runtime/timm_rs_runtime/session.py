"""An exported network at work in ONNX Runtime, without torch"""
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
from PIL import Image

from . import fields, ort
from .errors import UserError
from .format import preprocessing_of, read_metadata
from .images import MODES as IMAGE_MODES
from .images import ImageError, ImageSource, is_image_source, name_of
from .lifetime import Closable

__all__ = ['MODES', 'NotFiniteError', 'Session']

MODES = ('fast', 'low_memory')
MAX_IMAGES = 4096  # of a request
IMAGES_AT_A_TIME = 16  # that are read while the network runs those before
_Item = TypeVar('_Item')


class NotFiniteError(UserError):
    """A network answers with NaN or infinity.

    Args:
        path: File of the network.
        resolution: Its input size.
        logits: Array of float32 [N, num_classes], the answers to all images.
        names: Names of the images.
    """

    def __init__(self, path: str, resolution: int, logits: np.ndarray, names: Sequence[str]):
        super().__init__(path, resolution, logits, names)
        self.path, self.resolution, self.logits, self.names = path, resolution, logits, names

    def __str__(self) -> str:
        (broken,) = np.nonzero(~np.isfinite(self.logits).all(-1))
        listed = ', '.join(self.names[i] for i in broken[:3]) + ', ...' * (len(broken) > 3)
        return f'{self.path} at {self.resolution} px answers with logits that are not finite numbers: {listed}.'


class Session(Closable):
    """Runs a file of `timm-rs export` at any of its resolutions; safe to be called from several threads.

    It can be closed, is a context manager, can be pickled and copied, and works in forked processes. A copy opens the
    file as it is then. A forked process opens the file again, which must not have been replaced.

    Args:
        path: File of `timm-rs export --format onnx`, or of one size.
        threads: Threads of an inference, all cores if None.
        mode: 'fast' holds a graph per size, each with its BatchNorms folded into its weights, at the latency of a plain
            network; 'low_memory' holds the weights once for all sizes.
        warm_up: Run each size once now, so that the first request does not pay for it.
        decode: 'scaled' decodes a JPEG at the smallest scale that has, on each side, twice the pixels that the size
            needs, 'fast' at the smallest that has 1.25 times as many, 'exact' as timm does; see Preprocessing.

    Attributes:
        path: The file.
        mode: 'fast' or 'low_memory'.
        resolutions: Input sizes in pixels, largest first.
        num_classes: Number of classes.
        class_names: Names of the classes, or None.
        threshold: Probability from which on a label counts in a network of several labels per image, else None.
        madds: Multiply-adds of an image, by resolution.
        preprocessing: What is done to an image; None if the channels are not those of one: it takes only batches then.
        mean: Pixel mean of each channel, of values in [0, 1].
        std: Pixel standard deviation of each channel.
        batch_size: Images of a run, if the file takes only batches of one size; None for any number.
        metadata: What the file records about itself.

    Raises:
        UserError: The file is not an export of timm_rs, or an argument is not usable.

    Example:
        >>> with Session('model.onnx', threads=1) as session:    # doctest: +SKIP
        ...     session.predict('photo.jpg', resolution=160).argmax(-1)
        array([207])
    """

    def __init__(
            self,
            path: Union[str, os.PathLike],
            threads: Optional[int] = None,
            mode: str = 'fast',
            warm_up: bool = True,
            decode: str = 'scaled',
    ):
        if not isinstance(path, (str, os.PathLike)):
            raise UserError(f'Got {type(path).__name__}, expected the name of a file of timm-rs export.')
        if mode not in MODES:
            raise UserError(f"Unknown mode {mode!r}, expected {' or '.join(map(repr, MODES))}.")
        self.path = os.fspath(path)
        self.mode = mode
        self._threads = threads
        self._version = _version_of(self.path)
        self.metadata = read_metadata(self.path)
        self.resolutions: Tuple[int, ...] = self.metadata['resolutions']
        self.num_classes: int = self.metadata['num_classes']
        self.class_names: Optional[Sequence[str]] = self.metadata.get('class_names')
        self.threshold: Optional[float] = self.metadata.get('multilabel_threshold')
        self.madds: Dict[int, int] = self.metadata.get('madds', {})
        self.mean, self.std = self.metadata['mean'], self.metadata['std']
        self.preprocessing = preprocessing_of(self.metadata, decode) if len(self.mean) in IMAGE_MODES else None
        self._lock = threading.RLock()  # a signal handler may close it
        self._file = os.path.abspath(self.path)  # for a forked process in another folder
        self._sessions: Optional[Dict[int, Any]] = self._open(self.path)
        (images,) = self._sessions[self.resolutions[0]].get_inputs()
        self._input = images.name
        self.batch_size: Optional[int] = None
        if isinstance(images.shape[0], int):
            self.batch_size = fields.check_argument(
                f'{self.path}: the batch size', images.shape[0], fields.integer(1, MAX_IMAGES))
        super().__init__(partial(type(self), self._file, threads, mode, warm_up, decode))
        if warm_up:
            self.warm_up()

    @classmethod
    def open(cls, model: Any, threads: Optional[int] = None, mode: str = 'fast', decode: str = 'scaled') -> Any:
        """Return a session as it is, or open a file.

        Raises:
            UserError: It is a session of another kind, or a closed one, or one beside arguments that it has already, or
                the file is not an export of timm_rs.
        """
        if not hasattr(model, 'predict') or isinstance(model, Closable) and not isinstance(model, cls):
            return cls(model, threads, mode, decode=decode)
        if (threads, mode, decode) != (None, 'fast', 'scaled'):
            raise UserError('threads, mode and decode are for a file, a session that is given has its own.')
        if isinstance(model, cls):
            model._check_open()
        return model

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.path!r}, mode={self.mode!r}, resolutions={self.resolutions})'

    def close(self) -> None:
        """Stop answering and free the memory. Requests that are running are answered."""
        with self._lock:
            super().close()
            self._sessions = None

    def predict(
            self,
            images: Union[ImageSource, Sequence[ImageSource], np.ndarray],
            resolution: Optional[int] = None,
    ) -> np.ndarray:
        """Return the logits of images. The next ones are read while the network runs.

        Args:
            images: An image or a list of them, each the name of a file, a binary file or a PIL image; or a preprocessed
                batch, float32 [N, C, H, W].
            resolution: Input size in pixels; if None the largest, or that of a batch.

        Returns:
            Array of float32 [N, num_classes].

        Raises:
            ClosedError: The session was closed.
            ImageError: An image cannot be used; the message names it.
            InferenceError: ONNX Runtime fails, for example for lack of memory.
            NotFiniteError: The network answers with NaN or infinity.
            UserError: The network lacks this resolution, the batch has another shape or type, or there are more than
                MAX_IMAGES images.
        """
        sessions = self._opened()
        if isinstance(images, np.ndarray):
            resolution = self._check_batch(images, resolution)
            names = (f'image {i} of the batch' for i in range(len(images)))
            size = self.batch_size or max(len(images), 1)
            batches = (images[i:i + size] for i in range(0, len(images), size))
        else:
            images = image_list(images)
            resolution = self.check_resolution(resolution)
            names = map(name_of, images)
            batches = read_in_chunks(
                lambda image: self.preprocess(image, resolution), images, self.batch_size or IMAGES_AT_A_TIME)
        runs = [self._run(sessions[resolution], np.asarray(batch)) for batch in batches]
        if not runs:
            return np.zeros((0, self.num_classes), np.float32)
        logits = np.concatenate(runs)
        if not np.isfinite(logits).all():
            raise NotFiniteError(self.path, resolution, logits, list(names))
        return logits

    def preprocess(self, image: ImageSource, resolution: Optional[int] = None) -> np.ndarray:
        """Return the input that predict makes of an image: float32 [C, resolution, resolution].

        Raises:
            ImageError: The image cannot be used.
            UserError: The network lacks this resolution.
        """
        self.check_takes_images()
        return self.preprocessing(image, self.check_resolution(resolution))

    def read(self, image: ImageSource, resolution: Optional[int] = None) -> Image.Image:
        """Return an image that is decoded for a resolution, the largest if None, and for smaller ones.

        It may be used at larger ones too: it is then decoded again if they need more of its pixels.

        Raises:
            ImageError: The image cannot be used.
            UserError: The network lacks this resolution.
        """
        self.check_takes_images()
        return self.preprocessing.open(image, self.check_resolution(resolution))

    def warm_up(self) -> None:
        """Run every size with a batch of one, so that its buffers are allocated."""
        for resolution, session in self._opened().items():
            self._run(session, np.zeros((self.batch_size or 1, len(self.mean), resolution, resolution), np.float32))

    def check_resolution(self, resolution: Optional[int]) -> int:
        """Return a resolution that this network has, the largest if None.

        Raises:
            UserError: It has others.
        """
        if resolution is None:
            return self.resolutions[0]
        if resolution not in self.resolutions:
            known = ', '.join(map(str, self.resolutions))
            raise UserError(f'Unknown resolution {resolution!r}, {self.path} has {known}.')
        return int(resolution)

    def _run(self, session: Any, images: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, which is filled up with zeros if the file takes only batches of one size."""
        count = len(images)
        if self.batch_size and count < self.batch_size:
            images = np.concatenate([images, np.zeros((self.batch_size - count, *images.shape[1:]), images.dtype)])
        return ort.run(session, {self._input: images}, self.path)[0][:count]

    def _open(self, path: str) -> Dict[int, Any]:
        """Return the session of ONNX Runtime that serves each size."""
        if len(self.resolutions) == 1 or self.mode == 'low_memory':
            return dict.fromkeys(self.resolutions, ort.open_onnx(path, self._threads))
        # With fixed height and width ONNX Runtime folds the choice of the row, the tables and then the BatchNorms.
        return {r: ort.open_onnx(path, self._threads, dict(height=r, width=r)) for r in self.resolutions}

    def _open_again(self) -> Dict[int, Any]:
        """Return the sessions of a forked process."""
        if _version_of(self._file) != self._version:
            raise UserError(f'{self.path} was replaced or deleted since the session was opened, open it again.')
        return self._open(self._file)

    def _opened(self) -> Dict[int, Any]:
        sessions = self._sessions
        if sessions is None:  # closed, or in a process that was forked
            with self._lock:
                self._check_open()
                self._sessions = sessions = self._sessions or self._open_again()
        return sessions

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close it
        for session in set((self._sessions or {}).values()):
            ort.abandon(session)
        self._sessions = None

    def check_takes_images(self) -> None:
        """Raise ImageError if the channels are not those of an image."""
        if self.preprocessing is None:
            raise ImageError(f'{self.path} takes {len(self.mean)} channels, expected float32 arrays instead of images.')

    def check_classifies(self) -> None:
        """Raise UserError if it does not take images, or has no classes to choose from."""
        self.check_takes_images()
        if not self.num_classes:
            raise UserError(f'{self.path} has no classes, expected a classifier.')
        if self.num_classes == 1 and self.threshold is None:
            raise UserError(f'{self.path} has one class, which always has probability 1; expected several, or labels.')

    def _check_batch(self, images: np.ndarray, resolution: Optional[int]) -> int:
        channels = len(self.mean)
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != channels:
            raise UserError(
                f'Got an array of {images.dtype} {list(images.shape)}, expected float32 [N, {channels}, H, W].')
        height, width = images.shape[2:]
        if height != width or height not in self.resolutions or resolution not in (None, height):
            expected = [resolution] if resolution is not None else self.resolutions
            expected = ', '.join(f'{r}x{r}' for r in expected)
            raise UserError(f'Got a batch of {height}x{width}, expected {expected}.')
        return height


def _version_of(path: str) -> Optional[Tuple[int, int, int]]:
    """Return what changes when a file is replaced, None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def image_list(images: Union[ImageSource, Iterable[ImageSource]]) -> List[ImageSource]:
    """Return the images of a request.

    Raises:
        ImageError: These are not images.
        UserError: There are more than MAX_IMAGES.
    """
    if is_image_source(images):
        return [images]
    if isinstance(images, np.ndarray) or not isinstance(images, Iterable):
        raise ImageError(f'Got {type(images).__name__}, expected images (Session.predict takes arrays too).')
    images = list(islice(images, MAX_IMAGES + 1))
    fields.check_argument('The number of images', len(images), fields.integer(0, MAX_IMAGES))
    return images


def read_in_chunks(read: Callable[[ImageSource], Any], images: Sequence[ImageSource], size: int) -> Iterator[List]:
    """Give what images become by `read`, in lists of at most `size`, each of which is made while the last is used."""
    starts = range(0, len(images), size)
    chunks = (list(map(read, images[i:i + size])) for i in starts)
    return ahead(chunks) if len(starts) > 1 else chunks


def ahead(items: Iterable[_Item], most: int = 2) -> Iterator[_Item]:
    """Give the items of an iterator, which makes up to `most` of the next ones in a thread meanwhile.

    An error is raised in the place of the item. ONNX Runtime and the decoders of Pillow let other threads work.

    Example:
        >>> list(ahead(i * i for i in range(3)))
        [0, 1, 4]
    """
    items, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(most))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
