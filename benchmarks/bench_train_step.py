#!/usr/bin/env python3
"""Training: one step at five resolutions against five plain timm steps

One step of MultiResolutionTask on rs_resnet18 at 224, 192, 160, 128 and 96 px (pyramid, forward at all sizes, ensemble
distillation, backward, optimizer) against what it replaces: one timm ClassificationTask step (forward, cross entropy,
backward, optimizer) at each of these sizes, on five plain resnet18, one per size. Wanted: a ratio of at most 1.05.

Both sides: float32, the same batch of images and targets, initial weights of one state dict, timm's SGD with momentum
0.9 and weight decay. The pyramid is made within the RS step; the plain steps get their resized images ready-made. The
RS step updates its weights once and the plain steps five times in all, which is in the nature of the two; the second
row leaves the optimizer out on both sides.

Sides take turns (A B A B ...), 30 rounds by default (--rounds); a ratio is the median over rounds of the ratio within a
round, with its 95% interval.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --threads 2 --output results/bench_train_step_2threads.json

One run takes about ten minutes on one core.
"""
import timm
import torch
from _common import create_parser, measure, print_table, ratio, summarize, write_results
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_rs.train import MultiResolutionTask

COLUMNS = ('case', 'rs_ms', 'plain_ms', 'ratio', 'interval', 'wanted', 'n')


def main():
    parser = create_parser(__doc__, rounds=30)
    parser.add_argument('--model', default='resnet18', help='timm model (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--threads', default=1, type=int, metavar='N', help='threads of torch (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = timm.create_model(f'rs_{args.model}')
    task = MultiResolutionTask(model, verbose=False).train()
    optimizer = create_optimizer(model)
    plain = []
    for r in model.resolutions:
        network = timm.create_model(args.model)
        network.load_state_dict(model.at(r).state_dict())
        plain.append((ClassificationTask(network, verbose=False).train(), create_optimizer(network)))
    images = torch.randn(args.batch_size, 3, model.resolutions[0], model.resolutions[0])
    target = torch.randint(model.num_classes, (args.batch_size,))
    pyramid = task.pyramid(images)

    def rs_step(update):
        step(task, optimizer, images, target, update)

    def plain_steps(update):
        for (plain_task, plain_optimizer), resized in zip(plain, pyramid):
            step(plain_task, plain_optimizer, resized, target, update)

    contenders = dict(
        rs=lambda: rs_step(True),
        plain=lambda: plain_steps(True),
        rs_no_update=lambda: rs_step(False),
        plain_no_update=lambda: plain_steps(False),
    )
    seconds = measure(contenders, args.rounds)
    rows = [
        create_row('RS step / sum of plain steps', seconds['rs'], seconds['plain'], wanted=1.05),
        create_row('the same without optimizer', seconds['rs_no_update'], seconds['plain_no_update']),
    ]
    print(f'{args.model}, batch {args.batch_size}, {", ".join(map(str, model.resolutions))} px')
    print_table(COLUMNS, rows)
    write_results(args.output, args, rows, threads=args.threads)


def create_optimizer(model):
    return create_optimizer_v2(model, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=1e-4)


def step(task, optimizer, images, target, update):
    task(images, target)['loss'].backward()
    if update:
        optimizer.step()
    optimizer.zero_grad()


def create_row(case, rs, plain, **extra):
    medians = summarize(dict(rs_ms=rs, plain_ms=plain))
    return dict(case=case, **medians, **ratio(rs, plain), **extra, n=len(rs))


if __name__ == '__main__':
    main()
