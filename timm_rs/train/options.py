"""Command line of train_rs.py: timm's flags, same names and defaults, and those of multi-resolution training"""
import argparse
import logging
import math
from typing import Any, Dict, Mapping, Optional, Sequence

from timm.loss import LOSS_TYPES
from timm.models import is_model
from timm.utils.distributed import world_info_from_env

from timm_rs_runtime import fields
from timm_rs_runtime.errors import KeyValues, OneLineParser, UserError, did_you_mean
from timm_rs_runtime.preprocess import MARGINS
from timm_rs_runtime.unreadable import MAX_UNREADABLE

from ..data.datasets import INTERPOLATIONS
from ..evaluate import TASKS
from ..models.rs_models import PREFIX
from ..records import check_model_args, read_yaml
from .loss import EnsembleDistillationLoss
from .pyramid import ResolutionPyramid
from .refused import REFUSED, Refuse, add_refused, check_flags

__all__ = ['WARM_START', 'create_parser', 'is_warm_start', 'parse_args']

_logger = logging.getLogger('train')

# Defaults of a run that starts from trained weights, measured in docs/findings.md.
WARM_START = dict(
    opt='adamw', lr_base=3e-4, lr_base_size=64, epochs=10, warmup_epochs=0, sched_on_updates=True,
    loss_reduction='mean', bn_statistics='auto', scale=[0.35, 1.0])

