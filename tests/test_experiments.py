"""Tables of accuracy: planned, trained by train_rs.py, and compared"""
import argparse
import csv
import json
import multiprocessing
import os
import random
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from command_lines import fails
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments'))
import _runs
import paper_table
import time_to_accuracy
import warm_start
from _runs import Run, hold_out
from _tables import markdown, scores_of

import validate_rs
from timm_rs.train.options import is_warm_start
from timm_rs.train.options import parse_args as parse_flags

CONTEXT = multiprocessing.get_context('fork')

RECIPE = dict(
    model='rs_test_resnet', resolutions=[32, 24], loss_reduction='mean', batch_size=4, lr=0.05, warmup_epochs=0,
    color_jitter=0., train_interpolation='bilinear', interpolation='bilinear', crop_pct=1.0, epochs=2, workers=0,
    device='cpu')


@pytest.fixture
def argv(tmp_path):
    generator = random.Random(0)
    for split, count in (('train', 40), ('val', 4)):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'pictures' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.frombytes('RGB', (40, 36), generator.randbytes(40 * 36 * 3)).save(folder / f'{i}.png')
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(RECIPE))
    return [
        str(tmp_path / 'pictures'), '--config', str(tmp_path / 'recipe.yaml'), '--work', str(tmp_path / 'work'),
        '--output', str(tmp_path / 'table.csv')]


def write_run(folder, flags, scores):
    """Leave what a finished run of train_rs.py leaves."""
    args = vars(parse_flags(flags))
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    names = [f'eval_{metric}_{size}' for size in scores for metric in ('top1', 'top5', 'loss')]
    values = [value for top1 in scores.values() for value in (top1, top1 + 1, 1.)]
    (folder / 'summary.csv').write_text(
        f"epoch,{','.join(names)},eval_top1_mean\n{args['epochs'] - 1},{','.join(map(str, values))},50\n")


class Forked:
    """A script in a copy of this process, which need not import torch again."""

    def __init__(self, command, stdout, **_):
        self.process = CONTEXT.Process(target=self._run, args=(command[1:], stdout.fileno()))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def _run(argv, log):
        sys.stdout = sys.stderr = open(log, 'w', closefd=False)
        sys.argv, code = argv, None
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit as e:
            code = e.code
        sys.stdout.flush()
        os._exit(code or 0)  # the threads that it would end are those of this process

    def terminate(self):
        pass


def test_table_of_trained_networks(argv, tmp_path, monkeypatch):
    """Through train_rs.py itself; what is done is not trained again."""
    monkeypatch.chdir(warm_start.ROOT)
    monkeypatch.setattr(_runs.subprocess, 'Popen', Forked)
    monkeypatch.setattr(paper_table.subprocess, 'run', lambda command, **_: validate_rs.main(command[2:]))
    argv = [*argv, '--methods', 'inet', 'random_size', '--epochs', '1', '--decoded-cache-side', '40']
    paper_table.main(argv)
    table = json.loads((tmp_path / 'table.json').read_text())
    assert [(r['method'], r['sizes']) for r in table['runs']] == [
        ('inet', [32]), ('inet', [24]), ('random_size', [32, 24])]
    assert set(table['runs'][0]['top1']) >= {'32', '24'}  # the largest I-Net at the other size too
    rows = list(csv.DictReader((tmp_path / 'table.csv').open()))
    assert [(r['method'], r['resolution']) for r in rows] == [
        (method, size) for method in ('I-Nets', 'I-32', 'random size') for size in ('32', '24')]
    assert (tmp_path / 'table.png').stat().st_size > 1000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'work').glob('*/train.log')}
    assert len(before) == 3
    paper_table.main(argv)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / 'work').glob('*/train.log')}
    with pytest.raises(SystemExit, match='was trained with --batch-size 4, not 5: choose another --work'):
        paper_table.main([*argv, '--batch-size', '5'])


