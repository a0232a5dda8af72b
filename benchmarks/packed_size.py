#!/usr/bin/env python3
"""Size of model files: weights of K bits against float32

Each network, of 1000 classes and five resolutions, is written by timm_rs.hub.convert.save_model as it is and packed:
what counts is model.safetensors. Packed are the codes of the quantized convolutions; their bases, the first
convolution, the BatchNorms of all resolutions and the classifier stay float32.

    python benchmarks/packed_size.py

A run takes a few seconds.
"""
import tempfile
from pathlib import Path

import timm
from _common import create_parser, print_table, write_results

from timm_rs.hub.convert import save_model
from timm_rs.models.rs_models import OTHER_MODELS, PREFIX

COLUMNS = ('network', 'float32_mb', 'packed_mb', 'ratio')


def main():
    args = create_parser(__doc__).parse_args()
    rows = []
    for name, (_, _, quantization) in OTHER_MODELS.items():
        if quantization:
            model = timm.create_model(PREFIX + name)
            full, packed = (file_size(model, packed) for packed in (False, True))
            rows.append(dict(
                network=PREFIX + name,
                float32_mb=round(full / 1e6, 2),
                packed_mb=round(packed / 1e6, 2),
                ratio=round(full / packed, 2),
            ))
    print_table(COLUMNS, rows)
    write_results(args, rows)


def file_size(model, packed):
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f'{folder}/model', packed=packed)
        return Path(folder, 'model', 'model.safetensors').stat().st_size


if __name__ == '__main__':
    main()
