#!/usr/bin/env python3
"""Parameters and multiply-adds of the paper's three networks, beside the published ones

Parameters are in millions, as timm counts them; the paper's are in units of 2^20 and converted. We count the
multiply-adds of convolutions and matrix products. The published ones (Wang et al., ECCV 2020, table 1) agree with that
for MobileNetV2; those of the ResNets are 0.3 to 1.2 % larger, as if normalization, activation and pooling were counted
too. No single rule gives both.

    python benchmarks/costs.py    # writes results/costs.json
"""
import timm
from _common import create_parser, print_table, write_results

from timm_rs.evaluate import count_madds, count_parameters

PUBLISHED = {  # parameters in units of 2^20, multiply-adds by size
    'rs_resnet18': (11.18, [1.82e9, 1.34e9, 931e6, 596e6, 335e6]),
    'rs_resnet50': (24.58, [4.14e9, 3.04e9, 2.11e9, 1.35e9, 760e6]),
    'rs_mobilenetv2_100': (3.47, [301e6, 221e6, 154e6, 99e6, 56e6]),
}


def main():
    args = create_parser(__doc__).parse_args()
    rows = []
    for name, (parameters, published) in PUBLISHED.items():
        model = timm.create_model(name)
        plain = timm.create_model(name.removeprefix('rs_'))
        for resolution, expected in zip(model.resolutions, published):
            madds = count_madds(model, resolution)
            rows.append(dict(
                model=name, resolution=resolution, madds=madds, published=int(expected),
                deviation_percent=round(100 * (madds / expected - 1), 2),
                params_M=round(count_parameters(model) / 1e6, 2),
                published_params_M=round(parameters * 2 ** 20 / 1e6, 2),
                plain_params_M=round(count_parameters(plain) / 1e6, 2)))
    print_table(rows[0], rows)
    write_results(args, rows)


if __name__ == '__main__':
    main()
