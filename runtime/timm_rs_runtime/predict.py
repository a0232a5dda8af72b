"""Answers for files: what `timm-rs predict` and `timm-rs fit-cascade` do"""
import io
import json
import os
import statistics
import sys
import time
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from .adaptive import AdaptiveSession
from .cascade import (
    CascadeSession,
    collect_logits,
    evaluate_cascade,
    fit,
    label_folders,
    softmax,
    write_cascade,
)
from .files import check_new_file
from .preprocess import MODES, ImageError, ImageSource, find_images, open_image, spread
from .session import Session

__all__ = ['Predictor', 'find_sources', 'fit_cascade', 'predict_all', 'top']

STDIN = '-'
_TIMED = 24  # images


class Predictor:
    """Answers one image after the other, by whichever way the size is chosen.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        resolution: Answer at this size, the largest if None.
        budget_ms: Or at the largest size that keeps this budget.
        cascade: Or by the cascade of this file.
        threads: Threads of an inference, all cores if None.
        mode: See Session.

    Raises:
        ValueError: A file or argument is not usable.
    """

    def __init__(
            self,
            path: Any,
            resolution: Optional[int] = None,
            budget_ms: Optional[float] = None,
            cascade: Optional[str] = None,
            threads: Optional[int] = None,
            mode: str = 'fast',
    ):
        session = path if hasattr(path, 'predict') else Session(path, threads, mode)
        self.session = session
        session.check_takes_images()
        self._resolution = session.check_resolution(session.resolutions[0] if resolution is None else resolution)
        self._adaptive = None if budget_ms is None else AdaptiveSession(session, budget_ms)
        self._cascade = None if cascade is None else CascadeSession(session, cascade)

    def __call__(self, image: ImageSource) -> Tuple[np.ndarray, int, float]:
        """Return logits [num_classes], the size and milliseconds, the reading of the image included.

        Raises:
            ImageError: The image cannot be used.
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


def top(logits: np.ndarray, names: Optional[Sequence[str]] = None, k: int = 5) -> List[Dict[str, Any]]:
    """Return the most probable classes: 'class', 'name' and 'probability' of each.

    Example:
        >>> top(np.array([0., np.log(3.)]), ['cat', 'dog'], k=1)
        [{'class': 1, 'name': 'dog', 'probability': 0.75}]
    """
    probabilities = softmax(logits)
    best = np.argsort(-logits, kind='stable')[:k]
    return [
        {'class': int(i), 'name': names[i] if names else str(i), 'probability': round(float(probabilities[i]), 6)}
        for i in best
    ]


def find_sources(names: Sequence[str]) -> Iterator[Tuple[str, Union[str, IO[bytes], ImageError]]]:
    """Give a name and an image, or the error instead, for files, the images below folders, and '-', standard input."""
    for name in names:
        if name == STDIN:
            file = io.BytesIO(sys.stdin.buffer.read())
            file.name = 'standard input'
            yield file.name, file
        elif os.path.isdir(name):
            try:
                yield from ((path, path) for path in find_images(name))
            except ImageError as e:
                yield name, e
        else:
            yield name, name


def predict_all(predictor: Predictor, names: Sequence[str], k: int = 5, as_json: bool = False) -> int:
    """Print the answer for each image: its top classes, or a line of JSON.

    What is wrong with an image is a line on stderr, or the 'error' of its line of JSON.

    Args:
        predictor: Answers.
        names: Files, folders, or '-'.
        k: Classes to print.
        as_json: Print lines of JSON.

    Returns:
        Number of images that failed.
    """
    failed = 0
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no text
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    for name, image in find_sources(names):
        try:
            if isinstance(image, ImageError):
                raise image
            logits, resolution, milliseconds = predictor(image)
        except (ValueError, RuntimeError) as e:
            failed += 1
            message = ' '.join(str(e).split())
            if as_json:
                print(json.dumps(dict(image=name, error=message), ensure_ascii=False), flush=True)
            else:
                print(f'timm-rs predict: error: {message}', file=sys.stderr, flush=True)
            continue
        best = top(logits, predictor.session.class_names, k)
        if as_json:
            told = dict(image=name, resolution=resolution, milliseconds=round(milliseconds, 3), top=best)
            print(json.dumps(told, ensure_ascii=False), flush=True)
        else:
            print(f'{name}: {resolution} px, {milliseconds:.1f} ms', flush=True)
            for row in best:
                print(f"  {row['probability']:7.2%}  {row['name']}")
    return failed


def fit_cascade(
        path: Any,
        folder: str,
        output: str,
        target_accuracy: Optional[float] = None,
        target_madds: Optional[float] = None,
        start: Optional[int] = None,
        most: Optional[int] = None,
        threads: Optional[int] = None,
) -> List[Dict[str, Any]]:
    """Fit a cascade on labelled images and write it.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        folder: Folder of class folders, see label_folders.
        output: File to write, which there must not be yet.
        target_accuracy: Share of right answers to reach.
        target_madds: Mean multiply-adds of an image to stay below.
        start: First resolution, fitted if None.
        most: Images at most.
        threads: Threads of an inference, all cores if None.

    Returns:
        Rows of accuracy, mean multiply-adds and mean latency on these images, of each resolution and the cascade. The
        latency is of images one by one, as measured on some of them.

    Raises:
        ValueError: A file, folder or argument is not usable, or no cascade reaches the target.
    """
    check_new_file(output)
    session = path if hasattr(path, 'predict') else Session(path, threads)
    images, labels = label_folders(folder, session, most)
    latency, reading = measure_images(session, spread(images, _TIMED))
    logits = collect_logits(session, images)
    found = fit(logits, labels, session.madds, target_accuracy, target_madds, start)
    rows = compare(session, found.cascade, logits, labels, latency, reading)
    write_cascade(output, found.cascade, images=len(images), target_accuracy=target_accuracy,
                  target_madds=target_madds, rows=rows)
    return rows


def measure_images(session: Session, images: Sequence[str], rounds: int = 3) -> Tuple[Dict[int, float], float]:
    """Measure what images take one by one: the mean of their medians.

    Args:
        session: The session.
        images: Names of files.
        rounds: Times that each is answered.

    Returns:
        Seconds of an image at each resolution, its preprocessing included, and seconds to read it.
    """
    mode = MODES[len(session.mean)]
    times: Dict[Optional[int], List[List[float]]] = {r: [] for r in (None, *session.resolutions)}
    for name in images:
        for found in times.values():
            found.append([])
        for _ in range(rounds):
            start = time.perf_counter()
            image = open_image(name, mode)
            times[None][-1].append(time.perf_counter() - start)
            for r in session.resolutions:
                start = time.perf_counter()
                session.predict(image, r)
                times[r][-1].append(time.perf_counter() - start)
    means = {key: statistics.mean(map(statistics.median, found)) for key, found in times.items()}
    return means, means.pop(None)


def compare(
        session: Session,
        cascade: Any,
        logits: Dict[int, np.ndarray],
        labels: np.ndarray,
        latency: Dict[int, float],
        reading: float,
) -> List[Dict[str, Any]]:
    """Return a row of each resolution alone and of the cascade.

    Args:
        session: Tells the multiply-adds.
        cascade: The cascade.
        logits: Array [N, num_classes] at each resolution.
        labels: Classes [N].
        latency: Seconds of an image at each resolution, its preprocessing included.
        reading: Seconds to read an image, once for all resolutions.
    """
    rows = []
    for name, c in [(f'{r} px', {r: 0.}) for r in session.resolutions] + [('cascade', cascade.thresholds)]:
        judged = evaluate_cascade(type(cascade)(c, cascade.average), logits, labels, session.madds)
        seconds = reading + sum(share * latency[r] for r, share in judged.shares.items())
        rows.append(dict(
            network=name, accuracy=round(judged.accuracy, 6), madds=round(judged.madds),
            milliseconds=round(1e3 * seconds, 3), shares={str(r): round(s, 4) for r, s in judged.shares.items()}))
    return rows
