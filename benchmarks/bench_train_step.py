#!/usr/bin/env python3
"""Training: one step at five resolutions against five plain timm steps

One step of MultiResolutionTask on rs_resnet18 at 224, 192, 160, 128 and 96 px (pyramid, forward at all sizes, ensemble
distillation, backward, optimizer) against what it replaces: one timm ClassificationTask step (forward, cross entropy,
backward, optimizer) at each of these sizes, on five plain resnet18, one per size. Wanted: a ratio of at most 1.05.

Both sides: float32, the same images and targets, initial weights of one state dict, timm's SGD with momentum 0.9 and
weight decay, as `create_optimizer_v2` makes it. The pyramid is made within the RS step; the plain steps get their
resized images ready-made. The RS step updates its weights once and the plain steps five times in all, which is in the
nature of the two; the second row leaves the optimizer out on both sides.

Sides take turns (A B A B ...). n: 3 builds of all networks, 10 rounds with each (--builds, --rounds). A ratio is the
median over builds of the median ratio within a round, with its range over builds.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --clock cpu    # while other programs share the cores
    python benchmarks/bench_train_step.py --threads 2 --output results/bench_train_step_2threads.json

One run takes about ten minutes on one core.
"""
import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_rs.train import MultiResolutionTask

COLUMNS = ('case', 'rs_ms', 'plain_ms', 'ratio', 'range', 'wanted', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=10)
    parser.add_argument('--model', default='resnet18', help='timm model (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    args = parser.parse_args()
    torch.manual_seed(0)

    runs = measure(lambda: create_contenders(args), args, warmup=1)
    rows = [
        create_row(args, f'rs_{args.model} step / five plain steps', runs, 'rs', 'plain', wanted=1.05),
        create_row(args, 'the same without optimizer', runs, 'rs_backward', 'plain_backward'),
    ]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(args):
    """Return both sides, each with and without the update of the optimizer."""
    model = timm.create_model(f'rs_{args.model}')
    task, optimizer = create_trainer(MultiResolutionTask, model)
    images = torch.randn(args.batch_size, 3, model.resolutions[0], model.resolutions[0])
    target = torch.randint(model.num_classes, (args.batch_size,))
    plain = []
    for resolution, resized in zip(model.resolutions, task.pyramid(images)):
        network = timm.create_model(args.model)
        network.load_state_dict(model.at(resolution).state_dict())
        plain.append((*create_trainer(ClassificationTask, network), resized))

    def rs_step(update):
        step(task, optimizer, images, target, update)

    def plain_steps(update):
        for plain_task, plain_optimizer, resized in plain:
            step(plain_task, plain_optimizer, resized, target, update)

    return dict(
        rs=lambda: rs_step(update=True),
        plain=lambda: plain_steps(update=True),
        rs_backward=lambda: rs_step(update=False),
        plain_backward=lambda: plain_steps(update=False),
    )


def create_trainer(task_class, network):
    optimizer = create_optimizer_v2(network, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=1e-4)
    return task_class(network, verbose=False).train(), optimizer


def step(task, optimizer, images, target, update):
    task(images, target)['loss'].backward()
    if update:
        optimizer.step()
    optimizer.zero_grad()


def create_row(args, case, runs, rs, plain, **extra):
    return dict(
        case=f'{case}, batch {args.batch_size}',
        rs_ms=median(runs, rs),
        plain_ms=median(runs, plain),
        **ratio(runs, rs, plain),
        **extra,
        n=f'{args.builds} x {args.rounds}',
    )


if __name__ == '__main__':
    main()
