"""Cascades fitted on labelled images to a target accuracy or a target cost"""
import itertools
import os
import re
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from .cascade import Cascade, check_one_label, softmax
from .errors import UserError
from .images import MODES, find_images, open_image, spread
from .session import Session
from .unreadable import ReadErrors, UnreadableError

__all__ = [
    'FOLDS',
    'Fit',
    'collect_logits',
    'compare',
    'cross_fit',
    'evaluate_cascade',
    'fit',
    'label_folders',
    'measure_images',
    'sweep',
]

_STEPS = 256  # thresholds that are tried
FOLDS, _SEED = 5, 0  # of cross-fitting


@dataclass(frozen=True)
class Fit:
    """A cascade and what it does on some images.

    Attributes:
        cascade: The cascade.
        accuracy: Share of right answers.
        madds: Mean multiply-adds of an image.
        shares: Share of the images that go through each resolution.
        images: Number of images.
    """
    cascade: Cascade
    accuracy: float
    madds: float
    shares: Mapping[int, float]
    images: int

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, from the unbiased variance of right answers."""
        return (self.accuracy * (1 - self.accuracy) / max(self.images - 1, 1)) ** 0.5


def fit(
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
        target_accuracy: Optional[float] = None,
        target_madds: Optional[float] = None,
        start: Optional[int] = None,
        most_accurate: bool = False,
) -> Fit:
    """Return the cheapest cascade of a target accuracy, or the most accurate one of a target cost.

    The accuracy and cost that it returns are those on the images that it is fitted on; see cross_fit for others.

    Args:
        logits: Array [N, num_classes] at each resolution, of the same images.
        labels: Their classes [N].
        madds: Multiply-adds of an image at each resolution.
        target_accuracy: Share of right answers to reach.
        target_madds: Mean multiply-adds of an image to stay below.
        start: First resolution; if None it is fitted as well.
        most_accurate: Take the most accurate cascade if none reaches the target accuracy.

    Raises:
        UserError: No target or two are given, or no cascade reaches it.
    """
    if (target_accuracy is None) == (target_madds is None):
        raise UserError('Expected a target accuracy or a target of multiply-adds, one of the two.')
    found = sweep(logits, labels, madds, start)
    if target_accuracy is not None:
        best = max(f.accuracy for f in found)
        if best < target_accuracy and not most_accurate:
            raise UserError(f'No cascade reaches an accuracy of {target_accuracy:.2%} on these images, '
                            f'the best has {best:.2%}.')
        good = [f for f in found if f.accuracy >= min(target_accuracy, best)]
        return min(good, key=lambda f: (f.madds, -f.accuracy))
    good = [f for f in found if f.madds <= target_madds]
    if not good:
        least = min(f.madds for f in found)
        raise UserError(f'No cascade stays below {target_madds:.4g} multiply-adds, the cheapest takes {least:.4g}.')
    # Among cascades of the same sizes take the one that spends most: others are better only by chance.
    spent = {(f.cascade.resolutions, f.cascade.average): f for f in sorted(good, key=lambda f: f.madds)}
    return max(spent.values(), key=lambda f: (f.accuracy, -f.madds))


def cross_fit(
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
        target_accuracy: Optional[float] = None,
        target_madds: Optional[float] = None,
        start: Optional[int] = None,
) -> Fit:
    """Fit a cascade on all images, and measure cascades on images that they were not fitted on.

    The images are split into FOLDS at random, by a fixed seed. Each fold is answered by a cascade that is fitted on the
    others; if those do not reach the target accuracy, by the most accurate one.

    Returns:
        The cascade of all images, with the accuracy, cost and shares of the images of all folds; arguments as in fit.
    """
    found = fit(logits, labels, madds, target_accuracy, target_madds, start)
    if len(labels) < FOLDS:
        raise UserError(f'{len(labels)} labelled images are too few to judge a cascade, expected at least {FOLDS}.')
    fold_of = np.random.default_rng(_SEED).permutation(len(labels)) % FOLDS
    judged = []
    for fold in range(FOLDS):
        held_out = fold_of == fold
        others = {r: z[~held_out] for r, z in logits.items()}
        fitted = fit(others, labels[~held_out], madds, target_accuracy, target_madds, start, most_accurate=True)
        answers = {r: z[held_out] for r, z in logits.items()}
        judged.append(evaluate_cascade(fitted.cascade, answers, labels[held_out], madds))
    weights = np.bincount(fold_of) / len(labels)
    shares = {r: float(weights @ [f.shares.get(r, 0.) for f in judged]) for r in sorted(logits)}
    return Fit(
        found.cascade,
        float(weights @ [f.accuracy for f in judged]),
        float(weights @ [f.madds for f in judged]),
        {r: share for r, share in shares.items() if share},
        len(labels),
    )


def sweep(
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
        start: Optional[int] = None,
) -> List[Fit]:
    """Return cascades of every set of sizes, with many thresholds.

    A cascade has the same threshold at all sizes except the last: a threshold of each, fitted to the answers, gains on
    the images that it is fitted on and loses on others (docs/findings.md).

    Args: See fit.

    Raises:
        UserError: The arguments do not agree.
    """
    sizes = sorted(logits)
    if start is not None and start not in sizes:
        raise UserError(f"Unknown start {start!r}, expected one of {', '.join(map(str, sizes))}.")
    if any(not madds.get(r) for r in sizes):
        raise UserError('Multiply-adds of a resolution are unknown, expected a file that records them.')
    if not len(labels) or any(len(logits[r]) != len(labels) for r in sizes):
        raise UserError('Expected as many logits as labels, at least one.')
    found = []
    for length in range(1, len(sizes) + 1):
        for chosen in itertools.combinations(sizes, length):
            if start is not None and chosen[0] != start:
                continue
            for average in (False, True)[:length]:  # a single size has no mean
                confidence, right = _stages([logits[r] for r in chosen], labels, average)
                thresholds = np.zeros(1)
                if length > 1:  # from 0 to 1, close together where many images are
                    thresholds = np.unique([0., 1., *np.quantile(confidence[:-1], np.linspace(0, 1, _STEPS))])
                for threshold in thresholds.tolist():
                    cascade = Cascade({**dict.fromkeys(chosen, threshold), chosen[-1]: 0.}, average)
                    found.append(_judge(cascade, confidence, right, madds))
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


def _judge(cascade: Cascade, confidence: np.ndarray, right: np.ndarray, madds: Mapping[int, int]) -> Fit:
    """Return what a cascade does, given the confidence and correctness of the answer after each stage."""
    thresholds = np.array(list(cascade.thresholds.values()))
    last = np.argmax(confidence >= thresholds[:, None], axis=0)  # the first that is sure enough, as the last always is
    return Fit(
        cascade,
        float(right[last, np.arange(len(last))].mean()),
        float(np.cumsum([madds[r] for r in cascade.resolutions])[last].mean()),
        {r: float((last >= i).mean()) for i, r in enumerate(cascade.resolutions)},
        len(last),
    )


def evaluate_cascade(
        cascade: Cascade,
        logits: Mapping[int, np.ndarray],
        labels: np.ndarray,
        madds: Mapping[int, int],
) -> Fit:
    """Return accuracy and cost of a cascade, given the logits of images at its resolutions; arguments as in fit."""
    stages = _stages([logits[r] for r in cascade.resolutions], labels, cascade.average)
    return _judge(cascade, *stages, madds)


def collect_logits(
        session: Session,
        images: Sequence[str],
        errors: Optional[ReadErrors] = None,
        batch_size: int = 16,
) -> Tuple[Dict[int, np.ndarray], np.ndarray]:
    """Return the logits [N, num_classes] of images at each resolution, and the indices of the N images.

    Args:
        session: The session.
        images: Names of files.
        errors: Where unreadable images are reported and left out; by default the first one raises an error.
        batch_size: Images of a batch.

    Raises:
        UnreadableError: Too many images cannot be read, or all.
    """
    errors = errors or ReadErrors(0)
    rows: Dict[int, List[np.ndarray]] = {r: [] for r in session.resolutions}
    readable: List[int] = []
    batch_size = session.batch_size or batch_size
    for first in range(0, len(images), batch_size):
        batch = images[first:first + batch_size]
        opened = [errors.open(image, MODES[len(session.mean)]) for image in batch]
        chosen = [i for i, image in enumerate(opened) if image is not None]
        readable += [first + i for i in chosen]
        for r in rows if chosen else ():
            rows[r].append(session.predict([opened[i] for i in chosen], r))
    if not readable:
        raise UnreadableError(f'None of the {len(images)} images can be read.')
    return {r: np.concatenate(found) for r, found in rows.items()}, np.array(readable)


def label_folders(
        folder: Union[str, os.PathLike],
        session: Session,
        most: Optional[int] = None,
) -> Tuple[List[str], np.ndarray]:
    """Return images of a folder of class folders, and their classes.

    A class folder has the name of a class or, for ImageNet, its WordNet id. If the file records no names there must be
    as many folders as classes, in the order of timm's training: by name, numbers in it by value, capitals as small
    letters. The innermost folder of an image is that of its class.

    Args:
        folder: The folder.
        session: A session with these classes.
        most: Largest number of images, spread evenly.

    Raises:
        UserError: The folder holds no images, or the classes of its folders are unknown.
    """
    check_one_label(session)
    paths = find_images(folder)
    loose = [path for path in paths if os.path.dirname(os.path.relpath(path, folder)) == '']
    if loose:
        raise UserError(f'{loose[0]} is not in a class folder.')
    names = sorted(set(map(_class_of, paths)), key=_natural_key)
    index = _class_index(names, session)
    unknown = [name for name in names if name not in index]
    if unknown:
        known = [name for name in names if name in index]
        expected = f'{session.num_classes} folders in the order of the classes, found {len(names)}'
        if known or session.class_names is not None:
            expected = f'the names of classes, such as {(known or session.class_names)[0]}, or WordNet ids'
        raise UserError(f'{folder}: {unknown[0]} is not a class folder: expected {expected}.')
    paths = spread(paths, most)
    return paths, np.array([index[_class_of(path)] for path in paths])


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _natural_key(name: str) -> List[Union[int, str]]:
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())]


def _class_index(names: Sequence[str], session: Session) -> Dict[str, int]:
    for listed in (session.class_names, session.metadata.get('class_ids')):
        known = {name: i for i, name in enumerate(listed or ())}
        if set(names) & set(known):  # the caller names those that are not
            return known
    is_known = session.class_names is not None  # then other names are other classes
    return {} if is_known or len(names) != session.num_classes else {name: i for i, name in enumerate(names)}


def measure_images(session: Session, images: Sequence[str], rounds: int = 3) -> Tuple[Dict[int, float], float]:
    """Return how many seconds an image takes at each resolution, preprocessing included, and how many to read it.

    Images are answered one by one, each `rounds` times; it is the mean of their medians.
    """
    seconds = np.zeros((len(images), rounds, 1 + len(session.resolutions)))
    for i, k in np.ndindex(len(images), rounds):
        times = [time.perf_counter()]
        image = open_image(images[i], MODES[len(session.mean)])
        times.append(time.perf_counter())
        for r in session.resolutions:
            session.predict(image, r)
            times.append(time.perf_counter())
        seconds[i, k] = np.diff(times)
    reading, *latency = np.median(seconds, axis=1).mean(axis=0).tolist()
    return dict(zip(session.resolutions, latency)), reading


def compare(
        session: Session,
        fitted: Fit,
        logits: Dict[int, np.ndarray],
        labels: np.ndarray,
        latency: Dict[int, float],
        reading: float,
) -> List[Dict[str, Any]]:
    """Return a row of each resolution by itself and of the cascade, with accuracy, mean multiply-adds and mean latency.

    Args:
        session: Session with the multiply-adds.
        fitted: What the cascade does.
        logits: Array [N, num_classes] at each resolution.
        labels: Classes [N].
        latency, reading: See measure_images.
    """
    sizes = {
        f'{r} px': evaluate_cascade(Cascade({r: 0.}), logits, labels, session.madds) for r in session.resolutions}
    rows = []
    for name, judged in dict(sizes, cascade=fitted).items():
        seconds = reading + sum(share * latency[r] for r, share in judged.shares.items())
        rows.append(dict(
            network=name, accuracy=round(judged.accuracy, 6), standard_error=round(judged.standard_error, 6),
            madds=round(judged.madds), milliseconds=round(1e3 * seconds, 3),
            shares={str(r): round(s, 4) for r, s in judged.shares.items()}))
    return rows
