#!/usr/bin/env python3
"""How much training a recipe takes to be as accurate as another: changes of a recipe, each at several budgets

A learning rate that ends at zero gives its accuracy only at the end of a schedule, so each recipe is trained in full at
each of --shares. A share is that of the multiply-adds which the first recipe takes in its own number of epochs, so a
recipe with cheaper updates gets more epochs. A recipe has reached the target once its mean top-1 over the sizes is at
least that of the target and each size is at most --tolerance below, in every seed. The target is what the first recipe
reaches at share 1, or --target.

    python experiments/time_to_accuracy.py DIR 'the recipe=' 'small steps=--small-steps 0.5' --shares 0.25 0.5 1
    python experiments/time_to_accuracy.py DIR 'small steps=--small-steps 0.5' --shares 0.5 --target 86.1 85 82.8 79.8

The part after '=' has flags of train_rs.py; others that this program does not know go to all recipes. Every run has a
folder in --work with its log; a stopped run continues, a finished one is not repeated. The .csv has a row for each
recipe, share and size, with the process time of one run (seconds of all its processes; on a GPU that of the host) and
the time on the clock. The .json has all runs and the smallest share of each recipe that reached the target.
"""
import json
import shlex
import statistics
from pathlib import Path

from _runs import Run, count_classes, madds, parse_known, train_all
from _shared import ROOT, create_parser, environment, shell_command, write_json
from _tables import write_rows

from timm_rs.train.loop import choose_levels
from timm_rs.train.options import parse_args as parse_flags


def main(argv=None):
    args = parse_args(argv)
    runs = [run for recipe in args.recipes for share in args.shares for run in plan(args, recipe, share)]
    for run in runs:
        run.check()
    if args.dry_run:
        for run in runs:
            print(shlex.join(['python', *run.command]))
        return
    if not args.table_only:
        train_all(runs, args.jobs)
    write_results(args)


def parse_args(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/, each with a folder per class')
    add('recipes', nargs='+', metavar='NAME=FLAGS', help='the changes to --config; nothing after = for none')
    add('--config', default=str(ROOT / 'configs' / 'rs_resnet10t.imagenette.yaml'), metavar='FILE')
    add('--shares', type=float, nargs='+', default=[0.5, 1.], metavar='X', help='of the cost of the first recipe')
    add('--target', type=float, nargs='+', metavar='TOP1', help='top-1 to reach, a value per size, largest size first')
    add('--tolerance', type=float, default=0.3, metavar='POINTS', help='what one size may lack (default: 0.3)')
    add('--dry-run', action='store_true', help='show the commands')
    parser.set_defaults(output=Path('results/time_to_accuracy.csv'))
    args = parse_known(parser, argv, 'output/time_to_accuracy')
    args.data_dir = str(Path(args.data_dir).resolve())
    num_classes = count_classes(parser, args.data_dir)
    texts, args.recipes = args.recipes, {}
    for text in texts:
        name, is_named, flags = text.partition('=')
        if not name or not is_named or name in args.recipes:
            parser.error(f'{text!r}: expected NAME=FLAGS, each name once.')
        args.recipes[name] = flags.split()
    if min(args.shares) <= 0:
        parser.error(f'--shares is {min(args.shares):g}, expected more than 0.')
    args.common = ['--config', args.config, *args.flags, '--decoded-cache', str(args.work / 'decoded')]
    args.recipe = parse_flags([args.data_dir, *args.common])
    if args.recipe.resolutions is None:
        parser.error(f'{args.config} does not name resolutions, give --resolutions.')
    if args.target and len(args.target) != len(args.recipe.resolutions):
        parser.error(f'--target has {len(args.target)} values, expected {len(args.recipe.resolutions)}, one per size.')
    for name, flags in args.recipes.items():
        sizes = parse_flags([args.data_dir, *args.common, *flags]).resolutions
        if sizes != args.recipe.resolutions:
            parser.error(f'{name!r} has the resolutions {sizes}, expected those of all, {args.recipe.resolutions}.')
    costs = {size: madds(args.recipe, size, num_classes=num_classes) for size in args.recipe.resolutions}
    own = cost(args.recipe, costs)
    args.full_epochs = {  # of each recipe, for what the first takes in its own number of epochs
        name: args.recipe.epochs * own / cost(parse_flags([args.data_dir, *args.common, *flags]), costs)
        for name, flags in args.recipes.items()}
    return args


def cost(recipe, costs, updates=1000):
    """Return the multiply-adds per image of a step, on average over the updates of the whole schedule."""
    total = 0
    for update in range(updates):
        levels = choose_levels(recipe, update * recipe.epochs // updates, update)
        total += sum(costs[recipe.resolutions[i]] for i in (levels or range(len(recipe.resolutions))))
    return total / updates


def plan(args, name, share):
    """Return a run of a recipe for each seed, of as many epochs as the share buys."""
    epochs = max(1, round(share * args.full_epochs[name]))
    flags = (args.data_dir, *args.common, *args.recipes[name], '--epochs', str(epochs))
    folder = f"{name.replace(' ', '-').replace('/', '-')}-share{share:g}"
    return [
        Run(args.work / f'{folder}-seed{seed}', (*flags, '--seed', str(seed), '--checkpoint-hist', '1'))
        for seed in args.seeds]


def write_results(args):
    """Write what the finished runs come to, and print it."""
    sizes = [str(size) for size in args.recipe.resolutions]
    found = {(name, share): [run for run in plan(args, name, share) if run.result()]
             for name in args.recipes for share in args.shares}
    found = {key: runs for key, runs in found.items() if runs}
    if not found:
        raise SystemExit(f'{args.work} holds no finished run of these.')
    reference = (next(iter(args.recipes)), 1.)
    first = found.get(reference, [])
    target = args.target or [statistics.mean(run.result()['top1'][s] for run in first) for s in sizes if first]
    rows, records, smallest = [], [], dict.fromkeys(args.recipes)
    for (name, share), runs in found.items():
        scores = [[run.result()['top1'][s] for s in sizes] for run in runs]
        spent = [json.loads((run.folder / 'spent.json').read_text()) for run in runs]
        is_target = not args.target and (name, share) == reference
        reached = is_target or all(reaches(top1, target, args.tolerance) for top1 in scores) if target else None
        if reached and (smallest[name] is None or share < smallest[name]):
            smallest[name] = share
        epochs = parse_flags(runs[0].flags).epochs
        for size, top1 in zip(sizes, zip(*scores)):
            rows.append(dict(
                recipe=name, share=share, epochs=epochs, resolution=size, seeds=len(runs),
                top1_mean=round(statistics.mean(top1), 2),
                top1_std=round(statistics.stdev(top1), 2) if top1[1:] else '',
                **{key: round(statistics.mean(s[key] for s in spent)) for key in ('process_seconds', 'seconds')},
                reached='' if reached is None else int(reached)))
        records.extend(
            dict(recipe=name, share=share, top1=top1, **s, flags=shlex.join(run.flags))
            for run, top1, s in zip(runs, scores, spent))
    write_rows(args.output, rows)
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), environment=environment(), recipe=vars(args.recipe), target=target,
        tolerance=args.tolerance, smallest_share=smallest, runs=records))
    for row in rows:
        print(*row.values())


def reaches(top1, target, tolerance):
    """Return whether the mean is that of the target and no size is more than the tolerance below."""
    return statistics.mean(top1) >= statistics.mean(target) and all(
        value >= wanted - tolerance for value, wanted in zip(top1, target))


if __name__ == '__main__':
    main()
