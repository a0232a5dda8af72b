#!/usr/bin/env python3
"""Training: one step at five resolutions against five plain timm steps, and what further parts of a step cost

A step is the forward pass, the loss, the backward pass and timm's optimizer; that of MultiResolutionTask on an RS-Net
at 224, 192, 160, 128 and 96 px makes the smaller images and distills too. --measure

- step: against a timm ClassificationTask at each of these sizes, on five plain networks. Wanted: a ratio of at most
  1.03. The RS step updates its weights once and the plain steps five times in all, which is in the nature of the two;
  the second row leaves the optimizer out.
- quantized: rs_resnet18_w2a32 against rs_resnet18, and rs_preresnet18_w2a2 against rs_preresnet18. Wanted: at most 1.6.
  What quantizing weights costs does not depend on the batch, so a small one makes the ratio larger.
- teacher: with running statistics and AdamW as from pretrained weights, a step with the network of the largest size as
  a fixed teacher against one without. Wanted: at most 1.15. And the comparison of statistics at the start of a run
  (--bn-statistics auto). It takes 32 images whatever the batch, so epoch_percent is its share of an epoch of 6,400 and
  of 1,500 images. Wanted: at most 2 %.
- memory: --memory lean, each size recomputed in turn, against the activations of all sizes at once (default) and a
  plain step only at the largest size, all without the optimizer. In MiB the peak of what a step holds above what is
  there before it, parameters and their gradients: on the CPU the bytes of all storages that operators return, from the
  call to the moment that the last user lets go, on a GPU torch.cuda.max_memory_allocated. Wanted: lean at most 1.15
  times only the largest size, and 1.45 times the time of default.

Sides take turns (A B A B ...). n: 3 builds of all networks, 10 rounds with each (--builds, --rounds). A ratio is the
median over builds of the median ratio within a round, with its range over builds. Times are in ms.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --clock cpu    # while other programs share the cores
    python benchmarks/bench_train_step.py --measure memory -b 32 --output results/bench_memory.json
    python benchmarks/bench_train_step.py --measure teacher --model tf_efficientnet_lite0 -b 4 --channels-last \\
        --output results/bench_teacher.json
    python benchmarks/bench_train_step.py --device cuda -b 128 --amp --channels-last --torchcompile

One run takes about ten minutes on one core.
"""
import copy
import weakref

import timm
import torch
from _common import add_timing_arguments, compare, create_parser, measure, write_results
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_rs.train import MultiResolutionTask
from timm_rs.train.teacher import FixedTeachers

PAIRS = {'rs_resnet18_w2a32': 'rs_resnet18', 'rs_preresnet18_w2a2': 'rs_preresnet18'}
PROBED = 32  # images of MultiResolutionTask.measure_statistics


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=3, rounds=10)
    add = parser.add_argument
    add('--measure', default='step', choices=MEASURES, help='default: %(default)s')
    add('--model', default='resnet18', help='timm model (default: %(default)s)')
    add('-b', '--batch-size', default=8, type=int, metavar='N', help='images (default: %(default)s)')
    add('--device', default='cpu', help='where to run (default: %(default)s)')
    add('--channels-last', action='store_true', help='layout of networks and images')
    add('--amp', action='store_true', help='bfloat16')
    add('--torchcompile', action='store_true', help='compile the networks')
    args = parser.parse_args()
    torch.manual_seed(0)
    write_results(args, MEASURES[args.measure](args))


