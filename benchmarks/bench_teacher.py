#!/usr/bin/env python3
"""Training: a step with a fixed teacher against one without

One step of MultiResolutionTask on rs_tf_efficientnet_lite0 at 224, 192, 160, 128 and 96 px, with running statistics and
AdamW as from pretrained weights, with the network of the largest size as a fixed teacher against without one. The
teacher is one forward pass at the largest size. Wanted: a ratio of at most 1.15. And the comparison of statistics at
the start of a run (--bn-statistics auto) against a step with as many images. It takes 32 images whatever the batch, so
epoch_percent is its share of an epoch of 6,400 and of 1,500 images. Wanted: at most 2 %.

Sides take turns (A B A B ...). n: 2 builds of all networks, 5 rounds with each (--builds, --rounds). A ratio is the
median over builds of the median ratio within a round, with its range over builds.

    python benchmarks/bench_teacher.py
    python benchmarks/bench_teacher.py --clock cpu    # while other programs share the cores
"""
import copy

import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.optim import create_optimizer_v2

from timm_rs.train import MultiResolutionTask
from timm_rs.train.teacher import FixedTeachers

COLUMNS = ('case', 'ms', 'plain_ms', 'ratio', 'range', 'epoch_percent', 'wanted', 'n')
PROBED = 32  # images of MultiResolutionTask.measure_statistics


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=2, rounds=5)
    add = parser.add_argument
    add('--model', default='rs_tf_efficientnet_lite0', help='rs_* model (default: %(default)s)')
    add('--resolutions', type=int, nargs='+', default=[224, 192, 160, 128, 96], metavar='N', help='input sizes')
    add('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    args = parser.parse_args()
    if args.batch_size > PROBED:
        parser.error(f'--batch-size is {args.batch_size}, expected at most {PROBED}.')
    torch.manual_seed(0)
    runs = measure(lambda: create_contenders(args), args, warmup=1)
    rows = [
        create_row(args, 'step with a fixed teacher / step without', runs, 'teacher', wanted='<= 1.15'),
        create_row(args, 'comparison of statistics / step', runs, 'comparison', wanted='<= 2 % of an epoch'),
    ]
    rows[1]['epoch_percent'] = [round(100 * rows[1]['ratio'] * PROBED / n, 2) for n in (6400, 1500)]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(args):
    model = timm.create_model(args.model, resolutions=args.resolutions, num_classes=1000)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, *[model.resolutions[0]] * 2).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (args.batch_size,))
    mean, std = (model.pretrained_cfg[k] for k in ('mean', 'std'))
    tasks = {}
    for name in ('teacher', 'plain'):
        network = copy.deepcopy(model)
        teachers = FixedTeachers([copy.deepcopy(model.at(model.resolutions[0]))], mean, std)
        task = MultiResolutionTask(network, teachers=teachers if name == 'teacher' else None, verbose=False)
        task.keep_statistics = True
        tasks[name] = task.train(), create_optimizer_v2(network, opt='adamw', lr=3e-4)

    def step(task, optimizer):
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    return dict(
        teacher=lambda: step(*tasks['teacher']),
        plain=lambda: step(*tasks['plain']),
        comparison=lambda: tasks['plain'][0].measure_statistics(images),
    )


def create_row(args, case, runs, name, **extra):
    return dict(
        case=f'{case}, {args.model}, batch {args.batch_size}', ms=median(runs, name), plain_ms=median(runs, 'plain'),
        **ratio(runs, name, 'plain'), **extra, n=f'{args.builds} x {args.rounds}')


if __name__ == '__main__':
    main()
