"""A session that keeps a latency budget by choosing the resolution of each request"""
import os
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from .errors import UserError
from .fields import check_argument, integer, number
from .images import ImageError, ImageSource, buffered, is_in_memory, name_of
from .lifetime import Closable
from .session import NotFiniteError, Session, image_list

__all__ = ['AdaptiveSession', 'Controller', 'Prediction', 'QueueFullError', 'measure_latency']

READ_AHEAD = 3  # requests whose images are decoded while they wait
MAX_QUEUE = 10 ** 6
_POSITIVE = number(0, above=True)
_METRICS = {
    'requests': ('requests_total', 'Requests served, by resolution.'),
    'misses': ('deadline_misses_total', 'Requests served later than their budget.'),
    'rejected': ('rejected_total', 'Requests refused because the queue was full.'),
    'failed': ('failed_total', 'Requests that ended in another error.'),
    'queue': ('queue_length', 'Requests that wait.'),
    'resolution': ('resolution_pixels', 'Resolution chosen last.'),
    'slowdown': ('slowdown_ratio', 'Recent latency of inference against that at the start.'),
    'expected_ms': ('expected_seconds', 'Expected time of an image, by resolution.'),
    'budget_ms': ('budget_seconds', 'Budget of a request.'),
}  # of Prometheus, by their keys in stats()


class QueueFullError(UserError, RuntimeError):
    """A request came while the queue was full; it was not served."""


@dataclass(frozen=True)
class Prediction:
    """The answer to a request.

    Attributes:
        logits: Array of float32 [N, num_classes].
        resolution: Input size in pixels that was chosen.
        milliseconds: From the call to the answer, the time in the queue included.
        in_time: Whether that is within the budget.
    """
    logits: np.ndarray
    resolution: int
    milliseconds: float
    in_time: bool


class Estimate:
    """A running mean and mean deviation, as TCP estimates round-trip times (RFC 6298).

    Example:
        >>> estimate = Estimate(8.)
        >>> estimate.update(16.)
        >>> estimate.mean, estimate.deviation
        (9.0, 2.0)
    """

    def __init__(self, mean: float):
        self.mean = mean
        self.deviation = 0.

    def update(self, value: float) -> None:
        error = value - self.mean
        self.mean += error / 8
        self.deviation += (abs(error) - self.deviation) / 4

    def upper(self, margin: float) -> float:
        """Return the mean plus `margin` deviations."""
        return self.mean + margin * self.deviation


