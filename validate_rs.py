#!/usr/bin/env python3
"""Evaluate a Resolution Switchable Network at its resolutions and as their ensemble

    python validate_rs.py DIR --checkpoint output/train/run/model_best.pth.tar
    python validate_rs.py DIR --model rs_resnet50 --checkpoint weights.safetensors --img-size 160 96
    python validate_rs.py DIR --model hf-hub:user/name --pretrained --results-file results.csv

Prints a table of resolution, top-1, top-5, loss, multiply-adds, parameters and images per second. At each size the
images are preprocessed as timm does for that size. A checkpoint of train_rs.py records its model, resolutions, classes
and normalization. Without a checkpoint the pretrained weights of --model are evaluated. Plain timm models are evaluated
too: one network at every --img-size.
"""
import argparse
import csv
import importlib
import json
import logging
import math
import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial

import torch
from timm import utils
from timm.data.model_config import resolve_input_data_config
from timm.layers import set_fast_norm
from timm.models import is_model
from tqdm import tqdm

from timm_rs import SwitchableMixin, explain_unknown_model
from timm_rs._compat import get_model_input_config
from timm_rs.data.classes import (
    check_class_folders,
    check_labels,
    count_classes,
    encode_labels,
    explain_classes,
    explain_labels,
    number_classes,
)
from timm_rs.data.datasets import (
    INTERPOLATIONS,
    PyramidNormalizer,
    choose_img_mode,
    create_dataset,
    create_eval_loader,
    describe,
)
from timm_rs.data.readers import skip_unreadable
from timm_rs.data.real_labels import use_real_labels
from timm_rs.evaluate import (
    ENSEMBLE,
    METRICS,
    TASKS,
    check_images,
    choose_amp,
    count_madds,
    count_parameters,
    create_evaluator,
    evaluate,
    format_scores,
)
from timm_rs.load import load_model
from timm_rs.records import labels_beside, read_label_names
from timm_rs.resolutions import check_resolutions, neighbours
from timm_rs.train.faults import name_flags, open_device
from timm_rs.train.refused import add_refused
from timm_rs_runtime.errors import KeyValues, OneLineParser, UserError, one_line, one_line_errors
from timm_rs_runtime.fields import MAX_SIZE, array, check_argument, check_numbers, integer, read_text
from timm_rs_runtime.files import atomic_write, check_new_file
from timm_rs_runtime.preprocess import MARGINS
from timm_rs_runtime.unreadable import MAX_UNREADABLE, ReadErrors

_logger = logging.getLogger('validate')
_COLUMNS = ('madds', 'params', 'images', 'unreadable', 'images_per_second')
_FORMATS = ('csv', 'json')

_NAFLEX = 'NaFlex batches are token sequences; a BatchNorm network takes images of the sizes --img-size'
# Flags of timm's validate.py that are accepted only at the value that they have where they are not used, and why.
_REFUSED = dict(
    aot_autograd=(False, 'use --torchcompile'),
    apex_amp=(False, 'use --amp'),
    fuser=('', 'it goes with --torchscript; use --torchcompile'),
    metrics_avg=(None, 'the table holds top-1, top-5 and loss, or mean average precision and F1'),
    naflex_loader=(False, _NAFLEX),
    naflex_max_seq_len=(576, _NAFLEX),
    test_pool=(False, 'a network pools larger images as a whole, see --img-size'),
    tf_preprocessing=(False, 'images are preprocessed as in training, by Pillow'),
    torchscript=(False, 'the network switches at run time; script one resolution of it, model.at(160)'),
)