def create_parser() -> argparse.ArgumentParser:
    """Return the parser; every flag that it accepts is read by train_rs.py."""
    parser = OneLineParser(
        quiet=world_info_from_env()[0] > 0,
        usage='%(prog)s DIR --model rs_resnet18 [--resolutions 224 192 ...] [options]',
        description='Train a Resolution Switchable Network: one set of weights for several input sizes.',
        epilog="All other flags are those of timm's train.py.",
    )
    add = parser.add_argument
    add('data', nargs='?', metavar='DIR', help='folder of the data set, same as --data-dir')
    add('-c', '--config', default='', metavar='FILE', help='YAML file of defaults for these flags')

    add = parser.add_argument_group('Resolutions').add_argument
    add('--resolutions', type=int, nargs='+', default=None, metavar='N',
        help="input sizes in pixels that get their own BatchNorm (default: the model's, 224 192 160 128 96)")
    add('--distill', default='ens_topdown', choices=EnsembleDistillationLoss.MODES,
        help='teachers of a resolution: none, the ensemble, or the ensemble and all larger ones (default)')
    add('--loss-reduction', default='sum', choices=EnsembleDistillationLoss.REDUCTIONS,
        help='sum the losses of all resolutions, as the paper does (default), or take the mean (default from trained '
             'weights), which needs the learning rate and weight decay of a network of one size')
    add('--small-steps', type=float, default=0., metavar='P',
        help='share of the updates that train only the smaller half of the resolutions, which costs little and lets '
             'these train for more epochs (default: 0)')
    add('--sizes-per-update', type=int, default=None, metavar='N',
        help='number of resolutions, drawn at random, that each update trains (default: all)')
    add('--all-sizes-from', type=float, default=None, metavar='P',
        help='share of the epochs after which --small-steps or --sizes-per-update ends: each later update trains all '
             'resolutions (default: it does not end)')
    add('--private', default='both', choices=('both', 'statistics', 'none'),
        help='what of a BatchNorm is private to a resolution: both halves (default); only the running statistics, '
             'while all resolutions train one weight and bias; or nothing')
    add('--bn-statistics', default='batch', choices=('batch', 'running', 'auto'),
        help='what normalizes in training: the statistics of the batch (default), or the running ones, which then stay '
             'as they are; auto: the running ones if the network does not bear those of the batch (default from '
             'trained weights)')
    add('--flip', default='shared', choices=ResolutionPyramid.FLIPS,
        help='flip an image once for all resolutions (default) or decide again for each')
    add('--resample', default='matched', choices=ResolutionPyramid.RESAMPLES,
        help='make the smaller images as sharp as those of evaluation (default), or by plain antialiased interpolation')
    add('--memory', default='default', choices=('default', 'lean'),
        help='lean: hold the activations of one resolution at a time, for one more forward pass')

    add = parser.add_argument_group('Fixed teachers').add_argument
    add('--self-teacher', action='store_true',
        help='let the network as it is at the start, at its largest size, teach all sizes; not with a new classifier')
    add('--kd-model-name', default=None, metavar='NAME',
        help='let a trained network teach all sizes: a run folder, a checkpoint, or a name of timm such as '
             'hf-hub:user/name; with --self-teacher their mean does')
    add('--kd-temperature', type=float, default=4.0, metavar='T', help='temperature of the teachers (default: 4)')
    add('--task-loss-weight', type=float, default=None, metavar='W', help='weight of all other losses (default: 1)')
    add('--distill-loss-weight', type=float, default=None, metavar='W',
        help='weight of the loss of the teachers (default: 1, or 1 - task loss weight if that is given)')
    add('--label-free', action='store_true', help='train on the answers of the teachers instead of labels')

    add = parser.add_argument_group('Data set').add_argument
    add('--task', default='classification', choices=TASKS,
        help='one label per image (classification, default), or several independent ones (multilabel)')
    add('--target-format', default=None, choices=('indices', 'multihot'),
        help='labels of --task multilabel: a list of class indices (default), or a vector of one value per class')
    add('--data-dir', metavar='DIR', help='folder of the data set')
    add('--dataset', default='', metavar='NAME',
        help='kind of data set: "" for a folder or tar of class folders, "digits" for the bundled digits, '
             'or <type>/<name> with a type of timm (torch, hfds, hfids, tfds, wds)')
    add('--train-split', default='train', metavar='NAME', help='split to train on')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on')
    add('--train-num-samples', default=None, type=int, metavar='N', help='images in an iterable train split')
    add('--val-num-samples', default=None, type=int, metavar='N', help='images in an iterable validation split')
    add('--dataset-download', action='store_true', help='let data sets that can be downloaded do so')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', default=None, help='PIL mode of the images (default: RGB, or L for 1 channel)')
    add('--input-key', default=None, help='key of the image in a sample')
    add('--target-key', default=None, help='key of the label in a sample')
    add('--dataset-trust-remote-code', action='store_true', help='let a HF data set run its own code')

    add('--decode', default='exact', choices=tuple(MARGINS),
        help='how training images are decoded: all of their pixels (default), or a JPEG at the smallest scale at which '
             'its crop still has twice the width and height of the largest of --resolutions (scaled), or 1.25 times '
             '(fast)')
    add('--decoded-cache', default='', metavar='DIR',
        help='decode the images of a folder once and keep them here; training crops and flips them on the device')
    add('--decoded-cache-side', type=int, default=None, metavar='N',
        help='keep training images as squares of this size (default: twice the largest of --resolutions)')
    add('--decoded-cache-gb', type=float, default=32., metavar='GB', help='size that the cache may have (default: 32)')

    add = parser.add_argument_group('Model').add_argument
    add('--model', default='rs_resnet50', metavar='MODEL', help='name of an rs_* model (default: rs_resnet50)')
    add('--pretrained', action='store_true', help="start from the model's pretrained weights")
    add('--pretrained-path', default=None, metavar='PATH',
        help='start from this checkpoint, plain or switchable, as if it were the pretrained weights; new classifier')
    add('--initial-checkpoint', default='', metavar='PATH', help='load this checkpoint, plain or switchable, strictly')
    add('--resume', default='', metavar='PATH',
        help='continue from this checkpoint; "auto" from the last one in the output folder, if any')
    add('--no-resume-opt', action='store_true', help='do not resume the state of the optimizer')
    add('--num-classes', type=int, default=None, metavar='N', help='number of classes (default: of the data or model)')
    add('--gp', default=None, metavar='POOL', help='global pool: fast, avg, max, avgmax or catavgmax')
    add('--img-size', type=int, default=None, metavar='N', help='only the largest of --resolutions is accepted')
    add('--in-chans', type=int, default=None, metavar='N', help='image channels (default: 3)')
    add('--input-size', type=int, nargs=3, default=None, metavar='N',
        help='channels, height and width; only the largest of --resolutions is accepted')
    add('--crop-pct', type=float, default=None, metavar='PCT', help='share of the image that validation crops')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='pixel mean for normalization')
    add('--std', type=float, nargs='+', default=None, metavar='STD', help='pixel standard deviation for normalization')
    add('--interpolation', default='', choices=('', *INTERPOLATIONS), metavar='NAME',
        help='interpolation of validation images')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images per process and step (default: 128)')
    add('-vb', '--validation-batch-size', type=int, default=None, metavar='N', help='images per validation batch')
    add('--channels-last', action='store_true', help='channels_last memory layout')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches whose gradients make one update')
    add('--grad-checkpointing', action='store_true', help='recompute activations instead of keeping them')
    add('--fast-norm', action='store_true', help="timm's fast norm layers")
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, help='further model arguments as key=value')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=KeyValues,
        help="changes of the model's pretrained_cfg as key=value")
    add('--new-classifier-init', default='fitted', choices=('fitted', 'zero'),
        help='begin a new classifier for other classes than those of the weights as it suits the features of the first '
             '5000 training images (default), or at zero; without --head-init-scale')
    add('--head-init-scale', type=float, default=None, help='scale of the initial classifier')
    add('--head-init-bias', type=float, default=None, help='initial bias of the classifier')
    add('--torchcompile', nargs='?', default=None, const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', default=None, help='mode of torch.compile')

    add = parser.add_argument_group('Device').add_argument
    add('--device', default='cuda', help='device to run on; without a GPU the CPU is used (default: cuda)')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default=None, choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)')
    add('--model-dtype', default=None, choices=('float32', 'float16', 'bfloat16'), help='dtype of the weights')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers at each step')
    add('--synchronize-step', action='store_true', help='wait for the GPU at the end of each step')
    add('--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--device-modules', nargs='+', default=None, help='Python modules to import for a device backend')

    add = parser.add_argument_group('Optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME', help='optimizer of timm (default: sgd; adamw from trained weights)')
    add('--opt-eps', type=float, default=None, metavar='EPS', help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs='+', default=None, metavar='BETA', help='betas of the optimizer')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum (default: 0.9)')
    add('--weight-decay', type=float, default=2e-5, metavar='W',
        help='weight decay (default: 2e-5), except of BatchNorm, biases and ensemble weights')
    add('--clip-grad', type=float, default=None, metavar='NORM', help='clip gradients (default: no)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what is clipped')
    add('--layer-decay', type=float, default=None, help='layer-wise decay of the learning rate')
    add('--layer-decay-min-scale', type=float, default=0., help='lower bound of the layer-wise scale')
    add('--layer-decay-no-opt-scale', type=float, default=None, help='layer-wise scale under which layers are frozen')
    add('--opt-kwargs', nargs='*', default={}, action=KeyValues, help='further optimizer arguments as key=value')

    add = parser.add_argument_group('Learning rate').add_argument
    add('--sched', default='cosine', metavar='NAME', help='schedule of timm (default: cosine)')
    add('--sched-on-updates', action='store_true',
        help='step the schedule at every update (default from trained weights) instead of every epoch')
    add('--lr', type=float, default=None, metavar='LR', help='learning rate (default: from --lr-base)')
    add('--lr-base', type=float, default=0.1, metavar='LR',
        help='learning rate for --lr-base-size images (default: 0.1 for 256; from trained weights 3e-4 for 64)')
    add('--lr-base-size', type=int, default=256, metavar='N', help='images per update that --lr-base is for')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
        help='how the rate grows with the batch (default: sqrt for adaptive optimizers, else linear)')
    add('--lr-noise', type=float, nargs='+', default=None, metavar='PCT', help='where noise is put on the rate')
    add('--lr-noise-pct', type=float, default=0.67, help='bound of the noise')
    add('--lr-noise-std', type=float, default=1.0, help='standard deviation of the noise')
    add('--lr-cycle-mul', type=float, default=1.0, help='growth of the cycle length')
    add('--lr-cycle-decay', type=float, default=0.5, help='decay of the rate per cycle')
    add('--lr-cycle-limit', type=int, default=1, help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    add('--lr-decay-fn', default=None, help='shape of the decay phase of wsd and rsqrt')
    add('--lr-stable-timescale', type=float, default=None, help='time scale of rsqrt in epochs')
    add('--warmup-lr', type=float, default=1e-5, help='learning rate that the warm-up begins with')
    add('--min-lr', type=float, default=0., help='lowest learning rate')
    add('--epochs', type=int, default=300, metavar='N', help='epochs to train (default: 300; 10 from trained weights)')
    add('--epoch-repeats', type=float, default=0., help='repeats of an iterable data set per epoch')
    add('--start-epoch', type=int, default=None, metavar='N', help='epoch to start from, overrides the checkpoint')
    add('--stop-epoch', type=int, default=None, metavar='N', help='stop after N epochs, the schedule unchanged')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, help='epochs between decays of step')
    add('--warmup-epochs', type=int, default=5, help='epochs of warm-up (default: 5; 0 from trained weights)')
    add('--warmup-prefix', action='store_true', help='do not count the warm-up in the schedule')
    add('--cooldown-epochs', type=int, default=0, help='epochs at the lowest rate at the end')
    add('--patience-epochs', type=int, default=10, help='patience of plateau')
    add('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')

    add = parser.add_argument_group('Augmentation and regularization').add_argument
    add('--no-aug', action='store_true', help='no training augmentation at all')
    add('--train-crop-mode', default=None, choices=('rrc', 'rkrc', 'rkrr'), help='crop of training images')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], help='area of the random crop')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], help='aspect ratio of the random crop')
    add('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, help='strength of the color jitter')
    add('--color-jitter-prob', type=float, default=None, help='probability of the color jitter')
    add('--grayscale-prob', type=float, default=None, help='probability of a greyscale image')
    add('--gaussian-blur-prob', type=float, default=None, help='probability of a blur')
    add('--aa', default=None, metavar='NAME', help='auto augmentation policy, e.g. rand-m9-mstd0.5')
    add('--aug-repeats', type=float, default=0, help='repeated augmentations of an image (distributed only)')
    add('--loss', default=None, choices=LOSS_TYPES,
        help='base criterion (default: ce, cross entropy; bce, binary cross entropy, for --task multilabel, which only '
             'twoway, zlpr and db are for)')
    add('--class-stats', default=None, metavar='FILE',
        help="JSON of class counts, as timm's class_weights.py writes it, for weights by name and --loss db")
    add('--loss-pos-weight', default=None, metavar='WEIGHTS',
        help='weight of positive targets in bce and multi-label asl: neg_pos, a number, numbers with commas, or a file')
    add('--loss-class-weight', default=None, metavar='WEIGHTS',
        help='weight of a class in bce and multi-label asl: inv_freq, effective_num, numbers with commas, or a file')
    add('--loss-weight-power', type=float, default=1., help='exponent of neg_pos and inv_freq')
    add('--loss-weight-beta', type=float, default=0.999, help='beta of effective_num')
    add('--loss-weight-max', type=float, default=None, help='largest weight that is computed')
    add('--bce-loss', action='store_true', help='same as --loss bce')
    add('--bce-sum', action='store_true', help='sum BCE over classes')
    add('--bce-target-thresh', type=float, default=None, help='threshold that makes soft BCE targets hard')
    add('--bce-pos-weight', type=float, default=None, help='same as --loss-pos-weight')
    add('--asl-gamma-pos', type=float, default=1., help='focus of asl on positive targets')
    add('--asl-gamma-neg', type=float, default=4., help='focus of asl on negative targets')
    add('--asl-clip', type=float, default=0.05, help='margin of negative probabilities of multi-label asl')
    add('--asl-reduction', default='batchmean', choices=('batchmean', 'sum', 'mean'),
        help='multi-label asl: sum over classes and mean over images (default), sum, or mean')
    add('--poly-epsilon', type=float, default=2., help='coefficient of poly')
    add('--poly-gamma', type=float, default=0., help='focus of multi-label poly')
    add('--poly-alpha', type=float, default=None, help='weight of positive targets of multi-label poly')
    add('--twoway-tp', type=float, default=4., help='temperature of positive logits of twoway')
    add('--twoway-tn', type=float, default=1., help='temperature of negative logits of twoway')
    add('--db-neg-scale', type=float, default=2., help='scale of negative logits of db')
    add('--db-init-bias', type=float, default=0.05, help='shift of logits by class frequency of db')
    add('--db-focal-gamma', type=float, default=2., help='focus of db')
    add('--reprob', type=float, default=0., help='probability of random erasing')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='fill of random erasing')
    add('--recount', type=int, default=1, help='erased regions')
    add('--mixup', type=float, default=0., help='alpha of mixup')
    add('--cutmix', type=float, default=0., help='alpha of cutmix')
    add('--cutmix-minmax', type=float, nargs='+', default=None, help='share of cutmix, instead of its alpha')
    add('--mixup-prob', type=float, default=1., help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix if both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares a mixing ratio')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on')
    add('--smoothing', type=float, default=None, help='label smoothing (default: 0.1, multi-label 0)')
    add('--train-interpolation', default='random', choices=(*INTERPOLATIONS, 'random'),
        help='interpolation of training images')
    add('--drop', type=float, default=0., help='dropout rate')
    add('--drop-connect', type=float, default=None, help='old name of --drop-path')
    add('--drop-path', type=float, default=None, help='stochastic depth rate')
    add('--drop-block', type=float, default=None, help='drop block rate')

    add = parser.add_argument_group('Batch normalization').add_argument
    add('--bn-momentum', type=float, default=None, help='momentum of the running statistics')
    add('--bn-eps', type=float, default=None, help='epsilon of BatchNorm')
    add('--sync-bn', action='store_true', help='synchronize BatchNorm over processes (GPU only)')
    add('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''),
        help='make running statistics equal on all processes after an epoch')

    add = parser.add_argument_group('Moving average').add_argument
    add('--model-ema', action='store_true', help='track a moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU of rank 0, without validation')
    add('--model-ema-decay', type=float, default=0.9998, help='its decay')
    add('--model-ema-warmup', action='store_true', help='let the decay warm up')

    add = parser.add_argument_group('Miscellaneous').add_argument
    add('--seed', type=int, default=42, help='random seed (default: 42)')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='seeding of loader workers')
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='best checkpoints to keep')
    add('--save-epochs', type=int, nargs='+', default=None, metavar='N', help='epochs to keep a milestone of')
    add('-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    add('--max-unreadable', type=int, default=MAX_UNREADABLE, metavar='N',
        help='end with an error beyond N unreadable images')
    add('--save-images', action='store_true', help='save a batch of training images at every log line')
    add('--pin-mem', action='store_true', help='pin memory of batches')
    add('--no-prefetcher', action='store_true', help='normalize on the CPU instead of on the device')
    add('--output', default='', metavar='DIR', help='folder of the output (default: ./output/train)')
    add('--experiment', default='', metavar='NAME', help='sub-folder of the output (default: from time and model)')
    add('--eval-metric', default=None, metavar='NAME',
        help='metric of the best checkpoint, e.g. top1_160, top1_ens or top1_mean, over resolutions (default; map_mean '
             'for --task multilabel)')
    add('--multilabel-threshold', type=float, default=0.5, metavar='P',
        help='probability from which on a label counts in F1 (default: 0.5)')
    add('--tta', type=int, default=0, choices=(0, 1, 2), help='2: evaluate the mean over an image and its mirror image')
    add('--persistent-workers', action=argparse.BooleanOptionalAction, default=True,
        help='keep loader workers between epochs where that is possible (default)')
    add('--use-multi-epochs-loader', action='store_true', help='keep loader workers between epochs, as is done anyway')
    add('--log-tensorboard', action='store_true', help='log to TensorBoard, in the output folder')
    add('--log-wandb', action='store_true', help='log to wandb')
    add('--wandb-project', default=None, help='wandb project')
    add('--wandb-tags', nargs='+', default=[], help='wandb tags')
    add('--wandb-resume-id', default='', help='wandb run to continue')

    add('--traceback', action='store_true', help='show the traceback of an error')

    add = parser.add_argument_group('Hugging Face Hub').add_argument
    add('--push-to-hub', default='', metavar='USER/NAME',
        help='push the best checkpoint at the end, with the token of HF_TOKEN or of `hf auth login`')
    add('--push-interval', type=int, default=0, metavar='N', help='also push the best one so far every N epochs')
    add('--hub-private', action='store_true', help='make the repository private')

    add_refused(parser, REFUSED)
    return parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, over a --config file, over the defaults: those of WARM_START from trained weights.

    Unusable flags and values end the program with one line on stderr and status 2.
    """
    parser, unset = create_parser(), object()
    defaults = {name: parser.get_default(name) for name in vars(parser.parse_args(argv))}
    parser.set_defaults(**dict.fromkeys(defaults, unset))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not unset}
    parser.set_defaults(**defaults)
    if given.get('config'):
        given = {**_read_config(parser, given['config']), **given}
    if is_warm_start(given):
        chosen = {k: v for k, v in WARM_START.items() if k not in given}
        if {'opt', 'lr', 'lr_base', 'lr_base_size'} & given.keys():  # the rate goes with the optimizer
            chosen = {k: v for k, v in chosen.items() if not k.startswith('lr_')}
        _logger.info(f"From trained weights: {', '.join(f'{k} {v}' for k, v in chosen.items()) or 'all flags given'}.")
        defaults.update(chosen)
        if 'opt' in chosen and max(given.get(k) or 0 for k in ('lr', 'lr_base')) > 10 * WARM_START['lr_base']:
            _logger.warning(f"The learning rate is high for {chosen['opt']}; if it is meant for SGD, give --opt sgd.")
    args = argparse.Namespace(**{**defaults, **given})
    for dest in REFUSED:
        delattr(args, dest)
    check_flags(parser, args)
    return args


def is_warm_start(flags: Mapping[str, Any]) -> bool:
    """Return whether the flags begin with trained weights."""
    return any(flags.get(k) for k in ('pretrained', 'pretrained_path', 'initial_checkpoint'))


def _read_config(parser: argparse.ArgumentParser, path: str) -> Dict[str, Any]:
    """Read a YAML file with the names and types of the flags."""
    try:
        config = read_yaml(path)
        for name in ('model_kwargs', 'pretrained_cfg_overlay'):
            if isinstance(config.get(name), dict):
                config[name] = check_model_args(config[name], path)
    except UserError as e:
        parser.error(f'--config {e}')
    actions = {a.dest: a for a in parser._actions if a.dest != 'help'}
    defaults = {}
    for name, value in config.items():
        if name not in actions:
            parser.error(f'--config {path}: unknown flag {name!r}{did_you_mean(str(name), actions)}')
        action = actions[name]
        if isinstance(action, Refuse):
            unused, why = action.const
            if value not in (None, False, 0, '', [], unused):
                parser.error(f'--config {path}: {name} is not supported: {why}.')
            continue
        defaults[name] = _convert(parser, path, action, value)
    name = defaults.get('model', PREFIX)
    if not name.startswith(PREFIX) and is_model(PREFIX + name.split('.')[0]):
        defaults['model'] = PREFIX + name
        _logger.info(f'--config {path} is of a run of timm: the model {name} becomes {PREFIX}{name}.')
    return defaults


def _convert(parser: argparse.ArgumentParser, path: str, action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the command line would give it."""
    expected = f'--config {path}: {action.dest} is {fields.shown(value)}, expected'
    if value is None and action.default is None:
        return value
    if isinstance(action, KeyValues):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            parser.error(f'{expected} names with their values.')
        return value
    if isinstance(action.default, bool):
        if not isinstance(value, bool):
            parser.error(f'{expected} true or false.')
        return value
    is_list = action.nargs in ('+', '*') or isinstance(action.nargs, int)
    if is_list != isinstance(value, (list, tuple)):
        parser.error(f"{expected} {'a list' if is_list else 'one value'}.")
    convert = action.type or str
    values = list(value) if is_list else [value]
    try:
        for i, v in enumerate(values):
            is_cut = convert is int and isinstance(v, float) and v != int(v)
            if v is None or is_cut or isinstance(v, (bool, bytes, dict, list)):
                raise ValueError
            values[i] = convert(v)
            if isinstance(values[i], float) and not math.isfinite(values[i]):
                raise ValueError
    except (OverflowError, TypeError, ValueError):
        parser.error(f"{expected} {dict(str='text').get(convert.__name__, convert.__name__)}.")
    value = values if is_list else values[0]
    if action.choices is not None and value not in action.choices:
        parser.error(f"{expected} one of {', '.join(map(str, action.choices))}.")
    return value
