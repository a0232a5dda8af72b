"""Random numbers of augmentation follow from seed, epoch, image and repetition"""
import random

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, RandomSampler

from timm_rs.train.seeding import EpochSampler, SeededDataset, mix_seed, seed_all


class Draws(list):
    """Images that are random numbers, one of each generator."""

    def __getitem__(self, index):
        return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize('repeats', [1, 2, 2.5, 3])
@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_repeated_images_are_augmented_differently(repeats, world_size):
    """On all processes together; and from any batch on, as in the whole epoch."""
    images, seen = Draws(range(20)), []
    for rank in range(world_size):
        sampler = RepeatAugSampler(images, world_size, rank, num_repeats=repeats)
        order = EpochSampler(sampler, 42, batch_size=2)
        order.set_epoch(3)
        keys, dataset = list(order), SeededDataset(images, mix_seed(42, rank))
        sampler.set_epoch(3)
        assert [key[1] for key in keys] == list(sampler)
        seen += [dataset[key] for key in keys]
        order.set_epoch(3, 2)
        assert list(order) == keys[4:]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize('sampler', [
    RandomSampler(range(20)), DistributedSampler(range(19), 2, 1), RepeatAugSampler(range(20), 2, 1, num_repeats=1),
])
def test_images_that_are_not_repeated_are_augmented_as_ever(sampler):
    """Only from (seed, epoch, index), so that runs of earlier versions continue."""
    order, dataset = EpochSampler(sampler, 42, 4), SeededDataset(Draws(range(20)), mix_seed(42, 1))
    order.set_epoch(5)
    for key in order:
        found = dataset[key]
        seed_all(mix_seed(42, 1), 5, key[1])
        assert found == dataset.dataset[key[1]]


def test_seeds_stay():
    assert mix_seed(mix_seed(42, 1), 5, 17) == mix_seed(mix_seed(42, 1), 5, 17, 0) == 1954695764
    assert len({mix_seed(3, 5, 17, n) for n in range(1000)}) == 1000
