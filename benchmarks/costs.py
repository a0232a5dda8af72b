#!/usr/bin/env python3
"""Parameters and multiply-adds of the paper's networks beside the published ones, and sizes of packed model files

Parameters are in millions, as timm counts them; the paper's are in units of 2^20 and converted. We count the
multiply-adds of convolutions and matrix products. The published ones (Wang et al., ECCV 2020, table 1) agree with that
for MobileNetV2; those of the ResNets are 0.3 to 1.2 % larger, as if normalization, activation and pooling were counted
too. No single rule gives both.

--packed instead: model.safetensors of quantized networks of 1000 classes and five resolutions as timm_rs.hub.convert
writes it, in float32 and packed. Packed are the codes of the quantized convolutions; their bases, the first
convolution, the BatchNorms and the classifier stay float32.

    python benchmarks/costs.py
    python benchmarks/costs.py --packed --output results/packed_size.json
"""
import tempfile
from pathlib import Path

import timm
from _common import create_parser, write_results

from timm_rs.evaluate import count_madds, count_parameters
from timm_rs.hub.convert import save_model
from timm_rs.models.rs_models import OTHER_MODELS, PREFIX

PUBLISHED = {  # parameters in units of 2^20, multiply-adds by size
    'rs_resnet18': (11.18, [1.82e9, 1.34e9, 931e6, 596e6, 335e6]),
    'rs_resnet50': (24.58, [4.14e9, 3.04e9, 2.11e9, 1.35e9, 760e6]),
    'rs_mobilenetv2_100': (3.47, [301e6, 221e6, 154e6, 99e6, 56e6]),
}


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--packed', action='store_true', help='sizes of model files')
    args = parser.parse_args()
    write_results(args, list(packed_sizes() if args.packed else costs()))


def costs():
    for name, (parameters, published) in PUBLISHED.items():
        model = timm.create_model(name)
        plain = timm.create_model(name.removeprefix(PREFIX))
        for resolution, expected in zip(model.resolutions, published):
            madds = count_madds(model, resolution)
            yield dict(
                model=name, resolution=resolution, madds=madds, published=int(expected),
                deviation_percent=round(100 * (madds / expected - 1), 2),
                params_M=round(count_parameters(model) / 1e6, 2),
                published_params_M=round(parameters * 2 ** 20 / 1e6, 2),
                plain_params_M=round(count_parameters(plain) / 1e6, 2))


def packed_sizes():
    for name, (_, _, quantization) in OTHER_MODELS.items():
        if quantization:
            model = timm.create_model(PREFIX + name)
            full, packed = (file_size(model, packed) for packed in (False, True))
            yield dict(
                network=PREFIX + name, float32_mb=round(full / 1e6, 2), packed_mb=round(packed / 1e6, 2),
                ratio=round(full / packed, 2))


def file_size(model, packed):
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f'{folder}/model', packed=packed)
        return Path(folder, 'model', 'model.safetensors').stat().st_size


if __name__ == '__main__':
    main()
