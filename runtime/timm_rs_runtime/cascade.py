"""A cascade: unsure images go on to a larger resolution

A small size answers first. Where its confidence, the largest softmax probability, is below a threshold, the next size
answers. Sizes and thresholds are fitted on labelled images to a target accuracy or a target cost.
"""
import itertools
import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from .errors import UserError
from .files import atomic_write
from .preprocess import ImageSource, find_images, is_image_source, open_image, spread
from .session import Session

__all__ = [
    'Cascade',
    'CascadePrediction',
    'CascadeSession',
    'Fit',
    'fit',
    'label_folders',
    'read_cascade',
    'softmax',
    'sweep',
    'write_cascade',
]

_STEPS = 256  # thresholds that are tried


@dataclass(frozen=True)
class Cascade:
    """Which sizes answer in turn, and when an answer is good enough.

    Attributes:
        thresholds: Confidence that suffices at each resolution, smallest first; that of the last is 0.
        average: An answer is the mean of the logits of all sizes that an image went through, not those of the last.

    Raises:
        ValueError: They are not in this order, or no probabilities.

    Example:
        >>> Cascade({96: 0.8, 224: 0.}).resolutions
        (96, 224)
    """
    thresholds: Mapping[int, float]
    average: bool = False

    def __post_init__(self):
        sizes, values = list(self.thresholds), list(self.thresholds.values())
        if not sizes or sizes != sorted(sizes) or values[-1] != 0:
            raise UserError(
                f'{self.thresholds} is no cascade, expected rising resolutions, the last with threshold 0.')
        if not all(0 <= value <= 1 for value in values):
            raise UserError(f'{self.thresholds} is no cascade, expected thresholds from 0 to 1.')

    @property
    def resolutions(self) -> Tuple[int, ...]:
        """Input sizes in pixels, smallest first."""
        return tuple(self.thresholds)


@dataclass(frozen=True)
class CascadePrediction:
    """The answer of a cascade.

    Attributes:
        logits: Array of float32 [N, num_classes].
        resolutions: The size that had the last word on each image [N].
        madds: Multiply-adds that each image took, of all its sizes [N].
    """
    logits: np.ndarray
    resolutions: np.ndarray
    madds: np.ndarray


