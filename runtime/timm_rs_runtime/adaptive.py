"""A session that keeps a latency budget by choosing the resolution of each request"""
import io
import math
import os
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from .controller import Controller, ReadingTime
from .errors import UserError
from .fields import check_argument, flag, integer, number
from .images import ImageError, ImageSource, buffered, is_in_memory, name_of, open_image, work_of
from .lifetime import Closable
from .session import NotFiniteError, Session, image_list

__all__ = [
    'AdaptiveSession', 'BudgetError', 'Prediction', 'QueueFullError', 'measure_latency', 'measure_reading']

READ_AHEAD = 3  # requests whose images are decoded while they wait
MAX_QUEUE = 10 ** 6
TRIALS = 0.1  # of the time, for requests that seem to be late
_POSITIVE = number(0, above=True)


class QueueFullError(UserError, RuntimeError):
    """A request was not served because too many others were waiting.

    Attributes:
        retry_after: Seconds after which it might have been in time.
    """
    retry_after = 0.


class BudgetError(UserError):
    """Images take longer than the budget of their request, even at the smallest size with no others waiting.

    Attributes:
        least_ms: Milliseconds that they take.
    """
    least_ms = 0.


def _too_many(reason: str, retry_after: float) -> QueueFullError:
    error = QueueFullError(f'{reason}; try again later.')
    error.retry_after = retry_after
    return error


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


@dataclass(eq=False)
class _Request:
    budget_ms: float
    deadline: float
    count: int
    kind: str  # format of its images
    prices: List[float]  # of decoding them at each resolution, see ReadingTime
    reading: List[float]  # expected seconds of that; 0 once they are decoded
    end: Optional[float] = None  # when it will be served, expected since its turn began
    trial: Optional[float] = None  # when it came, if it is served although it seems to be late
    near: threading.Event = field(default_factory=threading.Event)  # set when it may decode its images
    turn: threading.Event = field(default_factory=threading.Event)  # set when it is served


