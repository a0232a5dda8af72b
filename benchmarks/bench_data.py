#!/usr/bin/env python3
"""Data loading: the training pyramid against timm's loader, five evaluation sizes in one pass against five passes

Pictures of 500 x 375 px are written as JPEGs of 110 kB, an average file of ImageNet, and read without a network:

- training: batches at 224 px as train_rs.py loads them, in one loader process, and their pyramid of five sizes, which
  this process makes meanwhile, against timm's training loader only at 224 px, both with timm's default augmentation.
  An epoch shows every picture --repeats times: at its end the loader process is idle while the last two batches get
  their pyramids, which weighs more the shorter the epoch is. Wanted: at least 0.95 of timm's images per second.
- evaluation: every image decoded once for 224, 192, 160, 128 and 96 px and normalized, against a pass of timm's
  evaluation loader for each of the five, all without a loader process. Wanted: at most 0.55 of their time.

Sides take turns; n: 3 builds, 3 rounds over all images. Training needs two cores to itself; evaluation can be measured
on busy ones, by --clock cpu.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --cases evaluation --clock cpu
"""
import tempfile
from pathlib import Path

import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image
from timm.data import create_dataset as create_timm_dataset
from timm.data import create_loader, resolve_data_config

from timm_rs.data.datasets import PyramidNormalizer, create_dataset, create_eval_loader
from timm_rs.train import ResolutionPyramid

RESOLUTIONS = (224, 192, 160, 128, 96)
CONFIG = resolve_data_config(dict(input_size=(3, 224, 224)))
CASES = ('training', 'evaluation')
COLUMNS = ('case', 'ms', 'timm_ms', 'ratio', 'range', 'wanted', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=3)
    parser.add_argument('--images', default=512, type=int, metavar='N', help='photographs (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=32, type=int, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--repeats', default=4, type=int, metavar='N', help='of each to train (default: %(default)s)')
    parser.add_argument('--cases', nargs='+', default=CASES, choices=CASES, help='default: %(default)s')
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        size = write_images(Path(root), args.images)
        runs = measure(lambda: create_contenders(root, args), args, warmup=1)
    n = f'{args.builds} x {args.rounds}'
    # images per second: the inverse of the times
    rows = []
    if 'training' in args.cases:
        rows.append(dict(
            case='training batches with pyramid, images/s', ms=median(runs, 'pyramid'), timm_ms=median(runs, 'train'),
            **ratio(runs, 'train', 'pyramid'), wanted='>= 0.95', n=n))
    if 'evaluation' in args.cases:
        rows.append(dict(
            case='five sizes in one pass, time', ms=median(runs, 'one_pass'), timm_ms=median(runs, 'five_passes'),
            **ratio(runs, 'one_pass', 'five_passes'), wanted='<= 0.55', n=n))
    args.bytes_per_image = size
    print_table(COLUMNS, rows)
    write_results(args, rows)


def write_images(root, count):
    """Write JPEGs of 500 x 375 px and return their mean size in bytes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse, fine = (torch.rand(1, 3, h, w, generator=generator) for h, w in ((24, 32), (188, 250)))
        layers = [torch.nn.functional.interpolate(x, (375, 500), mode='bicubic') for x in (coarse, fine)]
        pixels = (layers[0] * 140 + layers[1] * 115).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        path = root / f'class{i % 2}' / f'{i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return round(sum(p.stat().st_size for p in root.glob('*/*')) / count)


def create_contenders(root, args):
    """Return what reads all images once."""
    kwargs = dict(batch_size=args.batch_size, num_workers=0, persistent_workers=False, device=torch.device('cpu'))
    training_set = create_timm_dataset('', root)
    training_set.reader.samples *= args.repeats
    training = create_loader(
        training_set, is_training=True, color_jitter=0.4, interpolation='random', input_size=(3, 224, 224),
        mean=CONFIG['mean'], std=CONFIG['std'], **dict(kwargs, num_workers=1, persistent_workers=True))
    one_pass = create_eval_loader(create_dataset('', root, ''), RESOLUTIONS, args.batch_size, CONFIG)
    single = [
        create_loader(create_timm_dataset('', root), **dict(CONFIG, input_size=(3, r, r)), **kwargs)
        for r in RESOLUTIONS]
    pyramid = ResolutionPyramid(RESOLUTIONS)
    normalize = PyramidNormalizer(CONFIG['mean'], CONFIG['std'], torch.device('cpu'))

    def read(*loaders):
        for loader in loaders:
            for _ in loader:
                pass

    def read_pyramid():
        torch.manual_seed(0)
        for images, _ in training:
            pyramid(images)

    def read_training():
        torch.manual_seed(0)
        read(training)

    def read_one_pass():
        for images, _ in one_pass:
            for level in images:
                normalize(level)

    contenders = dict(
        training=dict(pyramid=read_pyramid, train=read_training),
        evaluation=dict(one_pass=read_one_pass, five_passes=lambda: read(*single)))
    return {name: call for case in args.cases for name, call in contenders[case].items()}


if __name__ == '__main__':
    main()
