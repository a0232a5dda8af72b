"""A cascade: unsure images go on to a larger resolution

A small size answers first. If its confidence, the largest softmax probability, is below a threshold, the next size
answers. timm_rs_runtime.fitting chooses sizes and thresholds.
"""
import json
import os
import threading
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from . import fields
from .errors import UserError
from .files import atomic_write
from .images import ImageSource, name_of
from .lifetime import Closable
from .session import IMAGES_AT_A_TIME, NotFiniteError, Session, image_list, read_in_chunks

__all__ = [
    'Cascade', 'CascadePrediction', 'CascadeSession', 'check_one_label', 'read_cascade', 'softmax', 'write_cascade']

_CASCADE = fields.record(dict(
    thresholds=fields.table(fields.size_text, fields.number(0, 1)),
    average=fields.flag(),
), required=('thresholds',))


@dataclass(frozen=True)
class Cascade:
    """Which sizes answer in turn, and when an answer is good enough.

    Attributes:
        thresholds: Confidence that suffices at each resolution, smallest first; that of the last is 0.
        average: An answer is the mean of the logits of all sizes that an image went through, not those of the last.

    Raises:
        UserError: They are not in this order, or not probabilities.

    Example:
        >>> Cascade({96: 0.8, 224: 0.}).resolutions
        (96, 224)
    """
    thresholds: Mapping[int, float]
    average: bool = False

    def __post_init__(self):
        table = self.thresholds if isinstance(self.thresholds, Mapping) else {}
        sizes, values = list(table), list(table.values())
        is_sound = all(isinstance(x, Real) for x in sizes + values) and all(0 <= value <= 1 for value in values)
        is_sound = is_sound and all(size == size // 1 for size in sizes)
        if not sizes or not is_sound or sizes != sorted(sizes) or values[-1] != 0:
            raise UserError(
                f'{self.thresholds} is not a cascade, expected rising resolutions with thresholds from 0 to 1, '
                'the last with threshold 0.')
        object.__setattr__(self, 'thresholds', {int(size): float(value) for size, value in table.items()})

    @property
    def resolutions(self) -> Tuple[int, ...]:
        """Input sizes in pixels, smallest first."""
        return tuple(self.thresholds)


@dataclass(frozen=True)
class CascadePrediction:
    """The answer of a cascade.

    Attributes:
        logits: Array of float32 [N, num_classes].
        resolutions: The size that answered each image last [N].
        madds: Multiply-adds that each image took at all its sizes [N].
    """
    logits: np.ndarray
    resolutions: np.ndarray
    madds: np.ndarray


class CascadeSession(Closable):
    """Runs a cascade of the resolutions of an exported file; safe to be called from several threads.

    It can be closed, is a context manager, can be pickled and copied, and works in forked processes, as a Session.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session, which has its own threads, mode and decode.
        cascade: File of `timm-rs fit-cascade`, a Cascade, or thresholds by resolution.
        threads: Threads of an inference, all cores if None.
        mode, decode: See Session. An image is decoded once, for the cascade's largest size.

    Raises:
        UserError: A file is of another kind, or the network lacks a resolution of the cascade.

    Example:
        >>> session = CascadeSession('model.onnx', {96: 0.8, 160: 0.7, 224: 0.})    # doctest: +SKIP
        >>> session.predict(['easy.jpg', 'hard.jpg']).resolutions    # doctest: +SKIP
        array([ 96, 224])
    """

    def __init__(
            self,
            path: Any,
            cascade: Union[str, os.PathLike, Cascade, Mapping[int, float]],
            threads: Optional[int] = None,
            mode: str = 'fast',
            decode: str = 'scaled',
    ):
        if isinstance(cascade, (str, os.PathLike)):
            cascade = read_cascade(cascade)
        self.cascade = cascade if isinstance(cascade, Cascade) else Cascade(cascade)
        self.session = Session.open(path, threads, mode, decode)
        self._is_owner = self.session is not path
        for resolution in self.cascade.resolutions:
            self.session.check_resolution(resolution)
        self.session.check_classifies()
        check_one_label(self.session)
        self._after_fork()
        super().__init__(partial(
            type(self), os.path.abspath(path) if self._is_owner else path, self.cascade, threads, mode, decode))

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.session!r}, {self.cascade})'

    def close(self) -> None:
        """Stop answering, and close the Session unless it was given. Requests that are running are answered."""
        with self._lock:
            super().close()
            self._end_if_over()

    def _end_if_over(self) -> None:
        if self._closed and self._is_owner and not self._running:
            self.session.close()

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close it
        self._running = 0  # requests

    def predict(self, images: Union[ImageSource, Sequence[ImageSource]]) -> CascadePrediction:
        """Answer images; only the unsure ones go on to the next size. The next ones are read while the network runs.

        An answer that is not finite does not count: its image goes on, and fails after the last size.

        Args:
            images: An image or a list of them, see Session.predict.

        Raises:
            NotFiniteError: The last size answers with NaN or infinity.
            UserError: See Session.predict.
        """
        with self._lock:
            self._check_open()
            self._running += 1
        try:
            read = partial(self.session.read, resolution=self.cascade.resolutions[-1])
            opened = read_in_chunks(read, image_list(images), IMAGES_AT_A_TIME)
            answers = [self._answer(chunk) for chunk in opened] or [self._answer([])]
            return CascadePrediction(*map(np.concatenate, zip(*answers)))
        finally:
            with self._lock:
                self._running -= 1
                self._end_if_over()

    def _answer(self, images: Sequence[Image.Image]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logits, size and multiply-adds of each image."""
        logits = np.zeros((len(images), self.session.num_classes), np.float32)
        counts = np.zeros((len(images), 1), np.float32)  # of sizes whose answer counts
        sizes = np.zeros(len(images), int)
        madds = np.zeros(len(images), int)
        unsure = np.arange(len(images))
        for resolution, threshold in self.cascade.thresholds.items():
            if not len(unsure):
                break
            try:
                found = self.session.predict([images[i] for i in unsure], resolution)
            except NotFiniteError as e:
                found = e.logits
            if self.cascade.average:
                found = logits[unsure] + (found - logits[unsure]) / (counts[unsure] + 1)
            madds[unsure] += self.session.madds.get(resolution, 0)
            finite = np.isfinite(found).all(-1)
            answered = unsure[finite]
            logits[answered] = found[finite]
            counts[answered] += 1
            sizes[answered] = resolution
            goes_on = ~finite
            goes_on[finite] = softmax(found[finite]).max(-1) < threshold
            unsure = unsure[goes_on]
        if len(unsure):
            names = [name_of(images[i]) for i in unsure]
            raise NotFiniteError(self.session.path, resolution, found[goes_on], names)
        return logits, sizes, madds


def check_one_label(session: Any) -> None:
    """Raise UserError if the network of a Session answers with several labels per image."""
    if getattr(session, 'threshold', None) is not None:
        raise UserError(f'{session.path} has several labels per image, a cascade needs a network of one.')


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def write_cascade(path: Union[str, os.PathLike], cascade: Cascade, overwrite: bool = False, **records: Any) -> None:
    """Write a cascade and further records as JSON, complete or not at all."""
    values = dict(asdict(cascade), **records)
    with atomic_write(path, overwrite=overwrite) as f:
        json.dump(values, f, indent=2)
        f.write('\n')


def read_cascade(path: Union[str, os.PathLike]) -> Cascade:
    """Read a file of write_cascade.

    Raises:
        UserError: The file does not exist, or it is of another kind.
    """
    found = fields.read_json(path, _CASCADE)
    try:
        return Cascade(**found)
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