def test_learning_rate_of_the_best_mean_accuracy(argv, tmp_path, capsys):
    argv = [*argv, '--methods', 'ens', '--lrs', '0.01', '0.1', '0.3']
    args = paper_table.parse_args(argv)
    assert str(paper_table.plan(args)[0]['lr']) == 'nan'  # not known yet
    for cell, scores in zip(paper_table.plan(args, search=True), ((50., 40.), (49., 43.), (51., 40.5))):
        write_run(cell['run'].folder, cell['run'].flags, dict(zip((32, 24), scores)))
    (cell,) = paper_table.plan(args)
    assert cell['lr'] == 0.1 and '--lr 0.1 ' in ' '.join(cell['run'].command)
    write_run(cell['run'].folder, cell['run'].flags, {32: 60., 24: 55.})
    paper_table.main(argv)
    table = json.loads((tmp_path / 'table.json').read_text())
    assert [r['lr'] for r in table['searches']] == [0.01, 0.1, 0.3]
    assert table['runs'][0]['top1'] == {'32': 60., '24': 55.}
    assert 'networks chose' not in capsys.readouterr().out  # it is none of the edge


def test_plan_and_its_cost(argv, capsys):
    paper_table.main([*argv, '--dry-run', '--seeds', '0', '1', '--private', 'statistics'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (2 + 4)
    assert all(line.startswith('python train_rs.py') and '--private statistics' in line for line in lines)
    costs = [float(line.rpartition('# ')[2].split()[0]) for line in lines[:6]]
    assert costs[2] == costs[3] == pytest.approx(costs[0] + costs[1], abs=0.11)
    assert costs[5] == pytest.approx(costs[2] / 2, abs=0.11)


def test_wrong_flags_are_refused_before_anything_is_trained(argv, tmp_path, capfd):
    assert '--aa rand' in fails(paper_table.main, [*argv, '--aa', 'rand'], capfd)
    assert 'unknown flag --epoch-count' in fails(paper_table.main, [*argv, '--epoch-count', '3'], capfd)
    assert 'does not hold train/' in fails(paper_table.main, [str(tmp_path), *argv[1:]], capfd)
    assert not (tmp_path / 'work').exists()


def test_a_failed_run_is_named_with_its_error(argv):
    with pytest.raises(SystemExit, match='ens-lr0.05-seed0 failed: .*--batch-size 1000: expected at most'):
        paper_table.main([*argv, '--methods', 'ens', '--batch-size', '1000'])


def test_stopped_before_its_end(tmp_path):
    flags = ['x', '--epochs', '3', '--resolutions', '32', '24']
    write_run(tmp_path / 'r', flags, {32: 50., 24: 40.})
    run = Run(tmp_path / 'r', flags)
    assert run.result() == dict(top1={'32': 50., '24': 40.}, top5={'32': 51., '24': 41.}, loss={'32': 1., '24': 1.})
    assert Run(tmp_path / 'r', [*flags[:2], '4', *flags[3:]]).result() is None


def test_held_out_images_are_a_share_of_each_class(argv, tmp_path):
    for _ in range(2):
        hold_out(argv[0], tmp_path / 'held', 0.25)
    found = {split: {p.resolve() for p in (tmp_path / 'held' / split).glob('*/*')} for split in ('train', 'validation')}
    assert found['train'].isdisjoint(found['validation'])
    assert found['train'] | found['validation'] == set((tmp_path / 'pictures' / 'train').glob('*/*'))
    assert [len([*(tmp_path / 'held' / 'validation' / name).iterdir()]) for name in ('cat', 'dog')] == [10, 10]


def runs(method, scores, seed=0):
    """Runs of a method with top-1 by size; the I-Nets one per size."""
    if method == 'inet':
        return [run for s, v in scores.items() for run in runs('I', {s: v}, seed) if not run.update(method=method)]
    return [dict(
        method=method, sizes=list(scores), seed=seed, top1={str(s): v for s, v in scores.items()},
        top5={str(s): 99. for s in scores})]


def test_gains_are_over_the_same_seeds():
    found = [*runs('inet', {32: 50., 24: 40.}), *runs('ens', {32: 51., 24: 43.}), *runs('ens', {32: 61., 24: 53.}, 1)]
    lines = markdown(scores_of(found, (32, 24)), (32, 24)).splitlines()
    assert lines[2] == '| I-Nets | 0 | 50.0 | 40.0 | 45.0 |'
    assert lines[3] == '| RS-Net, ensemble only | 0, 1 | 56.0 ± 7.1 (+1.0) | 48.0 ± 7.1 (+3.0) | 52.0 |'


def test_table_of_warm_starts(tmp_path, argv):
    """The network of the largest size gives two rows, and what starts from scratch keeps the recipe of the others."""
    pictures, _, recipe, *_ = argv
    weights = tmp_path / 'weights.pth'
    given = ['--config', recipe, '--pretrained-path', str(weights), '--epochs', '1', '--device', 'cpu']
    argv = [f'cats={pictures}', *given, '--resolutions', '32', '24', '--seeds', '0', '1', '--table-only',
            '--methods', 'RS-Net', 'per size', 'largest size', 'from scratch', '--variants',
            'no teachers=--distill none', '--work', str(tmp_path / 'work'),
            '--output', str(tmp_path / 'warm.csv')]
    recipe = yaml.safe_load(Path(recipe).read_text())
    for name in ('lr', 'warmup_epochs', 'loss_reduction'):
        recipe.pop(name)
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit, match='holds no finished run'):
        warm_start.main(argv)
    scores = {'RS-Net': ('32-24', 80., 70.), 'single': ('32', 79.), 'from-scratch': ('32-24', 30., 20.),
              'no-teachers': ('32-24', 78., 68.)}
    for name, (sizes, *top1) in scores.items():
        for seed in (0, 1):
            flags = [os.path.relpath(pictures, warm_start.ROOT), *given, '--resolutions', *sizes.split('-')]
            flags += ['--distill', 'none'] if name in ('single', 'no-teachers') else []
            if name == 'from-scratch':
                flags = [f for f in flags if f not in ('--pretrained-path', str(weights))]
                flags += ['--opt', 'adamw', '--lr-base', '3e-4', '--lr-base-size', '64', '--warmup-epochs', '0',
                          '--loss-reduction', 'mean', '--sched-on-updates', '--scale', '0.35', '1.0']
            folder = tmp_path / 'work' / f'cats-{name}-{sizes}-seed{seed}'
            write_run(folder, [*flags, '--seed', str(seed), '--checkpoint-hist', '1'],
                      dict(zip(sizes.split('-'), [t + seed for t in top1])))
            (folder / 'spent.json').write_text('{"seconds": 5.0}')
            (folder / 'other_sizes.json').write_text(json.dumps([dict(resolution=24, top1=60. + seed)]))
    warm_start.main(argv)
    rows = list(csv.DictReader((tmp_path / 'warm.csv').open()))
    assert list(rows[0]) == [
        'dataset', 'model', 'method', 'resolution', 'seeds', 'epochs', 'top1_mean', 'top1_std', 'madds', 'seconds']
    assert [(r['method'], r['resolution'], r['top1_mean'], r['seeds'], r['seconds']) for r in rows] == [
        ('RS-Net', '32', '80.5', '2', '5'), ('RS-Net', '24', '70.5', '2', '5'), ('per size', '32', '79.5', '2', '5'),
        ('largest size', '32', '79.5', '2', '5'), ('largest size', '24', '60.5', '2', '5'),
        ('from scratch', '32', '30.5', '2', '5'), ('from scratch', '24', '20.5', '2', '5'),
        ('no teachers', '32', '78.5', '2', '5'), ('no teachers', '24', '68.5', '2', '5')]
    with pytest.raises(SystemExit):
        warm_start.main([*argv, '--variants', 'distill'])


def test_from_scratch_has_no_trained_weights():
    for flags in (['--pretrained'], ['--pretrained-path', 'x.pth'], ['--initial-checkpoint', 'x.pth', '--lr', '0.1']):
        args = argparse.Namespace(flags=flags, recipe=parse_flags(flags))
        assert not is_warm_start(vars(parse_flags(warm_start.flags_from_scratch(args))))
    with pytest.raises(SystemExit, match='cannot leave out the trained weights: name them by --pretrained, '):
        warm_start.flags_from_scratch(argparse.Namespace(
            flags=['--pretrained-path=x.pth'], recipe=parse_flags(['--pretrained-path=x.pth'])))


def test_smallest_share_that_reaches_the_target(tmp_path, argv, monkeypatch, capfd):
    """Both seeds must reach it; the mean may lack nothing, one size 0.3 points."""
    argv = [*argv, 'recipe=', 'small=--small-steps 0.5', '--shares', '0.5', '1', '--seeds', '0', '1', '--epochs', '20']
    monkeypatch.setattr(time_to_accuracy, 'madds', lambda recipe, size, num_classes: {32: 3, 24: 2}[size])
    with pytest.raises(SystemExit):
        at = argv.index('recipe=') + 1
        time_to_accuracy.parse_args([*argv[:at], 'other=--resolutions 32 16', *argv[at:]])
    assert "'other' has the resolutions [32, 16], expected those of all, [32, 24]" in capfd.readouterr().err
    args = time_to_accuracy.parse_args(argv)
    cells = [(name, share) for name in ('recipe', 'small') for share in (0.5, 1.)]
    epochs = [parse_flags(time_to_accuracy.plan(args, *cell)[0].flags).epochs for cell in cells]
    assert epochs == pytest.approx([10, 20, 10 * 5 / 3.5, 20 * 5 / 3.5], abs=1)  # half of the updates cost 2, not 5
    scores = [((79., 69.), (80., 70.)), ((80., 70.), (81., 71.)), ((80.9, 70.3), (80.2, 70.9)), ((85., 69.5),) * 2]
    for cell, found in zip(cells, scores):
        for run, top1 in zip(time_to_accuracy.plan(args, *cell), found):
            write_run(run.folder, run.flags, dict(zip((32, 24), top1)))
            (run.folder / 'spent.json').write_text('{"seconds": 3.0, "process_seconds": 5.0}')
    time_to_accuracy.main([*argv, '--table-only'])
    table = json.loads((tmp_path / 'table.json').read_text())
    assert table['target'] == [80.5, 70.5]
    assert table['smallest_share'] == dict(recipe=1., small=0.5)
    rows = list(csv.DictReader((tmp_path / 'table.csv').open()))
    assert [(r['recipe'], r['share'], r['resolution'], r['top1_mean'], r['reached']) for r in rows[2:7:2]] == [
        ('recipe', '1.0', '32', '80.5', '1'), ('small', '0.5', '32', '80.55', '1'), ('small', '1.0', '32', '85.0', '0')]
    assert {r['process_seconds'] for r in rows} == {'5'}
    time_to_accuracy.main([*argv, '--table-only', '--target', '90', '60'])
    assert json.loads((tmp_path / 'table.json').read_text())['smallest_share'] == dict(recipe=None, small=None)
    assert '--target has 1 values, expected 2' in fails(time_to_accuracy.main, [*argv, '--target', '90'], capfd)
    assert '--shares is 0' in fails(time_to_accuracy.main, [*argv, '--shares', '0'], capfd)
    assert "'fast': expected NAME=FLAGS" in fails(time_to_accuracy.main, [argv[0], 'fast', *argv[1:5]], capfd)
    assert '--jobs is 0, expected at least 1' in fails(time_to_accuracy.main, [*argv, '--jobs', '0'], capfd)
    assert 'small= does not hold train/' in fails(time_to_accuracy.main, ['small=', *argv[1:]], capfd)  # no DIR
