#!/usr/bin/env python3
"""One table of what paper_table.py reached under several recipes: quantized or not, and other changes one at a time

Takes its .json files, each under a name, and writes what their runs reach at every size: a .csv with the columns of
results/paper_table.csv, a .md with a line per recipe and method, and a .json with all runs. The first recipe is what
the others are compared with.

    python experiments/compare_recipes.py both=results/paper_table.json statistics=output/statistics.json
"""
import csv
import json
from pathlib import Path

from _shared import create_parser, environment, shell_command, write_json
from _tables import markdown, rows_of, scores_of


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
    with open(args.output, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(tables, sizes)
    args.output.with_suffix('.md').write_text(text)
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), environment=environment(),
        recipes={name: table['recipe'] for name, table in found.items()},
        runs={name: table['runs'] for name, table in found.items()}))
    print(text)


if __name__ == '__main__':
    main()
