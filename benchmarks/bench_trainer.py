#!/usr/bin/env python3
"""What the loop of train_rs.py costs over the bare step that the published tables were made with

Both train resnet10t at 48, 40, 32 and 24 px on the same crops of decoded images from the same weights, in turns. The
bare step is that of benchmarks/_training.py at commit 9522664, from which it is read; it has no log, no checks of
the loss and of images, no seeds per step and no schedule.

    git worktree add /tmp/before 9522664
    python benchmarks/bench_trainer.py /tmp/before --clock cpu
"""
import sys
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image

from timm_rs.train import builders, loop
from timm_rs.train.options import parse_args
from timm_rs.train.preemption import Preemption
from timm_rs.train.saver import Progress

SIZES = (48, 40, 32, 24)
LR = 0.01


def main(argv=None):
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=4)
    parser.add_argument('before', metavar='DIR', help='checkout of commit 9522664')
    parser.add_argument('--batches', type=int, default=3, metavar='N', help='steps of a round (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    args = parser.parse_args(argv)
    if not Path(args.before, 'benchmarks', '_training.py').is_file():
        parser.error(f'{args.before} is not a checkout of commit 9522664, it has no benchmarks/_training.py.')
    sys.path.append(str(Path(args.before, 'benchmarks')))
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.batches * args.batch_size)
        runs = measure(partial(build, args, folder, losses), args, warmup=1)
    images = args.batches * args.batch_size
    rows = [
        dict(
            trainer=name, ms_per_step=median(runs, name) / args.batches,
            images_per_second=images / median(runs, name, 1), **ratio(runs, 'bare step', name),
            first_loss=losses[name][0], last_loss=losses[name][-1])
        for name in runs[0]]
    print_table(list(rows[0]), rows)
    apart = max(abs(a - b) / b for a, b in zip(*losses.values()))
    print(f'\nThe mean losses of each {args.batches} steps differ by at most {100 * apart:.2g} %.')
    write_results(args, rows)


def write_images(root: Path, count: int) -> None:
    """Write noise of 96 px in two classes."""
    generator = np.random.default_rng(0)
    for split, number in (('train', count), ('validation', 2)):
        for i in range(number):
            path = root / split / 'ab'[i % 2] / f'{i:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(path)


def build(args: Namespace, folder: str, losses: dict):
    """Return an epoch of each trainer."""
    from _photographs import Boxes  # of the checkout
    from _training import Run, Step
    from _variants import ENSEMBLES

    flags = parse_args([
        folder, '--config', str(Path(__file__).parent.parent / 'configs/rs_resnet10t.imagenette.yaml'), '--device',
        'cpu', '--workers', '0', '--batch-size', str(args.batch_size), '--lr', str(LR), '--seed', '0',
        '--decoded-cache', f'{folder}/cache', '--decoded-cache-side', '96'])
    flags.amp = args.amp
    device = builders.select_device(flags)
    torch.manual_seed(0)
    datasets = builders.build_datasets(flags)
    model = builders.build_model(flags, device)
    loaders = builders.build_loaders(flags, model, device, *datasets)
    task = builders.build_task(flags, model, device)
    optimizer = builders.build_optimizer(flags, model)
    autocast = partial(torch.autocast, 'cpu', torch.bfloat16) if args.amp else nullcontext

    before = Namespace(
        device='cpu', amp=args.amp, channels_last=True, torchcompile=False, cuda_graphs=False, resample='matched',
        weight_decay=flags.weight_decay, mean_loss=True)
    run = Run('ens_topdown', SIZES, LR, 0)
    torch.manual_seed(0)
    bare = builders.build_model(flags, device)
    bare.load_state_dict(model.state_dict())
    crops = loaders.train
    step = Step(
        run, before, bare.train(), ENSEMBLES['sizes'](run.method, 4, 2), torch.from_numpy(np.array(crops.images)),
        crops.targets)
    losses.update({'train_rs.py': [], 'bare step': []})
    epochs = dict.fromkeys(losses, 0)

    def train():
        task.progress = Progress(epochs['train_rs.py'])
        means = loop.train_one_epoch(
            task.progress, task, loaders, optimizer, flags, Preemption(), amp_autocast=autocast)
        losses['train_rs.py'].append(means['loss'])
        epochs['train_rs.py'] += 1

    def train_bare():
        crops.order.set_epoch(epochs['bare step'])
        total = 0.
        for indices, boxes in crops.boxes():
            boxes[:4] *= crops.images.shape[-1]
            total += step(Boxes(indices, boxes), (0, 1, 2, 3), LR, 1.)[0].item() / len(SIZES)
        losses['bare step'].append(total / args.batches)
        epochs['bare step'] += 1

    return {'train_rs.py': train, 'bare step': train_bare}


if __name__ == '__main__':
    main()
