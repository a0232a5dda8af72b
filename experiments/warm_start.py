#!/usr/bin/env python3
"""From pretrained weights to several sizes on other images: one network for all sizes against one per size

On each folder of images, and with the flags of train_rs.py that say where the weights come from, train_rs.py trains

    RS-Net         the default: one network, the ensemble of sizes and the larger sizes as teachers
    per size       a network for each size, by the same recipe
    largest size   that of the largest size, at all sizes
    random size    one network, BatchNorm shared by all sizes, one of them at random for every batch
    from scratch   the RS-Net by the same recipe, but without the weights

and evaluates each after its last epoch. --variants adds RS-Nets with other flags, e.g. 'no teachers=--distill
none', under the name before the '='. Every other flag has train_rs.py's default for trained weights, so the table is
of what a user gets. Validation images choose nothing.

    python experiments/warm_start.py imagenette=DIR caltech=DIR --model rs_tf_efficientnet_lite0 \\
        --pretrained-path FILE --resolutions 160 128 96 64 --epochs 2 --seeds 0 1

Every run has a folder in --work with its log; a stopped run continues, a finished one is not repeated. The .csv has a
row for each method and size, the .json the flags of each run. `seconds` are those of training all networks of the
method once, on the clock, with whatever else the machine did.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from _runs import Run, evaluation_flags, madds, parse_known, train_all
from _shared import ROOT, create_parser, environment, shell_command, write_json
from _tables import write_rows

from timm_rs.train.options import WARM_START, is_warm_start
from timm_rs.train.options import parse_args as parse_flags

SINGLE = '--distill none'
METHODS = {
    'RS-Net': '', 'per size': SINGLE, 'largest size': SINGLE,
    'random size': '--distill none --private none --sizes-per-update 1', 'from scratch': ''}
_SOURCES = {'--pretrained': 0, '--pretrained-path': 1, '--initial-checkpoint': 1}


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('datasets', nargs='+', metavar='NAME=DIR', help='name in the table, and folder with train/ and val/')
    add('--methods', nargs='*', default=list(METHODS), choices=METHODS, help='what to train (default: all)')
    add('--variants', nargs='+', default=[], metavar='NAME=FLAGS', help='RS-Nets with further flags')
    parser.set_defaults(output=Path('results/warm_start.csv'))
    args = parse_known(parser, argv, 'output/warm_start')
    args.recipe = parse_flags(args.flags)
    if args.recipe.resolutions is None:
        parser.error('give --resolutions, the sizes to train.')
    methods = {name: METHODS[name] for name in args.methods}
    for text in args.variants:
        name, _, flags = text.partition('=')
        if not flags or name in METHODS:
            parser.error(f'--variants {text}: expected NAME=FLAGS, with a name that no method has.')
        methods[name] = flags
    cells = [cell for text in args.datasets for method in methods.items() for cell in plan(args, text, *method)]
    if not args.table_only:
        train_all(list(dict.fromkeys(run for *_, run in cells)), args.jobs)
    write_results(args, cells)


def plan(args, text, method, own_flags):
    """Return (data set, method, run) for each run of a method; two methods can have a run in common."""
    name, _, folder = text.partition('=')
    sizes, flags, what = args.recipe.resolutions, args.flags, method.replace(' ', '-')
    groups = [sizes]
    if own_flags == SINGLE and method in METHODS:
        groups, what = [[s] for s in (sizes if method == 'per size' else sizes[:1])], 'single'
    elif method == 'from scratch':
        flags = flags_from_scratch(args)
    cells = []
    for seed in args.seeds:
        for trained in ['-'.join(map(str, group)) for group in groups]:
            run = Run(args.work / f'{name}-{what}-{trained}-seed{seed}', (
                os.path.relpath(folder, ROOT), *flags, '--resolutions', *trained.split('-'), *own_flags.split(),
                '--seed', str(seed), '--checkpoint-hist', '1'))
            run.check()
            cells.append((name, method, run))
    return cells


def flags_from_scratch(args):
    """Return the flags without the weights, but with what follows from them, except what BatchNorm normalizes with."""
    kept, skip = [], 0
    for flag in args.flags:
        if skip:
            skip -= 1
        elif flag in _SOURCES:
            skip = _SOURCES[flag]
        else:
            kept.append(flag)
    recipe = {k: getattr(args.recipe, k) for k in WARM_START if k != 'bn_statistics'}
    for name, value in recipe.items():
        flag = '--' + name.replace('_', '-')
        if flag not in kept and value is not False:
            kept += [flag, *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    if is_warm_start(vars(parse_flags(kept))):
        raise SystemExit(
            f"'from scratch' cannot leave out the trained weights: name them by {', '.join(_SOURCES)}, written out, "
            'with the file after a space.')
    return kept


def read(cell, args):
    """Return top-1 by size of a finished run, and its seconds; None for others."""
    _, method, run = cell
    found = run.result()
    if found is None:
        return None
    top1 = {int(s): v for s, v in found['top1'].items() if s.isdecimal()}
    path, others = run.folder / 'other_sizes.json', args.recipe.resolutions[1:]
    if method == 'largest size' and others:
        if not path.exists():
            subprocess.run([
                sys.executable, 'validate_rs.py', run.flags[0], '--split', 'val', '--checkpoint',
                str(run.folder / 'last.pth.tar'), '--img-size', *map(str, others), '--results-file', str(path),
                '--workers', str(args.recipe.workers), *evaluation_flags(args.recipe)], cwd=ROOT, check=True)
        top1.update({row['resolution']: row['top1'] for row in json.loads(path.read_text())})
    return top1, json.loads((run.folder / 'spent.json').read_text())['seconds']


def write_results(args, cells):
    """Write a row for each data set, method and size that has a finished run."""
    found = {cell: read(cell, args) for cell in cells}
    found = {cell: result for cell, result in found.items() if result is not None}
    if not found:
        raise SystemExit(f'{args.work} holds no finished run of these.')
    rows = []
    for name, method in dict.fromkeys(cell[:2] for cell in found):
        results = [result for cell, result in found.items() if cell[:2] == (name, method)]
        for size in args.recipe.resolutions:
            top1 = [top1[size] for top1, _ in results if size in top1]
            if top1:
                rows.append(dict(
                    dataset=name, model=args.recipe.model, method=method, resolution=size, seeds=len(top1),
                    epochs=args.recipe.epochs, top1_mean=round(statistics.mean(top1), 2),
                    top1_std=round(statistics.stdev(top1), 2) if top1[1:] else '', madds=madds(args.recipe, size),
                    seconds=round(sum(seconds for _, seconds in results) / len(top1))))
    write_rows(args.output, rows)
    runs = [dict(dataset=name, method=method, top1=top1, seconds=seconds, flags=shlex.join(run.flags))
            for (name, method, run), (top1, seconds) in found.items()]
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), environment=environment(), recipe=vars(args.recipe), runs=runs))
    for row in rows:
        print(*row.values())


if __name__ == '__main__':
    main()
