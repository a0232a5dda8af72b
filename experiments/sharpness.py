#!/usr/bin/env python3
"""Images resized once against images resized twice: pixels, and accuracy of networks trained on either

train_rs.py makes the smaller images of a batch from the largest, evaluation makes them from the photograph. The
validation images come to each size

    once           as evaluation does
    antialiased    by way of the largest size, both times with antialiased interpolation
    matched        by way of the largest size, the second time with timm_rs.data.resample.downscale

Printed is the root mean square difference to the first, in levels of 255, and the accuracy of switchable networks, for
example of train_rs.py with --resample antialiased and --resample matched.

    python experiments/sharpness.py DIR --checkpoint antialiased/last.pth.tar matched/last.pth.tar

Writes results/sharpness.json.
"""
from pathlib import Path

import torch
from _shared import create_parser, print_table, write_results
from timm.data import resolve_model_data_config

from timm_rs.data.datasets import PyramidNormalizer, create_dataset, create_eval_loader
from timm_rs.evaluate import evaluate
from timm_rs.load import load_model
from timm_rs.train import ResolutionPyramid


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with val/, with a folder per class')
    add('--checkpoint', required=True, nargs='+', metavar='FILE', help='of train_rs.py, all of the same sizes')
    add('--workers', type=int, default=0, metavar='N')
    args = parser.parse_args(argv)

    models = {Path(path).parent.name: load_model(path).model.eval() for path in args.checkpoint}
    model = next(iter(models.values()))
    sizes, config = model.resolutions, dict(resolve_model_data_config(model), crop_pct=1., interpolation='bilinear')
    dataset = create_dataset('', args.data_dir, 'val')
    normalize = PyramidNormalizer(config['mean'], config['std'], torch.device('cpu'))
    batches = [([normalize(x) for x in levels], target) for levels, target in create_eval_loader(
        dataset, sizes, 64, config, args.workers)]
    ways = dict(once=batches)
    for resample in ResolutionPyramid.RESAMPLES:
        pyramid = ResolutionPyramid(sizes, resample=resample)
        ways[resample] = [(pyramid(levels[0]), target) for levels, target in batches]
    reached = {
        (name, way): evaluate(network, loader, sizes, lambda x: x)
        for name, network in models.items() for way, loader in ways.items()}
    rows = []
    for way, loader in ways.items():
        for i, size in enumerate(sizes):
            differences = torch.cat([levels[i] - once[i] for (levels, _), (once, _) in zip(loader, batches)])
            rows.append(dict(
                resolution=size, resized=way,
                difference=round((differences * normalize.std).square().mean().sqrt().item(), 3),
                **{name: round(reached[name, way][size]['top1'], 2) for name in models}))
    print_table(list(rows[0]), rows)
    write_results(args, rows)


if __name__ == '__main__':
    main()
