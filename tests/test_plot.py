"""Figures of runs"""
import shutil

import matplotlib.image
import pytest
import timm
import yaml
from command_lines import fails

from timm_rs.evaluate import count_madds
from timm_rs.plot import read_run
from timm_rs.train.summary import append_summary
from timm_rs_cli import main


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(model='rs_resnet10t', resolutions=[32, 16], num_classes=2, in_chans=3, model_kwargs={})
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    for epoch, (large, small) in enumerate([(20., 10.), (60., 40.), (50., 45.)]):
        append_summary(folder / 'summary.csv', dict(
            epoch=epoch, eval_top1_32=large, eval_top1_16=small, eval_top1_ens=large + 1,
            eval_top1_mean=(large + small) / 2, lr=.1))
    append_summary(folder / 'summary.csv', dict(epoch=3, lr=.1))  # not validated
    return folder


def test_history(run):
    history = read_run(str(run))
    assert history.resolutions == [32, 16] and len(history.rows) == 3
    assert history.best['epoch'] == 1
    assert list(history.madds()) == [32, 16] and history.madds()[32] > 2 * history.madds()[16]


def test_cost_is_that_of_the_trained_network(run):
    args = dict(model='rs_resnet10t', num_classes=2, in_chans=1, gp='catavgmax', model_kwargs=dict(stem_width=8))
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    model = timm.create_model('resnet10t', num_classes=2, in_chans=1, global_pool='catavgmax', stem_width=8)
    assert read_run(str(run)).madds() == {r: count_madds(model, r, 1) for r in (32, 16)}


def test_figures(run, tmp_path, capsys):
    main(['plot', str(run), str(run), '--output', str(tmp_path / 'figures')])
    for path in capsys.readouterr().out.split():
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels.std() > 0.01


def test_names_are_no_formulas(run, tmp_path):
    named = [run.rename(tmp_path / r'lr$\frac$')]
    named.append(shutil.copytree(named[0], tmp_path / '_hidden'))
    main(['plot', *map(str, named), '--output', str(tmp_path), '--format', 'svg'])
    for name in ('curves', 'accuracy_vs_madds'):
        drawn = (tmp_path / f'{name}.svg').read_text()
        assert r'<!-- lr$\frac$ -->' in drawn and '<!--  _hidden -->' in drawn


def test_figures_are_not_overwritten(run, tmp_path, capfd):
    argv = ['plot', str(run), '--output', str(tmp_path), '--format', 'svg']
    (tmp_path / 'accuracy_vs_madds.svg').write_text('mine')
    assert 'accuracy_vs_madds.svg exists and is not overwritten' in fails(main, argv, capfd)
    assert not (tmp_path / 'curves.svg').exists()
    main([*argv, '--overwrite'])
    assert '<svg' in (tmp_path / 'accuracy_vs_madds.svg').read_text() and (tmp_path / 'curves.svg').exists()


def test_bad_folders(run, tmp_path, capfd):
    assert 'summary.csv is missing' in fails(main, ['plot', tmp_path], capfd)
    (run / 'summary.csv').write_text('epoch,lr\n0,0.1\n')
    assert 'holds no validated epoch yet' in fails(main, ['plot', run], capfd)
