#!/usr/bin/env python3
"""From photograph to logits: JPEGs decoded at the scale that a size needs, against all of their pixels

Photographs of --data-dir are enlarged to 4000 x 3000, 1600 x 1200 and 500 x 375 px by bicubic interpolation, get noise
of 4 levels, which no interpolation makes, and become JPEGs of quality 90 in memory. timm_rs_runtime.Session answers
them one by one at 224 and 96 px, in ONNX Runtime, batch 1, random weights, with decode='scaled', 'fast' and 'exact'.
Decoders take turns (A B A B ...); n: 1 load, 5 rounds. A ratio is the median within a round.

    python benchmarks/bench_decode.py --data-dir imagenette --clock cpu
"""
import io
import tempfile

import numpy as np
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, ratio, write_results
from PIL import Image

import timm_rs  # noqa: F401  registers rs_*
from timm_rs.export.export import export_switchable
from timm_rs_runtime import Session
from timm_rs_runtime.images import find_images, open_image, split_folder
from timm_rs_runtime.preprocess import MARGINS

SIZES = ((4000, 3000), (1600, 1200), (500, 375))
RESOLUTIONS = (224, 96)
NETWORKS = ('mobilenetv2_100', 'resnet18')
PHOTOGRAPHS = 2


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=5)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='photographs, in class folders')
    parser.add_argument('--split', default='validation', metavar='NAME', help='split of DIR (default: %(default)s)')
    args = parser.parse_args()
    paths = find_images(split_folder(args.data_dir, args.split), PHOTOGRAPHS)
    photographs = {size: [enlarged(path, size) for path in paths] for size in SIZES}
    cases = [(name, size, resolution) for name in NETWORKS for size in SIZES for resolution in RESOLUTIONS]
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            torch.manual_seed(0)
            model = timm.create_model(f'rs_{name}', resolutions=RESOLUTIONS).eval()
            export_switchable(model, f'{folder}/{name}.onnx')

        def build():
            contenders = {}
            for decode in MARGINS:
                sessions = {name: Session(f'{folder}/{name}.onnx', args.threads, decode=decode) for name in NETWORKS}
                for name, size, resolution in cases:
                    contenders[decode, name, size, resolution] = lambda s=sessions[name], size=size, r=resolution: [
                        s.predict(photograph, r) for photograph in photographs[size]]
            return contenders

        runs = measure(build, args, warmup=1)
    rows = []
    for case in cases:
        name, (width, height), resolution = case
        row = dict(
            case=f'{name}, {width}x{height} at {resolution} px',
            exact_ms=median(runs, ('exact', *case), 1e-3 * PHOTOGRAPHS))
        for decode in ('scaled', 'fast'):
            found = ratio(runs, (decode, *case), ('exact', *case))
            row[f'{decode}_ms'] = median(runs, (decode, *case), 1e-3 * PHOTOGRAPHS)
            row.update({decode: found['ratio'], f'{decode}_range': found['range']})
        rows.append(dict(row, n=f'{args.builds} x {args.rounds}'))
    write_results(args, rows)


def enlarged(path, size):
    """Return an enlarged photograph with noise as the bytes of a JPEG."""
    image = open_image(path).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, 4, (*size[::-1], 3))
    file = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
    return file.getvalue()


if __name__ == '__main__':
    main()
