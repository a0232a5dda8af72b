#!/usr/bin/env python3
"""The paper's comparison on a folder of photographs: one network for all sizes against one per size

For a model, a folder with train/ and val/ and a list of sizes it trains, all under one recipe,

    inet          one plain network per size (the paper's I-Nets); that of the largest size is evaluated at all sizes
    parallel      a switchable network, classification at all sizes, no distillation (the paper's Parallel)
    ens           with the ensemble of sizes as the teacher
    ens_topdown   with the ensemble and every larger size as teachers: the RS-Net
    random_size   a plain network, BatchNorm shared, a random size for every batch

and evaluates each at its sizes (Wang et al., ECCV 2020, table 1). With several --lrs every network first looks for its
own, on a random tenth of the training images that is held out for that; validation images choose nothing.

    python benchmarks/paper_table.py DIR --model resnet10t --sizes 64 56 48 40 32 --epochs 80 --dry-run
    python benchmarks/paper_table.py DIR --model resnet10t --sizes 64 56 48 40 32 --epochs 80 --amp --channels-last

Every finished run leaves a file in --work and is not repeated; one that was stopped goes on at its last epoch. Images
are decoded once. --include takes over the runs of a table that was published. Written at the end, and with what is
there so far by --table-only: results/paper_table.csv, .md (the form of the paper's table, gains over the I-Nets in
brackets), .png (accuracy against multiply-adds) and .json.
"""
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from _common import create_parser, environment, shell_command
from _photographs import MEAN, STD, list_photographs, load_photographs, random_crops
from _tables import DEFAULTS, METHODS, describe, markdown, plot, summarize, top1
from _variants import ENSEMBLES, share_half
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from timm_rs.evaluate import ENSEMBLE, count_madds, count_parameters
from timm_rs.quant import quantize
from timm_rs.train import ResolutionPyramid

RECIPE = (
    'model', 'sizes', 'epochs', 'batch_size', 'weight_decay', 'warmup_epochs', 'scale', 'hflip', 'distill_ramp',
    'mean_loss', 'zero_init', 'amp', 'channels_last', 'side', 'crop_pct', 'search_epochs', 'ema', 'sampled', 'ensemble',
    'private', 'resample', 'weight_bits', 'activation_bits', 'initial_checkpoint')
