#!/usr/bin/env python3
"""The paper's comparison on a folder of photographs: one network for all sizes against one per size

For a model, a folder with train/ and val/ and a list of sizes, train_rs.py trains under one recipe (--config)

    inet          one network per size (the paper's I-Nets); that of the largest size is evaluated at all sizes
    parallel      a switchable network, classification at all sizes, no distillation (the paper's Parallel)
    ens           with the ensemble of sizes as the teacher
    ens_topdown   with the ensemble and every larger size as teachers: the RS-Net
    random_size   BatchNorm shared by all sizes, one of them at random for every batch

and evaluates each after its last epoch (Wang et al., ECCV 2020, table 1). Every network first looks for its own of
--lrs, if these are several, on a random tenth of the training images that is held out for that; validation images
choose nothing. Flags that this program does not know are those of train_rs.py.

    python experiments/paper_table.py DIR --sizes 48 40 32 24 --dry-run
    python experiments/paper_table.py DIR --sizes 48 40 32 24 --seeds 0 1 --jobs 2
    python experiments/paper_table.py DIR --model rs_resnet18 --sizes 128 112 96 80 64 --decoded-cache-side 224 --jobs 4

Every run has a folder in --work with its log; a stopped run continues, a finished one is not repeated. Written
at the end, and with what is there so far by --table-only: a .csv, .md (gains over the I-Nets in brackets), .png
(accuracy against multiply-adds) and .json (every run with its command).
"""
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import timm
from _runs import Run, count_classes, evaluation_flags, hold_out, madds, parse_known, train_all
from _shared import ROOT, create_parser
from _tables import METHODS, plot, rows_of, scores_of, write_table

from timm_rs.evaluate import count_parameters
from timm_rs.train.options import parse_args as parse_flags

FLAGS = dict(
    inet='--distill none', parallel='--distill none', ens='--distill ens', ens_topdown='--distill ens_topdown',
    random_size='--distill none --private none --sizes-per-update 1')


def main(argv=None):
    args = parse_args(argv)
    for cell in (*plan(args, search=True), *plan(args)):
        cell['run'].check()
        if args.dry_run:
            state = 'done' if cell['run'].result() else f'{cost(cell, args) / 1e9:.1f} G multiply-adds per image'
            print(shlex.join(['python', *cell['run'].command]), f' # {state}')
    if args.dry_run:
        return
    if not args.table_only:
        for search in (True, False):
            if search and plan(args, search):
                hold_out(args.data_dir, args.work / 'held_out')
            train_all([cell['run'] for cell in plan(args, search)], args.jobs)
        warn_of_the_edge(args)
    write_results(args)


