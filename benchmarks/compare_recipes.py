#!/usr/bin/env python3
"""One table of what paper_table.py reached under several recipes: quantized or not, and other changes one at a time

Takes the --work folders of paper_table.py, each under a name, and writes what their finished runs reach at every size:
a .csv of the columns of results/paper_table.csv, a .md with a line per recipe and method, and a .json with the recipes
and all runs. Runs of a moving average of the weights (--ema) give a second line, of the last weights themselves.

    python benchmarks/compare_recipes.py float=output/float 2/32=output/w2a32 2/2=output/w2a2
"""
import csv
import json
import statistics
from pathlib import Path

from _common import create_parser, environment, shell_command
from paper_table import METHODS


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
    if any(recipe['sizes'] != sizes for recipe in recipes.values()):
        parser.error('The folders are of different --sizes.')
    rows = [row for name in named for row in summarize(name, recipes[name], runs[name])]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = markdown(rows, sizes)
    args.output.with_suffix('.md').write_text(table)
    args.output.with_suffix('.json').write_text(json.dumps(dict(
        command=shell_command(), environment=environment(), recipes=recipes, runs=runs), indent=2) + '\n')
    print(table)


def read_runs(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob('*-seed*.json'))]
    return [run for run in found if not run['search']]


def summarize(name, recipe, runs):
    """Return the rows of a recipe, one for each method and size."""
    kinds = {name: runs}
    last = [dict(run, **run['without_average']) for run in runs if 'without_average' in run]
    if last:
        kinds = {f'{name}, moving average': runs, f'{name}, last weights': last}
    rows = []
    for title, chosen in kinds.items():
        for method in METHODS:
            for size in recipe['sizes']:
                fitting = [r for r in chosen if r['method'] == method and (method != 'inet' or r['sizes'] == [size])]
                if fitting:
                    rows.append(row_of(title, recipe, method, size, fitting))
    return rows


def row_of(title, recipe, method, size, runs):
    top1, top5 = ([run[key][str(size)] for run in runs] for key in ('top1', 'top5'))
    return dict(
        recipe=title, model=recipe['model'], method=METHODS[method], resolution=size, seeds=len(runs),
        epochs=recipe['epochs'], top1_mean=round(statistics.mean(top1), 2),
        top1_std=round(statistics.stdev(top1), 2) if len(top1) > 1 else '', top5_mean=round(statistics.mean(top5), 2),
        lr=runs[0]['lr'], params=runs[0]['params'])


def markdown(rows, sizes):
    """Return a line per recipe and method; of methods beside the I-Nets of a recipe, gains over them in brackets."""
    found = {(row['recipe'], row['method'], row['resolution']): row['top1_mean'] for row in rows}
    heads = ['recipe', 'method', *(f'{s} px' for s in sizes), 'mean']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for title, method in dict.fromkeys((row['recipe'], row['method']) for row in rows):
        values = [found.get((title, method, s)) for s in sizes]
        bases = [found.get((title, METHODS['inet'], s)) if method != METHODS['inet'] else None for s in sizes]
        cells = [
            '' if v is None else f'{v:.1f}' + (f' ({v - b:+.1f})' if b is not None else '')
            for v, b in zip(values, bases)]
        mean = '' if None in values else f'{statistics.mean(values):.1f}'
        lines.append(f'| {title} | {method} | ' + ' | '.join([*cells, mean]) + ' |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