SEARCH_SEED = 0
BEFORE = dict(resample='antialiased')  # what runs did that do not tell


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        method: Key of METHODS.
        sizes: Sizes in pixels that it is trained at, largest first.
        lr: Learning rate.
        seed: Of weights, order and crops.
        search: Trained without the held-out images and evaluated on them, to choose the learning rate.
    """
    method: str
    sizes: Tuple[int, ...]
    lr: float
    seed: int
    search: bool = False

    @property
    def name(self) -> str:
        sizes = f'-{self.sizes[0]}' if self.method == 'inet' else ''
        lr = '?' if math.isnan(self.lr) else f'{self.lr:g}'
        return f"{self.method}{sizes}-lr{lr}-seed{self.seed}{'-search' if self.search else ''}"

    @property
    def switchable(self) -> bool:
        return self.method not in ('inet', 'random_size')


def main(argv=None):
    args = parse_args(argv)
    published = read_published(args) if args.include and not args.worker else {}
    check_recipe(args)
    if not args.dry_run or published:
        keep_recipe(args)
    for run, result in published.items():
        if not read(run, args):
            write(run, result, args)

    if args.worker:
        return train(Run(**{k: tuple(v) if k == 'sizes' else v for k, v in json.loads(args.worker).items()}), args)
    if not args.table_only:
        for search in (True, False):
            runs = plan(args, search)
            if args.dry_run:
                show(runs, args, 'search' if search else 'train')
            else:
                train_all(runs, args)
                if search:
                    warn_of_the_edge(args)
    if not args.dry_run:
        write_table(args)


def parse_args(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--model', default='resnet10t', help='timm model with BatchNorm (default: %(default)s)')
    add('--sizes', type=int, nargs='+', default=[64, 56, 48, 40, 32], metavar='N', help='in pixels')
    add('--methods', nargs='+', default=list(METHODS), choices=METHODS, help='what to train (default: all)')
    add('--epochs', type=int, default=80, metavar='N')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N')
    add('--lrs', type=float, nargs='+', default=[0.1], metavar='LR', help='learning rates to choose from')
    add('--search-epochs', type=int, default=20, metavar='N', help='epochs of the runs that choose one')
    add('--batch-size', type=int, default=128, metavar='N')
    add('--weight-decay', type=float, default=5e-4, metavar='W')
    add('--warmup-epochs', type=float, default=2, metavar='N')
    add('--scale', type=float, nargs=2, default=[0.25, 1.], metavar='PCT', help='range of the area of a crop')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (default: %(default)s)')
    add('--distill-ramp', type=float, metavar='N', help='epochs in which distillation comes to its weight')
    add('--mean-loss', action='store_true', help='divide the loss by the number of sizes')
    add('--zero-init', action='store_true', help='start residual branches at zero')
    add('--ema', type=float, metavar='D', help='evaluate a moving average of the weights of this decay')
    add('--sampled', action='store_true', help='steps of the largest, the smallest and one size between, not of all')
    add('--ensemble', choices=ENSEMBLES,
        help='learned weights of the teacher: one per size, one per size and class, or one per size and a temperature')
    add('--private', choices=('both', 'affine', 'statistics'), help='half of BatchNorm that is private')
    add('--resample', choices=ResolutionPyramid.RESAMPLES,
        help='how the smaller images of a batch are made of the largest (default: %(default)s)')
    add('--initial-checkpoint', metavar='FILE', help='begin with these weights')
    add('--weight-bits', type=int, metavar='K', help='quantize the networks')
    add('--activation-bits', type=int, metavar='K')
    add('--side', type=int, metavar='N',
        help='training images are kept at this size, smaller ones are enlarged (default: twice the largest size)')
    add('--crop-pct', type=float, default=1., metavar='PCT', help='for evaluation (default: %(default)s)')
    add('--dataset', default='', metavar='NAME', help='name in the table (default: that of the folder)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp', action='store_true', help='bfloat16')
    add('--channels-last', action='store_true')
    add('--torchcompile', action='store_true', help='compile the networks')
    add('--jobs', type=int, default=1, metavar='N', help='runs side by side, which share the threads')
    add('--work', type=Path, default=Path('output/paper_table'), metavar='DIR', help='where runs are kept')
    add('--include', type=Path, metavar='FILE', help='take over the runs of this results/....json, of the same recipe')
    add('--dry-run', action='store_true', help='show the plan and its cost')
    add('--table-only', action='store_true', help='write the table of the runs that are there')
    add('--worker', help=SUPPRESS)
    parser.set_defaults(output=Path('results/paper_table.csv'), **DEFAULTS)
    args = parser.parse_args(argv)
    for split in ('train', 'val'):
        if not any(Path(args.data_dir, split).glob('*/*')):
            parser.error(f'{args.data_dir} holds no {split}/ with a folder of images per class.')
    for key in ('weight_bits', 'activation_bits'):
        if getattr(args, key) not in (*range(1, 9), 32):
            parser.error(f'--{key.replace("_", "-")} is 1 to 8, or 32 for float, not {getattr(args, key)}.')
    if args.sampled and args.ensemble == 'classes':
        parser.error('--ensemble classes needs all sizes in each step, not --sampled.')
    if args.weight_bits == 32 > args.activation_bits:
        parser.error('--activation-bits needs --weight-bits.')
    args.sizes = sorted(set(args.sizes), reverse=True)
    args.side = args.side or 2 * args.sizes[0]
    args.dataset = args.dataset or Path(args.data_dir).resolve().name
    args.methods = [m for m in METHODS if m in args.methods]
    try:
        samples, classes = list_photographs(args.data_dir)
    except ValueError as e:
        parser.error(str(e))
    args.num_classes = len(classes)
    args.images = {split: len(found) for split, found in samples.items()}
    fit = args.images['train'] - (max(1, args.images['train'] // 10) if len(args.lrs) > 1 else 0)
    if fit < args.batch_size:
        parser.error(f'{fit} training images do not make a batch of {args.batch_size}, give a smaller --batch-size.')
    return args


def recipe_of(args: Namespace) -> dict:
    return dict({k: getattr(args, k) for k in RECIPE}, dataset=args.dataset, images=args.images)


def check_recipe(args: Namespace) -> None:
    """Keep runs of different recipes and data sets apart."""
    path, recipe = args.work / 'recipe.json', recipe_of(args)
    if path.exists():
        for key, value in json.loads(path.read_text()).items():
            if recipe[key] != value:
                raise SystemExit(f'{args.work} holds runs with {told(key, value)}, not {told(key, recipe[key])}; '
                                 f'choose another --work.')


def keep_recipe(args: Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / 'recipe.json'
    if not path.exists():
        path.write_text(json.dumps(recipe_of(args), indent=2) + '\n')


def told(key: str, value) -> str:
    if key == 'images':
        return ' and '.join(f'{count} images in {split}/' for split, count in value.items())
    return f'--{key.replace("_", "-")} {value}'


def plan(args: Namespace, search: bool) -> List[Run]:
    """Return the runs that choose learning rates, or those of the table."""
    groups = []
    for method in args.methods:
        groups.extend([(method, (s,)) for s in args.sizes] if method == 'inet' else [(method, tuple(args.sizes))])
    if search:
        lrs = args.lrs if len(args.lrs) > 1 else ()
        return [Run(method, sizes, lr, SEARCH_SEED, True) for method, sizes in groups for lr in lrs]
    return [Run(method, sizes, best_lr(method, sizes, args), seed)
            for seed in args.seeds for method, sizes in groups]


def best_lr(method: str, sizes: Tuple[int, ...], args: Namespace) -> float:
    """Return the learning rate of the best mean accuracy on the images that were held out."""
    if len(args.lrs) == 1:
        return args.lrs[0]
    found = {lr: read(Run(method, sizes, lr, SEARCH_SEED, True), args) for lr in args.lrs}
    known = {lr: statistics.mean(r['top1'][str(s)] for s in sizes) for lr, r in found.items() if r}
    return max(known, key=known.get) if len(known) == len(args.lrs) else math.nan


def warn_of_the_edge(args: Namespace) -> None:
    """Say so if larger or smaller learning rates might have been better still."""
    runs = {(run.method, run.sizes) for run in plan(args, search=True)}
    best = [best_lr(method, sizes, args) for method, sizes in runs]
    for edge, what in ((min(args.lrs), 'smallest'), (max(args.lrs), 'largest')):
        count = best.count(edge)
        if count:
            print(f'{count} of {len(best)} networks chose {edge:g}, the {what} of --lrs: the best may lie beyond.')


def read_published(args: Namespace) -> Dict[Run, dict]:
    """Return the runs of a published table, by what they are."""
    try:
        table = json.loads(args.include.read_text())
        recipe, results = dict(BEFORE, **table['recipe'], dataset=table['dataset']), table['searches'] + table['runs']
        recipe.update({k: table[k] for k in ('images',) if k in table})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'Cannot read {args.include}, expected a .json that this script wrote: {e!r}') from e
    for key, value in recipe.items():
        if getattr(args, key) != value:
            raise SystemExit(f'{args.include} holds runs with {told(key, value)}, not {told(key, getattr(args, key))}.')
    return {
        Run(**{k: tuple(v) if k == 'sizes' else v for k, v in r.items() if k in Run.__dataclass_fields__}): r
        for r in results}


def read(run: Run, args: Namespace) -> Optional[dict]:
    path = args.work / f'{run.name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def write(run: Run, result: dict, args: Namespace) -> None:
    path = args.work / f'{run.name}.json'
    path.with_suffix('.tmp').write_text(json.dumps(result, indent=2) + '\n')
    os.replace(path.with_suffix('.tmp'), path)


def cost(run: Run, args: Namespace) -> float:
    """Return the multiply-adds of a run per training image, a backward pass counted as two forward ones."""
    sizes = run.sizes if run.switchable or run.method == 'inet' else args.sizes
    total = 3. * sum(madds(args, s) for s in sizes) * (args.search_epochs if run.search else args.epochs)
    share = len(choose_levels(run, args, torch.Generator())) / len(run.sizes)
    return total * share


@cache
def _count(model: str, size: int, num_classes: int) -> int:
    return count_madds(timm.create_model(model, num_classes=num_classes), size)


def madds(args: Namespace, size: int) -> int:
    """Return the multiply-adds of an image."""
    return _count(args.model, size, args.num_classes)


def show(runs: List[Run], args: Namespace, title: str) -> None:
    for run in runs:
        state = 'done' if read(run, args) else ''
        print(f'{title:8}{run.name:40}{cost(run, args) / 1e9:10.1f} G multiply-adds an image  {state}')
    todo = sum(cost(run, args) for run in runs if not read(run, args))
    hours = seconds_left(todo, args) / 3600
    print(f'{title:8}{"all that is left":40}{todo / 1e9:10.1f} G' + (f', about {hours:.1f} h' if hours else '') + '\n')


def seconds_left(todo: float, args: Namespace) -> float:
    """Estimate the time for some multiply-adds per image from the runs that are done; 0 if there are none."""
    done = [json.loads(path.read_text()) for path in args.work.glob('*-seed*.json')]
    rate = sum(r['cost'] for r in done) / max(sum(r['seconds'] for r in done), 1e-9)
    return todo / rate / args.jobs if done else 0.


def train_all(runs: List[Run], args: Namespace) -> None:
    """Train what is not done, some side by side, each in a process of its own."""
    todo, running = [run for run in runs if not read(run, args)], {}
    env = dict(os.environ)
    env.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // args.jobs)))
    if todo:
        load(args)
    while todo or running:
        while todo and len(running) < args.jobs:
            run = todo.pop(0)
            argv = [sys.executable, *sys.argv, '--worker', json.dumps(asdict(run))]
            running[subprocess.Popen(argv, env=env)] = run
            left = seconds_left(sum(cost(r, args) for r in [*todo, *running.values()]), args)
            hours = f', {left / 3600:.1f} h left' if left else ''
            print(f'{run.name}: begun, {len(todo)} to follow{hours}', flush=True)
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            run = running.pop(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                raise SystemExit(f'{run.name} ended with {process.returncode}.')


def load(args: Namespace):
    try:
        return load_photographs(args.data_dir, args.sizes, args.side, args.crop_pct, args.work / 'photographs.pt')
    except ValueError as e:
        raise SystemExit(str(e)) from e


def train(run: Run, args: Namespace) -> None:
    """Train a network and write what it reaches."""
    began, device = time.perf_counter(), torch.device(args.device)
    photographs = load(args)
    count = photographs.num_fit if run.search else len(photographs.train)
    images, labels = photographs.train[:count].to(device), photographs.train_labels[:count].to(device)
    torch.manual_seed(run.seed)
    model = create_network(run, args, len(photographs.classes))
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    if args.private != 'both':
        share_half(model, args.private)
    network = torch.compile(model) if args.torchcompile else model
    mode = run.method if run.method in ('ens', 'ens_topdown') else 'none'
    criterion = ENSEMBLES[args.ensemble](mode, len(run.sizes), len(photographs.classes)).to(device)
    pyramid = ResolutionPyramid(run.sizes, resample=args.resample)
    average = ModelEmaV3(model, decay=args.ema) if args.ema else None
    optimizer = create_optimizer_v2(model, opt='sgd', lr=run.lr, momentum=0.9, weight_decay=args.weight_decay)
    if mode != 'none' and any(True for _ in criterion.parameters()):
        optimizer.add_param_group(dict(params=list(criterion.parameters()), weight_decay=0.))
    epochs, steps = args.search_epochs if run.search else args.epochs, count // args.batch_size
    partial, epoch, spent = args.work / f'{run.name}.ckpt', 0, 0.
    if partial.exists():
        state = torch.load(partial, map_location=device)
        model.load_state_dict(state['model'])
        criterion.load_state_dict(state['criterion'])
        optimizer.load_state_dict(state['optimizer'])
        epoch, spent = state['epoch'], state['seconds']
        if average:
            average.load_state_dict(state['average'])

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()

    while epoch < epochs:
        generator = torch.Generator().manual_seed(1000003 * run.seed + epoch)
        order, sums = torch.randperm(count, generator=generator), torch.zeros(4, device=device)
        model.train()
        batches = random_crops(images, order, args.batch_size, run.sizes[0], tuple(args.scale), generator, args.hflip)
        for step, (crops, indices) in enumerate(batches):
            at = epoch + step / steps
            warm = min(1., (at + 1 / steps) / max(args.warmup_epochs, 1e-9))
            for group in optimizer.param_groups:
                group['lr'] = run.lr * min(warm, 0.5 * (1 + math.cos(math.pi * at / epochs)))
            crops = crops.contiguous(memory_format=layout)
            with autocast():
                levels = pyramid(crops)
                chosen = choose_levels(run, args, generator)
                if run.switchable and len(chosen) == len(levels):
                    logits = network(levels)
                else:
                    logits = [network(levels[i]) for i in chosen]
            alpha = model.alpha[chosen] if run.switchable else torch.zeros(1)
            terms = criterion(logits, labels[indices.to(device)], alpha)
            ramp = min(1., at / args.distill_ramp) if args.distill_ramp else 1.
            loss = terms['classification'] + terms['ensemble'] + ramp * terms['distillation']
            (loss / len(logits) if args.mean_loss else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(model)
            sums += torch.stack([terms[k].detach() for k in ('loss', 'classification', 'ensemble', 'distillation')])
        if not sums.isfinite().all():
            if run.search:  # a rate like any other, only the worst
                none = {str(s): 0. for s in run.sizes}
                return write(run, dict(asdict(run), top1=none, top5=none, loss={}, params=count_parameters(model),
                                       cost=cost(run, args), seconds=time.perf_counter() - began), args)
            raise SystemExit(f'{run.name}: the loss is not finite in epoch {epoch}.')
        epoch += 1
        seconds = spent + time.perf_counter() - began
        losses, left = '/'.join(f'{v:.3f}' for v in (sums / steps).tolist()), seconds / epoch * (epochs - epoch)
        print(f'{run.name}: epoch {epoch}/{epochs}, loss {losses}, {left / 60:.0f} min to go', flush=True)
        state = dict(model=model.state_dict(), criterion=criterion.state_dict(), optimizer=optimizer.state_dict(),
                     epoch=epoch, seconds=seconds)
        if average:
            state.update(average=average.state_dict())
        torch.save(state, f'{partial}.tmp')
        os.replace(f'{partial}.tmp', partial)

    held = (photographs.held_out, photographs.train_labels[count:])
    target = held if run.search else (photographs.val, photographs.val_labels)
    sizes = run.sizes if run.method == 'inet' and (run.search or run.sizes[0] != args.sizes[0]) else args.sizes
    reached = accuracy(model.eval(), criterion, sizes, *target, device, autocast)
    if average:
        model, last = average.module, reached
        reached = dict(accuracy(model.eval(), criterion, sizes, *target, device, autocast), without_average=last)
    result = dict(
        asdict(run), **reached, params=count_parameters(model), cost=cost(run, args), seconds=seconds,
        device=device_name(device), images_per_second=count * epochs / seconds)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
               args.work / f'{run.name}.pth')
    write(run, result, args)
    partial.unlink()
    reached = ', '.join(f'{s} px {v:.2f}' if s.isdigit() else f'{s} {v:.2f}' for s, v in result['top1'].items())
    print(f'{run.name}: {reached}', flush=True)


def create_network(run: Run, args: Namespace, num_classes: int) -> torch.nn.Module:
    kwargs = dict(num_classes=num_classes)
    if args.zero_init:
        kwargs.update(zero_init_last=True)
    quantized = args.weight_bits < 32
    if not run.switchable and not quantized:
        model = timm.create_model(args.model, **kwargs)
    else:
        sizes = run.sizes if run.switchable else run.sizes[:1]
        model = timm.create_model(f'rs_{args.model}', resolutions=sizes, **kwargs)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if quantized:
        quantize(model, args.weight_bits, args.activation_bits, trained=bool(args.initial_checkpoint))
    return model if run.switchable or not quantized else model.at(run.sizes[0])


def choose_levels(run: Run, args: Namespace, generator: torch.Generator) -> List[int]:
    """Return which of the sizes of a run a step trains."""
    count = len(run.sizes)
    if run.method == 'random_size':
        return [int(torch.randint(count, (), generator=generator))]
    if args.sampled and count > 3:
        return [0, 1 + int(torch.randint(count - 2, (), generator=generator)), count - 1]
    return list(range(count))


@torch.inference_mode()
def accuracy(model, criterion, sizes, images, labels, device, autocast) -> Dict[str, Dict[str, float]]:
    """Return top-1 and top-5 in percent at each size, and of the ensemble."""
    logits = {}
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    for size in sizes:
        batches = images[size].split(250)
        with autocast():
            logits[str(size)] = torch.cat([model((x.to(device).float() - mean) / std).float() for x in batches])
    if hasattr(model, 'alpha'):
        logits[ENSEMBLE] = criterion.ensemble(torch.stack(list(logits.values())), model.alpha)
    labels = labels.to(device).view(-1, 1)
    hits = {k: z.topk(min(5, z.shape[1])).indices == labels for k, z in logits.items()}
    return dict(
        top1={k: 100 * h[:, :1].any(1).float().mean().item() for k, h in hits.items()},
        top5={k: 100 * h.any(1).float().mean().item() for k, h in hits.items()},
        loss={k: F.cross_entropy(z, labels[:, 0]).item() for k, z in logits.items()})


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f"{environment()['cpu']}, {torch.get_num_threads()} threads"


def write_table(args: Namespace) -> None:
    """Write what the finished runs come to."""
    args = Namespace(**{**vars(args), 'methods': list(METHODS)})
    searches, runs = ([(run, read(run, args)) for run in plan(args, search)] for search in (True, False))
    runs = [(run, result) for run, result in runs if result]
    found = {}  # runs by method and size, in the order of the table
    largest = args.sizes[0]
    for method, title in METHODS.items():
        for size in args.sizes:
            found[title, size] = [
                r for run, r in runs if run.method == method and (method != 'inet' or run.sizes == (size,))]
        if method == 'inet':
            chosen = [r for run, r in runs if run.method == 'inet' and run.sizes == (largest,)]
            found.update({(f'I-{largest}', size): chosen for size in args.sizes})
    found = {key: results for key, results in found.items() if results}
    if not found:
        raise SystemExit(f'{args.work} holds no finished run of these.')
    rows = [summarize(args, *key, results, madds(args, key[1])) for key, results in found.items()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown(rows, {(title, size): top1(results, size) for (title, size), results in found.items()}, args)
    args.output.with_suffix('.md').write_text(table)
    args.output.with_suffix('.json').write_text(json.dumps(dict(
        command=shell_command(), environment=environment(), dataset=args.dataset,
        images=args.images, recipe={k: getattr(args, k) for k in RECIPE}, lrs=args.lrs,
        searches=[r for _, r in searches if r], runs=[r for _, r in runs]), indent=2) + '\n')
    plot(rows, describe(args), args.output.with_suffix('.png'))
    print(table)


if __name__ == '__main__':
    main()
