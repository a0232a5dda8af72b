#!/usr/bin/env python3
"""Accuracy at sizes that a network was not trained at: the nearest BatchNorm, an interpolated one, or a calibrated one

A switchable or a plain network is evaluated at its own sizes and at others,

    trained        as it is, at its own sizes
    nearest        with the BatchNorms of the nearest size by area
    interpolated   with BatchNorms interpolated by area between the two neighbours, as model(x) does
    statistics, tune_bn, tune_bn_head
                   after timm_rs.add_resolution by this method, on training images without their labels; `statistics`
                   also re-estimates those of the network's own sizes

on the validation images, which no method has seen. Folders of a network of 1,000 classes are named by WordNet id.

    python experiments/added_sizes.py DIR --checkpoint last.pth.tar --sizes 56 44 36 28 20
    python experiments/added_sizes.py DIR --checkpoint FILE --model mobilenetv2_100 --model-kwargs pad_type=same \
        --resolutions 224 --sizes 160 128 96 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --interpolation bilinear

Writes results/added_sizes.json: a row per size and method.
"""
import copy
import logging
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from _shared import create_parser, print_table, write_results
from timm.data import ImageNetInfo, create_loader, resolve_model_data_config
from timm.utils import ParseKwargs

import timm_rs
from timm_rs.calibrate import METHODS, measure_statistics
from timm_rs.data.datasets import PyramidNormalizer, create_dataset, create_eval_loader
from timm_rs.evaluate import evaluate
from timm_rs.load import load_model
from timm_rs.resolutions import nearest_resolution


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--checkpoint', required=True, metavar='FILE', help='weights, as timm-rs export takes them')
    add('--model', help='name of the network, where the checkpoint does not hold it')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    add('--resolutions', type=int, nargs='+', metavar='N', help='sizes that it was trained at')
    add('--sizes', type=int, nargs='+', required=True, metavar='N', help='other sizes to evaluate at')
    add('--methods', nargs='+', default=['nearest', 'interpolated', 'statistics', 'tune_bn'],
        choices=['nearest', 'interpolated', *METHODS[1:]])
    add('--images', type=int, default=2048, metavar='N', help='images to calibrate on (default: %(default)s)')
    add('--epochs', type=int, default=2, metavar='N', help='passes over them (default: %(default)s)')
    add('--lr', type=float, default=1e-3)
    add('--scale', type=float, nargs=2, default=[0.25, 1.], help='area of the crops to calibrate on')
    for name in ('mean', 'std'):
        add(f'--{name}', type=float, nargs=3)
    add('--interpolation')
    add('--crop-pct', type=float, default=1.)
    add('--workers', type=int, default=0, metavar='N')
    args = parser.parse_args(argv)

    data = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct') if getattr(args, k)}
    model = load_model(
        args.checkpoint, args.model, args.resolutions, model_kwargs=args.model_kwargs, data_config=data).model.eval()
    config = dict(resolve_model_data_config(model), **data)
    sizes = sorted({*args.sizes, *model.resolutions}, reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        class_map = Path(folder, 'classes.txt')
        class_map.write_text('\n'.join(ImageNetInfo().label_names()))
        open_split = partial(
            create_dataset, '', args.data_dir, class_map=str(class_map) if model.num_classes == 1000 else '')
        train, val = open_split(split='train'), open_split(split='val')
    normalize = PyramidNormalizer(config['mean'], config['std'], torch.device('cpu'))
    batches = list(create_eval_loader(val, sizes, 64, config, args.workers))
    images = calibration_images(train, args, sizes[0], config)
    logging.getLogger('timm_rs').setLevel(logging.ERROR)  # of a size that was not trained
    rows = []
    for i, size in enumerate(sizes):
        for method in ('trained', 'statistics') if size in model.resolutions else args.methods:
            network = at_size(model, size, method, images, args)
            loader = [([levels[i]], target) for levels, target in batches]
            top1 = evaluate(network, loader, [size], normalize)[size]['top1']
            rows.append(dict(resolution=size, method=method, top1=round(top1, 2), evaluated=len(val)))
            print(f'{size} px, {method}: {top1:.2f}', flush=True)
            write_results(args, rows)
    print_table(list(rows[0]), rows)


def calibration_images(dataset, args, size, config):
    """Return random crops of training images, in batches."""
    torch.manual_seed(0)
    loader = create_loader(
        dataset, (3, size, size), 64, is_training=True, use_prefetcher=False, scale=args.scale, color_jitter=0.,
        interpolation=config['interpolation'], mean=config['mean'], std=config['std'], num_workers=args.workers)
    return [images for images, _ in islice(loader, args.images // 64)]


def at_size(model, size, method, images, args):
    """Return a network for a size."""
    if method == 'nearest':
        return model.at(nearest_resolution(size, size, model.resolutions))
    if method in ('trained', 'interpolated'):
        return model
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    if size in model.resolutions:
        measure_statistics(model, size, images)
        return model
    return timm_rs.add_resolution(model, size, images, method, epochs=args.epochs, lr=args.lr)


if __name__ == '__main__':
    main()