class CascadeSession:
    """Runs a cascade of the resolutions of an exported file; safe to be called from several threads.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        cascade: File of `timm-rs fit-cascade`, a Cascade, or thresholds by resolution.
        threads: Threads of an inference, all cores if None.
        mode: See Session.

    Attributes:
        session: The Session.
        cascade: The Cascade.

    Raises:
        ValueError: One of the files is another, or the network lacks a resolution of the cascade.

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
    ):
        if isinstance(cascade, (str, os.PathLike)):
            cascade = read_cascade(cascade)
        self.cascade = cascade if isinstance(cascade, Cascade) else Cascade(cascade)
        self.session = path if hasattr(path, 'predict') else Session(path, threads, mode)
        for resolution in self.cascade.resolutions:
            self.session.check_resolution(resolution)
        if not self.session.num_classes:
            raise UserError(f'{self.session.path} has no classes to be sure of, expected a classifier.')
        self.session.check_takes_images()

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.session!r}, {self.cascade})'

    def predict(self, images: Union[ImageSource, Sequence[ImageSource]]) -> CascadePrediction:
        """Answer images; only the unsure ones of a batch go on to the next size.

        Args:
            images: An image or a list of them, see Session.predict.

        Raises:
            ImageError: A ValueError that names an image that cannot be used.
            ValueError: They are arrays, whose size is given.
            RuntimeError: ONNX Runtime fails, for example for lack of memory.
        """
        if isinstance(images, np.ndarray):
            raise UserError('Got an array, whose size is given; expected images (Session.predict takes arrays).')
        images = [images] if is_image_source(images) else list(images)
        mode = 'L' if len(self.session.mean) == 1 else 'RGB'
        images = [open_image(image, mode) for image in images]  # decoded once for all sizes
        logits = np.zeros((len(images), self.session.num_classes), np.float32)
        sizes = np.zeros(len(images), int)
        madds = np.zeros(len(images), int)
        unsure = np.arange(len(images))
        for stage, (resolution, threshold) in enumerate(self.cascade.thresholds.items()):
            if not len(unsure):
                break
            found = self.session.predict([images[i] for i in unsure], resolution)
            if self.cascade.average:
                found = (logits[unsure] * stage + found) / (stage + 1)
            logits[unsure] = found
            sizes[unsure] = resolution
            madds[unsure] += self.session.madds.get(resolution, 0)
            unsure = unsure[softmax(logits[unsure]).max(-1) < threshold]
        return CascadePrediction(logits, sizes, madds)


@dataclass(frozen=True)
class Fit:
    """A cascade and what it does on the images that it was fitted on.

    Attributes:
        cascade: The cascade.
        accuracy: Share of right answers.
        madds: Mean multiply-adds of an image.
        shares: Share of the images that go through each resolution.
    """
    cascade: Cascade
    accuracy: float
    madds: float
    shares: Mapping[int, float]


def fit(
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
        target_accuracy: Optional[float] = None,
        target_madds: Optional[float] = None,
        start: Optional[int] = None,
) -> Fit:
    """Return the cheapest cascade of a target accuracy, or the most accurate one of a target cost.

    Args:
        logits: Array [N, num_classes] at each resolution, of the same images.
        labels: Their classes [N].
        madds: Multiply-adds of an image at each resolution.
        target_accuracy: Share of right answers to reach.
        target_madds: Mean multiply-adds of an image to stay below.
        start: First resolution; if None it is fitted as well.

    Raises:
        ValueError: Not one target is given, or no cascade reaches it.
    """
    if (target_accuracy is None) == (target_madds is None):
        raise UserError('Expected a target accuracy or a target of multiply-adds, one of both.')
    found = sweep(logits, labels, madds, start)
    if target_accuracy is not None:
        good = [f for f in found if f.accuracy >= target_accuracy]
        if not good:
            best = max(f.accuracy for f in found)
            raise UserError(f'No cascade reaches an accuracy of {target_accuracy:.2%} on these images, '
                             f'the best has {best:.2%}.')
        return min(good, key=lambda f: (f.madds, -f.accuracy))
    good = [f for f in found if f.madds <= target_madds]
    if not good:
        least = min(f.madds for f in found)
        raise UserError(f'No cascade stays below {target_madds:.4g} multiply-adds, the cheapest takes {least:.4g}.')
    # Of the same sizes the one that spends most: the others are better by chance alone.
    spent = {(f.cascade.resolutions, f.cascade.average): f for f in sorted(good, key=lambda f: f.madds)}
    return max(spent.values(), key=lambda f: (f.accuracy, -f.madds))


def sweep(
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
        start: Optional[int] = None,
) -> List[Fit]:
    """Return cascades of every set of sizes, with many thresholds.

    A cascade has the same threshold at all sizes but the last: a threshold of each, fitted to the answers, gains on the
    images that it is fitted on and loses on others (docs/findings.md).

    Args: See fit.

    Raises:
        ValueError: The arguments do not agree.
    """
    sizes = sorted(logits)
    if start is not None and start not in sizes:
        raise UserError(f"Unknown start {start!r}, expected one of {', '.join(map(str, sizes))}.")
    if any(not madds.get(r) for r in sizes):
        raise UserError('Multiply-adds of a resolution are unknown, expected a file that tells them.')
    if not len(labels) or any(len(logits[r]) != len(labels) for r in sizes):
        raise UserError('Expected as many logits as labels, at least one.')
    found = []
    for length in range(1, len(sizes) + 1):
        for chosen in itertools.combinations(sizes, length):
            if start is not None and chosen[0] != start:
                continue
            cost = np.array([madds[r] for r in chosen])
            for average in (False, True)[:length]:  # of one size there is no mean
                confidence, right = _stages([logits[r] for r in chosen], labels, average)
                for threshold in _candidates(confidence):
                    thresholds = np.append(np.full(length - 1, threshold), 0.)
                    found.append(_judge(chosen, thresholds, average, confidence, right, cost))
    return found


def _stages(logits: Sequence[np.ndarray], labels: np.ndarray, average: bool) -> Tuple[np.ndarray, np.ndarray]:
    """Return confidence and correctness of the answer after each stage [S, N]."""
    confidence, right, total = [], [], 0.
    for stage, found in enumerate(logits):
        total = total + found
        answer = total / (stage + 1) if average else found
        confidence.append(softmax(answer).max(-1))
        right.append(answer.argmax(-1) == labels)
    return np.stack(confidence), np.stack(right)


def _candidates(confidence: np.ndarray) -> np.ndarray:
    """Return thresholds from 0 to 1, close together where many images are, given their confidences [S, N]."""
    if len(confidence) == 1:
        return np.zeros(1)
    return np.unique(np.concatenate([[0., 1.], np.quantile(confidence[:-1], np.linspace(0, 1, _STEPS))]))


def _follow(confidence: np.ndarray, thresholds: np.ndarray, cost: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return the last stage of each image, and what it has spent then."""
    last = np.argmax(confidence >= thresholds[:, None], axis=0)  # the first that is sure enough; the last one is
    return last, np.cumsum(cost)[last]


