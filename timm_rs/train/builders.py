"""From flags to the parts of a training run, all of them timm's except the model's resolutions"""
import argparse
import copy
import logging
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.model_config import resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss, resolve_class_weights
from timm.models import is_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils.distributed import init_distributed_device, world_info_from_env
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.unreadable import ReadErrors

from ..data.cache import CropLoader, DecodedLoader, Squash, open_decoded
from ..data.crop import random_boxes
from ..data.datasets import (
    PyramidNormalizer,
    choose_img_mode,
    count_classes,
    create_dataset,
    create_eval_loader,
    describe,
    encode_labels,
    explain_classes,
    imagenet_classes,
    number_classes,
    share_shards,
)
from ..data.readers import ReadableDataset, skip_unreadable
from ..evaluate import ENSEMBLE, count_madds, create_evaluator
from ..load import load_model, load_weights, read_source
from ..models.rs_models import PREFIX, explain_unknown_model
from ..private_bn import tie_affine
from ..records import find_checkpoint
from ..resolutions import check_resolutions
from ..switchable import SwitchableMixin
from .loss import EnsembleDistillationLoss
from .options import is_mixing, largest_size_conflict
from .pyramid import ResolutionPyramid
from .seeding import EpochSampler, SeededDataset, mix_seed
from .task import MultiResolutionTask
from .teacher import FixedTeachers

__all__ = [
    'Loaders',
    'build_datasets',
    'build_loaders',
    'build_model',
    'build_optimizer',
    'build_task',
    'name_flags',
    'select_device',
]

_logger = logging.getLogger('train')
_CLASS_STATS = fields.record(dict(
    pos_counts=fields.array(fields.number(0), 1, fields.MAX_CLASSES), num_samples=fields.integer(1, 10 ** 12),
), required=('pos_counts', 'num_samples'))
_PLAIN = '{} is a plain network, expected a switchable one: an rs_* model, its weights by --initial-checkpoint.'


@dataclass
class Loaders:
    """Batches of a run.

    Attributes:
        train: Gives (images [N, C, H, W] at the largest resolution, targets), augmented and normalized.
        eval: Gives (list of uint8 images per resolution, targets).
        normalize: Brings evaluation images to the device.
        mixup: Mixes a training batch in the loop; None if the loader does it, or nothing is mixed.
        erase: Erases parts of a training batch in the loop; None if nothing is erased there.
        order: Order of the training images, None if the data set has its own.
        errors: Images that could not be read.
        eval_samples: Images of this process that count in evaluation, None if unknown.
    """
    train: Any
    eval: Any
    normalize: Callable[[torch.Tensor], torch.Tensor]
    mixup: Optional[Mixup]
    erase: Optional[RandomErasing]
    order: Optional[EpochSampler]
    errors: ReadErrors
    eval_samples: Optional[int]


def select_device(args: argparse.Namespace) -> torch.device:
    """Set up the device and the process group; without a GPU the CPU is used."""
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        if world_info_from_env()[1] == 0:
            _logger.warning(f'No GPU for --device {args.device}, running on the CPU.')
        args.device = 'cpu'
    if args.sync_bn and args.device.startswith('cpu'):
        raise UserError('--sync-bn needs GPUs: synchronized BatchNorm does not run on a CPU.')
    device = name_flags(args, 'device')(init_distributed_device)(args)
    if args.model_dtype == 'bfloat16' and device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        _logger.warning('This CPU has no instructions for bfloat16: float32 is several times as fast.')
    if args.aug_repeats and not args.distributed:
        raise UserError('--aug-repeats needs distributed training, see distributed_train.sh.')
    return device


