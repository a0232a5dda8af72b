#!/usr/bin/env python3
"""Inference: a switchable network against plain timm networks of the same weights

Three comparisons, all in float32, in eval and inference mode, in one process:

- `model.at(r)` against `timm.create_model(...)` with the weights of `model.at(r)`, at every resolution r.
  Wanted: a ratio of at most 1.02.
- `model(x)`, which finds the resolution and passes through PrivateBN, against the same plain network, batch 1 at the
  smallest resolution, where overhead weighs most. Wanted: at most 1.05.
- `switch_to` on rs_resnet50 against the plain alternative, `load_state_dict` of the BatchNorms of that resolution into
  one timm resnet50. Wanted: at most 50 microseconds.

Contenders take turns (A B A B ...). n: 10 builds of all networks, 30 rounds with each (--builds, --rounds). A ratio is
the median over builds of the median ratio within a round, with its range over builds. A second plain network of the
same weights takes part as a control: its ratio to the first, ideally 1, shows what the machine can tell apart. Before
the timing, outputs are compared.

    python benchmarks/bench_inference.py
    python benchmarks/bench_inference.py --clock cpu    # while other programs share the cores
    python benchmarks/bench_inference.py --threads 2 --output results/bench_inference_2threads.json

One run takes about five minutes on one core.
"""
import itertools

import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results

from timm_rs import PrivateBN

COLUMNS = ('case', 'rs_ms', 'plain_ms', 'ratio', 'range', 'control', 'control_range', 'wanted', 'n')
SWITCH_COLUMNS = ('case', 'rs_us', 'plain_us', 'wanted', 'n')
SWITCHES = 1000  # timed as one: a single switch is too short for the clock


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=10, rounds=30)
    parser.add_argument('--model', default='resnet18', help='timm model of the ratios (default: %(default)s)')
    parser.add_argument('--switch-model', default='resnet50', help='timm model to switch (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=1, type=int, metavar='N',
                        help='images, of the first comparison (default: %(default)s)')
    args = parser.parse_args()

    resolutions = timm.create_model(f'rs_{args.model}').resolutions
    with torch.inference_mode():
        rows = [compare_at(args, resolution) for resolution in resolutions]
        rows.append(compare_switchable(args, resolutions[-1]))
    print_table(COLUMNS, rows)
    switch = compare_switch_to(args)
    print()
    print_table(SWITCH_COLUMNS, [switch])
    write_results(args, rows + [switch])


def compare_at(args, resolution):
    """Return the row of model.at(resolution)."""
    x = torch.randn(args.batch_size, 3, resolution, resolution)

    def build():
        network = timm.create_model(f'rs_{args.model}').eval().at(resolution)
        return create_contenders(args, network, network, x)

    return create_row(args, f'at({resolution}), batch {args.batch_size}', measure(build, args), wanted=1.02)


def compare_switchable(args, resolution):
    """Return the row of model(x)."""
    x = torch.randn(1, 3, resolution, resolution)

    def build():
        model = timm.create_model(f'rs_{args.model}').eval()
        return create_contenders(args, model, model.at(resolution), x)

    return create_row(args, f'model(x) at {resolution}, batch 1', measure(build, args), wanted=1.05)


def create_contenders(args, network, source, x):
    """Return the network and two plain timm networks with the weights of source, to be run on x."""
    plain, control = (timm.create_model(args.model).eval() for _ in range(2))
    plain.load_state_dict(source.state_dict())
    control.load_state_dict(source.state_dict())
    torch.testing.assert_close(network(x), plain(x))
    return dict(rs=lambda: network(x), plain=lambda: plain(x), control=lambda: control(x))


def create_row(args, case, runs, wanted):
    control = ratio(runs, 'control', 'plain')
    return dict(
        case=f'rs_{args.model} {case}',
        rs_ms=median(runs, 'rs'),
        plain_ms=median(runs, 'plain'),
        **ratio(runs, 'rs', 'plain'),
        control=control['ratio'],
        control_range=control['range'],
        wanted=wanted,
        n=f'{args.builds} x {args.rounds}',
    )


def compare_switch_to(args):
    """Return the row of switch_to against loading the BatchNorms of a resolution into a plain network."""
    def build():
        model = timm.create_model(f'rs_{args.switch_model}').eval()
        plain = timm.create_model(args.switch_model).eval()
        private = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, PrivateBN))
        states = {
            r: {k: v for k, v in model.at(r).state_dict().items() if k.startswith(private)} for r in model.resolutions
        }
        sizes = itertools.cycle(model.resolutions)

        def switch():
            for resolution in itertools.islice(sizes, SWITCHES):
                model.switch_to(resolution)

        return dict(rs=switch, plain=lambda: plain.load_state_dict(states[next(sizes)], strict=False))

    runs = measure(build, args)
    return dict(
        case=f'rs_{args.switch_model} switch_to, plain: load_state_dict of its BatchNorms',
        rs_us=median(runs, 'rs', unit=1e-6 * SWITCHES),
        plain_us=median(runs, 'plain', unit=1e-6),
        wanted=50,
        n=f'{args.builds} x {args.rounds} x {SWITCHES}',
    )


if __name__ == '__main__':
    main()
