"""Randomness as a function of seed, epoch and position

Nothing random depends on what was drawn before: the order of an epoch follows from (seed, epoch), the augmentation of
an image from (seed, epoch, index, repeat), and what happens on the device from (seed, epoch, batch). So a run that is
resumed anywhere continues as if it had not been interrupted, without any generator state in its checkpoints.
"""
import random
from itertools import groupby, islice
from typing import Any, Iterator, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, RandomSampler, Sampler

__all__ = ['EpochSampler', 'SeededDataset', 'mix_seed', 'seed_all']


def mix_seed(*numbers: int) -> int:
    """Return a 32-bit seed that differs for different numbers, order included; a fourth number of 0 changes nothing.

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

    Gives (epoch, index, repeat) instead of the index, so that workers that live through many epochs know which epoch
    it is, and how often a sampler that repeats images one after the other (--aug-repeats) gave this image before.

    Args:
        sampler: timm's or torch's sampler of indices.
        seed: Seed of the run.
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


class SeededDataset(Dataset):
    """A data set whose augmentations follow from (seed, epoch, index, repeat), the keys of an EpochSampler.

    Args:
        dataset: Images with labels.
        seed: Seed of the run and the process.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int, int]) -> Tuple[Any, Any]:
        seed_all(self.seed, *key)
        return self.dataset[key[1]]
