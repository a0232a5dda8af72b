"""Answers for files: what `timm-rs predict` does"""
import json
import os
import sys
import time
from typing import IO, Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from .adaptive import AdaptiveSession
from .cascade import CascadeSession, softmax
from .errors import UserError, one_line
from .images import ImageError, ImageSource, buffered, find_images
from .session import Session, ahead

__all__ = ['Predictor', 'answers', 'find_sources', 'predict_all', 'top']

STDIN = '-'


class Predictor:
    """Answers one image after the other, at a size that is chosen in one of three ways.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session, which has its own threads, mode and decode.
        resolution: Answer at this size, the largest if None.
        budget_ms: Or at the largest size that keeps this budget.
        cascade: Or by the cascade in this file.
        threads: Threads of an inference, all cores if None.
        mode, decode: See Session.

    Raises:
        UserError: A file or argument is not usable, or two ways are given.
    """

    def __init__(
            self,
            path: Any,
            resolution: Optional[int] = None,
            budget_ms: Optional[float] = None,
            cascade: Optional[str] = None,
            threads: Optional[int] = None,
            mode: str = 'fast',
            decode: str = 'scaled',
    ):
        ways = dict(resolution=resolution, budget_ms=budget_ms, cascade=cascade)
        given = [f'{name} {value}' for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"Got {' and '.join(given)}, expected one of {', '.join(ways)}.")
        self.session = session = Session.open(path, threads, mode, decode)
        session.check_classifies()
        self._resolution = session.check_resolution(resolution)
        self._adaptive = None if budget_ms is None else AdaptiveSession(session, budget_ms)
        self._cascade = None if cascade is None else CascadeSession(session, cascade)
        if self._cascade is not None:
            self._resolution = self._cascade.cascade.resolutions[-1]

    def read(self, image: ImageSource) -> ImageSource:
        """Return an image that is decoded as far as that can be done before it is answered.

        Raises:
            UserError: The image cannot be used.
        """
        return image if self._adaptive is not None else self.session.read(image, self._resolution)

    def __call__(self, image: ImageSource) -> Tuple[np.ndarray, int, float]:
        """Return logits [num_classes], the size and milliseconds, the reading of the image included.

        Raises:
            UserError: The image cannot be used, or the network fails.
        """
        start = time.perf_counter()
        if self._adaptive is not None:
            found = self._adaptive.predict(image)
            logits, resolution = found.logits, found.resolution
        elif self._cascade is not None:
            found = self._cascade.predict(image)
            logits, resolution = found.logits, int(found.resolutions[0])
        else:
            logits, resolution = self.session.predict(image, self._resolution), self._resolution
        return logits[0], resolution, 1e3 * (time.perf_counter() - start)


def top(
        logits: np.ndarray,
        names: Optional[Sequence[str]] = None,
        k: int = 5,
        threshold: Optional[float] = None,
) -> List[Dict[str, Any]]:
    """Return the most probable classes: 'class', 'name' and 'probability' of each.

    Args:
        logits: Logits [num_classes].
        names: Names of the classes.
        k: Classes to return, at most.
        threshold: If not None, the classes are independent labels, and only those of at least this probability count.

    Example:
        >>> top(np.array([0., np.log(3.)]), ['cat', 'dog'], k=1)
        [{'class': 1, 'name': 'dog', 'probability': 0.75}]
        >>> [found['name'] for found in top(np.array([2., -2., 1.]), ['cat', 'dog', 'emu'], threshold=0.5)]
        ['cat', 'emu']
    """
    probabilities = softmax(logits) if threshold is None else np.exp(-np.logaddexp(0, -logits))
    best = [i for i in np.argsort(-logits, kind='stable')[:k] if threshold is None or probabilities[i] >= threshold]
    return [
        {'class': int(i), 'name': names[i] if names else str(i), 'probability': round(float(probabilities[i]), 6)}
        for i in best
    ]


def find_sources(names: Sequence[str]) -> Iterator[Tuple[str, Union[str, IO[bytes], ImageError]]]:
    """Give a name and an image, or the error instead, for files, the images below folders, and '-', standard input.

    Standard input is read at once. `answers` reads in a thread, where an interrupt would not end the waiting.
    """
    return _sources(names, [_read_stdin() for name in names if name == STDIN])


def _sources(names: Sequence[str], stdin: List[Any]) -> Iterator[Tuple[str, Union[str, IO[bytes], ImageError]]]:
    stdin = iter(stdin)
    for name in names:
        try:
            if name == STDIN:
                yield 'standard input', next(stdin)
            elif os.path.isdir(name):
                yield from ((path, path) for path in find_images(name))
            else:
                yield name, name
        except ImageError as e:
            yield name, e


def _read_stdin() -> Union[IO[bytes], ImageError]:
    if sys.stdin is None:
        return ImageError('Standard input is closed, expected an image.')
    try:
        file = buffered(sys.stdin.buffer)
    except ImageError as e:
        return e
    file.name = 'standard input'
    return file


def answers(
        predictor: Predictor,
        sources: Iterable[Tuple[str, Union[ImageSource, UserError]]],
        k: int = 5,
) -> Iterator[Dict[str, Any]]:
    """Give a row for each image: 'image', its name, 'resolution', 'milliseconds' and 'top', or 'image' and 'error'.

    The next images are read meanwhile.

    Args:
        predictor: Answers.
        sources: Name and image, or the error instead.
        k: Classes of an answer.
    """
    def read(source: Tuple[str, Any]) -> Tuple[str, Any, float]:
        (name, image), start = source, time.perf_counter()
        try:
            image = image if isinstance(image, UserError) else predictor.read(image)
        except UserError as e:
            image = e
        return name, image, 1e3 * (time.perf_counter() - start)

    for name, image, reading in ahead(map(read, sources)):
        try:
            if isinstance(image, UserError):
                raise image
            logits, resolution, milliseconds = predictor(image)
            best = top(logits, predictor.session.class_names, k, predictor.session.threshold)
            yield dict(image=name, resolution=resolution, milliseconds=round(milliseconds + reading, 3), top=best)
        except UserError as e:
            yield dict(image=name, error=one_line(e))


def predict_all(
        predictor: Predictor,
        names: Sequence[str],
        k: int = 5,
        as_json: bool = False,
        program: str = 'timm-rs predict',
) -> int:
    """Print the answer for each image: its top classes, or a line of JSON.

    An image that fails is a line on stderr, or a line of JSON with an 'error'.

    Args:
        predictor: Answers.
        names: Files, folders, or '-'.
        k: Classes to print.
        as_json: Print lines of JSON.
        program: Name before the message of an error.

    Returns:
        Number of images that failed.
    """
    failed = 0
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are not text
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')

    for row in answers(predictor, find_sources(names), k):
        failed += 'error' in row
        if as_json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif 'error' in row:
            print(f"{program}: error: {row['error']}", file=sys.stderr, flush=True)
        else:
            lines = [f"  {found['probability']:7.2%}  {found['name']}" for found in row['top']]
            print(f"{row['image']}: {row['resolution']} px, {row['milliseconds']:.1f} ms", *lines, sep='\n', flush=True)
    return failed
