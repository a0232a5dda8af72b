#!/usr/bin/env python3
"""The paper's comparison on a folder of photographs: one network for all sizes against one per size

For a model, a folder with train/ and val/ and a list of sizes it trains, all under one recipe,

    inet          one plain network per size (the paper's I-Nets); that of the largest size is evaluated at all sizes
    parallel      a switchable network, classification at all sizes, no distillation (the paper's Parallel)
    ens           with the ensemble of sizes as the teacher
    ens_topdown   with the ensemble and every larger size as teachers: the RS-Net
    random_size   a plain network, BatchNorm shared, a random size for every batch

and evaluates each at its sizes (Wang et al., ECCV 2020, table 1). Every network first looks for its own of --lrs, if
these are several, on a random tenth of the training images that is held out for that; validation images choose nothing.

    python benchmarks/paper_table.py DIR --model resnet10t --sizes 64 56 48 40 32 --epochs 80 --dry-run
    python benchmarks/paper_table.py DIR --model resnet10t --sizes 64 56 48 40 32 --epochs 80 --amp --channels-last
    python benchmarks/paper_table.py DIR --model resnet18 --sizes 128 112 96 80 64 --epochs 80 --side 224 --amp \
        --channels-last --cuda-graphs --jobs 4    # on a GPU, where all images lie in its memory

Every finished run leaves a file in --work and is not repeated; one that was stopped goes on where it was at the end of
an epoch, 20 s before at most if epochs take less. Images are decoded once. --include takes over the runs of a published
table. Written at the end, and with what is there so far by --table-only: results/paper_table.csv, .md (the form
of the paper's table, gains over the I-Nets in brackets), .png (accuracy against multiply-adds) and .json.
"""
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Callable, Container, Dict, List, Optional, Tuple

import timm
import torch
from _common import create_parser, environment, shell_command, write_json
from _photographs import Photographs, list_photographs, load_photographs, normalize
from _tables import DEFAULTS, METHODS, describe, markdown, plot, summarize, top1
from _training import Diverged, Run, create_network, level_shares, say, train_network
from _variants import ENSEMBLES
from timm.utils import ParseKwargs

from timm_rs.evaluate import count_madds
from timm_rs.train import ResolutionPyramid
from timm_rs_runtime.files import atomic_path, atomic_write

RECIPE = (
    'model', 'sizes', 'epochs', 'batch_size', 'weight_decay', 'warmup_epochs', 'scale', 'hflip', 'distill_ramp',
    'mean_loss', 'zero_init', 'amp', 'channels_last', 'side', 'crop_pct', 'search_epochs', 'ema', 'sampled', 'ensemble',
    'private', 'resample', 'weight_bits', 'activation_bits', 'initial_checkpoint', 'pretrained', 'pretrained_path',
    'model_kwargs', 'small_steps')
SEARCH_SEED = 0
BEFORE = dict(DEFAULTS, resample='antialiased', mean_loss=False)  # what runs did that do not tell


def main(argv=None):
    args = parse_args(argv)
    published = read_published(args) if args.include and not args.worker else {}
    check_recipe(args)
    if not args.worker:
        check_network(args)
    if not args.dry_run or published:
        keep_recipe(args)
    for run, result in published.items():
        if not read(run, args):
            write(run, result, args)

    if args.worker:
        return train(Run(**{k: tuple(v) if k == 'sizes' else v for k, v in json.loads(args.worker).items()}), args)
    if args.dry_run:
        show(plan(args, True), args, 'search')
        show(plan(args, False), args, 'train')
    elif not args.table_only:
        train_all(args)
    if not args.dry_run:
        write_table(args)