class AdaptiveSession(Closable):
    """Serves each request at the largest resolution that the budget, the queue and recent latency allow.

    Any number of threads may call predict. Requests are served one after the other, in the order in which they came,
    each in the thread that called. Files are read before a request stands in line, so that a stalled disk or a slow
    client does not hold up others. While one request is served, the next READ_AHEAD in line decode their images; memory
    does not grow with the line. What decoding costs is predicted from the bytes and pixels of a file, and counts: the
    size is chosen before an image is decoded, for the sum, and may go down afterwards.

    It can be closed, is a context manager, can be pickled and copied, and works in forked processes: a copy opens the
    file and measures again; a forked process starts with an empty line and counters at 0.

    Args:
        path: File of `timm-rs export --format onnx`, or a Session, which has its own threads, mode and decode.
        budget_ms: Milliseconds from a call of predict to its answer; for binary files, from the end of their reading.
        floor: Smallest resolution to use, the smallest one of the file if None.
        max_queue: Requests that may wait, at most MAX_QUEUE; one more is refused.
        threads: Threads of an inference, all cores if None.
        mode, decode: See Session.
        read_timeout: Seconds after which a request whose files are not read yet fails.
        refuse_late: Refuse at once what would be late even if all that wait were served at the floor, and do not serve
            what has become too late; otherwise it is served late.
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
        >>> session.stats()['misses']    # doctest: +SKIP
        0
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
            refuse_late: bool = False,
            clock: Callable[[], float] = time.perf_counter,
            **options: Any,
    ):
        self.budget_ms = check_argument('budget_ms', budget_ms, _POSITIVE)
        self.max_queue = check_argument('max_queue', max_queue, integer(0, MAX_QUEUE))
        self.refuse_late = check_argument('refuse_late', refuse_late, flag())
        self.read_timeout = check_argument('read_timeout', read_timeout, number(0, threading.TIMEOUT_MAX, above=True))
        self.session = Session.open(path, threads, mode, decode)
        self._is_owner = self.session is not path
        self._clock = clock
        self.latency, overhead = measure_latency(self.session, clock=clock)
        self._controller = Controller(self.latency, overhead, floor, **options)
        self._reading = ReadingTime(*measure_reading(clock=clock))
        smallest = self._controller.resolutions[-1]
        fastest_ms = 1e3 * self._controller.expected(smallest)
        self.feasible = fastest_ms <= budget_ms
        if not self.feasible:
            what = 'refused, except a trial at times' if refuse_late else f'served at {smallest} px, late'
            warnings.warn(
                f'A budget of {budget_ms:g} ms is below the {fastest_ms:.1f} ms that {smallest} px takes here: every '
                f'request is {what}.', RuntimeWarning, stacklevel=2)
        self._after_fork()
        super().__init__(partial(
            type(self), os.path.abspath(path) if self._is_owner else path, budget_ms, floor, max_queue, threads, mode,
            decode, read_timeout, refuse_late, clock, **options))

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
            BudgetError: With refuse_late, the budget is too small for these images.
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
            with self._in_line(self._request(images, budget_ms, start)) as request:
                images, largest = self._decode(images, request)
                self._wait_for_turn(request)
                resolution, logits = self._serve(images, largest)
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
            'requests' (served, by resolution), 'misses' (later than their budget, among these), 'rejected'
            (QueueFullError), 'failed' (ended in any other error), 'queue' (waiting now), 'resolution' (chosen last),
            'slowdown' (of inference against the start), 'reading_ms' (spent on decoding), 'network_ms' (on resizing and
            inference), 'expected_reading_ms' (to decode the last request, by resolution), 'expected_ms' (of an image
            that is decoded, by resolution), 'budget_ms', 'feasible'. Every request that has ended counts once, in
            'requests', 'rejected' or 'failed'.
        """
        with self._lock:
            return dict(
                requests={r: self._counts[r] for r in self._controller.resolutions},
                misses=self._counts['misses'],
                rejected=self._counts['rejected'],
                failed=self._counts['failed'],
                queue=max(len(self._line) - 1, 0),
                resolution=self._resolution,
                slowdown=self._controller.slowdown,
                reading_ms=1e3 * self._counts['reading'],
                network_ms=1e3 * self._counts['network'],
                expected_reading_ms={r: 1e3 * t for r, t in zip(self._controller.resolutions, self._expected_reading)},
                expected_ms={r: 1e3 * self._controller.expected(r) for r in self._controller.resolutions},
                budget_ms=self.budget_ms,
                feasible=self.feasible,
            )

    def _request(self, images: Sequence[ImageSource], budget_ms: float, start: float) -> _Request:
        runs = -(-len(images) // (self.session.batch_size or 1))  # a batch takes as long as a single image there
        needs = list(map(self.session.preprocessing.needed, self._controller.resolutions))
        formats, lengths, pixels = zip(*(work_of(image, needs) for image in images))
        kind, prices = max(formats), self._reading.prices(sum(lengths), map(sum, zip(*pixels)))
        self._expected_reading = self._reading.expected(kind, prices)
        return _Request(budget_ms, start + budget_ms / 1e3, runs, kind, prices, self._expected_reading)

    def _decode(self, images: Sequence[ImageSource], request: _Request) -> Tuple[List[Image.Image], int]:
        """Decode images for a size that is in time now, and return the largest size that these pixels serve."""
        start = self._clock()
        resolutions = self._controller.resolutions
        with self._lock:
            fitting = self._controller.largest(*self._outlook(self._line, start))
        price = request.prices[resolutions.index(fitting)]
        largest = next(r for r, other in zip(resolutions, request.prices) if other <= price)
        decoded = [self.session.read(image, largest) for image in images]
        seconds = self._clock() - start
        with self._lock:
            self._reading.observe(request.kind, price, seconds)
            self._counts['reading'] += seconds
            request.reading = [0.] * len(resolutions)
        return decoded, largest

    def _outlook(self, line: Iterable[_Request], now: float) -> Tuple[List[float], List[int], List[List[float]]]:
        """Return what the controller has to know of a line. The one that is being served only takes its time."""
        none = [0.] * len(self._controller.resolutions)
        rows = [
            (r.deadline - now, r.count, r.reading) if r.end is None else
            (math.inf, 0, [max(r.end - now, 0.)] * len(none)) for r in line]
        left, counts, reading = map(list, zip(*rows))
        return left, counts, reading

    def _lateness(self, line: Iterable[_Request]) -> float:
        return self._controller.lateness(*self._outlook(line, self._clock()))

    def _check_in_time(self, request: _Request) -> None:
        """Refuse a request that would be late behind the line even if all were served at the floor.

        If nobody waits it is served anyway now and then, so that a machine that was slow for a while is found out.

        Raises:
            QueueFullError: It would be late.
            BudgetError: Its own images take longer than its budget.
        """
        now, floor = self._clock(), self._controller.resolutions[-1]
        late = self._lateness([*self._line, request])
        if late <= 0:
            return
        if not self._line and now >= self._next_trial:
            request.trial = now
            return
        least_ms = 1e3 * (self.latency[floor] * request.count + request.prices[-1])
        if least_ms > request.budget_ms:
            error = BudgetError(
                f'The images take {least_ms:.1f} ms even at {floor} px, the budget is {request.budget_ms:g} ms.')
            error.least_ms = least_ms
            raise error
        raise _too_many(f'{len(self._line)} requests are being served or waiting, one more would be late', late)

    def _wait_for_turn(self, request: _Request) -> None:
        is_patient = not self.refuse_late or request.trial is not None
        has_come = request.turn.wait(None if is_patient else max(-self._lateness([request]), 0.))
        self._check_open()
        if not (is_patient or has_come and self._lateness([request]) <= 0):
            raise _too_many('The requests before took too long', max(self._lateness([request]), 0.))

    def _serve(self, images: Sequence[Image.Image], largest: int) -> Tuple[int, np.ndarray]:
        start = self._clock()
        with self._lock:
            request, controller = self._line[0], self._controller
            # A photograph whose decoding left room for less than the others does not hold them down.
            choose = controller.choose if largest == controller.resolutions[0] else controller.largest
            self._resolution = resolution = min(choose(*self._outlook(self._line, start)), largest)
            request.end = start + controller.expected(resolution) * request.count
        batch = np.stack([self.session.preprocess(image, resolution) for image in images])
        prepared = self._clock()
        try:
            logits = self.session.predict(batch)
        except NotFiniteError as e:
            raise NotFiniteError(e.path, resolution, e.logits, list(map(name_of, images))) from None
        end = self._clock()
        with self._lock:
            self._controller.observe(resolution, end - prepared, prepared - start, request.count)
            self._counts['network'] += end - start
        return resolution, logits

    @contextmanager
    def _in_line(self, request: _Request) -> Iterator[_Request]:
        """Stand in line until the request is near, and leave it at the end."""
        try:
            with self._lock:
                self._check_open()
                if len(self._line) > self.max_queue:
                    late = max(self._lateness([*self._line, request]), 0.)
                    raise _too_many(f'{self.max_queue} requests are waiting, the most that may', late)
                if self.refuse_late:
                    self._check_in_time(request)
                self._line.append(request)
                self._call_up()
            request.near.wait()
            self._check_open()
            yield request
        finally:
            with self._lock:
                if request.trial is not None:
                    now = self._clock()
                    self._next_trial = now + (now - request.trial) / TRIALS
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
        self._next_trial = -math.inf
        self._counts = Counter()
        self._resolution = self._controller.resolution
        self._expected_reading = [0.] * len(self._controller.resolutions)


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


def measure_reading(rounds: int = 5, clock: Callable[[], float] = time.perf_counter) -> Tuple[float, float]:
    """Measure how many seconds a byte of a JPEG and a pixel that is decoded take here."""
    width, height, file = 640, 480, io.BytesIO()
    Image.effect_noise((width, height), 16).convert('RGB').save(file, 'JPEG', quality=90)
    seconds = []
    for _ in range(rounds):
        times = [clock()]
        for needed in (None, lambda *_: (1, 1)):  # all pixels, then 1 of 64
            open_image(file, 'RGB', needed)
            times.append(clock())
        seconds.append(np.diff(times))
    whole, scaled = np.median(seconds, axis=0).tolist()
    pixels = max(whole - scaled, 0.) * 64 / 63  # seconds of all
    return max(whole - pixels, 0.) / file.getbuffer().nbytes, pixels / (width * height)
