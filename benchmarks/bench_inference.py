#!/usr/bin/env python3
"""Inference: a switchable network against plain timm networks of the same weights

Three comparisons, all in float32, in eval and inference mode, in one process:

- `model.at(r)` against `timm.create_model(...)` with the weights of `model.at(r)`, at every resolution r.
  Wanted: a ratio of at most 1.02.
- `model(x)`, which finds the resolution and passes through PrivateBN, against the same plain network, batch 1 at the
  smallest resolution, where overhead weighs most. Wanted: at most 1.05.
- `switch_to` on rs_resnet50 against the plain alternative, `load_state_dict` of the BatchNorms of that resolution into
  one timm resnet50. Wanted: at most 50 microseconds.

Contenders take turns (A B A B ...), 300 rounds each by default (--rounds); a ratio is the median over rounds of the
ratio within a round, with its 95% interval. A second plain network of the same weights takes part as a control: its
ratio to the first, ideally 1, shows what this machine can tell apart. Outputs are compared before the timing.

    python benchmarks/bench_inference.py
    python benchmarks/bench_inference.py --threads 2 --output results/bench_inference_2threads.json

One run takes about three minutes on one core.
"""
import itertools
import statistics

import timm
import torch
from _common import create_parser, measure, print_table, ratio, summarize, write_results

from timm_rs import PrivateBN

COLUMNS = ('case', 'rs_ms', 'plain_ms', 'ratio', 'interval', 'control', 'wanted', 'n')
SWITCH_COLUMNS = ('case', 'us', 'alternative_us', 'wanted', 'n')
SWITCHES = 1000  # per round: one switch is too short for the clock


def main():
    parser = create_parser(__doc__, rounds=300)
    parser.add_argument('--model', default='resnet18', help='timm model of the ratios (default: %(default)s)')
    parser.add_argument('--switch-model', default='resnet50', help='timm model to switch (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=1, type=int, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--threads', default=1, type=int, metavar='N', help='threads of torch (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = timm.create_model(f'rs_{args.model}').eval()
    with torch.inference_mode():
        rows = [compare(args, model.at(r), model.at(r), r, 'at(r)', wanted=1.02) for r in model.resolutions]
        smallest = model.resolutions[-1]
        rows.append(compare(args, model, model.at(smallest), smallest, 'model(x)', wanted=1.05, batch_size=1))
    print_table(COLUMNS, rows)
    switch = time_switch(args)
    print()
    print_table(SWITCH_COLUMNS, [switch])
    write_results(args.output, args, rows + [switch], threads=args.threads)


def compare(args, network, source, resolution, name, wanted, batch_size=None):
    """Return the row of a network against two plain timm networks that hold the weights of source."""
    plain, control = (timm.create_model(args.model).eval() for _ in range(2))
    plain.load_state_dict(source.state_dict())
    control.load_state_dict(source.state_dict())
    x = torch.randn(batch_size or args.batch_size, 3, resolution, resolution)
    torch.testing.assert_close(network(x), plain(x))

    contenders = dict(rs=lambda: network(x), plain=lambda: plain(x), control=lambda: control(x))
    seconds = measure(contenders, args.rounds, warmup=10)
    medians = summarize(seconds)
    against_control = ratio(seconds['control'], seconds['plain'])
    return dict(
        case=f'rs_{args.model} {name} / plain, batch {len(x)}, {resolution} px',
        rs_ms=medians['rs'],
        plain_ms=medians['plain'],
        **ratio(seconds['rs'], seconds['plain']),
        control=against_control['ratio'],
        control_interval=against_control['interval'],
        wanted=wanted,
        n=args.rounds,
    )


def time_switch(args):
    """Return the row of switch_to against loading the BatchNorms of a resolution into a plain network."""
    model = timm.create_model(f'rs_{args.switch_model}').eval()
    plain = timm.create_model(args.switch_model).eval()
    names = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, PrivateBN))
    states = {r: {k: v for k, v in model.at(r).state_dict().items() if k.startswith(names)} for r in model.resolutions}
    sizes = itertools.cycle(model.resolutions)

    def switch():
        for r in itertools.islice(sizes, SWITCHES):
            model.switch_to(r)

    def load():
        plain.load_state_dict(states[next(sizes)], strict=False)

    seconds = measure(dict(rs=switch, plain=load), args.rounds)
    return dict(
        case=f'rs_{args.switch_model} switch_to / load_state_dict of its BatchNorms',
        us=round(statistics.median(seconds['rs']) / SWITCHES * 1e6, 3),
        alternative_us=round(statistics.median(seconds['plain']) * 1e6, 1),
        wanted=50,
        n=args.rounds,
        switches_per_round=SWITCHES,
    )


if __name__ == '__main__':
    main()
