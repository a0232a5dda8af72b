"""Every flag of timm's train.py and validate.py: accepted, refused with a reason, or read from its args.yaml"""
import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

import validate_rs
from timm_rs.train.model import build_model
from timm_rs.train.options import create_parser, parse_args

CPU = torch.device('cpu')


def timm_flags(script):
    """Return timm's flags with their defaults, and what is done here: accepted, refused, or another default."""
    with open(Path(__file__).with_name('timm_flags.csv'), newline='') as f:
        return {row['flag']: (json.loads(row['default']), row['here'])
                for row in csv.DictReader(f) if row['script'] == script}


def refuses(tmp_path, capsys, content):
    """Return the line that a config file is refused with."""
    path = tmp_path / 'c.yaml'
    path.write_text(content)
    with pytest.raises(SystemExit) as e:
        parse_args(['--config', str(path)])
    assert e.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line.partition(f'error: --config {path}: ')[2]


@pytest.mark.parametrize('script,parser', [('train', create_parser), ('validate', validate_rs.create_parser)])
def test_every_flag_of_timm_is_in_the_table(script, parser):
    actions = {action.dest: action for action in parser()._actions}
    own = vars(parse_args([])) if script == 'train' else vars(parser().parse_args([]))
    for flag, (default, here) in timm_flags(script).items():
        if here == 'refused':
            unused, why = actions[flag].const
            assert (unused or None) == (default or None) and why.strip('. ') == why
        else:
            expected = json.loads(here.removeprefix('default ')) if here.startswith('default ') else default
            assert own[flag] == expected, flag


def test_config_of_timm_at_its_defaults(tmp_path):
    """The args.yaml that timm's train.py writes if no flag is given."""
    path = tmp_path / 'args.yaml'
    path.write_text(yaml.safe_dump({flag: default for flag, (default, _) in timm_flags('train').items()}))
    found = parse_args(['--config', str(path)])
    assert found.config == str(path) and found.model == 'rs_resnet50' and found.amp_dtype == 'float16'
    found.config, found.amp_dtype = '', None
    assert vars(found) == vars(parse_args([]))


def test_config_of_timm_names_its_model(tmp_path):
    path = tmp_path / 'args.yaml'
    for model, expected in (('resnet18.a1_in1k', 'rs_resnet18.a1_in1k'), ('vit_tiny', 'vit_tiny'),
                            ('rs_resnet18', 'rs_resnet18')):
        path.write_text(f'model: {model}')
        assert parse_args(['--config', str(path)]).model == expected
    assert parse_args(['--model', 'resnet18']).model == 'resnet18'  # refused later, with a suggestion


def test_config_opens_nothing_by_an_overlay(tmp_path, caplog):
    (tmp_path / 'c.yaml').write_text('pretrained_cfg_overlay: {url: "http://example.org", num_classes: 10}')
    assert parse_args(['--config', str(tmp_path / 'c.yaml')]).pretrained_cfg_overlay == dict(num_classes=10)
    assert 'the model arguments url are left out' in caplog.text
    assert parse_args(['--pretrained-cfg-overlay', 'file=a.pth']).pretrained_cfg_overlay == dict(file='a.pth')


def test_overlay_of_the_pretrained_cfg():
    args = parse_args('--model rs_test_resnet --resolutions 32 16 --pretrained-cfg-overlay crop_pct=0.5'.split())
    args.distributed = False
    assert build_model(args, CPU).pretrained_cfg['crop_pct'] == 0.5


@pytest.mark.parametrize('flag', [flag for flag, (_, here) in timm_flags('train').items() if here == 'refused'])
def test_what_is_refused(tmp_path, capsys, flag):
    unused = timm_flags('train')[flag][0]
    other = {type(None): '[3]', bool: 'true', list: '[3]'}.get(type(unused), '7')
    line = refuses(tmp_path, capsys, f'{flag}: {other}')
    assert line.startswith(f'{flag} is not supported: ')
    name = f"--{flag.replace('_', '-')}"
    with pytest.raises(SystemExit):
        parse_args([name, *([] if unused is False else [other.strip('[]')])])
    assert capsys.readouterr().err.strip().endswith(line.partition(' ')[2])
    if unused not in (None, False, ''):
        parse_args([name, *map(str, unused if isinstance(unused, list) else [unused])])


@pytest.mark.parametrize('flags,message', [
    ('--task multilabel --loss ce', '--loss ce is for one label per image, expected bce, asl, poly, twoway, zlpr, db.'),
    ('--loss jsd', '--loss jsd is not supported: every image is seen'),
    ('--task multilabel --self-teacher', '--self-teacher is for one label per image, not for --task multilabel.'),
    ('--target-format multihot', '--target-format multihot needs --task multilabel.'),
    ('--task multilabel --multilabel-threshold 1', '--multilabel-threshold is 1, expected a number between 0 and 1.'),
    ('--bce-pos-weight 2 --loss-pos-weight 3', '--bce-pos-weight and --loss-pos-weight are the same'),
    ('--tta 3', 'invalid choice: 3'),
    ('--task multilabel --loss db', '--loss db needs --class-stats.'),
])
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('flags,epochs', [('--epochs 4', 4), ('--epochs 5', 5), ('--epochs 2 --warmup-epochs 2', 2)])
def test_a_run_that_is_all_warm_up(caplog, flags, epochs):
    args = parse_args(flags.split())
    assert f'--epochs {epochs} is all warm-up: with --warmup-epochs {args.warmup_epochs} the learning' in caplog.text
    caplog.clear()
    parse_args([*flags.split(), '--warmup-prefix'])
    parse_args(['--epochs', '6'])
    parse_args(['--epochs', '1', '--warmup-epochs', '0'])
    assert not caplog.text


@pytest.mark.parametrize('content', ['epochs: 2.7', 'resolutions: [64, 32.5]', 'batch_size: .inf', 'seed: .nan'])
def test_config_is_refused_parts_of_integers(tmp_path, capsys, content):
    assert refuses(tmp_path, capsys, content).endswith(', expected int.')


def test_config_takes_integers_as_yaml_writes_them(tmp_path):
    (tmp_path / 'c.yaml').write_text("epochs: 7.0\nbatch_size: '16'\nresolutions: [64, 32.0]\nepoch_repeats: 2.5\n")
    args = parse_args(['--config', str(tmp_path / 'c.yaml')])
    assert (args.epochs, args.batch_size, args.resolutions, args.epoch_repeats) == (7, 16, [64, 32], 2.5)
    assert isinstance(args.epochs, int)


def test_first_weights_of_both_classifiers():
    """Of a network with one more for distillation; one without a bias gets none."""
    flags = ['--model', 'rs_swiftformer_xs', '--resolutions', '64', '32', '--num-classes', '3', '--smoothing', '0']
    args = parse_args([*flags, '--head-init-scale', '0', '--head-init-bias', '0.5'])
    args.distributed = False
    heads = build_model(args, CPU).get_classifier()
    assert len(heads) == 2
    for head in heads:
        assert not head.weight.any() and (head.bias == 0.5).all()
