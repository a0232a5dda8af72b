"""From flags to the device, the step and the optimizer of a training run, all timm's except the several sizes"""
import argparse
import copy
import logging
from typing import Any, Mapping, Optional

import torch
import torch.nn as nn
from timm.loss import create_classification_loss, resolve_class_weights
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils.distributed import init_distributed_device, world_info_from_env

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError

from ..data.classes import explain_labels
from ..load import load_model
from ..records import labels_beside, read_label_names
from ..resolutions import nearest_resolution
from ..switchable import SwitchableMixin
from .faults import name_flags, open_device
from .loaders import resolve_data_config
from .loss import EnsembleDistillationLoss
from .pyramid import ResolutionPyramid
from .refused import is_mixing
from .task import MultiResolutionTask
from .teacher import FixedTeachers

__all__ = ['build_optimizer', 'build_task', 'select_device']

_logger = logging.getLogger('train')
_CLASS_STATS = fields.record(dict(
    pos_counts=fields.array(fields.number(0), 1, fields.MAX_CLASSES), num_samples=fields.integer(1, 10 ** 12),
), required=('pos_counts', 'num_samples'))


def select_device(args: argparse.Namespace) -> torch.device:
    """Set up the device and the process group; without a GPU the CPU is used."""
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        if world_info_from_env()[1] == 0:
            _logger.warning(f'No GPU for --device {args.device}, running on the CPU.')
        args.device = 'cpu'
    if args.sync_bn and args.device.startswith('cpu'):
        raise UserError('--sync-bn needs GPUs: synchronized BatchNorm does not run on a CPU.')
    device = name_flags(args, 'device')(init_distributed_device)(args)
    open_device(args)
    if args.model_dtype == 'bfloat16' and device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        _logger.warning('This CPU has no instructions for bfloat16: float32 is several times as fast.')
    if args.aug_repeats and not args.distributed:
        raise UserError('--aug-repeats needs distributed training, see distributed_train.sh.')
    return device


def build_task(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        classes: Optional[Mapping[Any, int]] = None,
) -> MultiResolutionTask:
    """Build the multi-resolution step around timm's criterion; classes are as for build_model."""
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
        _build_teachers(args, model, device, classes),
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
            args, 'loss', 'smoothing', 'class_stats', 'loss_pos_weight', 'loss_class_weight', 'bce_target_thresh',
            'label_free'):
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


def _build_teachers(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        classes: Optional[Mapping[Any, int]],
) -> Optional[FixedTeachers]:
    """Build the fixed teachers, None if no flag asks for one; call it before the network is trained or resumed."""
    networks = []
    if args.self_teacher:
        if not (args.initial_checkpoint or args.pretrained) or args.new_classifier:
            raise UserError(
                f'--self-teacher needs trained weights with their classifier for {args.num_classes} classes: '
                '--initial-checkpoint, or --pretrained with the classes of the weights.')
        networks.append(copy.deepcopy(model.at(args.resolutions[0])))
        _compare_classes('--self-teacher', classes, args.initial_checkpoint, model)
    if args.kd_model_name:
        loaded = load_model(args.kd_model_name, use_ema=None, keep_plain=True)
        network = loaded.model.to(device)
        if network.num_classes != args.num_classes:
            raise UserError(
                f'--kd-model-name {args.kd_model_name} has {network.num_classes} classes, expected {args.num_classes}.')
        if getattr(network, 'multilabel_threshold', None) is not None:
            raise UserError(f'--kd-model-name {args.kd_model_name} was trained with several labels per image.')
        if isinstance(network, SwitchableMixin):
            network = network.at(nearest_resolution(args.resolutions[0], args.resolutions[0], network.resolutions))
        networks.append(network)
        _compare_classes(f'--kd-model-name {args.kd_model_name}', classes, loaded.source, network)
    if not networks:
        return None
    data_config = resolve_data_config(args, model)
    teachers = FixedTeachers(
        networks, data_config['mean'], data_config['std'], args.kd_temperature, args.task_loss_weight,
        args.distill_loss_weight, args.label_free)
    with name_flags(args, 'kd_model_name'):  # it may take images of other sizes or channels only
        teachers(torch.zeros(1, *data_config['input_size'], device=device))
    return teachers


def _compare_classes(flag: str, classes: Optional[Mapping[Any, int]], source: str, network: nn.Module) -> None:
    """Warn if a teacher has as many classes as the data set, but others or in another order."""
    path = labels_beside(source)
    labels = read_label_names(path) if path else network.pretrained_cfg.get('label_names')
    differ = explain_labels(classes, labels)
    if differ:
        _logger.warning(f'{flag} teaches other classes than those of the data set: {differ}.')


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


def _train_interpolation(args: argparse.Namespace, model: nn.Module) -> str:
    """Return how training images are resized; as in evaluation if it is drawn at random for each image."""
    names = [] if args.no_aug else [args.train_interpolation]
    names.append(resolve_data_config(args, model)['interpolation'])
    return next((name for name in names if name in ResolutionPyramid.INTERPOLATIONS), 'bicubic')
