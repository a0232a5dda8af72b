#!/usr/bin/env python3
"""Quantized training: one step at five resolutions against the same step of the float network

One step of MultiResolutionTask at 224, 192, 160, 128 and 96 px (pyramid, forward at all sizes with an update of every
basis at each, ensemble distillation, backward, optimizer): rs_resnet18_w2a32 against rs_resnet18, and
rs_preresnet18_w2a2 against rs_preresnet18. Wanted: a ratio of at most 1.6.

Both sides: float32, the same images, targets and initial weights, timm's SGD with momentum 0.9 and weight decay. What
quantizing weights costs does not depend on the batch, so a small one makes the ratio larger.

Sides take turns (A B A B ...). n: 3 builds of all networks, 5 rounds with each (--builds, --rounds). A ratio is the
median over builds of the median ratio within a round, with its range over builds.

    python benchmarks/bench_quant_step.py
    python benchmarks/bench_quant_step.py --clock cpu    # while other programs share the cores

One run takes about ten minutes on one core.
"""
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.optim import create_optimizer_v2

from timm_rs.train import MultiResolutionTask

PAIRS = {'rs_resnet18_w2a32': 'rs_resnet18', 'rs_preresnet18_w2a2': 'rs_preresnet18'}
COLUMNS = ('case', 'quantized_ms', 'float_ms', 'ratio', 'range', 'wanted', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=5)
    parser.add_argument('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    args = parser.parse_args()
    torch.manual_seed(0)

    runs = measure(lambda: create_contenders(args), args, warmup=1)
    rows = [
        dict(
            case=f'{quantized} step / {plain} step, batch {args.batch_size}',
            quantized_ms=median(runs, quantized),
            float_ms=median(runs, plain),
            **ratio(runs, quantized, plain),
            wanted=1.6,
            n=f'{args.builds} x {args.rounds}',
        )
        for quantized, plain in PAIRS.items()
    ]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(args):
    """Return the steps of both sides of all pairs."""
    images, target = torch.randn(args.batch_size, 3, 224, 224), torch.randint(1000, (args.batch_size,))
    contenders = {}
    for quantized, plain in PAIRS.items():
        network = timm.create_model(plain)
        twin = timm.create_model(quantized)
        twin.load_state_dict(network.state_dict(), strict=False)  # without bases
        contenders[plain] = create_step(network, images, target)
        contenders[quantized] = create_step(twin, images, target)
    return contenders


def create_step(network, images, target):
    task = MultiResolutionTask(network, verbose=False).train()
    optimizer = create_optimizer_v2(network, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=5e-5)

    def step():
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == '__main__':
    main()
