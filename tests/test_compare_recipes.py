"""A table of what several recipes reached"""
import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import compare_recipes


def write_work(folder, top1, sizes=(32, 24), **more):
    """Write what paper_table.py leaves; top1 has the values at all sizes of a method and a seed."""
    folder.mkdir()
    recipe = dict(model='test_resnet', sizes=list(sizes), epochs=2)
    (folder / 'recipe.json').write_text(json.dumps(recipe))
    for (method, seed), values in top1.items():
        found = {str(s): float(v) for s, v in zip(sizes, values)}
        ways = [[s] for s in sizes] if method == 'inet' else [list(sizes)]
        for way in ways:
            run = dict(
                method=method, sizes=way, lr=0.1, seed=seed, search=False, top1={str(s): found[str(s)] for s in way},
                top5={str(s): 99. for s in way}, params=5, **more)
            (folder / f"{method}-{'-'.join(map(str, way))}-seed{seed}.json").write_text(json.dumps(run))
    (folder / 'ens_topdown-seed0-search.json').write_text(json.dumps(dict(run, search=True, top1={'32': 0., '24': 0.})))
    return folder


def test_table(tmp_path):
    first = write_work(
        tmp_path / 'a', {('inet', 0): (80, 70), ('ens_topdown', 0): (82, 75), ('ens_topdown', 1): (84, 76)})
    last = dict(top1={'32': 60., '24': 50.}, top5={'32': 90., '24': 90.})
    second = write_work(tmp_path / 'b', {('ens_topdown', 0): (62, 53)}, without_average=last)
    output = tmp_path / 'results' / 'recipes.csv'
    compare_recipes.main([f'2/32={first}', f'mean={second}', '--output', str(output)])
    assert output.with_suffix('.md').read_text().splitlines() == [
        '| recipe | method | seeds | 32 px | 24 px | mean | over 2/32 |', '|---|---|---|---|---|---|---|',
        '| 2/32 | I-Nets | 0 | 80.0 | 70.0 | 75.0 |  |',
        '| 2/32 | RS-Net | 0, 1 | 83.0 ± 1.4 (+2.0) | 75.5 ± 0.7 (+5.0) | 79.2 |  |',
        '| mean, last weights | RS-Net | 0 | 60.0 | 50.0 | 55.0 | -23.5 |',
        '| mean, moving average | RS-Net | 0 | 62.0 | 53.0 | 57.5 | -21.0 |']
    rows = list(csv.DictReader(output.open()))
    assert [(r['resolution'], r['seeds'], r['top1_mean'], r['top1_std']) for r in rows[2:4]] == [
        ('32', '2', '83.0', '1.41'), ('24', '2', '75.5', '0.71')]
    written = json.loads(output.with_suffix('.json').read_text())
    assert set(written['recipes']) == {'2/32', 'mean'} and len(written['runs']['2/32']) == 4


def test_what_cannot_be_compared(tmp_path, capsys):
    folder = write_work(tmp_path / 'a', {('ens_topdown', 0): (82, 75)})
    other = write_work(tmp_path / 'b', {('ens_topdown', 0): (82, 75)}, sizes=(48, 24))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'recipe.json').write_text('{}')
    output = tmp_path / 'table.csv'
    for folders, message in (
            ([str(folder)], 'is no NAME=DIR of a --work folder'),
            ([f'a={tmp_path}'], 'is no NAME=DIR of a --work folder'),
            ([f"a={tmp_path / 'empty'}"], 'empty holds no finished run'),
            ([f'a={folder}', f'b={other}'], 'The folders are of different --sizes'),
    ):
        with pytest.raises(SystemExit):
            compare_recipes.main([*folders, '--output', str(output)])
        assert message in capsys.readouterr().err
    assert not output.exists()