def parse_args(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--model', default='resnet10t', help='timm model with BatchNorm (default: %(default)s)')
    add('--sizes', type=int, nargs='+', default=[64, 56, 48, 40, 32], metavar='N', help='in pixels')
    add('--methods', nargs='+', default=list(METHODS), choices=METHODS,
        help='what to train, in this order (default: all)')
    add('--epochs', type=int, default=80, metavar='N')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N')
    add('--lrs', type=float, nargs='+', default=[0.1, 0.3, 1.], metavar='LR',
        help='learning rates to choose from (default: 0.1 0.3 1.0)')
    add('--search-epochs', type=int, default=8, metavar='N', help='epochs of the runs that choose one')
    add('--batch-size', type=int, default=128, metavar='N')
    add('--weight-decay', type=float, default=5e-4, metavar='W')
    add('--warmup-epochs', type=float, default=2, metavar='N')
    add('--scale', type=float, nargs=2, default=[0.25, 1.], metavar='PCT', help='range of the area of a crop')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (default: %(default)s)')
    add('--distill-ramp', type=float, metavar='N', help='epochs in which distillation comes to its weight')
    add('--mean-loss', action=BooleanOptionalAction,
        help='divide the loss by the number of sizes, so that the same learning rates suit all (default: yes)')
    add('--zero-init', action='store_true', help='start residual branches at zero')
    add('--ema', type=float, metavar='D', help='evaluate a moving average of the weights of this decay')
    add('--sampled', action='store_true', help='steps of the largest, the smallest and one size between, not of all')
    add('--small-steps', type=float, metavar='P',
        help='share of the steps that train the smaller half of the sizes alone (default: %(default)s)')
    add('--ensemble', choices=ENSEMBLES,
        help='learned weights of the teacher: one per size, one per size and class, or one per size and a temperature')
    add('--private', choices=('both', 'affine', 'statistics'), help='half of BatchNorm that is private')
    add('--resample', choices=ResolutionPyramid.RESAMPLES,
        help='how the smaller images of a batch are made of the largest (default: %(default)s)')
    add('--pretrained', action='store_true', help="begin with timm's weights")
    add('--pretrained-path', metavar='FILE', help='begin with these weights, adapted as pretrained ones are')
    add('--initial-checkpoint', metavar='FILE', help='begin with these weights as they are')
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='KEY=VALUE', help='further arguments of the model')
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
    add('--cuda-graphs', action='store_true', help='launch a step at once: small networks keep a GPU busy then')
    add('--jobs', type=int, default=1, metavar='N', help='runs side by side, which share the threads or the GPU')
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
    for key in ('epochs', 'search_epochs', 'batch_size'):
        if getattr(args, key) < 1:
            parser.error(f'--{key.replace("_", "-")} is at least 1, not {getattr(args, key)}.')
    if not 0 <= args.small_steps < 1:
        parser.error(f'--small-steps is a share of at least 0 and below 1, not {args.small_steps:g}.')
    for option in ('--sampled',) * args.sampled + ('--small-steps',) * (args.small_steps > 0):
        if args.ensemble == 'classes':
            parser.error(f'--ensemble classes needs all sizes in each step, not {option}.')
    if args.ema and args.private == 'statistics':
        parser.error('--ema would average repeatedly what --private statistics shares.')
    if args.sampled and args.small_steps:
        parser.error('--sampled and --small-steps exclude each other.')
    if sum(map(bool, (args.pretrained, args.pretrained_path, args.initial_checkpoint))) > 1:
        parser.error('--pretrained, --pretrained-path and --initial-checkpoint exclude each other.')
    for option in ('initial_checkpoint', 'pretrained_path'):
        path = getattr(args, option)
        if path and not Path(path).is_file():
            parser.error(f'--{option.replace("_", "-")}: {path} is no file.')
    if args.weight_bits == 32 > args.activation_bits:
        parser.error('--activation-bits needs --weight-bits.')
    if args.cuda_graphs and (torch.device(args.device).type != 'cuda' or args.torchcompile):
        parser.error('--cuda-graphs needs --device cuda, and no --torchcompile.')
    if args.jobs < 1 or args.jobs > 1 and args.torchcompile and torch.device(args.device).type == 'cuda':
        parser.error('--jobs is 1 or more, and 1 with --torchcompile on a GPU, where runs share a process.')
    args.sizes = sorted(set(args.sizes), reverse=True)
    args.side = args.side or 2 * args.sizes[0]
    args.dataset = args.dataset or Path(args.data_dir).resolve().name
    args.methods = list(dict.fromkeys(args.methods))
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
    recipe = dict({k: getattr(args, k) for k in RECIPE}, dataset=args.dataset, images=args.images)
    return json.loads(json.dumps(recipe))  # as it is read again


def check_recipe(args: Namespace) -> None:
    """Keep runs of different recipes and data sets apart."""
    path, recipe = args.work / 'recipe.json', recipe_of(args)
    if path.exists():
        for key, value in dict(BEFORE, **json.loads(path.read_text())).items():
            if recipe[key] != value:
                raise SystemExit(f'{args.work} holds runs with {told(key, value)}, not {told(key, recipe[key])}; '
                                 f'choose another --work.')


def check_network(args: Namespace) -> None:
    """Find out before anything is written whether there are such networks."""
    runs = {run.switchable: run for run in plan(args, search=bool(args.lrs[1:]))}
    for switchable, run in runs.items():
        try:
            create_network(run, args, args.num_classes)
        except Exception as e:  # of timm, of file readers and of the client of the Hub
            raise SystemExit(f"Cannot create {'rs_' * switchable}{args.model}: {one_line(e)}") from e
    for size in args.sizes:
        try:
            madds(args, size)
        except Exception as e:  # of any layer
            raise SystemExit(f'{args.model} does not run at {size} px: {one_line(e)}') from e


def one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:400] or type(error).__name__


