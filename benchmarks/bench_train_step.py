#!/usr/bin/env python3
"""Training: one step at five resolutions against five plain timm steps, and against lists through every layer

One step of MultiResolutionTask on rs_resnet18 at 224, 192, 160, 128 and 96 px (pyramid, forward at all sizes, ensemble
distillation, backward, optimizer) against what it replaces: one timm ClassificationTask step (forward, cross entropy,
backward, optimizer) at each of these sizes, on five plain resnet18, one per size. Wanted: a ratio of at most 1.03.

The third row is the design of the authors' code, written again here: every layer takes and returns a list of all sizes'
maps, float32 in NCHW; against it rs_resnet18 in channels_last. Wanted: at least 1.13 times its images per second.

With --quantized instead: the step of rs_resnet18_w2a32 against that of rs_resnet18, and of rs_preresnet18_w2a2 against
that of rs_preresnet18 (with an update of every basis at each size). Wanted: a ratio of at most 1.6. What quantizing
weights costs does not depend on the batch, so a small one makes the ratio larger.

All sides: float32 and NCHW (--amp, --channels-last and --torchcompile change this for the first two rows), the same
images and targets, initial weights of one state dict, timm's SGD with momentum 0.9 and weight decay. The pyramid is
made within the RS step; the plain steps get their resized images ready-made. The RS step updates its weights once and
the plain steps five times in all, which is in the nature of the two; the second row leaves the optimizer out.

Sides take turns (A B A B ...). n: 3 builds of all networks, 10 rounds with each (--builds, --rounds). A ratio is the
median over builds of the median ratio within a round, with its range over builds.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --clock cpu    # while other programs share the cores
    python benchmarks/bench_train_step.py --clock cpu --builds 1 --quantized --output results/bench_quant_step.json
    python benchmarks/bench_train_step.py --device cuda -b 128 --amp --channels-last --torchcompile

One run takes about ten minutes on one core.
"""
import copy
from functools import partial
from itertools import chain

import timm
import torch
import torch.nn as nn
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_rs.train import EnsembleDistillationLoss, MultiResolutionTask, ResolutionPyramid

PAIRS = {'rs_resnet18_w2a32': 'rs_resnet18', 'rs_preresnet18_w2a2': 'rs_preresnet18'}
COLUMNS = ('case', 'rs_ms', 'plain_ms', 'ratio', 'range', 'wanted', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=10)
    parser.add_argument('--model', default='resnet18', help='timm model (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='where to run (default: %(default)s)')
    parser.add_argument('--channels-last', action='store_true', help='layout of the first two rows')
    parser.add_argument('--amp', action='store_true', help='bfloat16 in the first two rows')
    parser.add_argument('--torchcompile', action='store_true', help='compile the networks of the first two rows')
    parser.add_argument('--quantized', action='store_true', help='quantized against float networks')
    args = parser.parse_args()
    torch.manual_seed(0)

    runs = measure(lambda: (create_pairs if args.quantized else create_contenders)(args), args, warmup=1)
    if args.quantized:
        rows = [create_row(args, f'{q} step / {f} step', runs, q, f, wanted='<= 1.6') for q, f in PAIRS.items()]
    else:
        rows = [
            create_row(args, f'rs_{args.model} step / five plain steps', runs, 'rs', 'plain', wanted='<= 1.03'),
            create_row(args, 'the same without optimizer', runs, 'rs_backward', 'plain_backward'),
            # images per second: the inverse of the times
            dict(create_row(args, f'rs_{args.model} channels_last / lists NCHW, images/s', runs, 'rs_channels_last',
                            'lists', wanted='>= 1.13'), **ratio(runs, 'lists', 'rs_channels_last')),
        ]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(args):
    """Return all sides, the first two with and without the update of the optimizer."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = timm.create_model(f'rs_{args.model}').to(args.device, memory_format=layout)
    task, optimizer = create_trainer(MultiResolutionTask, model)
    images, target = create_batch(args, model)
    images = images.to(memory_format=layout)
    plain = []
    for resolution, resized in zip(model.resolutions, task.pyramid(images)):
        network = timm.create_model(args.model).to(args.device, memory_format=layout)
        network.load_state_dict(model.at(resolution).state_dict())
        plain.append((*create_trainer(ClassificationTask, network), resized))
    last = create_trainer(MultiResolutionTask, copy.deepcopy(model).to(memory_format=torch.channels_last))
    last_images = images.contiguous(memory_format=torch.channels_last)
    lists = ListTask(model)
    lists_optimizer = create_optimizer_v2(lists, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if args.torchcompile:
        for each in (task, *(p[0] for p in plain)):
            each.compile(backend='inductor')

    def rs_step(update):
        step(task, optimizer, images, target, update, args.amp)

    def plain_steps(update):
        for plain_task, plain_optimizer, resized in plain:
            step(plain_task, plain_optimizer, resized, target, update, args.amp)

    return dict(
        rs=lambda: rs_step(update=True),
        plain=lambda: plain_steps(update=True),
        rs_backward=lambda: rs_step(update=False),
        plain_backward=lambda: plain_steps(update=False),
        rs_channels_last=lambda: step(*last, last_images, target),
        lists=lambda: step(lists, lists_optimizer, images.contiguous(), target),
    )


def create_pairs(args):
    """Return the steps of quantized networks and of their float twins."""
    contenders = {}
    for quantized, plain in PAIRS.items():
        network, twin = (timm.create_model(name).to(args.device) for name in (plain, quantized))
        twin.load_state_dict(network.state_dict(), strict=False)  # without bases
        batch = create_batch(args, network)
        for name, model in ((plain, network), (quantized, twin)):
            contenders[name] = partial(step, *create_trainer(MultiResolutionTask, model), *batch)
    return contenders


def create_batch(args, model):
    size = model.resolutions[0]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    return images, torch.randint(model.num_classes, (args.batch_size,), device=args.device)


class ListTask(nn.Module):
    """The step of a ResNet with basic blocks where lists of all sizes' maps go through every layer."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.pyramid, self.criterion = ResolutionPyramid(model.resolutions), EnsembleDistillationLoss()

    def forward(self, images, target):
        model, maps = self.model, self.pyramid(images)
        maps = self.each(model.maxpool, self.each(model.act1, self.norm(model.bn1, self.each(model.conv1, maps))))
        for block in chain(model.layer1, model.layer2, model.layer3, model.layer4):
            short = maps
            if block.downsample is not None:
                short = self.norm(block.downsample[1], self.each(block.downsample[0], maps))
            maps = self.each(block.act1, self.norm(block.bn1, self.each(block.conv1, maps)))
            maps = self.norm(block.bn2, self.each(block.conv2, maps))
            maps = self.each(block.act2, [x + y for x, y in zip(maps, short)])
        logits = self.each(model.fc, self.each(model.global_pool, maps))
        return self.criterion(logits, target, model.alpha)

    def each(self, layer, maps):
        return [layer(x) for x in maps]

    def norm(self, bn, maps):
        return [bn[r](x) for r, x in zip(self.model.resolutions, maps)]


def create_trainer(task_class, network):
    optimizer = create_optimizer_v2(network, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=1e-4)
    return task_class(network, verbose=False).train(), optimizer


def step(task, optimizer, images, target, update=True, amp=False):
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        loss = task(images, target)['loss']
    loss.backward()
    if update:
        optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


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
