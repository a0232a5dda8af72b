#!/usr/bin/env python3
"""One table of what paper_table.py reached under several recipes: quantized or not, and other changes one at a time

Takes its .json files, each under a name, and writes what their runs reach at every size: a .csv with the columns of
results/paper_table.csv, a .md with a line per recipe and method, and a .json with all runs. The first recipe is what
the others are compared with.

    python experiments/compare_recipes.py both=results/paper_table.json statistics=output/statistics.json
"""
import json
from pathlib import Path

from _shared import create_parser
from _tables import rows_of, scores_of, write_table


def main(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument('files', nargs='+', metavar='NAME=FILE', help='name in the table and .json of paper_table.py')
    parser.set_defaults(output=Path('results/recipes.csv'))
    args = parser.parse_args(argv)
    found, first = {}, None
    for text in args.files:
        name, is_named, path = text.partition('=')
        try:
            found[name] = json.loads(Path(path).read_text())
            recipe = found[name]['recipe']
            sizes = recipe.get('resolutions') or recipe['sizes']
            if not is_named or not found[name]['runs']:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f'{text!r}: expected NAME=FILE, a .json that paper_table.py wrote.')
        kind = (sizes, recipe['model'].removeprefix('rs_'), found[name].get('dataset'))
        first = first or kind
        for what, now, before in zip(('sizes', 'model', 'dataset'), kind, first):
            if now != before:
                parser.error(f'{path} is of the {what} {now}, the first file of {before}.')
    tables = {name: scores_of(table['runs'], sizes) for name, table in found.items()}
    rows = []
    for name, scores in tables.items():
        recipe = found[name]['recipe']
        rows.extend(rows_of(scores, recipe=name, model=recipe['model'], epochs=recipe['epochs']))
    write_table(
        args.output, rows, tables, sizes, recipes={name: table['recipe'] for name, table in found.items()},
        runs={name: table['runs'] for name, table in found.items()})


if __name__ == '__main__':
    main()