def create_step(args, model, task_class=MultiResolutionTask, size=None, is_warm=False, **kwargs):
    """Return a function that trains a network on a random batch, and updates its weights unless told otherwise.

    Args:
        args: The flags.
        model: The network, which is moved to its device.
        task_class: The task of timm.
        size: Pixels of the images, by default those of the largest resolution.
        is_warm: With running statistics and AdamW, as from pretrained weights.
        **kwargs: Further arguments of the task.
    """
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(args.device, memory_format=layout)
    task = task_class(model, verbose=False, **kwargs).train()
    task.keep_statistics = is_warm
    if args.torchcompile:
        task.compile(backend='inductor')
    opt = 'adamw' if is_warm else 'sgd'
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    size = size or model.resolutions[0]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device).to(memory_format=layout)
    target = torch.randint(model.num_classes, (args.batch_size,), device=args.device)

    def step(update=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            loss = task(images, target)['loss']
        loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=update)
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def compare_steps(args):
    def build():
        model = timm.create_model(f'rs_{args.model}')
        rs = create_step(args, model)
        plain = [create_step(args, timm.create_model(args.model), ClassificationTask, r) for r in model.resolutions]
        return dict(
            rs=rs, plain=lambda: [step() for step in plain],
            rs_backward=lambda: rs(False), plain_backward=lambda: [step(False) for step in plain])

    runs = measure(build, args, warmup=1)
    return [
        compare(args, runs, f'rs_{args.model} step / five plain steps', 'rs', 'plain', wanted='<= 1.03'),
        compare(args, runs, 'the same without optimizer', 'rs_backward', 'plain_backward', wanted=''),
    ]


def compare_quantized(args):
    runs = measure(lambda: {
        name: create_step(args, timm.create_model(name)) for pair in PAIRS.items() for name in pair}, args, warmup=1)
    return [compare(args, runs, f'{q} step / {f} step', q, f, wanted='<= 1.6') for q, f in PAIRS.items()]


def compare_teacher(args):
    def build():
        model = timm.create_model(f'rs_{args.model}')
        mean, std = (model.pretrained_cfg[key] for key in ('mean', 'std'))
        plain = create_step(args, model, is_warm=True)
        teachers = FixedTeachers([copy.deepcopy(model.at(model.resolutions[0]))], mean, std)
        probed = MultiResolutionTask(copy.deepcopy(model), verbose=False)
        count, size = min(args.batch_size, PROBED), model.resolutions[0]
        images = torch.randn(count, 3, size, size, device=args.device)
        return dict(
            teacher=create_step(args, copy.deepcopy(model), is_warm=True, teachers=teachers), plain=plain,
            comparison=lambda: probed.measure_statistics(images))

    runs = measure(build, args, warmup=1)
    step = compare(args, runs, 'step with a fixed teacher / step without', 'teacher', 'plain', wanted='<= 1.15')
    comparison = compare(args, runs, 'comparison of statistics / step', 'comparison', 'plain', wanted='')
    comparison['epoch_percent'] = [round(100 * comparison['ratio'] * PROBED / images, 2) for images in (6400, 1500)]
    return [step, comparison]


def compare_memory(args):
    def build():
        lean = timm.create_model(f'rs_{args.model}')
        lean.set_resolution_checkpointing()
        steps = dict(
            lean=create_step(args, lean), default=create_step(args, timm.create_model(f'rs_{args.model}')),
            largest=create_step(args, timm.create_model(args.model), ClassificationTask, lean.resolutions[0]))
        return {name: lambda step=step: step(False) for name, step in steps.items()}

    time = compare(args, measure(build, args, warmup=1), 'lean / default, ms', 'lean', 'default', wanted='<= 1.45')
    peak = {name: round(measure_peak(step, args.device) / 2 ** 20, 1) for name, step in build().items()}
    return [*(
        dict(case=f'{name} / only the largest size, MiB', ours=peak[name], theirs=peak['largest'],
             ratio=round(peak[name] / peak['largest'], 4), wanted=wanted)
        for name, wanted in (('lean', '<= 1.15'), ('default', ''))), time]


def measure_peak(call, device):
    """Return the most bytes that a step holds at once, beyond what was there before it."""
    call()
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        call()
    return live.peak


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and something still uses."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given, made = (
            {id(x.untyped_storage()): x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)}
            for tensors in ((args, kwargs), output))
        self.storages.update({key: storage for key, storage in made.items() if key not in given})
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return output


MEASURES = dict(step=compare_steps, quantized=compare_quantized, teacher=compare_teacher, memory=compare_memory)

if __name__ == '__main__':
    main()
