"""Flags of train_rs.py that are refused: those of timm that do not apply, and those that do not go together"""
import argparse
import logging
import math
from typing import Any, Mapping, Optional, Sequence, Tuple

from huggingface_hub.utils import validate_repo_id
from timm.loss import MULTI_LABEL_LOSS_TYPES

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError

from ..resolutions import check_resolutions

__all__ = ['REFUSED', 'Refuse', 'add_refused', 'check_flags', 'is_mixing', 'largest_size_conflict']

_logger = logging.getLogger('train')

# Flags of timm's train.py that are accepted only at the value that a run of timm has which does not use them, with the
# reason that the user is given.
REFUSED = {flag: (unused, why) for why, flags in {
    'NaFlex batches are token sequences; a BatchNorm network takes images of the sizes --resolutions': dict(
        naflex_loader=False, naflex_train_seq_lens=[128, 256, 576, 784, 1024], naflex_max_seq_len=576,
        naflex_patch_sizes=None, naflex_patch_size_probs=None, naflex_loss_scale='linear',
        naflex_patchify_channels_first=False),
    'every image is seen at all resolutions already; splits would need BNs private to both': dict(
        aug_splits=0, split_bn=False, resplit=False, jsd_loss=False),
    'the network switches at run time; script one resolution of the trained network, model.at(160)': dict(
        torchscript=False),
    'it goes with --torchscript; use --torchcompile': dict(fuser=''),
    'a teacher passes on its logits, by their divergence': dict(
        kd_distill_type='logit', kd_loss_type='kl', kd_student_feature_dim=None, kd_teacher_feature_dim=None,
        kd_token_distill_type='soft'),
    'the training sizes are --resolutions; --sizes-per-update and --small-steps choose those of an update': dict(
        train_img_sizes=None, train_size_probs=None, train_size_schedule='constant', train_size_schedule_spread=0.65,
        train_size_random_mix=0.1),
    'all resolutions train on the same images, see --batch-size': dict(
        train_batch_sizes=None, variable_batch_loss_scale='none'),
    'an epoch is all images once': dict(train_batches_per_epoch=None, train_steps_per_epoch=None),
}.items() for flag, unused in flags.items()}
_NOT_DECODED = dict(  # values that go with --decoded-cache, the one to give first
    color_jitter=(0.,), color_jitter_prob=(None, 0.), grayscale_prob=(None, 0.), gaussian_blur_prob=(None, 0.),
    aa=(None,), vflip=(0.,), no_aug=(False,), aug_repeats=(0,), train_crop_mode=('rrc', None),
    train_interpolation=('bilinear',))
_LENGTHS = dict(scale=(2,), ratio=(2,), cutmix_minmax=(2,), opt_betas=(2, 3))
_NUMBERS = {name: check for check, names in (
    (fields.number(1), (
        'epochs', 'num_classes', 'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist', 'stop_epoch',
        'decoded_cache_side', 'sizes_per_update', 'save_epochs', 'lr_base_size', 'lr_cycle_limit', 'recount')),
    (fields.number(0), (
        'recovery_interval', 'push_interval', 'start_epoch', 'decoded_cache_gb', 'mixup', 'cutmix', 'lr', 'lr_base',
        'min_lr', 'warmup_lr', 'lr_noise', 'lr_noise_pct', 'lr_noise_std', 'lr_cycle_decay', 'weight_decay', 'opt_eps',
        'task_loss_weight', 'distill_loss_weight', 'decay_milestones', 'warmup_epochs', 'cooldown_epochs',
        'patience_epochs', 'epoch_repeats', 'aug_repeats', 'color_jitter', 'mixup_off_epoch', 'loss_weight_power',
        'bce_pos_weight', 'asl_gamma_pos', 'asl_gamma_neg', 'poly_gamma', 'db_focal_gamma')),
    (fields.number(0, above=True), (
        'ratio', 'kd_temperature', 'clip_grad', 'lr_cycle_mul', 'lr_k_decay', 'lr_stable_timescale', 'decay_epochs',
        'decay_rate', 'loss_weight_max', 'twoway_tp', 'twoway_tn', 'db_neg_scale')),
    (fields.number(0, 1, above=True), ('layer_decay',)),
    (fields.number(0, 1), (
        'scale', 'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
        'mixup_switch_prob', 'drop', 'drop_connect', 'drop_path', 'drop_block', 'smoothing', 'model_ema_decay',
        'all_sizes_from', 'opt_betas', 'momentum', 'bn_momentum', 'layer_decay_min_scale', 'layer_decay_no_opt_scale',
        'loss_weight_beta', 'bce_target_thresh', 'asl_clip', 'poly_alpha', 'cutmix_minmax')),
) for name in names}


