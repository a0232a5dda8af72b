#!/usr/bin/env python3
"""What the loop of train_rs.py costs over the bare step that the published tables were made with

Both train resnet10t at 48, 40, 32 and 24 px on the same crops of decoded images from the same weights, in turns. The
bare step is that of benchmarks/_training.py at commit 9522664, from which it is read; it has no log, no checks of the
loss and of images, no seeds per step and no schedule. Their losses agree. Wanted: at least 0.95 of its images per
second; a ratio is the median within a round.

    git worktree add before 9522664
    python benchmarks/bench_trainer.py before --clock cpu
"""
import sys
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from torch.utils.data import RandomSampler

from timm_rs.data.cache import CropLoader, Decoded
from timm_rs.data.crop import random_boxes
from timm_rs.data.datasets import PyramidNormalizer
from timm_rs.train import builders, loop
from timm_rs.train.options import parse_args
from timm_rs.train.preemption import Preemption
from timm_rs.train.saver import Progress
from timm_rs.train.seeding import EpochSampler, mix_seed
from timm_rs_runtime.unreadable import ReadErrors

CONFIG = Path(__file__).parent.parent / 'configs' / 'rs_resnet10t.imagenette.yaml'
LR = 0.01


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=10)
    parser.add_argument('before', metavar='DIR', help='checkout of commit 9522664')
    parser.add_argument('-b', '--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    args = parser.parse_args()
    if not Path(args.before, 'benchmarks', '_training.py').is_file():
        parser.error(f'{args.before} is not a checkout of commit 9522664, it has no benchmarks/_training.py.')
    sys.path.append(str(Path(args.before, 'benchmarks')))
    losses = {'train_rs.py': [], 'bare step': []}
    runs = measure(partial(build, args, losses), args, warmup=1)
    rows = [
        dict(
            trainer=name, ms_per_step=median(runs, name), images_per_second=args.batch_size / median(runs, name, 1),
            **ratio(runs, 'bare step', name), first_loss=losses[name][0], last_loss=losses[name][-1])
        for name in losses]
    print_table(list(rows[0]), rows)
    write_results(args, rows)


def build(args, losses):
    """Return an epoch of one step of each trainer."""
    from _photographs import Boxes  # from the checkout
    from _training import Run, Step
    from _variants import ENSEMBLES

    flags = parse_args([
        'noise', '--config', str(CONFIG), '--device', 'cpu', '--batch-size', str(args.batch_size), '--lr', str(LR),
        '--num-classes', '10'])
    flags.amp = args.amp
    device = builders.select_device(flags)
    model, bare = builders.build_model(flags, device), builders.build_model(flags, device)
    bare.load_state_dict(model.state_dict())
    task, optimizer = builders.build_task(flags, model, device), builders.build_optimizer(flags, model)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (args.batch_size, 3, 96, 96), dtype=np.uint8)
    decoded = Decoded([images, np.ones(len(images), np.float32)], generator.integers(0, 10, len(images)), {})
    normalize = PyramidNormalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), device, channels_last=True)
    crops = CropLoader(
        decoded, EpochSampler(RandomSampler(images), 0, len(images)), len(images), flags.resolutions[0], normalize,
        partial(random_boxes, scale=flags.scale), partial(mix_seed, 0))
    loaders = builders.Loaders(crops, None, normalize, None, None, crops.order, ReadErrors(), None)
    autocast = partial(torch.autocast, 'cpu', torch.bfloat16) if args.amp else nullcontext
    before = Namespace(
        device='cpu', amp=args.amp, channels_last=True, torchcompile=False, cuda_graphs=False, resample='matched',
        weight_decay=flags.weight_decay, mean_loss=True)
    step = Step(
        Run('ens_topdown', tuple(flags.resolutions), LR, 0), before, bare.train(),
        ENSEMBLES['sizes']('ens_topdown', 4, 10), torch.from_numpy(images), crops.targets)

    def train():
        task.progress = Progress(len(losses['train_rs.py']))
        losses['train_rs.py'].append(loop.train_one_epoch(
            task.progress, task, loaders, optimizer, flags, Preemption(), amp_autocast=autocast)['loss'])

    def train_bare():
        crops.order.set_epoch(len(losses['bare step']))
        (indices, boxes), = crops.boxes()
        boxes[:4] *= images.shape[-1]  # which it wants in pixels
        terms = step(Boxes(indices, boxes), (0, 1, 2, 3), LR, 1.)
        losses['bare step'].append(terms[0].item() / len(flags.resolutions))

    return {'train_rs.py': train, 'bare step': train_bare}


if __name__ == '__main__':
    main()
