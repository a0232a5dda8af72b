#!/usr/bin/env python3
"""How well networks bear the statistics of a batch, as `train_rs.py --bn-statistics auto` measures it

For each network and size the mean cosine, over training images, between features with the running statistics and with
those of the batch, each without its mean. train_rs.py takes the statistics of the batch from 0.8 on average.

    timm-rs convert FILE --model rs_tf_efficientnet_lite0 --resolutions 128 96 64 --output lite0
    python experiments/bn_similarity.py imagenette rs_resnet10t.imagenette local-dir:lite0
"""
import csv
from pathlib import Path

import timm
import torch
from _shared import create_parser
from PIL import Image
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config

from timm_rs.train import MultiResolutionTask


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data', type=Path, metavar='DIR', help='folder of images, in folders of any depth')
    add('networks', nargs='+', metavar='NAME', help='switchable networks with their weights, e.g. local-dir:FOLDER')
    add('--images', type=int, nargs='+', default=[32], metavar='N', help='images of a batch (default: 32)')
    parser.set_defaults(output=Path('results/bn_similarity.csv'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(args.data.rglob('*.JPEG')) + sorted(args.data.rglob('*.jp*g'))
    rows = []
    for name in args.networks:
        model = timm.create_model(name, pretrained=True)
        config = resolve_input_data_config(model)
        transform = create_transform(
            model.resolutions[0], is_training=True, mean=config['mean'], std=config['std'],
            interpolation=config['interpolation'])
        for count in args.images:
            torch.manual_seed(0)
            chosen = [paths[i] for i in torch.randperm(len(paths))[:count].tolist()]
            images = torch.stack([transform(Image.open(p).convert('RGB')) for p in chosen])
            found = MultiResolutionTask(model, verbose=False).measure_statistics(images)
            rows += [dict(network=name.rpartition('/')[2].rpartition(':')[2], resolution=r, images=count,
                          similarity=round(s, 3)) for r, s in zip(model.resolutions, found)]
            print(name, count, *(f'{s:.3f}' for s in found), flush=True)
    with args.output.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