class Refuse(argparse.Action):
    """Ends the program, except at the value of a run that does not use the flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        unused, why = self.const
        if values != [str(v) for v in (unused if isinstance(unused, list) else [unused])]:
            parser.error(f'{option_string} is not supported: {why}.')


def add_refused(parser: argparse.ArgumentParser, refused: Mapping[str, Tuple[Any, str]]) -> None:
    """Let a parser accept flags only at the value that they have where they are not used.

    Args:
        parser: The parser.
        refused: That value and the reason, a part of a sentence, by flag.
    """
    for dest, const in refused.items():
        parser.add_argument(
            '--' + dest.replace('_', '-'), dest=dest, nargs='*', action=Refuse, const=const, help=argparse.SUPPRESS)


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the flags against each other and settle those that depend on others."""
    is_multi_label = args.task == 'multilabel'
    if args.smoothing is None:
        args.smoothing = 0. if is_multi_label else 0.1
    if args.eval_metric is None:
        args.eval_metric = 'map_mean' if is_multi_label else 'top1_mean'
    if not 0 < args.multilabel_threshold < 1:
        parser.error(f'--multilabel-threshold is {args.multilabel_threshold:g}, expected a number between 0 and 1.')
    if is_multi_label:
        wrong = [name for name in ('self_teacher', 'kd_model_name', 'decoded_cache') if getattr(args, name)]
        if wrong:
            parser.error(f"--{wrong[0].replace('_', '-')} is for one label per image, not for --task multilabel.")
    elif args.target_format == 'multihot':
        parser.error('--target-format multihot needs --task multilabel.')
    if args.data and args.data_dir and args.data != args.data_dir:
        parser.error(f'two data folders are given, {args.data} and --data-dir {args.data_dir}.')
    args.data_dir = args.data_dir or args.data
    if args.resolutions is not None:
        try:
            args.resolutions = list(check_resolutions(args.resolutions))
        except ValueError as e:
            parser.error(f'--resolutions: {e}')
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name.replace('_', '-')} is {value}, expected a finite number.")
    try:
        fields.check_numbers(args, **_NUMBERS)
    except UserError as e:
        parser.error(str(e))
    if args.stop_epoch is not None and args.stop_epoch > args.epochs:
        parser.error(f'--stop-epoch is {args.stop_epoch}, expected at most --epochs {args.epochs}.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        parser.error(f'--amp keeps the weights in float32, so it does not go with --model-dtype {args.model_dtype}.')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto needs --experiment, the name of the run to continue.')
    if args.memory == 'lean' and args.torchcompile:
        parser.error('--memory lean recomputes outside the compiled graph, so it does not go with --torchcompile.')
    if args.decoded_cache:
        given = {flag: f"--{flag.replace('_', '-')}" for flag in _NOT_DECODED}
        wrong = [flag for flag, allowed in _NOT_DECODED.items() if getattr(args, flag) not in allowed]
        if wrong:
            parser.error('--decoded-cache only crops, flips and resizes bilinearly, it does not go with ' + ', '.join(
                f'{given[flag]} {getattr(args, flag)} (give {_NOT_DECODED[flag][0]})' for flag in wrong) + '.')
    elif args.decoded_cache_side is not None:
        parser.error('--decoded-cache-side needs --decoded-cache.')
    if args.label_free and not (args.self_teacher or args.kd_model_name):
        parser.error('--label-free needs a teacher, --self-teacher or --kd-model-name.')
    if not 0 <= args.small_steps < 1:
        parser.error(f'--small-steps is {args.small_steps:g}, expected a share of the updates, from 0 to below 1.')
    if args.small_steps and args.sizes_per_update:
        parser.error('--small-steps does not go with --sizes-per-update.')
    if args.all_sizes_from is not None and not (args.small_steps or args.sizes_per_update):
        parser.error('--all-sizes-from needs --small-steps or --sizes-per-update, which it ends.')
    if args.private != 'both' and args.model_ema:
        parser.error(
            f'--private {args.private} does not go with --model-ema, which averages what is shared repeatedly.')
    for name, lengths in _LENGTHS.items():
        value = getattr(args, name)
        if value is not None and len(value) not in lengths:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {' or '.join(map(str, lengths))} numbers.")
    if is_mixing(args) and args.batch_size % 2:
        parser.error(f'--batch-size is {args.batch_size}, expected an even one: mixup and cutmix mix pairs of images.')
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as e:
            parser.error(f'--push-to-hub: {e}')
    elif args.push_interval or args.hub_private:
        parser.error('--push-interval and --hub-private need --push-to-hub, the repository to push to.')
    if args.drop_connect is not None:
        args.drop_path = args.drop_connect if args.drop_path is None else args.drop_path
    if args.bce_loss:
        if args.loss not in (None, 'bce'):
            parser.error(f'--bce-loss does not go with --loss {args.loss}.')
        args.loss = 'bce'
    if args.loss == 'jsd':
        parser.error(f"--loss jsd is not supported: {REFUSED['jsd_loss'][1]}.")
    if args.loss and is_multi_label and args.loss not in MULTI_LABEL_LOSS_TYPES:
        parser.error(f"--loss {args.loss} is for one label per image, expected {', '.join(MULTI_LABEL_LOSS_TYPES)}.")
    if args.loss == 'db' and not args.class_stats:
        parser.error('--loss db needs --class-stats.')
    if args.bce_pos_weight is not None:
        if args.loss_pos_weight not in (None, str(args.bce_pos_weight)):  # timm records both
            parser.error('--bce-pos-weight and --loss-pos-weight are the same, give one of them.')
        args.loss_pos_weight = str(args.bce_pos_weight)
    if not args.warmup_prefix and 0 < args.epochs <= args.warmup_epochs:
        _logger.warning(
            f'--epochs {args.epochs} is all warm-up: with --warmup-epochs {args.warmup_epochs} the learning rate does '
            'not reach its value.')


def is_mixing(args: argparse.Namespace) -> bool:
    """Return whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def largest_size_conflict(args: argparse.Namespace, resolutions: Sequence[int]) -> Optional[str]:
    """Return what is wrong with --img-size or --input-size, None if it is unset or the largest resolution."""
    expected = f'the training sizes are --resolutions, now {" ".join(map(str, resolutions))}.'
    if args.img_size and args.img_size != resolutions[0]:
        return f'--img-size {args.img_size}: {expected}'
    if args.input_size and set(args.input_size[1:]) != {resolutions[0]}:
        return f"--input-size {' '.join(map(str, args.input_size))}: {expected}"
    return None
