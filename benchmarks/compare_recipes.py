#!/usr/bin/env python3
"""One table of what paper_table.py reached under several recipes: quantized or not, and other changes one at a time

Takes the --work folders of paper_table.py, each under a name, and writes what their finished runs reach at every size:
a .csv of the columns of results/paper_table.csv, a .md with a line per recipe and method, and a .json with the recipes
and all runs. The first recipe is what the others are compared with. Runs of a moving average of the weights (--ema)
give two lines, of the last weights and of their average.

    python benchmarks/compare_recipes.py float=output/float 2/32=output/w2a32 2/2=output/w2a2
"""
import csv
import json
import statistics
from pathlib import Path

from _common import create_parser, environment, shell_command, write_json
from _tables import METHODS, cell, gain, top1

from timm_rs_runtime.files import atomic_write


def main(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument('folders', nargs='+', metavar='NAME=DIR', help='name in the table and --work of paper_table.py')
    parser.set_defaults(output=Path('results/recipes.csv'))
    args = parser.parse_args(argv)
    named = {}
    for text in args.folders:
        name, found, folder = text.partition('=')
        if not found or not Path(folder, 'recipe.json').is_file():
            parser.error(f'{text!r} is no NAME=DIR of a --work folder of paper_table.py.')
        named[name] = Path(folder)
    recipes = {name: json.loads((folder / 'recipe.json').read_text()) for name, folder in named.items()}
    runs = {name: read_runs(folder) for name, folder in named.items()}
    for name, folder in named.items():
        if not runs[name]:
            parser.error(f'{folder} holds no finished run.')
    sizes = recipes[next(iter(named))]['sizes']
    for key in ('sizes', 'model', 'dataset'):
        values = {json.dumps(recipe[key]) for recipe in recipes.values() if key in recipe}
        if len(values) > 1:
            parser.error(f"The folders are of different --{key}: {', '.join(sorted(values))}.")
    for name, found in runs.items():
        known = {}
        for run in found:
            if known.setdefault((run['method'], *run['sizes'], run['seed']), run['lr']) != run['lr']:
                parser.error(f"{named[name]} holds runs of {run['method']} of several learning rates.")
    rows, scores = [], {}
    for name, recipe in recipes.items():
        for (title, method, size), chosen in group(name, recipe, runs[name]).items():
            rows.append(row_of(title, method, size, chosen, recipe))
            scores[title, METHODS[method], size] = top1(chosen, size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output, overwrite=True, newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown(scores, sizes)
    with atomic_write(args.output.with_suffix('.md'), overwrite=True) as f:
        f.write(table)
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), environment=environment(), recipes=recipes, runs=runs))
    print(table)


def read_runs(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob('*-seed*.json'))]
    return [run for run in found if not run['search']]


def group(name, recipe, runs):
    """Return the runs of a recipe by title, method and size, in the order of the table."""
    kinds = {name: runs}
    last = [dict(run, **run['without_average']) for run in runs if 'without_average' in run]
    if last:
        kinds = {f'{name}, last weights': last, f'{name}, moving average': runs}
    found = {
        (title, method, size): [
            r for r in chosen if r['method'] == method and (method != 'inet' or r['sizes'] == [size])]
        for title, chosen in kinds.items() for method in METHODS for size in recipe['sizes']}
    return {key: chosen for key, chosen in found.items() if chosen}


def row_of(title, method, size, runs, recipe):
    first, fifth = ([run[key][str(size)] for run in runs] for key in ('top1', 'top5'))
    return dict(
        recipe=title, model=recipe['model'], method=METHODS[method], resolution=size, seeds=len(runs),
        epochs=recipe['epochs'], top1_mean=round(statistics.mean(first), 2),
        top1_std=round(statistics.stdev(first), 2) if first[1:] else '', top5_mean=round(statistics.mean(fifth), 2),
        lr=runs[0]['lr'], params=runs[0]['params'])


def markdown(scores, sizes):
    """Return a line per recipe and method.

    Args:
        scores: Top-1 accuracy in percent by recipe, method and size, and in it by seed.
        sizes: In pixels.

    In brackets stand gains over the I-Nets of the recipe; the last column has the mean gain over the first recipe
    by the same method. Both are of the seeds that both have.
    """
    reference = next(iter(scores))[0]
    heads = ['recipe', 'method', 'seeds', *(f'{s} px' for s in sizes), 'mean', f'over {reference}']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for title, method in dict.fromkeys(key[:2] for key in scores):
        found = [scores.get((title, method, s), {}) for s in sizes]
        plain = [scores.get((title, METHODS['inet'], s), {}) if method != METHODS['inet'] else {} for s in sizes]
        values = [cell(f, p) if f else '' for f, p in zip(found, plain)]
        mean = f'{statistics.mean(statistics.mean(f.values()) for f in found):.1f}' if all(found) else ''
        seeds = ', '.join(str(seed) for seed in sorted(set().union(*found)))
        gains = [gain(f, scores.get((reference, method, s), {})) for f, s in zip(found, sizes)]
        over = '' if title == reference or None in gains else f'{statistics.mean(gains):+.1f}'
        lines.append(f'| {title} | {method} | {seeds} | ' + ' | '.join([*values, mean, over]) + ' |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