def create_parser():
    parser = OneLineParser(
        usage='%(prog)s DIR --checkpoint FILE [--img-size N ...] [options]',
        description='Evaluate a Resolution Switchable Network.',
        epilog="The flags are those of timm's validate.py, of which some are refused with the reason why.",
    )
    add = parser.add_argument
    add('data', nargs='?', metavar='DIR', help='folder of the data set, same as --data-dir')
    add('--data-dir', metavar='DIR', help='folder of the data set')
    add('--dataset', default='', metavar='NAME', help='kind of data set: "", "digits", or <type>/<name> as in timm')
    add('--split', default='validation', metavar='NAME', help='split to evaluate')
    add('--max-unreadable', type=int, default=MAX_UNREADABLE, metavar='N',
        help='end with an error beyond N unreadable images; up to N are left out (default: %(default)s)')
    add('--num-samples', default=None, type=int, metavar='N', help='images in an iterable split')
    add('--dataset-download', action='store_true', help='let data sets that can be downloaded do so')
    add('--decode', default='exact', choices=tuple(MARGINS),
        help='all pixels of an image (default), or a JPEG at the smallest scale that has twice the pixels on each side '
             'that the largest size takes (scaled), or 1.25 times as many (fast)')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', default=None, help='PIL mode that images are converted to')
    add('--input-key', default=None, help='key of the image in a sample')
    add('--target-key', default=None, help='key of the label in a sample')
    add('--dataset-trust-remote-code', action='store_true', help='let a HF data set run its own code')
    add('--task', default=None, choices=TASKS,
        help='one label per image (classification) or several (multilabel); default: that of the checkpoint')
    add('--target-format', default=None, choices=('indices', 'multihot'),
        help='labels of --task multilabel: a list of class indices (default), or a vector of one value per class')
    add('--multilabel-threshold', type=float, default=None, metavar='P',
        help='probability from which on a label counts in F1 (default: that of the checkpoint, else 0.5)')
    add('--real-labels', default='', metavar='FILE', help='JSON of the real labels of the images of ImageNet')
    add('--valid-labels', default='', metavar='FILE',
        help="indices of the network's classes, one a line, that the classes of the data set are")
    add('-m', '--model', default=None, metavar='NAME', help='name of the model (default: that of the checkpoint)')
    add('--pretrained', action='store_true',
        help='load the pretrained weights of the model (default without --checkpoint)')
    add('--checkpoint', default='', metavar='PATH', help='weights to load: a training checkpoint or a state dict')
    add('--use-ema', action='store_true', help="evaluate the checkpoint's moving average, if it holds one")
    add('--resolutions', type=int, nargs='+', default=None, metavar='N', help="the model's resolutions")
    add('--num-classes', type=int, default=None, help='number of classes')
    add('--in-chans', type=int, default=None, metavar='N', help='image channels')
    add('--gp', default=None, metavar='POOL', help='global pool')
    add('--bn-eps', type=float, default=None, help='epsilon of BatchNorm')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, help='further model arguments as key=value')
    add('--img-size', type=int, nargs='+', default=None, metavar='N',
        help="sizes to evaluate at, trained or not (default: all of the model's resolutions and their ensemble)")
    add('--input-size', type=int, nargs=3, default=None, metavar='N', help='channels, height and width of one size')
    add('--crop-pct', default=None, type=float, metavar='PCT', help='share of the image that is cropped')
    add('--crop-mode', default=None, choices=('center', 'squash', 'border'), help='how it is cropped')
    add('--crop-border-pixels', default=None, type=int, metavar='N', help='pixels cut off every border first')
    add('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='pixel mean for normalization')
    add('--std', type=float, nargs='+', default=None, metavar='STD', help='pixel standard deviation')
    add('--interpolation', default='', choices=('', *INTERPOLATIONS), metavar='NAME',
        help='interpolation of the images')
    add('-b', '--batch-size', default=256, type=int, metavar='N', help='images per batch (default: 256)')
    add('--retry', action='store_true', help='take smaller batches where memory does not suffice')
    add('--tta', type=int, default=0, choices=(0, 1, 2), help='2: take the mean over an image and its mirror image')
    add('-j', '--workers', default=4, type=int, metavar='N', help='loader processes (default: 4)')
    add('--log-freq', default=10, type=int, metavar='N', help='batches between log lines')
    add('--seed', default=42, type=int, metavar='N', help='random seed (default: 42)')
    add('--pin-mem', action='store_true', help='pin memory of batches')
    add('--channels-last', action='store_true', help='channels_last memory layout')
    add('--device', default='cuda', help='device to run on; without a GPU the CPU is used (default: cuda)')
    add('--device-modules', nargs='+', default=(), help='Python modules to import for a device backend')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default=None, choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)')
    add('--model-dtype', default=None, choices=('float32', 'float16', 'bfloat16'), help='dtype of the weights')
    add('--fast-norm', action='store_true', help="timm's fast norm layers")
    add('--reparam', action='store_true', help='fuse the branches of a plain timm model')
    add('--torchcompile', nargs='?', default=None, const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', default=None, help='mode of torch.compile')
    add('--results-file', default='', metavar='FILE', help='write the table to FILE, .csv or .json')
    add('--overwrite', action='store_true', help='replace a results file of this name')
    add('--results-format', default=None, choices=_FORMATS, help='format of that file (default: by its name)')
    add('--traceback', action='store_true', help='show the traceback of an error')

    # These are always so: on one device, without a prefetcher, at the sizes of training.
    add('--amp-impl', default='native', choices=('native',), help=argparse.SUPPRESS)
    add('--native-amp', dest='amp', action='store_true', help=argparse.SUPPRESS)
    add('--no-prefetcher', action='store_true', help=argparse.SUPPRESS)
    add('--num-gpu', default=1, type=int, choices=(1,), help=argparse.SUPPRESS)
    add('--use-train-size', action='store_true', help=argparse.SUPPRESS)
    add_refused(parser, _REFUSED)
    return parser


def main(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    args.results_format = args.results_format or args.results_file.rpartition('.')[2]
    if args.results_file and args.results_format not in _FORMATS:
        parser.error(
            f'--results-file {args.results_file}: expected a name that ends in .csv or .json, or --results-format.')
    if args.data and args.data_dir and args.data != args.data_dir:
        parser.error(f'two data folders are given, {args.data} and --data-dir {args.data_dir}.')
    args.data_dir = args.data_dir or args.data
    if not args.model and not args.checkpoint:
        parser.error('give --checkpoint, --model, or both.')
    args.pretrained = args.pretrained or not args.checkpoint
    if args.input_size:
        channels, height, width = args.input_size
        args.in_chans, args.img_size = args.in_chans or channels, args.img_size or [height]
        if (args.in_chans, args.img_size, height) != (channels, [height], width):
            parser.error(
                f"--input-size {' '.join(map(str, args.input_size))}: expected a square, and the channels and the size "
                'of --in-chans and --img-size if these are given.')

    with one_line_errors('validate_rs.py', args.traceback):
        check_numbers(args, crop_border_pixels=integer(0, MAX_SIZE))
        if args.results_file:
            check_new_file(args.results_file, args.overwrite)
        if args.multilabel_threshold is not None and not 0 < args.multilabel_threshold < 1:
            raise UserError(
                f'--multilabel-threshold is {args.multilabel_threshold:g}, expected a number between 0 and 1.')
        if args.valid_labels and args.real_labels:
            raise UserError('--valid-labels and --real-labels do not go together.')
        if args.real_labels and args.task == 'multilabel':
            raise UserError('--real-labels does not go with --task multilabel.')
        if args.img_size is not None:
            args.img_size = check_resolutions(args.img_size)
        for module in args.device_modules:
            importlib.import_module(module)
        if args.device.startswith('cuda') and not torch.cuda.is_available():
            _logger.warning(f'No GPU for --device {args.device}, running on the CPU.')
            args.device = 'cpu'
        device = open_device(args)
        utils.random_seed(args.seed)
        model = build_model(args, device)
        if args.resolutions and not isinstance(model, SwitchableMixin):
            raise UserError('--resolutions is for a switchable network, expected --img-size for a plain one.')
        resolutions = args.img_size or getattr(model, 'resolutions', None)
        if resolutions is None:
            resolutions = (model.pretrained_cfg['input_size'][-1],)
        in_chans = get_model_input_config(model)['input_size'][0]
        madds = {r: count_madds(model, r, in_chans) for r in resolutions}
        for r in sorted(set(resolutions) - set(getattr(model, 'resolutions', resolutions)), reverse=True):
            below, above, _ = neighbours(r, r, model.resolutions)
            place = f'of {below} px' if below == above else f'between those of {above} and {below} px'
            _logger.warning(f'{r} px was not trained: the BatchNorms {place} serve.')
        warnings.filterwarnings('ignore', message='.* has no BatchNorm for')  # said above

        config = dict(
            name_flags(args, 'mean', 'std')(resolve_input_data_config)(model, args=data_args(args), verbose=True),
            crop_border_pixels=args.crop_border_pixels)
        dataset = create_dataset(
            args.dataset, args.data_dir, args.split, class_map=args.class_map, download=args.dataset_download,
            num_samples=args.num_samples, batch_size=args.batch_size, input_key=args.input_key,
            target_key=args.target_key, target_format=args.target_format,
            trust_remote_code=args.dataset_trust_remote_code,
            input_img_mode=choose_img_mode(in_chans, args.input_img_mode), seed=args.seed, decode=args.decode,
        )
        classes = read_classes(args.valid_labels, model.num_classes) if args.valid_labels else None
        check_classes(args, dataset, model, classes)
        evaluator = partial(create_evaluator, args.task, threshold=args.multilabel_threshold)
        num_classes = model.num_classes if classes is None else len(classes)
        if args.task == 'multilabel':
            encode_labels(dataset, num_classes, args.target_format)
        elif args.real_labels:
            evaluator = use_real_labels(dataset, args.real_labels)
        else:
            check_labels(dataset, num_classes)
        errors = ReadErrors(args.max_unreadable)
        _logger.info(f'Validation reads {describe(dataset)}.')
        readable = skip_unreadable(dataset, errors, stand_in=False)
        dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
        normalize = PyramidNormalizer(config['mean'], config['std'], device, dtype, args.channels_last)

        autocast = nullcontext
        if args.amp:
            autocast = partial(
                torch.autocast, device_type=device.type, dtype=choose_amp(model, device, args.amp_dtype, in_chans))
        network = model
        if args.torchcompile:
            network = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)

        def log(batch_idx, running):
            progress.update()
            errors.check()
            if batch_idx % args.log_freq == 0:
                _logger.info(f'Test: [{batch_idx:>4d}/{len(loader)}]  {format_scores(running)}')

        while True:
            loader = create_eval_loader(
                readable, resolutions, args.batch_size, config, num_workers=args.workers, pin_memory=args.pin_mem)
            progress = tqdm(total=len(loader), desc='Test', leave=False, disable=None)
            try:
                metrics = evaluate(
                    network, loader, resolutions, normalize, amp_autocast=autocast, on_batch=log,
                    evaluator=evaluator, classes=classes, mirrored=args.tta == 2)
                break
            except torch.OutOfMemoryError as e:
                smaller = utils.decay_batch_step(args.batch_size) if args.retry else 0
                if not smaller:
                    raise UserError(f'Out of memory with batches of {args.batch_size} images: {one_line(e)}') from e
                _logger.warning(f'Out of memory with batches of {args.batch_size} images, now {smaller}.')
                args.batch_size = smaller
            finally:
                progress.close()
        check_images(metrics)
        broken = [str(key) for key, row in metrics.items() if not math.isfinite(row['loss'])]
        if broken:
            raise UserError(f'The logits are not finite (NaN or infinite) at {", ".join(broken)}.')
        if errors.names:
            _logger.warning(errors.summary())
        params = count_parameters(model)
        madds[ENSEMBLE] = sum(madds.values())
        rows = [dict(row, resolution=key, madds=madds[key], params=params) for key, row in metrics.items()]
        print(format_table(rows))
        if args.results_file:
            columns = ('resolution', *(name for name in METRICS if name in rows[0]), *_COLUMNS)
            write_results(args, [{c: row[c] for c in columns} for row in rows])


def build_model(args, device):
    """Build the network, and take args.input_img_mode, args.task and its threshold from its checkpoint."""
    if not args.checkpoint and ':' not in args.model and not is_model(args.model) and not os.path.exists(args.model):
        raise UserError(explain_unknown_model(args.model))
    if args.fast_norm:
        set_fast_norm()
    chosen = dict(in_chans=args.in_chans, global_pool=args.gp, bn_eps=args.bn_eps)
    loaded = load_model(
        args.checkpoint or args.model,
        args.model if args.checkpoint else None,
        args.resolutions,
        args.num_classes,
        use_ema=None if args.use_ema else False,
        model_kwargs={**{k: v for k, v in chosen.items() if v is not None}, **args.model_kwargs},
        keep_plain=True,
    )
    model, args.input_img_mode = loaded.model, args.input_img_mode or loaded.args.get('input_img_mode')
    threshold = model.multilabel_threshold
    args.task = args.task or ('classification' if threshold is None else 'multilabel')
    args.multilabel_threshold = args.multilabel_threshold or threshold or 0.5
    if loaded.args.get('class_map') and not args.class_map:
        _logger.warning(f"The training had --class-map {loaded.args['class_map']}, which is not opened unless given.")
    if args.reparam and isinstance(model, SwitchableMixin):
        raise UserError('--reparam is for plain models: take one resolution out first, timm-rs convert --extract N.')
    if args.reparam:
        model = utils.reparameterize_model(model)
    model.to(device=device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    kind = f'resolutions {model.resolutions}' if isinstance(model, SwitchableMixin) else 'one resolution'
    _logger.info(f'Model of {loaded.source}, {kind}, {count_parameters(model):,} parameters')
    return model


def data_args(args):
    chosen = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    return {k: v for k, v in chosen.items() if v}


def read_classes(path, num_classes):
    """Return the indices in a file, one a line."""
    lines = read_text(path).split()
    try:
        classes = [int(line) for line in lines]
    except ValueError as e:
        raise UserError(f'--valid-labels {path}: expected the index of a class in each line, {e}.') from e
    twice = next((c for i, c in enumerate(classes) if c in classes[:i]), None)
    if twice is not None:
        raise UserError(f'--valid-labels {path}: class {twice} is in two lines.')
    return check_argument(f'--valid-labels {path}: line', classes, array(integer(0, num_classes - 1), 1, num_classes))


def check_classes(args, dataset, model, classes):
    """Refuse a data set with other classes than the model's, which it or a file beside its checkpoint may name."""
    check_class_folders(dataset)
    where = f'Split {args.split!r} of {args.data_dir or args.dataset}'
    num_classes, numbers = count_classes(dataset), number_classes(dataset)
    expected = model.num_classes if classes is None else len(classes)
    if num_classes is not None and (num_classes > expected if args.class_map else num_classes != expected):
        what = 'the model' if classes is None else f'--valid-labels {args.valid_labels}'
        raise UserError(f'{where} has {num_classes} classes, {what} has {expected}.')
    if classes is not None or args.class_map or not numbers:
        return
    path = labels_beside(args.checkpoint)
    if path:
        expected = {name: i for i, name in enumerate(read_label_names(path))}
        differ = explain_classes({str(name): i for name, i in numbers.items()}, expected)
    else:
        differ = explain_labels(numbers, model.pretrained_cfg.get('label_names'))
    if differ:
        raise UserError(
            f"{where} has other classes than {path or 'the model'}: {differ}. A --class-map could number them.")


def format_table(rows):
    """Return the table for people; M are millions, as in the number of parameters that the log begins with."""
    names = [name for name in METRICS if name in rows[0]]
    titles = [METRICS[name].replace('Acc@', 'top-').replace('Loss', 'loss') for name in names]
    lines = [' '.join([
        f"{'resolution':>10}", *(f'{title:>{max(len(title), 7)}}' for title in titles),
        f"{'MAdds':>9} {'params':>8} {'images/s':>9}"])]
    for row in rows:
        cells = [
            f"{row[name]:>{max(len(title), 7)}.{3 if name == 'loss' else 2}f}" for name, title in zip(names, titles)]
        lines.append(' '.join([
            f"{row['resolution']:>10}", *cells,
            f"{row['madds'] / 1e6:>8.1f}M {row['params'] / 1e6:>7.2f}M {row['images_per_second']:>9.1f}"]))
    return '\n'.join(lines)


def write_results(args, rows):
    """Write the rows as CSV or JSON; the file is there complete or not at all."""
    with atomic_write(args.results_file, overwrite=args.overwrite, newline='') as f:
        if args.results_format == 'json':
            json.dump(rows, f, indent=2)
        else:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    utils.setup_default_logging()
    sys.exit(main())