class Controller:
    """Chooses the size of each request; without threads or clocks.

    A request takes the time to read its image, which does not depend on the size, and the time of the inference. The
    latter is what was measured at the start, times a slowdown that all sizes share: a size that was not used for a
    while is judged by the others.

    It takes the largest size at which the next request and all that wait behind it would be in time. It goes down at
    once, and up only after several requests in a row had room for more.

    Args:
        latency: Seconds that one image takes at each resolution.
        overhead: Seconds that reading one image takes.
        floor: Smallest resolution to use, the smallest one if None.
        margin: Mean deviations of recent latency that are added to its mean.
        headroom: Share of time to spare that going up needs.
        patience: Requests in a row that must have had room for more.

    Attributes:
        resolutions: Those that are chosen from, largest first.
        resolution: The one that was chosen last.

    Raises:
        UserError: The floor is unknown, or a value is not usable.

    Example:
        >>> controller = Controller({224: 0.016, 96: 0.004})
        >>> controller.choose([0.1]), controller.choose([0.03, 0.03]), controller.choose([0.1])
        (224, 96, 96)
    """

    def __init__(
            self,
            latency: Mapping[int, float],
            overhead: float = 0.,
            floor: Optional[int] = None,
            margin: float = 2.,
            headroom: float = 0.2,
            patience: int = 4,
    ):
        if floor is not None and floor not in latency:
            raise UserError(f"Unknown floor {floor!r}, expected one of {', '.join(map(str, latency))}.")
        self.resolutions = tuple(sorted((r for r in latency if r >= (floor or 0)), reverse=True))
        self.resolution = self.resolutions[0]
        self._latency = dict(latency)
        self._slowdown = Estimate(1.)
        self._overhead = Estimate(overhead)
        self._margin = check_argument('margin', margin, number(0))
        self._headroom = check_argument('headroom', headroom, number(0))
        self._patience = check_argument('patience', patience, integer(1, MAX_QUEUE))
        self._roomy = 0

    def choose(self, left: Sequence[float], counts: Optional[Sequence[int]] = None) -> int:
        """Return the resolution for the first of the requests in line.

        Args:
            left: Seconds until the deadline of each, in the order in which they are served.
            counts: Images of each, one if None; runs of the network if it takes only whole batches.
        """
        counts = counts or [1] * len(left)
        fitting = self._largest(left, counts, 1.)
        if fitting <= self.resolution:
            self.resolution, self._roomy = fitting, 0
            return fitting
        larger = self._largest(left, counts, 1 + self._headroom)
        self._roomy = self._roomy + 1 if larger > self.resolution else 0
        if self._roomy >= self._patience:
            self.resolution, self._roomy = larger, 0
        return self.resolution

    def observe(self, resolution: int, inference: float, overhead: float, count: int = 1) -> None:
        """Learn from a request that was served.

        Args:
            resolution: Its size.
            inference: Seconds that the network took.
            overhead: Seconds that everything else took.
            count: Its images, or runs.
        """
        self._slowdown.update(inference / max(self._latency[resolution] * count, 1e-9))
        self._overhead.update(overhead / count)

    def expected(self, resolution: int) -> float:
        """Return the seconds to expect for an image."""
        return self._overhead.upper(self._margin) + self._latency[resolution] * self._slowdown.upper(self._margin)

    @property
    def slowdown(self) -> float:
        """How many times longer inference takes recently than it did at the start."""
        return self._slowdown.mean

    def _largest(self, left: Sequence[float], counts: Sequence[int], factor: float) -> int:
        """Return the largest size at which all would be in time, the floor if there is none."""
        pace = min(seconds / waiting for seconds, waiting in zip(left, accumulate(counts)))
        return next((r for r in self.resolutions if factor * self.expected(r) <= pace), self.resolutions[-1])


@dataclass(eq=False)
class _Request:
    deadline: float
    count: int
    near: threading.Event = field(default_factory=threading.Event)  # set when it may decode its images
    turn: threading.Event = field(default_factory=threading.Event)  # set when it is served