def keep_recipe(args: Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / 'recipe.json'
    if not path.exists():
        write_json(path, recipe_of(args))


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
    now = recipe_of(args)
    for key, value in recipe.items():
        if now[key] != value:
            raise SystemExit(f'{args.include} holds runs with {told(key, value)}, not {told(key, now[key])}.')
    return {
        Run(**{k: tuple(v) if k == 'sizes' else v for k, v in r.items() if k in Run.__dataclass_fields__}): r
        for r in results}


def read(run: Run, args: Namespace) -> Optional[dict]:
    path = args.work / f'{run.name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def write(run: Run, result: dict, args: Namespace) -> None:
    write_json(args.work / f'{run.name}.json', result)


def cost(run: Run, args: Namespace) -> float:
    """Return the multiply-adds of a run per training image, a backward pass counted as two forward ones."""
    sizes = run.sizes if run.switchable or run.method == 'inet' else args.sizes
    epochs = args.search_epochs if run.search else args.epochs
    return 3. * epochs * sum(share * madds(args, s) for share, s in zip(level_shares(run, args), sizes))


@cache
def _count(model: str, size: int, num_classes: int, kwargs: str) -> int:
    return count_madds(timm.create_model(model, num_classes=num_classes, **json.loads(kwargs)), size)


def madds(args: Namespace, size: int) -> int:
    """Return the multiply-adds of an image."""
    return _count(args.model, size, args.num_classes, json.dumps(args.model_kwargs))


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


def train_all(args: Namespace) -> None:
    """Train what is not done, --jobs side by side: in processes, or on a GPU in threads, which share the images."""
    if next_run(args, ()) is None:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: what runs keeps what it has
    photographs = load(args)
    on_gpu, failed, children, running = torch.device(args.device).type == 'cuda', threading.Event(), {}, {}
    env = dict(os.environ)
    env.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // args.jobs)))
    if on_gpu:
        photographs = on_device(photographs, args)

    def in_thread(run):
        with torch.cuda.stream(streams[threading.current_thread().name]):
            train(run, args, photographs, failed.is_set)

    def in_process(run):
        children[run] = subprocess.Popen([sys.executable, *sys.argv, '--worker', json.dumps(asdict(run))], env=env)
        if children[run].wait():
            raise SystemExit(f'{run.name} ended with {children[run].returncode}.')

    streams = defaultdict(torch.cuda.Stream)
    with ThreadPoolExecutor(args.jobs) as executor:
        try:
            while True:
                while len(running) < args.jobs and (run := next_run(args, running)):
                    say(f'{run.name}: begun{time_left(args)}')
                    running[run] = executor.submit(in_thread if on_gpu else in_process, run)
                if not running:
                    return
                wait(running.values(), return_when=FIRST_COMPLETED)
                for run in [run for run, future in running.items() if future.done()]:
                    running.pop(run).result()
                    if run.search and all(read(r, args) for r in plan(args, search=True)):
                        warn_of_the_edge(args)
        finally:
            failed.set()
            for child in children.values():
                child.terminate()


def next_run(args: Namespace, running: Container[Run]) -> Optional[Run]:
    """Return the first run that can begin: those that choose learning rates, then those of the table."""
    for search in (True, False):
        for run in plan(args, search):
            if run not in running and not math.isnan(run.lr) and not read(run, args):
                return run
    return None


def time_left(args: Namespace) -> str:
    left = seconds_left(sum(cost(run, args) for search in (True, False) for run in plan(args, search)
                            if not read(run, args)), args)
    return f', {left / 3600:.1f} h left' if left > 1800 else f', {left / 60:.0f} min left' if left else ''


def load(args: Namespace) -> Photographs:
    try:
        return load_photographs(args.data_dir, args.sizes, args.side, args.crop_pct, args.work / 'photographs.pt')
    except ValueError as e:
        raise SystemExit(str(e)) from e


def on_device(photographs: Photographs, args: Namespace) -> Photographs:
    """Move all images there, for all runs."""
    photographs = photographs._replace(
        train=photographs.train.to(args.device),
        val={size: x.to(args.device) for size, x in photographs.val.items()},
        held_out={size: x.to(args.device) for size, x in photographs.held_out.items()})
    normalize(photographs.train[:1])  # its constants are there before any other stream needs them
    torch.cuda.synchronize()
    return photographs


def train(
        run: Run, args: Namespace, photographs: Optional[Photographs] = None,
        stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train a network and write what it reaches."""
    if photographs is None:
        photographs = load(args)
        photographs = photographs._replace(train=photographs.train.to(args.device))
    began, checkpoint = time.perf_counter(), args.work / f'{run.name}.ckpt'
    try:
        result, weights = train_network(run, args, photographs, checkpoint, stop)
    except Diverged as e:
        if not run.search:
            raise SystemExit(str(e)) from e
        none = {str(s): 0. for s in run.sizes}  # a rate like any other, only the worst
        result, weights = dict(asdict(run), top1=none, top5=none, loss={}, seconds=time.perf_counter() - began), {}
    if weights:
        with atomic_path(args.work / f'{run.name}.pth', overwrite=True) as partial:
            torch.save(weights, partial)
    write(run, dict(result, cost=cost(run, args)), args)
    checkpoint.unlink(missing_ok=True)


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
    with atomic_write(args.output, overwrite=True, newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown(rows, {(title, size): top1(results, size) for (title, size), results in found.items()}, args)
    with atomic_write(args.output.with_suffix('.md'), overwrite=True) as f:
        f.write(table)
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), environment=environment(), dataset=args.dataset,
        images=args.images, recipe={k: getattr(args, k) for k in RECIPE}, lrs=args.lrs,
        searches=[r for _, r in searches if r], runs=[r for _, r in runs]))
    plot(rows, describe(args), args.output.with_suffix('.png'))
    print(table)


if __name__ == '__main__':
    main()
