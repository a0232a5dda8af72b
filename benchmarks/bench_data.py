#!/usr/bin/env python3
"""Data loading: the training pyramid and smaller JPEG scales against timm's loader, five evaluation sizes in one pass

Pictures are written as JPEGs of quality 90, of 500 x 375 px (110 kB, an average file of ImageNet) and 1600 x 1200 px
(490 kB), and read without a network, with timm's default augmentation where it is training:

- training: batches at 224 px as train_rs.py loads them, in one loader process, and their pyramid of five sizes, which
  this process makes meanwhile, against timm's training loader only at 224 px. An epoch shows every picture --repeats
  times: at its end the loader process is idle while the last two batches get their pyramids, which weighs more the
  shorter the epoch is. Wanted: at least 0.95 of timm's images per second.
- decode: training batches at 96 px with --decode scaled and fast against timm's loader, without a loader process, an
  eighth of the pictures. Wanted: 2.5 times timm's images per second for 1600 x 1200 px, 1.3 for 500 x 375 px by fast.
- evaluation: every image decoded once for 224, 192, 160, 128 and 96 px and normalized, against a pass of timm's
  evaluation loader for each of the five, all without a loader process. Wanted: at most 0.55 of their time.

Sides take turns; n: 3 builds, 3 rounds over all images. Training needs two cores to itself; the others can be measured
on busy ones, by --clock cpu.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --cases decode --clock cpu
"""
import random
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import add_timing_arguments, compare, create_parser, measure, ratio, write_results
from PIL import Image
from timm.data import create_dataset as create_timm_dataset
from timm.data import create_loader, resolve_data_config

from timm_rs.data.datasets import PyramidNormalizer, create_dataset, create_eval_loader
from timm_rs.train import ResolutionPyramid

RESOLUTIONS = (224, 192, 160, 128, 96)
CONFIG = resolve_data_config(dict(input_size=(3, 224, 224)))
CASES = ('training', 'decode', 'evaluation')
LARGE, SMALL = (1600, 1200), (500, 375)  # pixels
ROWS = [  # case, title, ours, timm's, whether the ratio is of images per second, what is wanted of it
    ('training', 'training batches with pyramid, images/s', 'pyramid', 'train', True, '>= 0.95'),
    ('decode', '1600 x 1200 to 96 px, scaled, images/s', 'scaled_1600', 'timm_1600', True, '>= 2.5'),
    ('decode', '1600 x 1200 to 96 px, fast, images/s', 'fast_1600', 'timm_1600', True, ''),
    ('decode', '500 x 375 to 96 px, scaled, images/s', 'scaled_500', 'timm_500', True, ''),
    ('decode', '500 x 375 to 96 px, fast, images/s', 'fast_500', 'timm_500', True, '>= 1.3'),
    ('evaluation', 'five sizes in one pass, time', 'one_pass', 'five_passes', False, '<= 0.55'),
]


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=3)
    add = parser.add_argument
    add('--images', default=512, type=int, metavar='N', help='photographs (default: %(default)s)')
    add('-b', '--batch-size', default=32, type=int, metavar='N', help='images (default: %(default)s)')
    add('--repeats', default=4, type=int, metavar='N', help='of each to train (default: %(default)s)')
    add('--cases', nargs='+', default=CASES, choices=CASES, help='default: %(default)s')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        args.bytes_per_image = [
            write_images(Path(root, str(size[0])), size, count) for size, count in (
                (SMALL, args.images if {*args.cases} != {'decode'} else args.images // 8), (LARGE, args.images // 8))]
        runs = measure(lambda: create_contenders(root, args), args, warmup=1)
    rows = []
    for case, title, ours, timms, is_rate, wanted in ROWS:
        if case in args.cases:
            rates = ratio(runs, timms, ours) if is_rate else {}
            rows.append(compare(args, runs, title, ours, timms, wanted=wanted, **rates))
    write_results(args, rows)


def write_images(root, size, count):
    """Write JPEGs and return their mean size in bytes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse, fine = (torch.rand(1, 3, h, w, generator=generator) for h, w in ((24, 32), (188, 250)))
        layers = [torch.nn.functional.interpolate(x, size[::-1], mode='bicubic') for x in (coarse, fine)]
        pixels = (layers[0] * 140 + layers[1] * 115).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        path = root / f'class{i % 2}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return round(sum(p.stat().st_size for p in root.glob('*/*')) / count)


def create_contenders(root, args):
    """Return what reads all images once."""
    kwargs = dict(batch_size=args.batch_size, num_workers=0, persistent_workers=False, device=torch.device('cpu'))
    small = f'{root}/{SMALL[0]}'

    def create_training_loader(dataset, resolution, **changes):
        return create_loader(
            dataset, is_training=True, color_jitter=0.4, interpolation='random',
            input_size=(3, resolution, resolution), mean=CONFIG['mean'], std=CONFIG['std'], **dict(kwargs, **changes))

    def seeded(read):
        def call():
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            read()
        return call

    def read(*loaders):
        for loader in loaders:
            for _ in loader:
                pass

    contenders = {}
    if 'training' in args.cases:
        repeated = create_timm_dataset('', small)
        repeated.reader.samples *= args.repeats
        training = create_training_loader(repeated, 224, num_workers=1, persistent_workers=True)
        pyramid = ResolutionPyramid(RESOLUTIONS)
        contenders.update(
            pyramid=seeded(lambda: read(pyramid(images) for images, _ in training)),
            train=seeded(partial(read, training)))
    if 'decode' in args.cases:
        for width in (LARGE[0], SMALL[0]):
            folder = f'{root}/{width}'
            sets = dict(timm=create_timm_dataset('', folder))
            sets.update({decode: create_dataset('', folder, '', decode) for decode in ('scaled', 'fast')})
            for name, dataset in sets.items():
                dataset.reader.samples = dataset.reader.samples[:args.images // 8]
                contenders[f'{name}_{width}'] = seeded(partial(read, create_training_loader(dataset, 96)))
    if 'evaluation' in args.cases:
        one_pass = create_eval_loader(create_dataset('', small, ''), RESOLUTIONS, args.batch_size, CONFIG)
        single = [
            create_loader(create_timm_dataset('', small), **dict(CONFIG, input_size=(3, r, r)), **kwargs)
            for r in RESOLUTIONS]
        normalize = PyramidNormalizer(CONFIG['mean'], CONFIG['std'], torch.device('cpu'))
        contenders.update(
            one_pass=lambda: read(normalize(level) for images, _ in one_pass for level in images),
            five_passes=partial(read, *single))
    return contenders


if __name__ == '__main__':
    main()