def parse_args(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('--config', default=str(ROOT / 'configs' / 'rs_resnet10t.imagenette.yaml'), metavar='FILE', help='the recipe')
    add('--sizes', type=int, nargs='+', metavar='N', help='in pixels (default: those of the recipe)')
    add('--methods', nargs='+', default=list(METHODS), choices=METHODS,
        help='what to train, in this order (default: all)')
    add('--epochs', type=int, metavar='N', help='default: those of the recipe')
    add('--lrs', type=float, nargs='+', metavar='LR', help='rates to choose from (default: that of the recipe)')
    add('--search-epochs', type=int, default=8, metavar='N', help='epochs of the runs that choose one (default: 8)')
    add('--dataset', default='', metavar='NAME', help='name in the table (default: that of the folder)')
    add('--dry-run', action='store_true', help='show the commands and what they cost')
    parser.set_defaults(output=Path('results/paper_table.csv'))
    args = parse_known(parser, argv, 'output/paper_table')
    args.data_dir = str(Path(args.data_dir).resolve())
    args.num_classes = count_classes(parser, args.data_dir)
    sizes = ['--resolutions', *map(str, args.sizes)] if args.sizes else []
    cache = ['--decoded-cache', str(args.work / 'decoded')]
    args.recipe = parse_flags(['--config', args.config, *args.flags, *cache, *sizes])
    if args.recipe.resolutions is None or args.recipe.lr is None and not args.lrs:
        parser.error(f'{args.config} does not name resolutions or a learning rate, give --sizes and --lrs.')
    args.sizes, args.epochs = args.recipe.resolutions, args.epochs or args.recipe.epochs
    args.lrs = args.lrs or [args.recipe.lr]
    args.dataset = args.dataset or Path(args.data_dir).name
    args.madds = {size: madds(args.recipe, size, num_classes=args.num_classes) for size in args.sizes}
    return args


def plan(args, search=False):
    """Return the runs that choose learning rates, or those of the table."""
    networks = [
        (method, sizes) for method in args.methods
        for sizes in ([[s] for s in args.sizes] if method == 'inet' else [args.sizes])]
    if search:
        return [
            plan_cell(args, *network, lr, args.seeds[0], True)
            for network in networks for lr in (args.lrs if len(args.lrs) > 1 else ())]
    return [
        plan_cell(args, *network, best_lr(*network, args), seed, False) for seed in args.seeds for network in networks]


def plan_cell(args, method, sizes, lr, seed, search):
    epochs = str(args.search_epochs if search else args.epochs)
    size = f'-{sizes[0]}' if method == 'inet' else ''
    folder = args.work / f"{method}{size}-lr{lr:g}-seed{seed}{'-search' if search else ''}"
    flags = (
        str(args.work / 'held_out') if search else args.data_dir, '--config', args.config, *args.flags,
        '--decoded-cache', str(args.work / 'decoded'), '--resolutions', *map(str, sizes), *FLAGS[method].split(),
        '--lr', str(lr), '--seed', str(seed), '--epochs', epochs, '--val-interval', epochs, '--checkpoint-hist', '1')
    return dict(method=method, sizes=sizes, lr=lr, seed=seed, search=search, run=Run(folder, flags))


def best_lr(method, sizes, args):
    """Return the learning rate of the best mean accuracy on the images that were held out, NaN if not known yet."""
    if len(args.lrs) == 1:
        return args.lrs[0]
    found = {lr: plan_cell(args, method, sizes, lr, args.seeds[0], True)['run'].result() for lr in args.lrs}
    if None in found.values():
        return math.nan
    return max(found, key=lambda lr: statistics.mean(found[lr]['top1'][str(s)] for s in sizes))


def warn_of_the_edge(args):
    """Say so if larger or smaller learning rates might have been better still."""
    best = [cell['lr'] for cell in plan(args) if len(args.lrs) > 1]
    for edge, what in ((min(args.lrs), 'smallest'), (max(args.lrs), 'largest')):
        if edge in best:
            print(f'{best.count(edge)} of {len(best)} networks chose {edge:g}, the {what} of --lrs: the best may be '
                  'beyond it.')


def cost(cell, args):
    """Return the multiply-adds of a run per training image, a backward pass counted as two forward ones."""
    epochs = args.search_epochs if cell['search'] else args.epochs
    share = 1 / len(args.sizes) if cell['method'] == 'random_size' else 1
    return 3 * epochs * share * sum(args.madds[size] for size in cell['sizes'])


def read(cell, args):
    """Return what a finished run reached, None for others; the I-Net of the largest size is tried at the others."""
    found = cell['run'].result()
    if found is None:
        return None
    others = [s for s in args.sizes[1:] if cell['method'] == 'inet' and cell['sizes'] == args.sizes[:1]]
    if others and not cell['search']:
        recipe, path = args.recipe, cell['run'].folder / 'other_sizes.json'
        if not path.exists():
            subprocess.run([
                sys.executable, 'validate_rs.py', args.data_dir, '--split', 'val',
                '--checkpoint', str(cell['run'].folder / 'last.pth.tar'), '--img-size', *map(str, others),
                '--results-file', str(path), '--workers', str(recipe.workers),
                '--crop-pct', str(recipe.crop_pct or 0.875),
                *(['--interpolation', recipe.interpolation] if recipe.interpolation else []),
                *(['--amp', '--amp-dtype', recipe.amp_dtype] if recipe.amp else []),
                *(['--channels-last'] if recipe.channels_last else []),
                *evaluation_flags(recipe)], cwd=ROOT, check=True)
        for row in json.loads(path.read_text()):
            for metric, values in found.items():
                values[str(row['resolution'])] = row[metric]
    kwargs = dict(args.recipe.model_kwargs, resolutions=cell['sizes'], num_classes=args.num_classes)
    return dict(
        method=cell['method'], sizes=list(cell['sizes']), lr=cell['lr'], seed=cell['seed'], **found,
        params=count_parameters(timm.create_model(args.recipe.model, **kwargs)),
        command=shlex.join(['python', *cell['run'].command]))


def write_results(args):
    """Write what the finished runs come to."""
    searches, runs = ([read(cell, args) for cell in plan(args, search)] for search in (True, False))
    runs = [r for r in runs if r]
    if not runs:
        raise SystemExit(f'{args.work} holds no finished run of these.')
    model, scores = args.recipe.model, scores_of(runs, args.sizes)
    rows = [
        dict(row, madds=args.madds[row['resolution']])
        for row in rows_of(scores, dataset=args.dataset, model=model, epochs=args.epochs)]
    write_table(
        args.output, rows, scores, args.sizes, dataset=args.dataset, recipe=vars(args.recipe), lrs=args.lrs,
        searches=[r for r in searches if r], runs=runs)
    plot(rows, f'{model} on {args.dataset}, {args.epochs} epochs', args.output.with_suffix('.png'))


if __name__ == '__main__':
    main()
