#!/usr/bin/env python3
"""Images resized once against images resized twice: pixels, and accuracy of networks trained on either

train_rs.py makes the smaller images of a batch of the largest, evaluation makes them of the photograph. The validation
images come to each size

    once           as evaluation does
    antialiased    by way of the largest size, both times with antialiased interpolation
    matched        by way of the largest size, the second time with timm_rs.data.resample.downscale

Printed is the root mean square difference to the first, in levels of 255, and the accuracy of switchable networks, for
example of paper_table.py with --resample antialiased and --resample matched.

    python benchmarks/sharpness.py DIR --model rs_resnet10t --sizes 48 40 32 24 --checkpoint FILE.pth FILE.pth

Writes results/sharpness.json.
"""
from pathlib import Path

import timm
import torch
from _common import create_parser, print_table, write_results
from _photographs import MEAN, STD, load_photographs

from timm_rs.train import ResolutionPyramid


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--model', required=True, help='rs_* model')
    add('--sizes', type=int, nargs='+', required=True, metavar='N', help='its sizes')
    add('--checkpoint', required=True, nargs='+', metavar='FILE', help='weights')
    add('--cache', default='output/sharpness.pt', metavar='FILE', help='decoded images')
    args = parser.parse_args()

    sizes = sorted(args.sizes, reverse=True)
    photographs = load_photographs(args.data_dir, sizes, 2 * sizes[0], 1., Path(args.cache))
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    images = dict(once=[(photographs.val[s].float() - mean) / std for s in sizes])
    for resample in ResolutionPyramid.RESAMPLES:
        images[resample] = ResolutionPyramid(sizes, resample=resample)(images['once'][0])
    rows = []
    for way, levels in images.items():
        for size, once, x in zip(sizes, images['once'], levels):
            difference = ((x - once) * std).square().mean().sqrt()
            rows.append(dict(resolution=size, resized=way, difference=round(difference.item(), 3)))
    for file in args.checkpoint:
        model = timm.create_model(
            args.model, num_classes=len(photographs.classes), resolutions=sizes, checkpoint_path=file).eval()
        levels = [x for way in images.values() for x in way]
        for row, x in zip(rows, levels):
            row[Path(file).stem] = round(accuracy(model, x, photographs.val_labels), 2)
    print_table(list(rows[0]), rows)
    write_results(args, rows)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    logits = torch.cat([model(x) for x in images.split(250)])
    return 100 * (logits.argmax(1) == labels).float().mean().item()


if __name__ == '__main__':
    main()