def build_model(
        args: argparse.Namespace,
        device: torch.device,
        classes: Optional[Mapping[Any, int]] = None,
) -> nn.Module:
    """Build the model and set args.resolutions, args.num_classes, args.in_chans and args.new_classifier accordingly.

    Args:
        args: The flags.
        device: Device of the model.
        classes: The index of each class of the data set by its name, if it records them.
    """
    name, kwargs = read_source(args.model, args.pretrained)
    if not name.startswith(PREFIX) or not is_model(name):
        raise UserError(_PLAIN.format(args.model) if kwargs else explain_unknown_model(name))
    for flag in ('initial_checkpoint', 'pretrained_path'):
        if getattr(args, flag):
            setattr(args, flag, find_checkpoint(getattr(args, flag)))
    if args.fast_norm:
        set_fast_norm()
    if args.in_chans is None:
        args.in_chans = args.input_size[0] if args.input_size else 3
    if ':' in args.model:  # the checkpoints record the network itself, and open nothing else
        own = {k: v for k, v in kwargs.items() if not k.startswith('pretrained') and k != 'resolutions'}
        args.model, args.model_kwargs = name, {**own, **args.model_kwargs}
    chosen = dict(
        resolutions=tuple(args.resolutions) if args.resolutions else None,
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        drop_rate=args.drop or None,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    kwargs = {**kwargs, **args.model_kwargs, **{k: v for k, v in chosen.items() if v is not None}}
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}  # a new classifier
    overlay.update(args.pretrained_cfg_overlay)
    if overlay:
        kwargs['pretrained_cfg_overlay'] = overlay
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained or bool(args.pretrained_path), **kwargs)
    except TypeError as e:
        _, unexpected, argument = str(e).partition('unexpected keyword argument ')
        if unexpected:  # such as --bn-momentum for the ResNets of timm
            raise UserError(f'{args.model} does not take the argument {argument}.') from e
        raise
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    args.resolutions = list(check_resolutions(model.resolutions))
    args.num_classes = model.num_classes
    metrics = create_evaluator(args.task).metric_names
    if args.eval_metric in metrics:
        args.eval_metric += '_mean'
    name, _, place = args.eval_metric.rpartition('_')
    if name not in metrics or place not in ('mean', ENSEMBLE, *map(str, args.resolutions)):
        raise UserError(
            f'--eval-metric {args.eval_metric!r}: expected one of {", ".join(metrics)}, followed by _mean, '
            f'_{ENSEMBLE} or a resolution such as _{args.resolutions[-1]}.')
    if (args.sizes_per_update or 1) > len(args.resolutions):
        raise UserError(
            f'--sizes-per-update {args.sizes_per_update}: expected at most the number of resolutions, '
            f'{len(args.resolutions)}.')
    conflict = largest_size_conflict(args, args.resolutions)
    if conflict:
        raise UserError(conflict)
    count_madds(model, args.resolutions[-1], args.in_chans)  # the smallest size must pass through the network
    args.new_classifier = _has_new_classifier(args, model, classes)
    if args.head_init_scale is not None:
        for parameter in model.get_classifier().parameters():
            parameter.data.mul_(args.head_init_scale)
    elif args.new_classifier:  # at random it would first disturb what is trained
        heads = model.get_classifier()
        for layer in nn.ModuleList(heads if isinstance(heads, (list, tuple)) else [heads]).modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == model.num_classes:
                for parameter in layer.parameters(recurse=False):
                    nn.init.zeros_(parameter)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        name_flags(args, 'grad_checkpointing')(model.set_grad_checkpointing)(True)
    if args.memory == 'lean':
        model.set_resolution_checkpointing(True)
    model.to(device=device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    if args.private != 'both':
        tie_affine(model, statistics=args.private == 'none')
    return model


def _has_new_classifier(args: argparse.Namespace, model: nn.Module, classes: Optional[Mapping[Any, int]]) -> bool:
    """Return whether the network has trained weights, but a classifier for other classes, by their names if known."""
    if args.initial_checkpoint or not (args.pretrained or args.pretrained_path):
        return False
    if model.pretrained_cfg['num_classes'] != model.num_classes:
        return True
    labels = model.pretrained_cfg.get('label_names') or ()
    if not classes or len(labels) != model.num_classes:
        return False
    wordnet = dict(zip(*imagenet_classes(1000)))

    def first_name(label: Any) -> str:
        return wordnet.get(label, str(label)).split(',')[0].replace('_', ' ').lower()

    differ = explain_classes(
        {first_name(name): i for name, i in classes.items()}, {first_name(name): i for i, name in enumerate(labels)})
    if differ:
        _logger.info(f'The weights are of other classes ({differ}), so the classifier is new.')
    return differ is not None


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
    numbers = [number_classes(d) for d in (eval_set, train_set)]
    differ = explain_classes(*numbers) if all(numbers) and not args.label_free else None
    if differ:
        raise UserError(
            f'Split {args.val_split!r} of {args.data_dir or args.dataset} has other classes than {args.train_split!r}: '
            f'{differ}. A --class-map could number them.')
    _logger.info(f'Training reads {describe(train_set)}, validation {describe(eval_set)}.')
    for split, dataset in ((args.train_split, train_set), (args.val_split, eval_set)):
        num_classes = count_classes(dataset)
        if num_classes is None or args.class_map or args.label_free and dataset is train_set:
            continue
        if args.num_classes is None:
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
    data_config = _data_config(args, model, verbose=args.rank == 0)
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
    train_loader = name_flags(args, 'aa', 'color_jitter', 'scale', 'ratio', 'mean', 'std')(create_loader)(
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
        samples.append([(os.path.abspath(name), target) for name, target in found])
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


def build_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> MultiResolutionTask:
    """Build the multi-resolution step around timm's criterion."""
    is_multi_label = args.task == 'multilabel'
    # As the criterion reduces over labels, so that distillation keeps its share of the loss.
    is_sum = args.bce_sum or args.loss == 'asl' and args.asl_reduction != 'mean'
    criterion = EnsembleDistillationLoss(
        args.distill, _create_criterion(args), args.loss_reduction,
        labels=('sum' if is_sum else 'mean') if is_multi_label else 'one')
    hflip = 0. if args.no_aug else args.hflip
    return MultiResolutionTask(
        model,
        criterion,
        ResolutionPyramid(args.resolutions, args.flip, hflip, args.resample, _train_interpolation(args, model)),
        _build_teachers(args, model, device),
        device=device,
        verbose=args.rank == 0,
    )


def _create_criterion(args: argparse.Namespace) -> nn.Module:
    """Return timm's criterion."""
    stats = None
    if args.class_stats:
        found = fields.read_json(args.class_stats, _CLASS_STATS)
        stats = found['pos_counts'], found['num_samples']
    options = {k: v for k, v in vars(args).items() if k.startswith(('asl_', 'poly_', 'twoway_', 'db_'))}
    if args.loss == 'db':
        options.update(class_counts=stats[0], num_samples=stats[1])
    with name_flags(
            args, 'loss', 'smoothing', 'class_stats', 'loss_pos_weight', 'loss_class_weight', 'bce_target_thresh'):
        for kind in ('pos_weight', 'class_weight'):
            options[kind] = resolve_class_weights(
                getattr(args, f'loss_{kind}'), kind, stats, args.loss_weight_power, args.loss_weight_beta,
                args.loss_weight_max)
        for weights in (options['pos_weight'], options['class_weight'], stats and stats[0]):
            if weights is not None and not isinstance(weights, float) and len(weights) != args.num_classes:
                raise ValueError(f'{len(weights)} values, expected one for each of {args.num_classes} classes')
        return create_classification_loss(
            args.loss,
            multi_label=args.task == 'multilabel',
            smoothing=args.smoothing,
            soft_targets=is_mixing(args) or args.label_free,
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            **options,
        )


def _build_teachers(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Optional[FixedTeachers]:
    """Build the fixed teachers, None if no flag asks for one; call it before the network is trained or resumed."""
    networks = []
    if args.self_teacher:
        if not (args.initial_checkpoint or args.pretrained) or args.new_classifier:
            raise UserError(
                f'--self-teacher needs trained weights with their classifier for {args.num_classes} classes: '
                '--initial-checkpoint, or --pretrained with the classes of the weights.')
        networks.append(copy.deepcopy(model.at(args.resolutions[0])))
    if args.kd_model_name:
        network = load_model(args.kd_model_name, use_ema=None, keep_plain=True).model.to(device)
        if network.num_classes != args.num_classes:
            raise UserError(
                f'--kd-model-name {args.kd_model_name} has {network.num_classes} classes, expected {args.num_classes}.')
        networks.append(network.at(network.resolutions[0]) if isinstance(network, SwitchableMixin) else network)
    if not networks:
        return None
    data_config = _data_config(args, model)
    return FixedTeachers(
        networks, data_config['mean'], data_config['std'], args.kd_temperature, args.task_loss_weight,
        args.distill_loss_weight, args.label_free)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Build timm's optimizer; without --lr the rate is computed from --lr-base and the images per update."""
    if args.lr is None:
        images = args.batch_size * args.world_size * args.grad_accum_steps
        scale = args.lr_base_scale
        if not scale:
            scale = 'sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear'
        ratio = images / args.lr_base_size
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr} for {images} images per update ({scale} scaling of {args.lr_base}).')
    create = name_flags(args, 'opt', 'opt_eps', 'opt_betas', 'opt_kwargs', 'layer_decay')(create_optimizer_v2)
    return create(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


@contextmanager
def name_flags(args: argparse.Namespace, *flags: str) -> Iterator[None]:
    """Name the flags that a function of timm or torch refuses, by an error of any class.

    Example:
        >>> name_flags(argparse.Namespace(device='gpu'), 'device')(torch.device)('gpu')
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: --device gpu: Expected one of cpu, ...
    """
    try:
        yield
    except UserError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as e:
        values = {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
        given = ' '.join(f'{flag} {value}' for flag, value in values.items() if value not in (None, {}))
        raise UserError(f'{given}: {one_line(e)}') from e


def _train_interpolation(args: argparse.Namespace, model: nn.Module) -> str:
    """Return how training images are resized; as in evaluation if it is drawn at random for each image."""
    names = [] if args.no_aug else [args.train_interpolation]
    names.append(_data_config(args, model)['interpolation'])
    return next((name for name in names if name in ResolutionPyramid.INTERPOLATIONS), 'bicubic')


def _data_config(args: argparse.Namespace, model: nn.Module, verbose: bool = False) -> Dict[str, Any]:
    """Return timm's data configuration of the model and the flags."""
    size = (args.in_chans, args.resolutions[0], args.resolutions[0])
    chosen = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    flags = dict(input_size=size, **{k: v for k, v in chosen.items() if v})
    return resolve_input_data_config(model, args=flags, verbose=verbose)
