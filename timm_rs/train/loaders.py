"""From flags to the images of a training run: timm's loaders, and those of decoded images"""
import argparse
import logging
import os
import signal
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.model_config import resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.unreadable import ReadErrors

from ..data.cache import CropLoader, DecodedLoader, Squash, open_decoded
from ..data.classes import (
    check_class_folders,
    check_labels,
    count_classes,
    drop_labels,
    encode_labels,
    explain_classes,
    number_classes,
)
from ..data.crop import random_boxes
from ..data.datasets import (
    PyramidNormalizer,
    choose_img_mode,
    create_dataset,
    create_eval_loader,
    describe,
    share_shards,
)
from ..data.readers import ReadableDataset, skip_unreadable
from .faults import name_flags
from .refused import is_mixing
from .seeding import EpochSampler, SeededDataset, mix_seed

__all__ = ['Loaders', 'build_datasets', 'build_loaders', 'resolve_data_config']

_logger = logging.getLogger('train')


@dataclass
class Loaders:
    """Batches of a run.

    Attributes:
        train: Gives (images [N, C, H, W] at the largest resolution, targets), augmented and normalized.
        eval: Gives (list of uint8 images per resolution, targets).
        normalize: Brings images to the device and normalizes those of evaluation.
        mixup: Mixes a training batch in the loop; None if the loader does it, or nothing is mixed.
        erase: Erases parts of a training batch in the loop; None if nothing is erased there.
        order: Order of the training images, None if the data set has its own.
        errors: Images that could not be read.
        eval_samples: Images of this process that count in evaluation, None if unknown.
    """
    train: Any
    eval: Any
    normalize: PyramidNormalizer
    mixup: Optional[Mixup]
    erase: Optional[RandomErasing]
    order: Optional[EpochSampler]
    errors: ReadErrors
    eval_samples: Optional[int]

    def begin_epoch(self, epoch: int, batch: int = 0) -> None:
        """Set the order and the augmentation of an epoch, from a batch on."""
        if self.order is not None:
            self.order.set_epoch(epoch, batch)
        elif hasattr(self.train.dataset, 'set_epoch'):
            self.train.dataset.set_epoch(epoch)
        elif hasattr(self.train.sampler, 'set_epoch'):
            self.train.sampler.set_epoch(epoch)

    def prepare(self, images: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Bring a training batch to the device, and do what the loader leaves to the loop."""
        mean = self.normalize.mean
        images, target = images.to(mean.device, dtype=mean.dtype), target.to(mean.device)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        if self.erase is not None:
            images = self.erase(images)
        return images.contiguous(memory_format=self.normalize.layout), target


def build_datasets(args: argparse.Namespace) -> Tuple[Dataset, Dataset]:
    """Open the training and validation split; without --num-classes their number of classes is taken."""
    common = dict(
        class_map=args.class_map,
        download=args.dataset_download,
        seed=args.seed,
        input_img_mode=choose_img_mode(args.in_chans or (args.input_size or (3,))[0], args.input_img_mode),
        input_key=args.input_key,
        target_key=args.target_key,
        target_format=args.target_format,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    train_set = create_dataset(
        args.dataset, args.data_dir, args.train_split, is_training=True, batch_size=args.batch_size,
        num_samples=args.train_num_samples, repeats=args.epoch_repeats, decode=args.decode, **common,
    )
    eval_set = create_dataset(
        args.dataset, args.data_dir, args.val_split, is_training=False,
        batch_size=args.validation_batch_size or args.batch_size, num_samples=args.val_num_samples, **common,
    )
    if args.dataset.lower().startswith('wds/'):
        for dataset, is_training in ((train_set, True), (eval_set, False)):
            share_shards(dataset, is_training, args.rank, args.world_size, args.workers)
    roots = [getattr(getattr(d, 'reader', None), 'root', None) for d in (train_set, eval_set)]
    if not args.dataset and roots[0] == roots[1]:
        raise UserError(
            f'{args.data_dir} gives the same images for training and validation, '
            f'expected the folders {args.train_split} and {args.val_split} in it.')
    for dataset in (eval_set,) if args.label_free else (train_set, eval_set):
        check_class_folders(dataset)
    numbers = [number_classes(d) for d in (eval_set, train_set)]
    differ = explain_classes(*numbers) if all(numbers) and not args.label_free else None
    if differ:
        raise UserError(
            f'Split {args.val_split!r} of {args.data_dir or args.dataset} has other classes than {args.train_split!r}: '
            f'{differ}. A --class-map could number them.')
    _logger.info(f'Training reads {describe(train_set)}, validation {describe(eval_set)}.')
    keeps_classifier = args.class_map and (args.pretrained or args.initial_checkpoint)
    for split, dataset in ((args.train_split, train_set), (args.val_split, eval_set)):
        num_classes = count_classes(dataset)
        if num_classes is None or args.label_free and dataset is train_set:
            continue
        if args.class_map and (args.num_classes or keeps_classifier):  # some of the classes
            continue
        if args.num_classes is None:
            if num_classes == 1:  # every answer would be right
                raise UserError(
                    f'{describe(dataset)}: there is only one class, expected a folder of images for each of several.')
            args.num_classes = num_classes
            _logger.info(f'{args.data_dir or args.dataset} has {num_classes} classes, so the model has as many.')
        elif args.num_classes != num_classes:
            raise UserError(
                f'Split {split!r} of {args.data_dir or args.dataset} has {num_classes} classes, '
                f'expected {args.num_classes} as the model.')
    if args.task == 'multilabel':
        if not args.num_classes:
            raise UserError(
                f'--task multilabel needs --num-classes: {args.data_dir or args.dataset} does not record the labels.')
        for dataset in (train_set, eval_set):
            encode_labels(dataset, args.num_classes, args.target_format)
    if args.label_free:
        drop_labels(train_set)
    if not isinstance(train_set, IterableDataset) and -(-len(train_set) // args.world_size) < args.batch_size:
        share = f' of {args.world_size} processes' if args.distributed else ''
        raise UserError(
            f'--batch-size {args.batch_size}{share}: expected at most the {len(train_set)} training images.')
    return train_set, eval_set


def build_loaders(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        train_set: Dataset,
        eval_set: Dataset,
) -> Loaders:
    """Build loaders for training as timm's train.py does, and one for evaluation at all resolutions in one pass."""
    data_config = resolve_data_config(args, model, verbose=args.rank == 0)
    mixup = collate = None
    prefetcher = not args.no_prefetcher and not args.decoded_cache
    if is_mixing(args):
        mixup_kwargs = dict(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=args.num_classes, multi_label=args.task == 'multilabel',
        )
        if prefetcher:
            collate = FastCollateMixup(**mixup_kwargs)
        else:
            mixup = Mixup(**mixup_kwargs)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
    erase = None
    on_device = args.decoded_cache or prefetcher
    if args.reprob > 0 and on_device and not args.no_aug:  # not in the prefetcher, which runs a batch ahead
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    errors = ReadErrors(args.max_unreadable, 'another one stands in for it in training, it is left out of validation')
    for dataset in (train_set, eval_set):
        check_labels(dataset, args.num_classes)
    train_set = skip_unreadable(train_set, errors, stand_in=True)
    eval_set = skip_unreadable(eval_set, errors, stand_in=False)
    normalize = PyramidNormalizer(data_config['mean'], data_config['std'], device, dtype, args.channels_last)
    eval_samples = None
    if args.distributed and not isinstance(eval_set, IterableDataset):  # a stream gives each its own, unpadded
        eval_samples = len(range(args.rank, len(eval_set), args.world_size))
    if args.decoded_cache:
        train_loader, eval_loader = _decoded_loaders(args, train_set, eval_set, data_config, errors, normalize)
        return Loaders(
            train_loader, eval_loader, normalize, mixup, erase, train_loader.order, errors, eval_samples)
    if not isinstance(train_set, IterableDataset):
        train_set = SeededDataset(train_set, mix_seed(args.seed, args.rank))
    train_loader = name_flags(args, 'aa', 'color_jitter')(create_loader)(
        train_set,
        input_size=(args.in_chans, args.resolutions[0], args.resolutions[0]),
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=0. if erase is not None else args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=0. if args.flip == 'independent' else args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        img_dtype=dtype,
        device=device,
        use_prefetcher=prefetcher,
        # New workers read a stream as a resumed run does, and learn that mixing has ended.
        persistent_workers=(
            args.persistent_workers and not isinstance(train_set, IterableDataset) and not args.mixup_off_epoch),
        worker_seeding=args.worker_seeding,
    )
    if args.aug_repeats and args.batch_size > len(train_loader.sampler):
        raise UserError(
            f'--batch-size {args.batch_size} of {args.world_size} processes: expected at most the '
            f'{len(train_loader.sampler)} images that each takes per epoch with --aug-repeats {args.aug_repeats:g}.')
    order = None
    if not isinstance(train_set, IterableDataset):
        batch_sampler = train_loader.batch_sampler
        order = batch_sampler.sampler = EpochSampler(batch_sampler.sampler, args.seed, args.batch_size)
    eval_loader = create_eval_loader(
        eval_set, args.resolutions, args.validation_batch_size or args.batch_size, data_config, args.workers,
        args.distributed, args.pin_mem,
    )
    for loader in (train_loader, eval_loader):
        loader = getattr(loader, 'loader', loader)  # in the prefetcher
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
    return Loaders(train_loader, eval_loader, normalize, mixup, erase, order, errors, eval_samples)


def _decoded_loaders(
        args: argparse.Namespace,
        train_set: ReadableDataset,
        eval_set: ReadableDataset,
        data_config: Dict[str, Any],
        errors: ReadErrors,
        normalize: PyramidNormalizer,
) -> Tuple[CropLoader, DecodedLoader]:
    """Open the decoded images of both splits, or decode them."""
    samples = []
    for dataset in (train_set, eval_set):
        found = getattr(getattr(dataset.dataset, 'reader', dataset.dataset), 'samples', None)
        if not found or not isinstance(found[0][0], str):
            raise UserError('--decoded-cache needs a folder of images, with a folder per class.')
        unlabeled = args.label_free and dataset is train_set  # and the cache is another one
        samples.append([(os.path.abspath(name), 0 if unlabeled else target) for name, target in found])
    largest = args.resolutions[0]
    side = args.decoded_cache_side or 2 * largest
    if side < largest:
        raise UserError(f'--decoded-cache-side is {side}, expected at least the largest of --resolutions, {largest}.')
    mode = dict(mode=train_set.dataset.input_img_mode)

    def decode(title, samples, shapes, settings, batches):
        return open_decoded(
            args.decoded_cache, title, samples, shapes, dict(mode, **settings), batches, errors, args.decoded_cache_gb)

    train_set.transform = Squash(side)
    train = decode(
        'train', samples[0], [((args.in_chans, side, side), 'uint8'), ((), 'float32')], dict(decode=args.decode),
        DataLoader(train_set, batch_size=64, num_workers=args.workers))
    eval_loader = create_eval_loader(eval_set, args.resolutions, 64, data_config, args.workers)
    evaluation = decode(
        'validation', samples[1], [((args.in_chans, r, r), 'uint8') for r in args.resolutions], data_config,
        eval_loader)
    sampler = DistributedSampler(train_set) if args.distributed else RandomSampler(train_set)
    train_loader = CropLoader(
        train, EpochSampler(sampler, args.seed, args.batch_size), args.batch_size, largest, normalize,
        partial(
            random_boxes, scale=args.scale, ratio=args.ratio, hflip=0. if args.flip == 'independent' else args.hflip),
        partial(mix_seed, args.seed))
    return train_loader, DecodedLoader(
        evaluation, args.validation_batch_size or args.batch_size, args.rank, args.world_size)


def _init_worker(init: Callable[[int], None], worker_id: int) -> None:
    """Survive the SIGTERM that a launcher or scheduler sends to all processes: training continues to a safe point."""
    init(worker_id)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Obey only a SIGTERM of the process that trains."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def resolve_data_config(args: argparse.Namespace, model: nn.Module, verbose: bool = False) -> Dict[str, Any]:
    """Return timm's data configuration of the model and the flags."""
    size = (args.in_chans, args.resolutions[0], args.resolutions[0])
    chosen = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    flags = dict(input_size=size, **{k: v for k, v in chosen.items() if v})
    return name_flags(args, 'mean', 'std')(resolve_input_data_config)(model, args=flags, verbose=verbose)
