#!/usr/bin/env python3
"""What --memory lean saves and costs: activations held for the backward pass, and time

One step of MultiResolutionTask on rs_resnet18 at 224, 192, 160, 128 and 96 px (forward, loss, backward): activations of
all sizes held at once (default), or each size recomputed in turn (lean), beside a plain timm step only at 224 px.

Memory is the peak of what a step holds above what is there before it, parameters and their gradients: on the CPU the
bytes of all storages that operators return, from the call to the moment that the last user lets go, on a GPU (--device
cuda) torch.cuda.max_memory_allocated. Wanted: lean at most 1.15 times only the largest size. Time: lean at most 1.45
times default; sides take turns, n: 2 builds, 3 rounds.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --clock cpu    # while other programs share the cores
"""
import weakref
from functools import partial

import timm
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from timm.task import ClassificationTask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_rs.train import MultiResolutionTask

COLUMNS = ('case', 'value', 'against', 'ratio', 'range', 'wanted', 'n')


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=2, rounds=3)
    parser.add_argument('--model', default='resnet18', help='timm model (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', default=32, type=int, metavar='N')
    parser.add_argument('--device', default='cpu', help='where to run (default: %(default)s)')
    args = parser.parse_args()

    runs = measure(lambda: create_contenders(args), args, warmup=1)
    contenders = create_contenders(args)
    peak = {name: measure_peak(step, args.device) / 2 ** 20 for name, step in contenders.items()}
    n = f'{args.builds} x {args.rounds}'
    batch = f'rs_{args.model}, batch {args.batch_size}'
    rows = [
        dict(case=f'{batch}: lean / only the largest size, MiB', value=round(peak['lean'], 1),
             against=round(peak['largest'], 1), ratio=round(peak['lean'] / peak['largest'], 4), wanted='<= 1.15',
             n='1'),
        dict(case=f'{batch}: default / only the largest size, MiB', value=round(peak['default'], 1),
             against=round(peak['largest'], 1), ratio=round(peak['default'] / peak['largest'], 4), n='1'),
        dict(case=f'{batch}: lean / default, ms', value=median(runs, 'lean'), against=median(runs, 'default'),
             **ratio(runs, 'lean', 'default'), wanted='<= 1.45', n=n),
    ]
    print_table(COLUMNS, rows)
    write_results(args, rows)


def create_contenders(args):
    """Return the three steps."""
    torch.manual_seed(0)
    steps = {}
    for name in ('lean', 'default', 'largest'):
        model = timm.create_model(args.model if name == 'largest' else f'rs_{args.model}').to(args.device)
        task_class = ClassificationTask if name == 'largest' else MultiResolutionTask
        task = task_class(model, verbose=False).train()
        if name == 'lean':
            model.set_resolution_checkpointing()
        images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
        target = torch.randint(model.num_classes, (args.batch_size,), device=args.device)
        steps[name] = lambda task=task, images=images, target=target: step(task, images, target)
    return steps


def step(task, images, target):
    task(images, target)['loss'].backward()
    task.zero_grad(set_to_none=False)
    if images.is_cuda:
        torch.cuda.synchronize()


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
        self.known, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known and id(storage) not in given:
                    self.known[id(storage)] = weakref.ref(storage, partial(self.drop, id(storage), storage.nbytes()))
                    self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return output

    def drop(self, key, count, _):
        del self.known[key]
        self.bytes -= count


if __name__ == '__main__':
    main()
