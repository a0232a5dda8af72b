#!/usr/bin/env python3
"""Export a network of every family of timm that becomes rs_* models, into results/exports.csv

The network with the fewest multiply-adds of each family (module of timm) is written as one ONNX file for two
resolutions, in float32 and in int8, and compared with PyTorch. Where that cannot be, the row says why.

    python tools/sweep_exports.py

Columns: float32 is ok or the reason, difference the largest one of logits over the largest logit, size the file over
the weights of the plain network, int8 is ok or the reason, int8_size that file over the float32 one. All weights are
random and the images noise: experiments/export_accuracy.py measures how accurate int8 is on photographs.
"""
import argparse
import csv
import os
import platform
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from _table import write_json, write_rows
from PIL import Image
from sweep import OUTPUT as ZOO
from sweep import randomize_bn
from tqdm import tqdm

import timm_rs
from timm_rs.export import ExportError, export_int8, export_switchable

OUTPUT = ZOO.with_name('exports.csv')
RESOLUTIONS = (160, 96)
COLUMNS = ('family', 'name', 'float32', 'difference', 'size', 'int8', 'int8_size')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('--output', default=OUTPUT, type=Path, metavar='FILE', help='table to write')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    rows = []
    for family, name in tqdm(sorted(cheapest(ZOO).items()), disable=None):
        rows.append(dict(family=family, name=name, **export(name)))
        print(rows[-1], flush=True)
        write_rows(args.output, COLUMNS, rows)
    write_json(args.output.with_suffix('.json'), dict(
        command=shlex.join(['python', 'tools/sweep_exports.py', *sys.argv[1:]]),
        versions=dict(timm=timm.__version__, torch=torch.__version__, python=platform.python_version()),
        timm_rs=timm_rs.__version__,
        resolutions=RESOLUTIONS,
        families=len(rows),
        float32=sum(row['float32'] == 'ok' for row in rows),
        int8=sum(row['int8'] == 'ok' for row in rows),
    ))


def cheapest(path):
    """Return the network of the fewest multiply-adds of each family."""
    with open(path, newline='', encoding='utf-8') as f:
        rows = sorted(csv.DictReader(f), key=lambda row: -int(row[f'madds_{RESOLUTIONS[0]}'] or 0))
    return {row['family']: row['name'] for row in rows if row['status'] == 'ok'}


def export(name):
    """Return the columns of a network from float32 on."""
    torch.manual_seed(0)
    model = timm.create_model(name, resolutions=RESOLUTIONS).eval()
    if not model.num_classes:
        model.reset_classifier(10)
    randomize_bn(model)
    with torch.inference_mode():
        size = RESOLUTIONS[0]
        largest = model(torch.randn(1, 3, size, size)).abs().max().item()
    row = dict(float32='ok', int8='ok')
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f'{kind}.onnx') for kind in ('float32', 'int8')]
        try:
            errors = export_switchable(model, paths[0])
        except ExportError as e:
            return dict(row, float32=reason(e), int8='')
        row['difference'] = f'{max(errors.values()) / largest:.1e}'
        weights = sum(p.numel() for p in model.at(size).parameters())
        row['size'] = f'{os.path.getsize(paths[0]) / weights / 4:.3f}'
        try:
            export_int8(model, paths[1], [noise(seed) for seed in range(8)])
        except ExportError as e:
            return dict(row, int8=reason(e))
        row['int8_size'] = f'{os.path.getsize(paths[1]) / os.path.getsize(paths[0]):.3f}'
    return row


def noise(seed):
    values = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy()).resize((180, 180), Image.Resampling.BICUBIC)


def reason(error):
    return ' '.join(str(error).split())[:200]


if __name__ == '__main__':
    main()
