"""Which resolution keeps a latency budget; without threads or clocks"""
from collections import defaultdict
from itertools import accumulate
from typing import Iterator, List, Mapping, Optional, Sequence

from .errors import UserError
from .fields import check_argument, integer, number

__all__ = ['Controller', 'Estimate', 'ReadingTime']

MAX_PATIENCE = 10 ** 6
SURPRISE = 4.  # the most times its mean that an overhead counts
# How many times as long as a JPEG's the bytes and pixels of a format take, until its images have been seen; of Pillow
# 12.3, for photographs of 500 x 375 to 4000 x 3000 pixels.
SLOWDOWN = {'AVIF': 4.5, 'PNG': 2., 'WEBP': 3.5}


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
    """Chooses the size of each request.

    A request takes the time to decode its images, see ReadingTime, the time to resize them, which hardly depends on the
    size, and the time of the inference. The latter is what was measured at the start, times a slowdown that all sizes
    share: a size that was not used for a while is judged by the others.

    It takes the largest size at which the next request and all that wait behind it would be in time. It goes down at
    once, and up only after several requests in a row had room for more.

    Args:
        latency: Seconds that one image takes at each resolution.
        overhead: Seconds that one image takes between decoding and inference.
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
        if floor is not None and floor not in list(latency):
            raise UserError(f"Unknown floor {floor!r}, expected one of {', '.join(map(str, latency))}.")
        self.resolutions = tuple(sorted((r for r in latency if r >= (floor or 0)), reverse=True))
        self.resolution = self.resolutions[0]
        self._latency = dict(latency)
        self._slowdown = Estimate(1.)
        self._overhead = Estimate(overhead)
        self._margin = check_argument('margin', margin, number(0))
        self._headroom = check_argument('headroom', headroom, number(0))
        self._patience = check_argument('patience', patience, integer(1, MAX_PATIENCE))
        self._roomy = 0

    def choose(
            self,
            left: Sequence[float],
            counts: Optional[Sequence[int]] = None,
            reading: Optional[Sequence[Sequence[float]]] = None,
    ) -> int:
        """Return the resolution for the first of the requests in line.

        Args:
            left: Seconds until the deadline of each, in the order in which they are served.
            counts: Images of each, one if None; runs of the network if it takes only whole batches.
            reading: Seconds that decoding each will take at each of the resolutions, nothing if None.
        """
        fitting = self.largest(left, counts, reading)
        if fitting <= self.resolution:
            self.resolution, self._roomy = fitting, 0
            return fitting
        larger = self.largest(left, counts, reading, 1 + self._headroom)
        self._roomy = self._roomy + 1 if larger > self.resolution else 0
        if self._roomy >= self._patience:
            self.resolution, self._roomy = larger, 0
        return self.resolution

    def observe(self, resolution: int, inference: float, overhead: float, count: int = 1) -> None:
        """Learn from a request that was served.

        Args:
            resolution: Its size.
            inference: Seconds that the network took.
            overhead: Seconds between decoding and that.
            count: Its images, or runs.
        """
        self._slowdown.update(inference / max(self._latency[resolution] * count, 1e-9))
        # How long one huge image took to resize says little about the next ones.
        most = max(SURPRISE * self._overhead.mean, self._latency[self.resolutions[0]])
        self._overhead.update(min(overhead / count, most))

    def expected(self, resolution: int) -> float:
        """Return the seconds to expect for an image that is decoded."""
        return self._overhead.upper(self._margin) + self._latency[resolution] * self._slowdown.upper(self._margin)

    @property
    def slowdown(self) -> float:
        """How many times longer inference takes recently than it did at the start."""
        return self._slowdown.mean

    def largest(
            self,
            left: Sequence[float],
            counts: Optional[Sequence[int]] = None,
            reading: Optional[Sequence[Sequence[float]]] = None,
            factor: float = 1.,
    ) -> int:
        """Return the largest size at which all would be in time, the floor if there is none; see choose."""
        for i, resolution in enumerate(self.resolutions):
            if all(factor * end <= seconds for end, seconds in zip(self._ends(i, left, counts, reading), left)):
                return resolution
        return self.resolutions[-1]

    def lateness(
            self,
            left: Sequence[float],
            counts: Optional[Sequence[int]] = None,
            reading: Optional[Sequence[Sequence[float]]] = None,
    ) -> float:
        """Return by how many seconds the last in line is late if all are served at the floor; see choose.

        Example:
            >>> round(Controller({224: 0.016, 96: 0.004}).lateness([0.1, 0.005]), 6)
            0.003
        """
        *_, end = self._ends(-1, left, counts, reading)
        return end - left[-1]

    def _ends(
            self,
            index: int,
            left: Sequence[float],
            counts: Optional[Sequence[int]],
            reading: Optional[Sequence[Sequence[float]]],
    ) -> Iterator[float]:
        """Give the seconds after which each in line is done, all at the resolution of this index."""
        seconds = self.expected(self.resolutions[index])
        counts = counts or [1] * len(left)
        reading = reading or [[0.] * len(self.resolutions)] * len(left)
        return accumulate(seconds * count + decoding[index] for count, decoding in zip(counts, reading))


class ReadingTime:
    """Predicts how long images take to decode.

    A byte of a file and a pixel that is decoded have the prices that were measured at the start with a JPEG, times a
    slowdown of each format, which begins at SLOWDOWN and is learned.

    Args:
        per_byte, per_pixel: Seconds.

    Example:
        >>> reading = ReadingTime(per_byte=0., per_pixel=1e-8)
        >>> reading.observe('JPEG', price=1., seconds=9.)    # 9 times as long as at the start
        >>> reading.expected('JPEG', [1.]), reading.expected('PNG', [1.])    # a mean of 2, with two deviations of 2
        ([6.0], [2.0])
    """

    def __init__(self, per_byte: float, per_pixel: float):
        self._per_byte, self._per_pixel = per_byte, per_pixel
        self._slowdown = defaultdict(lambda: Estimate(1.), {kind: Estimate(slow) for kind, slow in SLOWDOWN.items()})

    def prices(self, file_bytes: int, pixels: Sequence[int]) -> List[float]:
        """Return the seconds that it would have taken at the start, for each number of pixels."""
        return [self._per_byte * file_bytes + self._per_pixel * n for n in pixels]

    def expected(self, kind: str, prices: Sequence[float]) -> List[float]:
        """Return the seconds to expect for this format."""
        slowdown = self._slowdown[kind].upper(2)
        return [slowdown * price for price in prices]

    def observe(self, kind: str, price: float, seconds: float) -> None:
        """Learn from images that were decoded."""
        if price:
            self._slowdown[kind].update(seconds / price)
