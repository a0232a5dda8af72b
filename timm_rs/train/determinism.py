"""Randomness as a function of seed, epoch and position

Nothing random depends on what was drawn before: the order of an epoch follows from (seed, epoch), the augmentation of
an image from (seed, epoch, index), and what happens on the device from (seed, epoch, batch). So a run that is resumed
anywhere goes on exactly as if it had not been interrupted, without any generator state in its checkpoints.
"""
import logging
import random
from itertools import islice
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler, RandomSampler, Sampler

from ..errors import TrainingFault

__all__ = ['EpochSampler', 'ReadErrors', 'SteadyDataset', 'mix_seed', 'seed_all']

_logger = logging.getLogger('train')


def mix_seed(*numbers: int) -> int:
    """Return a 32-bit seed that differs for different numbers, order included.

    Example:
        >>> mix_seed(42, 1) != mix_seed(42, 2) and mix_seed(1, 2) != mix_seed(2, 1)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(*numbers: int) -> None:
    """Seed the generators of torch, NumPy and Python from some numbers."""
    seed = mix_seed(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class EpochSampler(Sampler):
    """Order of the images of an epoch, from any batch on.

    Gives (epoch, index) instead of the index, so that workers that live through many epochs know which one it is.

    Args:
        sampler: timm's or torch's sampler of indices.
        seed: Of the run.
        batch_size: Images per batch.
    """

    def __init__(self, sampler: Sampler, seed: int, batch_size: int):
        self.sampler = sampler
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch that its next pass begins with."""
        self.epoch = epoch
        self.first_batch = first_batch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.seed = self.seed
        elif isinstance(self.sampler, RandomSampler):
            self.sampler.generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        indices = islice(iter(self.sampler), self.first_batch * self.batch_size, None)
        return ((self.epoch, index) for index in indices)


class ReadErrors:
    """Images that could not be read, reported by all loader workers.

    Args:
        limit: Distinct images that may fail before check raises.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.names = {}  # of the images, in the order of their failing
        self._queue = torch.multiprocessing.SimpleQueue()

    def report(self, name: str, reason: str) -> None:
        """Tell, from any process, that an image cannot be read."""
        self._queue.put((name, reason))

    def check(self) -> None:
        """Log what was reported.

        Raises:
            TrainingFault: More images than the limit failed.
        """
        fault = self.fault()
        if fault is not None:
            raise fault

    def fault(self) -> Optional[TrainingFault]:
        """Log what was reported, and return the fault if more images than the limit failed."""
        while not self._queue.empty():
            name, reason = self._queue.get()
            if name not in self.names:
                _logger.warning(f'Cannot read image {name} ({reason}), another one stands in.')
            self.names[name] = reason
        if len(self.names) > self.limit:
            return TrainingFault(
                f'{len(self.names)} images cannot be read, expected at most {self.limit} (--max-unreadable): '
                f'{", ".join(list(self.names)[:3])}, ...')
        return None

    def summary(self) -> str:
        """Return one line on all failures so far, empty if there is none."""
        if not self.names:
            return ''
        names: List[str] = list(self.names)
        return f"{len(names)} unreadable images so far: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


class SteadyDataset(Dataset):
    """A data set whose augmentations follow from (seed, epoch, index), and that survives unreadable images.

    In the place of an image that cannot be read stands the next one.

    Args:
        dataset: Images with labels.
        seed: Of the run and the process.
        errors: Where unreadable images are reported.
    """

    def __init__(self, dataset: Dataset, seed: int, errors: ReadErrors):
        self.dataset = dataset
        self.seed = seed
        self.errors = errors
        if hasattr(dataset, '_max_retries'):
            dataset._max_retries = 1  # timm would pass over unreadable images without telling their names
            logging.getLogger('timm.data.dataset').setLevel(logging.ERROR)

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Tuple[Any, Any]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        for _ in range(min(len(self), self.errors.limit + 10)):
            if epoch is not None:
                seed_all(self.seed, epoch, index)
            try:
                return self.dataset[index]
            except (OSError, RuntimeError) as e:
                if isinstance(e, RuntimeError) and 'consecutive samples' not in str(e):
                    raise  # no reading error
                self.errors.report(self._name(index), self._reason(index, e))
                index = (index + 1) % len(self)
        raise RuntimeError(f'No image before number {index} can be read.')

    def _reason(self, index: int, error: Exception) -> str:
        if hasattr(self.dataset, 'reader'):  # timm tells that it failed, not why
            try:
                Image.open(self.dataset.reader[index][0]).load()
            except (OSError, SyntaxError) as e:
                error = e
        return ' '.join(str(error).split())

    def _name(self, index: int) -> str:
        try:
            return self.dataset.filename(index, absolute=True)
        except (AttributeError, NotImplementedError):
            return f'number {index}'