class AdaptiveSession(Closable):
    """Serves each request at the largest resolution that the budget, the queue and recent latency allow.

    Any number of threads may call predict. Requests are served one after the other, in the order in which they came,
    each in the thread that called. Files are read before a request stands in line, so that a stalled disk or a slow
    client does not hold up others. While one request is served, the next READ_AHEAD in line decode their images; memory
    does not grow with the line.

    It can be closed, is a context manager, can be pickled and copied, and works in forked processes: a copy opens the
    file and measures again; a forked process starts with an empty line and counters at 0.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session.
        budget_ms: Milliseconds from a call of predict to its answer; for binary files, from the end of their reading.
        floor: Smallest resolution to use, the smallest one of the file if None.
        max_queue: Requests that may wait, at most MAX_QUEUE; one more is refused.
        threads: Threads of an inference, all cores if None.
        mode, decode: See Session.
        read_timeout: Seconds after which a request whose files are not read yet fails.
        clock: Returns the time in seconds.
        **options: Arguments of the Controller: margin, headroom, patience.

    Attributes:
        latency: Seconds that the network takes for one image at each resolution, as measured at the start; for a batch
            if the file takes only whole batches.
        feasible: Whether the floor, with nothing in the queue, keeps the budget. If not, requests are served at the
            floor anyway, and a RuntimeWarning says so at the start.

    Raises:
        UserError: The file is not an export of timm_rs, or an argument is not usable.

    Example:
        >>> session = AdaptiveSession('model.onnx', budget_ms=50, threads=1)    # doctest: +SKIP
        >>> answer = session.predict('photo.jpg')    # doctest: +SKIP
        >>> answer.resolution, answer.in_time    # doctest: +SKIP
        (224, True)
        >>> print(session.prometheus())    # doctest: +SKIP
    """

    def __init__(
            self,
            path: Any,
            budget_ms: float,
            floor: Optional[int] = None,
            max_queue: int = 256,
            threads: Optional[int] = None,
            mode: str = 'fast',
            decode: str = 'scaled',
            read_timeout: float = 30.,
            clock: Callable[[], float] = time.perf_counter,
            **options: Any,
    ):
        self.budget_ms = check_argument('budget_ms', budget_ms, _POSITIVE)
        self.max_queue = check_argument('max_queue', max_queue, integer(0, MAX_QUEUE))
        self.read_timeout = check_argument('read_timeout', read_timeout, number(0, threading.TIMEOUT_MAX, above=True))
        self.session = Session.open(path, threads, mode, decode)
        self._is_owner = self.session is not path
        self._clock = clock
        self.latency, overhead = measure_latency(self.session, clock=clock)
        self._controller = Controller(self.latency, overhead, floor, **options)
        smallest = self._controller.resolutions[-1]
        fastest_ms = 1e3 * self._controller.expected(smallest)
        self.feasible = fastest_ms <= budget_ms
        if not self.feasible:
            warnings.warn(
                f'A budget of {budget_ms:g} ms is below the {fastest_ms:.1f} ms that {smallest} px takes here: every '
                f'request is served at {smallest} px, late.', RuntimeWarning, stacklevel=2)
        self._after_fork()
        super().__init__(partial(
            type(self), os.path.abspath(path) if self._is_owner else path, budget_ms, floor, max_queue, threads, mode,
            decode, read_timeout, clock, **options))

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.session!r}, budget_ms={self.budget_ms:g})'

    def close(self) -> None:
        """Stop answering. The request that is being served is answered; those that wait get a ClosedError.

        The Session is closed too, unless it was given.
        """
        with self._lock:
            super().close()
            for request in self._line:
                request.near.set()
                request.turn.set()
            self._end_if_over()

    def predict(
            self,
            images: Union[ImageSource, Sequence[ImageSource]],
            budget_ms: Optional[float] = None,
    ) -> Prediction:
        """Wait for the turn of this request and serve it.

        Args:
            images: An image or a list of them, see Session.predict; they all get the same resolution.
            budget_ms: Budget of this request, the session's if None.

        Raises:
            QueueFullError: Too many requests are waiting.
            UserError: There are no images, the budget is not a positive number, or see Session.predict.
        """
        start = self._clock()
        try:
            budget_ms = check_argument('budget_ms', self.budget_ms if budget_ms is None else budget_ms, _POSITIVE)
            images = image_list(images)
            if not images:
                raise UserError('Got no images, expected at least one.')
            self._check_open()
            is_sent = any(hasattr(image, 'read') for image in images)
            images = self._read(images)
            if is_sent:
                start = self._clock()
            runs = -(-len(images) // (self.session.batch_size or 1))  # a batch takes as long as a single image there
            with self._in_line(_Request(start + budget_ms / 1e3, runs)) as request:
                images = list(map(self.session.read, images))
                request.turn.wait()
                self._check_open()
                resolution, logits = self._serve(images)
                milliseconds = 1e3 * (self._clock() - start)
        except BaseException as e:
            with self._lock:
                self._counts['rejected' if isinstance(e, QueueFullError) else 'failed'] += 1
            raise
        in_time = milliseconds <= budget_ms
        with self._lock:
            self._counts[resolution] += 1
            self._counts['misses'] += not in_time
        return Prediction(logits, resolution, milliseconds, in_time)

    def _read(self, images: Sequence[ImageSource]) -> List[ImageSource]:
        """Read files in a thread, which is given up if one takes too long: a stalled read cannot be interrupted."""
        if all(map(is_in_memory, images)):
            return list(images)
        found = Future()

        def read() -> None:
            try:
                found.set_result(list(map(buffered, images)))
            except BaseException as e:
                found.set_exception(e)

        threading.Thread(target=read, daemon=True).start()
        if not wait([found], self.read_timeout).done:
            raise ImageError(f'{name_of(images[0])} was not read within {self.read_timeout:g} s.')
        return found.result()

    def stats(self) -> Dict[str, Any]:
        """Return the counters since the start, and the state now.

        Returns:
            'requests' (served, by resolution), 'misses' (later than their budget, among these), 'rejected' (the queue
            was full), 'failed' (ended in any other error), 'queue' (waiting now), 'resolution' (chosen last),
            'slowdown' (of inference against the start), 'expected_ms' (of an image now, by resolution), 'budget_ms',
            'feasible'. Every request that has ended counts once, in 'requests', 'rejected' or 'failed'.
        """
        with self._lock:
            return dict(
                requests={r: self._counts[r] for r in self._controller.resolutions},
                misses=self._counts['misses'],
                rejected=self._counts['rejected'],
                failed=self._counts['failed'],
                queue=max(len(self._line) - 1, 0),
                resolution=self._controller.resolution,
                slowdown=self._controller.slowdown,
                expected_ms={r: 1e3 * self._controller.expected(r) for r in self._controller.resolutions},
                budget_ms=self.budget_ms,
                feasible=self.feasible,
            )

    def prometheus(self) -> str:
        """Return the statistics in the text format that Prometheus reads."""
        stats, lines = self.stats(), []
        for key, (name, text) in _METRICS.items():
            value = stats[key]
            values = {f'{{resolution="{r}"}}': v for r, v in value.items()} if isinstance(value, dict) else {'': value}
            scale = 1e-3 if key.endswith('_ms') else 1
            kind = 'counter' if name.endswith('_total') else 'gauge'
            lines += [f'# HELP timm_rs_{name} {text}', f'# TYPE timm_rs_{name} {kind}']
            lines += [f'timm_rs_{name}{labels} {round(scale * v, 9)}' for labels, v in values.items()]
        return '\n'.join(lines) + '\n'

    def _serve(self, images: Sequence[ImageSource]) -> Tuple[int, np.ndarray]:
        start = self._clock()
        with self._lock:
            line = list(self._line)
            resolution = self._controller.choose([r.deadline - start for r in line], [r.count for r in line])
        batch = np.stack([self.session.preprocess(image, resolution) for image in images])
        prepared = self._clock()
        try:
            logits = self.session.predict(batch)
        except NotFiniteError as e:
            raise NotFiniteError(e.path, resolution, e.logits, list(map(name_of, images))) from None
        with self._lock:
            self._controller.observe(resolution, self._clock() - prepared, prepared - start, line[0].count)
        return resolution, logits

    @contextmanager
    def _in_line(self, request: _Request) -> Iterator[_Request]:
        """Stand in line until the request is near, and leave it at the end."""
        try:
            with self._lock:
                self._check_open()
                if len(self._line) > self.max_queue:
                    raise QueueFullError(f'{self.max_queue} requests are waiting, the most that may; try again later.')
                self._line.append(request)
                self._call_up()
            request.near.wait()
            self._check_open()
            yield request
        finally:
            with self._lock:
                if request in self._line:
                    self._line.remove(request)
                    self._call_up()
                self._end_if_over()

    def _call_up(self) -> None:
        """Call the first request in line, and let the next ones decode their images."""
        for request in islice(self._line, 1 + READ_AHEAD):
            request.near.set()
        if self._line:
            self._line[0].turn.set()

    def _end_if_over(self) -> None:
        if self._closed and self._is_owner and not self._line:
            self.session.close()

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close it
        self._line: Deque[_Request] = deque()  # the request that is served, then those that wait
        self._counts = Counter()


def measure_latency(
        session: Session,
        rounds: int = 7,
        clock: Callable[[], float] = time.perf_counter,
) -> Tuple[Dict[int, float], float]:
    """Measure how long one image takes here, or a batch if the file takes only whole batches.

    Args:
        session: The session.
        rounds: Times that each size runs.
        clock: Returns the time in seconds.

    Returns:
        Median seconds of the network at each resolution, and median seconds to prepare an image of 500x375 for the
        largest one. The sizes take turns.
    """
    image = Image.effect_noise((500, 375), 64)
    shape = session.batch_size or 1, len(session.mean)
    batches = [np.zeros((*shape, r, r), np.float32) for r in session.resolutions]
    seconds = []
    for _ in range(rounds):
        times = [clock()]
        session.preprocess(image, session.resolutions[0])
        times.append(clock())
        for batch in batches:
            with suppress(NotFiniteError):  # raised when an answer is asked for
                session.predict(batch)
            times.append(clock())
        seconds.append(np.diff(times))
    overhead, *latency = np.median(seconds, axis=0).tolist()
    return dict(zip(session.resolutions, latency)), overhead
