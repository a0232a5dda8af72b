"""Randomness as a function of seed, epoch and position

Nothing random depends on what was drawn before: the order of an epoch follows from (seed, epoch), the augmentation of
an image from (seed, epoch, index, repeat), and what happens on the device from (seed, epoch, batch). So a run that is
resumed anywhere goes on exactly as if it had not been interrupted, without any generator state in its checkpoints.
"""
import json
import logging
import random
import struct
import tempfile
import uuid
import weakref
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler, RandomSampler, Sampler

from .faults import TrainingFault

__all__ = ['EpochSampler', 'ReadErrors', 'SteadyDataset', 'mix_seed', 'seed_all']

_logger = logging.getLogger('train')
_READING = (EOFError, OSError, SyntaxError, struct.error, Image.DecompressionBombError)
_DECODING = (*_READING, RuntimeError, ValueError)  # what Pillow raises for damaged files


def mix_seed(*numbers: int) -> int:
    """Return a 32-bit seed that differs for different numbers, order included; a fourth number of 0 is as none.

    Example:
        >>> mix_seed(42, 1) != mix_seed(42, 2) and mix_seed(1, 2) != mix_seed(2, 1)
        True
        >>> mix_seed(42, 1, 2, 0) == mix_seed(42, 1, 2)
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

    Gives (epoch, index, repeat) instead of the index, so that workers that live through many epochs know which one it
    is, and how often a sampler that repeats images one after the other (--aug-repeats) gave this one before.

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

    def __iter__(self) -> Iterator[Tuple[int, int, int]]:
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.seed = self.seed
        elif isinstance(self.sampler, RandomSampler):
            self.sampler.generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        keys = ((self.epoch, index, n) for index, same in groupby(self.sampler) for n, _ in enumerate(same))
        return islice(keys, self.first_batch * self.batch_size, None)


class ReadErrors:
    """Images that could not be read, reported by all loader workers.

    Args:
        limit: Distinct images that may fail before check raises.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.names = {}  # of the images, in the order of their failing
        self._stuck = False
        self._told = set()  # by this process
        self._path = Path(tempfile.gettempdir(), f'timm_rs-{uuid.uuid4().hex}')  # never full, unlike a pipe
        self._position = 0
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def report(self, name: str, reason: str, is_last: bool = False) -> None:
        """Tell, from any process, that an image cannot be read, and whether none stands in for it."""
        if is_last or name not in self._told:
            self._told.add(name)
            with open(self._path, 'ab', buffering=0) as f:  # each line in one piece, behind those of the others
                f.write(json.dumps([name, reason, is_last]).encode() + b'\n')

    def check(self) -> None:
        """Log what was reported.

        Raises:
            TrainingFault: More images than the limit failed, or one that none stands in for.
        """
        fault = self.fault()
        if fault is not None:
            raise fault

    def fault(self) -> Optional[TrainingFault]:
        """Log what was reported, and return the fault that ends the run, if any."""
        for name, reason, is_last in self._reports():
            if name not in self.names:
                _logger.warning(f'Cannot read image {name} ({reason}), another one stands in.')
            self.names[name] = reason
            self._stuck |= is_last
        if len(self.names) > self.limit:
            expected = f'expected at most {self.limit} (--max-unreadable)'
        elif self._stuck:
            expected = 'and none is left to stand in'
        else:
            return None
        return TrainingFault(
            f'{len(self.names)} images cannot be read, {expected}: {", ".join(list(self.names)[:3])}, ...')

    def _reports(self) -> Iterator[Tuple[str, str, bool]]:
        """Give what was reported since the last time."""
        if not self._path.exists():
            return
        with open(self._path, 'rb') as f:
            f.seek(self._position)
            lines = f.read()
        lines = lines[:lines.rfind(b'\n') + 1]
        self._position += len(lines)
        yield from map(json.loads, lines.splitlines())

    def summary(self) -> str:
        """Return one line on all failures so far, empty if there is none."""
        if not self.names:
            return ''
        names: List[str] = list(self.names)
        return f"{len(names)} unreadable images so far: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


class SteadyDataset(Dataset):
    """A data set whose augmentations follow from (seed, epoch, index, repeat), and that survives unreadable images.

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
        epoch, index, repeat = key if isinstance(key, tuple) else (None, key, 0)
        for left in reversed(range(min(len(self), self.errors.limit + 10))):
            if epoch is not None:
                seed_all(self.seed, epoch, index, repeat)
            try:
                return self.dataset[index]
            except _DECODING as e:
                reason = self._reason(index, e)
                if reason is None:
                    raise
                self.errors.report(self._name(index), reason, is_last=not left)
                index = (index + 1) % len(self)
        raise RuntimeError(f'No image before number {index} can be read.')

    def _reason(self, index: int, error: Exception) -> Optional[str]:
        """Return why an image cannot be read, None if it can and the error is another one's, such as a transform's."""
        is_reading = isinstance(error, _READING)
        if hasattr(self.dataset, 'reader'):  # timm tells that it failed, not why
            is_reading = 'consecutive samples' in str(error)
            try:
                Image.open(self.dataset.reader[index][0]).convert(self.dataset.input_img_mode)
            except _DECODING as e:
                is_reading, error = True, e
        if not is_reading:
            return None
        return ' '.join(str(error).split()) or type(error).__name__

    def _name(self, index: int) -> str:
        try:
            return self.dataset.filename(index, absolute=True) or f'number {index}'
        except (AttributeError, NotImplementedError):
            return f'number {index}'
