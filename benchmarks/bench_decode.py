#!/usr/bin/env python3
"""From photograph to logits: JPEGs decoded at the scale that a size needs, against all of their pixels

Time: photographs of --data-dir are enlarged to 4000 x 3000, 1600 x 1200 and 500 x 375 px by bicubic interpolation, get
noise of 4 levels, which no interpolation makes, and become JPEGs of quality 90 in memory. timm_rs_runtime.Session
answers them one by one at 224 and 96 px, in ONNX Runtime, batch 1, random weights, with decode='scaled', 'fast' and
'exact'. Decoders take turns (A B A B ...); n: 1 load, 5 rounds. A ratio is the median within a round.

Accuracy, with --model: top-1 accuracy of the trained network in this file on the photographs, at each of its sizes,
how many answers are those of exact, how far the pixels of its input are from exact's (rms, of 255 levels), and how many
decoded pixels a side has for each one after resizing. 'noise' is exact plus -1, 0 or 1 level at random. The photographs
are as they are, or enlarged to a shorter side of --side px, with noise of --noise levels.

    python benchmarks/bench_decode.py --data-dir imagenette --clock cpu
    python benchmarks/bench_decode.py --data-dir imagenette --model rs_resnet10t.onnx --output FILE
"""
import io
import tempfile

import numpy as np
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image

import timm_rs  # noqa: F401  registers rs_*
from timm_rs.export.export import export_switchable
from timm_rs_runtime import Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import find_images, open_image, split_folder
from timm_rs_runtime.preprocess import MARGINS

SIZES = ((4000, 3000), (1600, 1200), (500, 375))
RESOLUTIONS = (224, 96)
NETWORKS = ('mobilenetv2_100', 'resnet18')
PHOTOGRAPHS = 2
BATCH = 16


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=5)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='photographs, in class folders')
    parser.add_argument('--split', default='validation', metavar='NAME', help='split of DIR (default: %(default)s)')
    parser.add_argument('--model', metavar='FILE.onnx', help='measure the accuracy of this file instead of times')
    parser.add_argument('--most', type=int, metavar='N', help='photographs that are answered (default: all)')
    parser.add_argument('--side', type=int, default=0, metavar='N', help='enlarge them to a shorter side of N px')
    parser.add_argument('--noise', type=float, default=4, metavar='X', help='noise of enlarged ones (default: 4)')
    args = parser.parse_args()
    rows = compare_accuracy(args) if args.model else compare_time(args)
    print_table([key for key in rows[0] if not key.endswith('_range')], rows)
    write_results(args, rows)


def enlarged(path, size, noise):
    """Return an enlarged photograph as the bytes of a JPEG."""
    image = open_image(path).resize(size, Image.Resampling.BICUBIC)
    if noise:
        pixels = np.asarray(image) + np.random.default_rng(0).normal(0, noise, (*size[::-1], 3))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return file.getvalue()


def compare_time(args):
    """Return a row for each network, photograph and size."""
    paths = find_images(split_folder(args.data_dir, args.split), PHOTOGRAPHS)
    photographs = {size: [enlarged(path, size, 4) for path in paths] for size in SIZES}
    cases = [(name, size, resolution) for name in NETWORKS for size in SIZES for resolution in RESOLUTIONS]
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            torch.manual_seed(0)
            export_switchable(timm.create_model(f'rs_{name}', resolutions=RESOLUTIONS).eval(), f'{folder}/{name}.onnx')

        def build():
            sessions = {
                (name, decode): Session(f'{folder}/{name}.onnx', args.threads, decode=decode)
                for name in NETWORKS for decode in MARGINS}
            return {
                f'{decode} {case}': lambda s=sessions[case[0], decode], size=case[1], r=case[2]: [
                    s.predict(photograph, r) for photograph in photographs[size]]
                for case in cases for decode in MARGINS}

        runs = measure(build, args, warmup=1)
    rows = []
    for case in cases:
        name, (width, height), resolution = case
        row = dict(case=f'{name}, {width}x{height} at {resolution} px', exact_ms=median(
            runs, f'exact {case}', 1e-3 * PHOTOGRAPHS))
        for decode in ('scaled', 'fast'):
            found = ratio(runs, f'{decode} {case}', f'exact {case}')
            row.update({
                f'{decode}_ms': median(runs, f'{decode} {case}', 1e-3 * PHOTOGRAPHS), decode: found['ratio'],
                f'{decode}_range': found['range']})
        rows.append(dict(row, n=f'{args.builds} x {args.rounds}'))
    return rows


def compare_accuracy(args):
    """Return a row for each size and way of decoding; and for noise, which shows how little changes answers."""
    sessions = {decode: Session(args.model, args.threads, decode=decode) for decode in MARGINS}
    exact = sessions['exact']
    crop_pct, std = exact.preprocessing.crop_pct, np.array(exact.std, np.float32)[:, None, None]
    paths, labels = label_folders(split_folder(args.data_dir, args.split), exact, args.most)
    noise = np.random.default_rng(0)
    found = {(r, decode): [] for r in exact.resolutions for decode in (*MARGINS, 'noise')}
    for start in range(0, len(paths), BATCH):
        batch = paths[start:start + BATCH]
        if args.side:
            batch = [enlarged(path, to_side(args.side, *open_image(path).size), args.noise) for path in batch]
        whole = list(map(exact.read, batch))  # once: all its sizes decode the same
        for r in exact.resolutions:
            inputs = np.stack([exact.preprocess(image, r) for image in whole])
            for decode in (*MARGINS, 'noise'):
                opened, changed = whole, inputs
                if decode in ('scaled', 'fast'):
                    opened = [sessions[decode].read(photograph, r) for photograph in batch]
                    changed = np.stack([sessions[decode].preprocess(image, r) for image in opened])
                elif decode == 'noise':
                    changed = inputs + noise.integers(-1, 2, inputs.shape).astype(np.float32) / (255 * std)
                answers = exact.predict(changed).argmax(-1)
                ratios = [min(image.size) * crop_pct / r for image in opened]
                errors = ((255 * std * (changed - inputs)) ** 2).mean((1, 2, 3))
                found[r, decode] += zip(answers, ratios, errors)
    rows = []
    for (r, decode), values in found.items():
        answers, ratios, errors = map(np.array, zip(*values))
        reference = np.array([answer for answer, *_ in found[r, 'exact']])
        rows.append(dict(
            resolution=r, decode=decode, images=len(paths), pixels_per_side=round(float(np.median(ratios)), 2),
            rms_levels=round(float(errors.mean()) ** 0.5, 2), top1=round(100 * float((answers == labels).mean()), 2),
            agreement=round(100 * float((answers == reference).mean()), 2)))
    return rows


def to_side(side, width, height):
    factor = side / min(width, height)
    return round(width * factor), round(height * factor)


if __name__ == '__main__':
    main()
