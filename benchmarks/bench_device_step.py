#!/usr/bin/env python3
"""Training on a GPU: images per second of a step at five resolutions, by precision and layout, against its bound

For each of --models one step (pyramid, forward at all sizes, ensemble distillation, backward, optimizer) of rs_<model>

    float32      eager, NCHW, as the authors' code runs
    amp          bfloat16 autocast, channels_last
    compiled     the same with torch.compile
    five plain   one timm step at each of the sizes on a network of its own, bfloat16, channels_last and compiled: the
                 bound, which a switchable step cannot pass

and the peak of the memory that each allocates. Images lie on the device, so no loader limits. Sides take turns; n: 1
build, 10 rounds of --steps steps. A ratio is the median within a round.

    python benchmarks/bench_device_step.py
    python benchmarks/bench_device_step.py --device cpu --models test_resnet --resolutions 64 32 --batch-size 4    # dry
"""
import time
from functools import partial

import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_rs.train import MultiResolutionTask

COLUMNS = ('model', 'case', 'images_per_second', 'against_float32', 'share_of_bound', 'peak_gb', 'first_step_s')
CASES = ('float32', 'amp', 'compiled', 'five plain')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=10)
    add = parser.add_argument
    add('--models', nargs='+', default=['resnet18', 'resnet50'], metavar='NAME', help='timm models')
    add('--resolutions', type=int, nargs='+', default=[224, 192, 160, 128, 96], metavar='N')
    add('-b', '--batch-size', default=128, type=int, metavar='N', help='images (default: %(default)s)')
    add('--steps', default=5, type=int, metavar='N', help='steps of a round (default: %(default)s)')
    add('--device', default='cuda')
    args = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    for name in args.models:
        first = {}
        runs = measure(partial(create_contenders, name, args, first), args, warmup=1)
        for case in CASES:
            row = dict(model=name, case=case)
            row.update(images_per_second=round(args.batch_size * args.steps / median(runs, case, unit=1)))
            row.update(against_float32=ratio(runs, 'float32', case)['ratio'])
            row.update(share_of_bound=ratio(runs, 'five plain', case)['ratio'])
            rows.append(dict(row, **first[case]))
    args.gpu = torch.cuda.get_device_name() if args.device == 'cuda' else None
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(name, args, first):
    """Return what runs --steps steps of each case, and note what its first step takes and its peak."""
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, max(args.resolutions), max(args.resolutions), device=device)
    target = torch.randint(1000, (args.batch_size,), device=device)
    contenders = {}
    for case in CASES:
        amp = case != 'float32'
        layout = torch.channels_last if amp else torch.contiguous_format
        switchable = timm.create_model(f'rs_{name}', resolutions=args.resolutions)
        if case == 'five plain':
            levels = MultiResolutionTask(switchable, verbose=False).pyramid(images)
            pairs = [(ClassificationTask(timm.create_model(name), verbose=False), x) for x in levels]
        else:
            pairs = [(MultiResolutionTask(switchable, verbose=False), images)]
        sides = []
        for task, batch in pairs:
            task.to(device=device, memory_format=layout).train()
            optimizer = create_optimizer_v2(task.trainable_module, opt='sgd', lr=1e-3, momentum=0.9)
            if case in ('compiled', 'five plain'):
                task.compile(backend='inductor')
            sides.append((task, optimizer, batch.contiguous(memory_format=layout)))

        def run(steps=args.steps, sides=sides, amp=amp):
            for _ in range(steps):
                for task, optimizer, batch in sides:
                    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                        loss = task(batch, target)['loss']
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            if device.type == 'cuda':
                torch.cuda.synchronize()

        began = time.perf_counter()
        run(1)
        first[case] = dict(first_step_s=round(time.perf_counter() - began, 1))
        if device.type == 'cuda':
            run(1)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run(1)
            first[case].update(peak_gb=round((torch.cuda.max_memory_allocated() - before) / 2 ** 30, 2))
        contenders[case] = run
    return contenders


if __name__ == '__main__':
    main()
