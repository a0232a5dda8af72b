#!/usr/bin/env python3
"""What add_resolution recovers: accuracy of a plain network at sizes that it was not trained at, by method

A plain ImageNet network of timm becomes switchable with its training size alone. Every other size is then added in turn
by each method (timm_rs.METHODS), calibrated on training images without their labels, and evaluated on validation images
that no method has seen. Folders are named by WordNet id and mapped to the 1,000 classes.

    python benchmarks/calibration.py --model mobilenetv2_100 --model-kwargs pad_type=same --checkpoint FILE \
        --train DIR --val DIR --val-glob 'ILSVRC2012_val_*' --mean 0.5 --std 0.5 --interpolation bilinear

Writes results/calibration.json: a row per size and method, with the command and the machine.
"""
import copy
import fnmatch
import random
from pathlib import Path

import timm
import torch
from _common import create_parser, print_table, write_results
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.utils import ParseKwargs

import timm_rs
from timm_rs.calibrate import METHODS


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--model', default='mobilenetv2_100')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    add('--checkpoint', required=True)
    add('--train', required=True, help='folder of WordNet folders of images to calibrate on')
    add('--val', required=True, nargs='+', help='folders of WordNet folders of images to evaluate on')
    add('--val-glob', default='*', help='names of the images to evaluate on')
    add('--size', type=int, default=224, help='training size of the network')
    add('--sizes', type=int, nargs='+', default=[160, 128, 96])
    add('--methods', nargs='+', default=METHODS, choices=METHODS)
    add('--images', type=int, default=2048, help='images to calibrate on')
    add('--epochs', type=int, default=2)
    add('--lr', type=float, default=1e-3)
    add('--batch-size', type=int, default=64)
    add('--mean', type=float, default=0.5)
    add('--std', type=float, default=0.5)
    add('--interpolation', default='bilinear')
    args = parser.parse_args()

    torch.manual_seed(0)
    names = {synset: i for i, synset in enumerate(ImageNetInfo().label_names())}
    found = [image for folder in args.val for image in find_images(folder, args.val_glob, names)]
    evaluated = {path.name for path, _ in found}
    train = [image for image in find_images(args.train, '*', names) if image[0].name not in evaluated]
    random.Random(0).shuffle(train)
    train = load_images(train[:args.images], args.size, args)
    targets = torch.tensor([label for _, label in found])
    model = timm.create_model(args.model, checkpoint_path=args.checkpoint, **args.model_kwargs)
    timm_rs.make_switchable(model.eval(), (args.size,))
    rows = []
    for size in args.sizes:
        images = load_images(found, size, args)
        for method in args.methods:
            calibrated = copy.deepcopy(model)
            loader = [train[i:i + args.batch_size] for i in range(0, len(train), args.batch_size)]
            timm_rs.add_resolution(calibrated, size, loader, method, epochs=args.epochs, lr=args.lr)
            top1 = accuracy(calibrated, images, targets)
            rows.append(dict(resolution=size, method=method, top1=round(top1, 2), evaluated=len(targets)))
            print(f'{size} px, {method}: {top1:.2f}', flush=True)
            write_results(args, rows)
    print_table(rows[0], rows)


def find_images(folder, pattern, names):
    """Return (path, class index) of the images in WordNet folders."""
    paths = sorted(p for p in Path(folder).glob('n*/*') if fnmatch.fnmatch(p.name, pattern))
    return [(p, names[p.parent.name]) for p in paths]


def load_images(found, size, args):
    """Return normalized images [N, 3, size, size] of whole pictures (crop_pct 1)."""
    transform = create_transform(
        size, is_training=False, interpolation=args.interpolation, mean=(args.mean,) * 3, std=(args.std,) * 3,
        crop_pct=1.)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path, _ in found])


@torch.inference_mode()
def accuracy(model, images, targets):
    model.eval()
    correct = [model(images[i:i + 50]).argmax(1) == targets[i:i + 50] for i in range(0, len(images), 50)]
    return 100 * torch.cat(correct).float().mean().item()


if __name__ == '__main__':
    main()
