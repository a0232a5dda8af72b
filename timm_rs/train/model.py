"""From flags to the network that is trained"""
import argparse
import logging
from contextlib import nullcontext
from functools import partial
from typing import Any, Mapping, Optional

import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.models import is_model

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.preprocess import PREPROCESSING

from ..data.classes import explain_labels
from ..evaluate import ENSEMBLE, count_madds, create_evaluator
from ..load import load_weights, read_preprocessing, read_source
from ..models.rs_models import PREFIX, explain_unknown_model
from ..private_bn import tie_affine
from ..records import SOURCE_ARGUMENTS, find_checkpoint
from ..resolutions import check_resolutions
from ..switchable import classifiers
from .faults import name_flags
from .loaders import resolve_data_config
from .refused import largest_size_conflict

__all__ = ['build_model']

_logger = logging.getLogger('train')
_PLAIN = '{} is a plain network, expected a switchable one: an rs_* model, its weights by --initial-checkpoint.'


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
    refused = (SOURCE_ARGUMENTS | {'features_only'}) & args.model_kwargs.keys()
    if refused:
        raise UserError(f"--model-kwargs does not take {', '.join(sorted(refused))}.")
    name, kwargs = read_source(args.model, args.pretrained)
    if not name.startswith(PREFIX) or not is_model(name):
        raise UserError(_PLAIN.format(args.model) if kwargs else explain_unknown_model(name))
    overlay = {}
    for flag in ('initial_checkpoint', 'pretrained_path'):
        if getattr(args, flag):
            overlay.update(read_preprocessing(getattr(args, flag)))
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
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # a new classifier
    overlay.update(args.pretrained_cfg_overlay)
    if overlay:
        kwargs['pretrained_cfg_overlay'] = overlay
    given = [flag for flag in ('model_kwargs', 'pretrained_cfg_overlay', 'gp') if getattr(args, flag)]
    named = partial(name_flags, args, 'model', *given) if given else nullcontext
    with named():
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
    numbered, is_given = max(classes.values()) + 1 if classes else 0, args.num_classes is not None
    args.num_classes = model.num_classes
    if args.num_classes < numbered:
        raise UserError(
            f'--class-map {args.class_map} numbers {numbered} classes, the model has {args.num_classes}: give '
            '--num-classes.')
    if args.class_map and args.num_classes > numbered and not is_given:
        _logger.info(
            f'--class-map {args.class_map} numbers {numbered} classes, the model keeps its {args.num_classes}: for a '
            f'new classifier give --num-classes {numbered}.')
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
    with named():
        count_madds(model, args.resolutions[-1], args.in_chans)  # the smallest size must pass through the network
    _record_preprocessing(args, model)
    args.new_classifier = _has_new_classifier(args, model, classes)
    if args.head_init_scale is not None:
        for parameter in classifiers(model).parameters():
            parameter.data.mul_(args.head_init_scale)
    elif args.new_classifier:  # at random it would first disturb what is trained
        for layer in classifiers(model).modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == model.num_classes:
                for parameter in layer.parameters(recurse=False):
                    nn.init.zeros_(parameter)
    if args.head_init_bias is not None:
        biases = [p for name, p in classifiers(model).named_parameters() if name.endswith('bias')]
        if not biases:
            raise UserError(f'--head-init-bias {args.head_init_bias:g}: the classifier of {args.model} has no bias.')
        for bias in biases:
            nn.init.constant_(bias, args.head_init_bias)
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
    differ = explain_labels(classes, model.pretrained_cfg.get('label_names'))
    if differ and args.head_init_scale is not None:  # then the classifier is kept
        return False
    if differ:
        _logger.info(f'The weights are of other classes ({differ}), so the classifier is new.')
    return differ is not None


def _record_preprocessing(args: argparse.Namespace, model: nn.Module) -> None:
    """Set the flags where the preprocessing is not that of the model's name, for checkpoints, which record flags."""
    named, resolved = timm.get_pretrained_cfg(args.model), resolve_data_config(args, model)
    for name in PREPROCESSING:
        own, usual = (list(v) if isinstance(v, tuple) else v for v in (
            model.pretrained_cfg.get(name), getattr(named, name)))
        if own and own != usual:
            setattr(args, name, resolved[name])
