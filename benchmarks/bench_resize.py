#!/usr/bin/env python3
"""Resizing for evaluation: the crops of five sizes from one image of 500 x 375, in four ways

- exact: timm_rs.data.exact_resize, crops by float32 matrix products, to the same bytes as timm;
- timm: its transforms, Pillow's resize of the whole image and then the crop;
- pillow: the same by Pillow's own calls, without torchvision around them;
- box: Image.resize(box=...), which makes only the crop, to bytes that may differ by some levels.

Each from a decoded image ('resize'), and from a JPEG through the evaluation loader to normalized batches ('loader',
only those that give timm's bytes). CPU time, sides in turns.

    python benchmarks/bench_resize.py --clock cpu
"""
import io

import numpy as np
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import Dataset

from timm_rs.data import datasets
from timm_rs.data.datasets import PyramidNormalizer, create_eval_loader
from timm_rs.data.exact_resize import ResizeAndCrop, to_planes

RESOLUTIONS = (224, 192, 160, 128, 96)
CONFIG = resolve_data_config(dict(input_size=(3, 224, 224), interpolation='bicubic', crop_pct=0.875))
COLUMNS = ('case', 'ms', 'timm_ms', 'ratio', 'range', 'different_bytes_percent', 'largest_difference', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=15)
    parser.add_argument('--images', type=int, default=16, metavar='N', help='photographs (default: %(default)s)')
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    files = [encode(generator) for _ in range(args.images)]
    images = [Image.open(io.BytesIO(f)).convert('RGB') for f in files]
    expected = [timm_crops(image) for image in images]
    runs = measure(lambda: create_contenders(files, images), args, warmup=2)
    rows = []
    for name, crops in (('exact', exact_crops), ('pillow', pillow_crops), ('box', box_crops)):
        pairs = [(a, b) for image, wanted in zip(images, expected) for a, b in zip(crops(image), wanted)]
        difference = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in pairs])
        rows.append(dict(
            case=f'resize, {name}', ms=median(runs, name, args.images * 1e-3),
            timm_ms=median(runs, 'timm', args.images * 1e-3), **ratio(runs, name, 'timm'),
            different_bytes_percent=round(100 * (difference > 0).double().mean().item(), 4),
            largest_difference=difference.max().item(), n=f'{args.builds} x {args.rounds}'))
    rows.append(dict(
        case='loader, exact', ms=median(runs, 'loader exact', args.images * 1e-3),
        timm_ms=median(runs, 'loader timm', args.images * 1e-3), **ratio(runs, 'loader exact', 'loader timm'),
        n=f'{args.builds} x {args.rounds}'))
    print_table(COLUMNS, rows)
    write_results(args, rows)


def encode(generator):
    coarse, fine = (torch.rand(1, 3, h, w, generator=generator) for h, w in ((24, 32), (188, 250)))
    layers = [torch.nn.functional.interpolate(x, (375, 500), mode='bicubic') for x in (coarse, fine)]
    pixels = (layers[0] * 140 + layers[1] * 115).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=90)
    return file.getvalue()


TRANSFORMS = [
    create_transform((3, r, r), use_prefetcher=True, interpolation='bicubic', crop_pct=0.875) for r in RESOLUTIONS]
EXACT = [ResizeAndCrop.of(transform) for transform in TRANSFORMS]


def timm_crops(image):
    return [transform(image) for transform in TRANSFORMS]


def exact_crops(image):
    planes = to_planes(image)
    return [exact(planes) for exact in EXACT]


def sides(image, size):
    width, height = image.size
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def pillow_crops(image):
    found = []
    for r, exact in zip(RESOLUTIONS, EXACT):
        resized = image.resize(sides(image, exact.size), Image.Resampling.BICUBIC)
        left, top = (int(round((n - r) / 2.)) for n in resized.size)
        found.append(to_tensor(resized.crop((left, top, left + r, top + r))))
    return found


def box_crops(image):
    found = []
    for r, exact in zip(RESOLUTIONS, EXACT):
        width, height = sides(image, exact.size)
        left, top = (int(round((n - r) / 2.)) for n in (width, height))
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + r) * across, (top + r) * down)
        found.append(to_tensor(image.resize((r, r), Image.Resampling.BICUBIC, box=box)))
    return found


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Files(Dataset):
    transform = None

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.transform(datasets.open_image(self.files[index])), 0


def create_contenders(files, images):
    loaders = {}
    for name in ('exact', 'timm'):
        loaders[name] = create_eval_loader(Files(files), RESOLUTIONS, len(files), CONFIG)
    loaders['timm'].dataset.transform.faster = [None] * len(RESOLUTIONS)
    normalize = PyramidNormalizer(CONFIG['mean'], CONFIG['std'], torch.device('cpu'))

    def read(loader):
        for pyramid, _ in loader:
            for level in pyramid:
                normalize(level)

    def run(crops):
        for image in images:
            crops(image)

    return {
        **{name: lambda c=c: run(c) for name, c in (
            ('exact', exact_crops), ('timm', timm_crops), ('pillow', pillow_crops), ('box', box_crops))},
        **{f'loader {name}': lambda loader=loader: read(loader) for name, loader in loaders.items()},
    }


if __name__ == '__main__':
    main()
