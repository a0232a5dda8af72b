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

One run takes about five minutes on one core.
"""
import itertools

import timm
import torch
from _common import add_timing_arguments, compare, create_parser, measure, median, ratio, write_results

from timm_rs import PrivateBN

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
        rows = [compare_networks(args, 'model.at(r)', r, args.batch_size, wanted=1.02) for r in resolutions]
        rows.append(compare_networks(args, 'model(x)', resolutions[-1], batch_size=1, wanted=1.05))
    write_results(args, [*rows, compare_switch_to(args)])


def compare_networks(args, which, resolution, batch_size, wanted):
    """Return the row of model(x) or model.at(resolution)(x) against two plain networks with the same weights."""
    x = torch.randn(batch_size, 3, resolution, resolution)

    def build():
        model = timm.create_model(f'rs_{args.model}').eval()
        extracted = model.at(resolution)
        network = model if which == 'model(x)' else extracted
        plain, control = (timm.create_model(args.model).eval() for _ in range(2))
        plain.load_state_dict(extracted.state_dict())
        control.load_state_dict(extracted.state_dict())
        torch.testing.assert_close(network(x), plain(x))
        return dict(rs=lambda: network(x), plain=lambda: plain(x), control=lambda: control(x))

    runs = measure(build, args)
    control = ratio(runs, 'control', 'plain')
    return compare(
        args, runs, f'rs_{args.model} {which} at {resolution}, batch {batch_size}', 'rs', 'plain',
        control=control['ratio'], control_range=control['range'], wanted=wanted)


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