def _judge(
        sizes: Sequence[int],
        thresholds: np.ndarray,
        average: bool,
        confidence: np.ndarray,
        right: np.ndarray,
        madds: np.ndarray,
) -> Fit:
    last, spent = _follow(confidence, thresholds, madds)
    return Fit(
        Cascade(dict(zip(sizes, thresholds.tolist())), average),
        float(right[last, np.arange(len(last))].mean()),
        float(spent.mean()),
        {r: float((last >= i).mean()) for i, r in enumerate(sizes)},
    )


def evaluate_cascade(
        cascade: Cascade,
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
) -> Fit:
    """Return what a cascade does on images whose logits are known at its resolutions; arguments as of fit."""
    sizes = cascade.resolutions
    confidence, right = _stages([logits[r] for r in sizes], labels, cascade.average)
    thresholds = np.array(list(cascade.thresholds.values()))
    return _judge(sizes, thresholds, cascade.average, confidence, right, np.array([madds[r] for r in sizes]))


def collect_logits(
        session: Session,
        images: Sequence[str],
        batch_size: int = 16,
        on_batch: Optional[Callable[[int], None]] = None,
) -> Dict[int, np.ndarray]:
    """Return the logits [N, num_classes] of images at each resolution; on_batch is told how many are done."""
    mode = 'L' if len(session.mean) == 1 else 'RGB'
    rows: Dict[int, List[np.ndarray]] = {r: [] for r in session.resolutions}
    batch_size = session.batch_size or batch_size
    for i in range(0, len(images), batch_size):
        opened = [open_image(image, mode) for image in images[i:i + batch_size]]
        for r in rows:
            rows[r].append(session.predict(opened, r))
        if on_batch is not None:
            on_batch(i + len(opened))
    return {r: np.concatenate(found) for r, found in rows.items()}


def label_folders(
        folder: Union[str, os.PathLike],
        session: Session,
        most: Optional[int] = None,
) -> Tuple[List[str], np.ndarray]:
    """Return images of a folder of class folders, and their classes.

    A class folder has the name of a class or, of ImageNet, its WordNet id; else there are as many folders as classes,
    in the order that timm's training gives them: by name, numbers in it by value, capitals as small letters. Of folders
    in folders the innermost is that of the class.

    Args:
        folder: The folder.
        session: Tells the classes.
        most: Images at most, spread evenly.

    Raises:
        ValueError: There are no images, or the folders cannot be told to be classes.
    """
    paths = find_images(folder)
    loose = [path for path in paths if os.path.dirname(os.path.relpath(path, folder)) == '']
    if loose:
        raise UserError(f'{loose[0]} is in no class folder.')
    names = sorted(set(map(_class_of, paths)), key=_natural_key)
    index = _class_index(names, session)
    unknown = [name for name in names if name not in index]
    expected = (f'the names of classes or WordNet ids, or {session.num_classes} folders in the order of the classes, '
                f'found {len(names)} folders')
    if len(unknown) < len(names):
        expected = f'the names of classes, as {next(name for name in names if name in index)} is one'
    if unknown:
        raise UserError(f'{folder}: {unknown[0]} is no class folder: expected {expected}.')
    paths = spread(paths, most)
    return paths, np.array([index[_class_of(path)] for path in paths])


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _natural_key(name: str) -> List[Union[int, str]]:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name.lower())]


def _class_index(names: Sequence[str], session: Session) -> Dict[str, int]:
    known = {name: i for i, name in enumerate(session.class_names or ())}
    if set(names) & set(known):  # if not all of them are, the caller says which
        return known
    if len(names) == session.num_classes:
        return {name: i for i, name in enumerate(names)}
    if names and all(len(name) == 9 and name[0] == 'n' and name[1:].isdigit() for name in names):
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(dict(num_classes=session.num_classes))
        if subset is not None:
            return {synset: i for i, synset in enumerate(ImageNetInfo(subset).label_names())}
    return {}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def write_cascade(path: Union[str, os.PathLike], cascade: Cascade, **told: Any) -> None:
    """Write a cascade as JSON, complete or not at all, and what else is told of it."""
    values = dict(asdict(cascade), **told)
    with atomic_write(path) as f:
        json.dump(values, f, indent=2)
        f.write('\n')


def read_cascade(path: Union[str, os.PathLike]) -> Cascade:
    """Read a file of write_cascade.

    Raises:
        ValueError: There is no such file, or it is another.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist, expected a file of timm-rs fit-cascade.')
    try:
        with open(path, encoding='utf-8') as f:
            values = json.load(f)
        thresholds = {int(r): float(t) for r, t in values['thresholds'].items()}
        return Cascade(thresholds, bool(values.get('average', False)))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path} is no file of timm-rs fit-cascade: {e}') from e
