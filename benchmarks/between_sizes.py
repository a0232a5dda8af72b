#!/usr/bin/env python3
"""Accuracy at sizes that a trained network never saw: the nearest BatchNorm, an interpolated one, or a calibrated one

A switchable network that paper_table.py trained is evaluated at sizes between and beside its own,

    nearest        with the BatchNorms of the nearest size by area
    interpolated   with BatchNorms interpolated by area between the two neighbours, as model(x) does
    statistics     with statistics that are measured anew on training images, for trained sizes too
    tune_bn        with BatchNorms that the network at its largest size has taught, without labels

on the validation images, whole pictures at each size.

    python benchmarks/between_sizes.py DIR --model rs_resnet10t --checkpoint FILE.pth --trained 48 40 32 24 \
        --sizes 56 44 36 28 20

Writes results/between_sizes.json.
"""
import copy
import warnings
from pathlib import Path

import timm
import torch
from _common import create_parser, print_table, write_results
from _photographs import crop, load_photographs, normalize, random_boxes

import timm_rs
from timm_rs.calibrate import measure_statistics
from timm_rs.resolutions import nearest_resolution

METHODS = ('nearest', 'interpolated', 'statistics', 'tune_bn')


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--model', required=True, help='rs_* model')
    add('--checkpoint', required=True, metavar='FILE', help='weights')
    add('--trained', type=int, nargs='+', required=True, metavar='N', help='sizes of the network')
    add('--sizes', type=int, nargs='+', required=True, metavar='N', help='sizes to evaluate at, also trained ones')
    add('--images', type=int, default=2048, metavar='N', help='training images to calibrate on (default: %(default)s)')
    add('--cache', default='output/between_sizes.pt', metavar='FILE', help='decoded images')
    args = parser.parse_args()
    for split in ('train', 'val'):
        if not any(Path(args.data_dir, split).glob('*/*')):
            parser.error(f'{args.data_dir} holds no {split}/ with a folder of images per class.')

    sizes = sorted({*args.sizes, *args.trained}, reverse=True)
    photographs = load_photographs(args.data_dir, sizes, 2 * sizes[0], 1., Path(args.cache))
    kwargs = dict(num_classes=len(photographs.classes), resolutions=args.trained, checkpoint_path=args.checkpoint)
    model = timm.create_model(args.model, **kwargs).eval()
    order = torch.randperm(len(photographs.train), generator=torch.Generator().manual_seed(0))[:args.images]
    rows = []
    for size in sizes:
        methods = ('trained', 'statistics') if size in model.resolutions else METHODS
        for method in methods:
            top1 = accuracy(at_size(model, size, method, photographs.train, order), photographs, size)
            rows.append(dict(resolution=size, method=method, top1=round(top1, 2)))
            print(f'{size} px, {method}: {top1:.2f}', flush=True)
    args.evaluated = len(photographs.val_labels)
    print_table(rows[0], rows)
    write_results(args, rows)


def at_size(model, size, method, images, order):
    """Return a network for a size."""
    if method == 'nearest':
        return model.at(nearest_resolution(size, size, model.resolutions))
    if method in ('trained', 'interpolated'):
        return model
    torch.manual_seed(0)
    largest = max(size, model.resolutions[0])
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(indices, images.shape[-1], (0.25, 1.), generator) for indices in order.split(128)]
    model, loader = copy.deepcopy(model), [crop(images, b, largest) for b in boxes]
    if size in model.resolutions:
        measure_statistics(model, size, loader)
        return model
    return timm_rs.add_resolution(model, size, loader, method)


@torch.inference_mode()
def accuracy(model, photographs, size):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a size that was not trained
        found = [model(normalize(x)).argmax(1) for x in photographs.val[size].split(250)]
    return 100 * (torch.cat(found) == photographs.val_labels).float().mean().item()


if __name__ == '__main__':
    main()
