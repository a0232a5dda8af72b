"""What train_rs.py refuses, in one line and before it writes anything"""
import os
import shutil
import sys

import pytest
import timm
from command_lines import MODEL, TINY, fails, images  # noqa: F401

import train_rs
from timm_rs.hub.convert import save_model
from timm_rs.train import refused
from timm_rs.train.options import create_parser, parse_args
from timm_rs_runtime import fields


@pytest.mark.parametrize('flags', [[], ['--resolutions', '32', '16']])
def test_folder_of_a_plain_network(images, tmp_path, capfd, flags):
    save_model(timm.create_model(MODEL[3:], num_classes=2), tmp_path / 'plain')
    argv = [images, '--model', f"local-dir:{tmp_path / 'plain'}", '--device', 'cpu', '--output', tmp_path / 'out',
            '--batch-size', '4', *flags]
    assert 'is a plain network, expected a switchable one' in fails(train_rs.main, argv, capfd)
    assert not (tmp_path / 'out').exists()


def test_one_class(images, tmp_path, capfd):
    for split in 'train', 'validation':
        shutil.copytree(images / split / 'cat', tmp_path / 'one' / split / 'cat')
    argv = [tmp_path / 'one', *TINY, '--epochs', '1', '--output', tmp_path / 'out']
    assert 'there is only one class' in fails(train_rs.main, argv, capfd)
    assert not (tmp_path / 'out').exists()


def test_images_beside_the_class_folders(images, tmp_path, capfd):
    shutil.copytree(images, tmp_path / 'loose')
    shutil.copy(images / 'train' / 'cat' / '1.jpg', tmp_path / 'loose' / 'train' / 'cover.jpg')
    argv = [tmp_path / 'loose', *TINY, '--epochs', '1', '--output', tmp_path / 'out']
    assert 'train holds images outside of its class folders' in fails(train_rs.main, argv, capfd)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('package,flag', [('wandb', '--log-wandb'), ('torch.utils.tensorboard', '--log-tensorboard')])
def test_missing_package_leaves_nothing_behind(images, tmp_path, capfd, monkeypatch, package, flag):
    monkeypatch.setitem(sys.modules, package, None)
    argv = [images, *TINY, '--epochs', '1', '--output', tmp_path / 'out', flag]
    assert f'{flag} needs the package' in fails(train_rs.main, argv, capfd)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('flags,message', [
    (['--model', 'rs_resnet1O'], "Unknown model 'rs_resnet1O', did you mean rs_resnet1"),
    (['--model', 'resnet10t'], 'did you mean rs_resnet10t?'),
    (['--resolutions', '32', '32'], 'names 32 twice'),
    (['--resolutions', '32', '0'], 'expected positive integers'),
    (['--num-classes', '3'], 'has 2 classes, expected 3'),
    (['--batch-size', '100'], '--batch-size 100'),
    (['--img-size', '64'], '--img-size 64: the training sizes are --resolutions'),
    (['--input-size', '3', '64', '64'], '--input-size 3 64 64: the training sizes are --resolutions'),
    (['--dataset', 'digits'], '--dataset digits comes with scikit-learn, leave out the folder'),
    (['--kd-distill-type', 'feature'], '--kd-distill-type is not supported'),
    (['--split-bn'], '--split-bn is not supported'),
    (['--aug-splits', '3'], '--aug-splits is not supported'),
    (['--jsd-loss'], '--jsd-loss is not supported'),
    (['--torchscript'], '--torchscript is not supported'),
    (['--naflex-loader'], '--naflex-loader is not supported'),
    (['--task', 'multilabel'], 'has one label per image, expected lists of labels as in a data set hfds/'),
    (['--resume', 'nowhere.pth.tar'], 'nowhere.pth.tar: there is no such checkpoint'),
    (['--resume', 'auto'], 'needs --experiment'),
    (['--initial-checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['--distill', 'both'], "invalid choice: 'both'"),
    (['--small-steps', '1'], '--small-steps is 1, expected a share of the updates'),
    (['--small-steps', '0.5', '--sizes-per-update', '1'], '--small-steps does not go with --sizes-per-update'),
    (['--opt-betas', '0.9', '2'], '--opt-betas'),
    (['--layer-decay', '0'], '--layer-decay'),
    (['--save-epochs', '0', '9'], '--save-epochs'),
    (['--clip-grad', '-1'], '--clip-grad is -1.0, expected a finite number above 0'),
    (['--sched', 'step', '--decay-rate', '-1'], '--decay-rate is -1.0, expected a finite number above 0'),
    (['--lr-base-size', '0'], '--lr-base-size is 0, expected a finite number of at least 1'),
    (['--lr-cycle-mul', '0'], '--lr-cycle-mul is 0.0'),
    (['--max-unreadable', '-1'], '--max-unreadable is -1, expected an integer from 0'),
    (['--all-sizes-from', '0.5'], '--all-sizes-from needs --small-steps or --sizes-per-update'),
    (['--sizes-per-update', '1', '--all-sizes-from', '1.5'], '--all-sizes-from'),
    (['--private', 'statistics', '--model-ema'], '--private statistics does not go with --model-ema'),
    (['--mixup', '0.2', '--batch-size', '3'], '--batch-size is 3, expected an even one'),
    (['--scale', '0.5'], '--scale is [0.5], expected 2 numbers'),
    (['--opt', 'adamw', '--opt-betas', '0.9'], '--opt-betas is [0.9], expected 2 or 3 numbers'),
    (['--train-interpolation', 'cubic'], "invalid choice: 'cubic'"),
    (['--sync-bn'], '--sync-bn needs GPUs'),
    (['--config', 'nowhere.yaml'], 'nowhere.yaml does not exist'),
    (['--epochs', '0'], '--epochs is 0'),
    (['--eval-metric', 'top2'], "--eval-metric 'top2'"),
    (['--opt', 'sgdd'], '--opt sgdd: Optimizer sgdd not found in registry'),
    (['--opt', 'adamw', '--opt-kwargs', 'caution=1', 'speed=3'], "speed': 3}: "),
    (['--aa', 'original-x3'], '--aa original-x3 --color-jitter 0.4'),
    (['--smoothing', '1.5'], '--smoothing is 1.5, expected a number of at least 0 and at most 1'),
    (['--ratio', '0', '1'], '--ratio is 0.0, expected a finite number above 0'),
    (['--seed', '-1'], '--seed is -1, expected an integer from 0 to'),
    (['--crop-pct', '0'], '--crop-pct is 0.0, expected a number of at least 0.1'),
    (['--mean', '0.5', '0.5'], '--mean [0.5, 0.5]: mean must have one value or 3'),
    (['--sched', 'cosin'], "--sched cosin: Unknown scheduler 'cosin'"),
    (['--model-kwargs', 'width'], '--model-kwargs width: expected key=value'),
    (['--lrr', '1'], 'unknown flag --lrr, did you mean --lr?'),
    (['--device', 'gpu'], '--device gpu: Expected one of cpu, cuda'),
    (['--device', 'mps'], '--device mps: '),
    (['--target-key', 'label'], '--target-key label is for data sets hfds/'),
    (['--task', 'multilabel', '--target-format', 'multihot'], '--target-format multihot is for data sets hfds/'),
    (['--model-kwargs', 'features_only=True'], '--model-kwargs does not take features_only'),
    (['--model-kwargs', 'channels=[8,16]'], "has no attribute 'layer3'"),
    (['--model-kwargs', 'act_layer=foo'], "--model rs_test_resnet --model-kwargs {'act_layer': 'foo'}: "),
    (['--gp', 'foo'], '--gp foo: '),
    (['--pretrained-cfg-overlay', 'input_size=5'], '--pretrained-cfg-overlay '),
    (['--model-kwargs', 'quantization=2'], 'quantization is 2, expected a mapping with some of weight_bits'),
    (['--val-split', 'nothing'], "holds train, validation; expected one of them as the split instead of 'nothing'"),
    (['--train-split', 'validation'], 'gives the same images for training and validation'),
    (['--train-split', ''], "holds train, validation; expected one of them as the split instead of ''"),
    (['--val-split', ''], "holds train, validation; expected one of them as the split instead of ''"),
    (['--in-chans', '2'], 'Images of 2 channels need a PIL mode, give it by --input-img-mode'),
    (['--input-img-mode', 'L'], '--input-img-mode L gives images of 1 channels, expected 3 as the model (--in-chans)'),
    (['--input-img-mode', 'RBG'], '--input-img-mode RBG: expected an 8-bit mode of PIL'),
])
def test_bad_training_input(images, tmp_path, capfd, flags, message):
    line = fails(train_rs.main, [images, *TINY, '--epochs', '1', '--output', tmp_path / 'out', *flags], capfd)
    assert message in line
    assert not (tmp_path / 'out').exists()


def test_every_number_is_bounded():
    """Except those that other checks bound, and those of which any number makes sense."""
    bounded = {*refused._NUMBERS, *fields._NUMBERS, *refused.REFUSED, 'small_steps', 'multilabel_threshold', 'tta'}
    free = {'local_rank', 'head_init_scale', 'head_init_bias', 'poly_epsilon', 'db_init_bias'}
    numbers = {a.dest for a in create_parser()._actions if a.type in (int, float)}
    assert len(numbers) > 80 and numbers - bounded == free - bounded


def test_class_folders_that_cannot_be_read(images, tmp_path, capfd, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).endswith('train/dog') and access(path, mode))
    argv = [images, *TINY, '--epochs', '1', '--output', tmp_path / 'out']
    assert 'train/dog cannot be read, its images would be left out' in fails(train_rs.main, argv, capfd)


def test_class_map_of_more_classes_than_the_model(images, tmp_path, capfd):
    (tmp_path / 'classes.txt').write_text('emu\ncat\ndog\n')
    argv = [images, *TINY, '--output', tmp_path / 'out', '--num-classes', '2', '--class-map', tmp_path / 'classes.txt']
    assert 'classes.txt numbers 3 classes, the model has 2' in fails(train_rs.main, argv, capfd)


def test_class_map_gives_the_number_of_classes(images, tmp_path, caplog):
    """One of a file with a byte order mark; folders that it does not name are named."""
    for split in 'train', 'validation':
        shutil.copytree(images / split, tmp_path / 'data' / split)
        shutil.copytree(images / split / 'cat', tmp_path / 'data' / split / 'emu')
    (tmp_path / 'classes.txt').write_text('cat\ndog\n', encoding='utf-8-sig')
    argv = [tmp_path / 'data', *TINY, '--epochs', '1', '--output', tmp_path, '--experiment', 'run', '--class-map',
            tmp_path / 'classes.txt']
    caplog.set_level('INFO')
    train_rs.main(list(map(str, argv)))
    assert (tmp_path / 'run' / 'label_names.txt').read_text() == 'cat\ndog\n'
    assert f"{tmp_path / 'data' / 'train'}: 1 folders are not in --class-map and left out: emu" in caplog.text
    assert 'has 2 classes, so the model has as many' in caplog.text


def test_class_map_with_an_empty_line(images, tmp_path, capfd):
    (tmp_path / 'classes.txt').write_text('cat\n\ndog\n')
    argv = [images, *TINY, '--output', tmp_path / 'out', '--class-map', tmp_path / 'classes.txt']
    assert 'classes.txt: a class has no name, as of an empty line' in fails(train_rs.main, argv, capfd)


def test_network_that_cannot_take_the_smallest_size(images, tmp_path, capfd):
    argv = [images, *TINY, '--model', 'rs_vgg11_bn', '--output', tmp_path / 'out']
    assert 'cannot take images of 16x16' in fails(train_rs.main, argv, capfd)


def test_missing_data_folder(tmp_path, capfd):
    assert f'{tmp_path}/nowhere does not exist' in fails(train_rs.main, [tmp_path / 'nowhere', *TINY], capfd)
    assert 'No data' in fails(train_rs.main, TINY, capfd)


@pytest.mark.parametrize('content,message', [
    ('lr: fast', "lr is 'fast', expected float"),
    ('leraning_rate: 1', "unknown flag 'leraning_rate'"),
    ('resolutions: 32', 'expected a list'),
    ('amp: 3', 'expected true or false'),
    ('distill: top', 'expected one of none, ens, ens_topdown'),
    ('split_bn: true', 'split_bn is not supported'),
    ('lr: [', 'not valid YAML'),
    ('lr: 2001-99-99', "lr is '2001-99-99', expected float"),
    ('lr: .nan', 'lr is nan, expected float'),
    ('model_kwargs: {stem_width: 10000000}', 'stem_width is 10000000, expected'),
    ('lr: ' + '[' * 9999, 'not valid YAML'),
    ('lr: \x00', 'not valid YAML'),
    ('log_interval:', 'log_interval is None, expected int'),
    ('opt:', 'opt is None, expected text'),
    ('opt: {a: 1}', "opt is {'a': 1}, expected text"),
    ('epochs: .inf', 'epochs is inf, expected int'),
    ('epochs: 1.5', 'epochs is 1.5, expected int'),
    ('epochs: true', 'epochs is True, expected int'),
    ('mean: [0.5, null]', 'mean is [0.5, None], expected float'),
    ('model_kwargs: 3', 'model_kwargs is 3, expected names with their values'),
    ('opt_kwargs:', 'opt_kwargs is None, expected names with their values'),
    ('lrr: 1', "unknown flag 'lrr', did you mean lr?"),
    ('- lr', "the content is ['lr'], expected a dict"),
])
def test_bad_config(tmp_path, capfd, content, message):
    (tmp_path / 'c.yaml').write_text(content)
    assert message in fails(parse_args, ['--config', tmp_path / 'c.yaml'], capfd)


def test_batch_that_is_too_small_for_batchnorm(images, tmp_path, capfd):
    argv = [images, *TINY, '--epochs', '1', '--output', tmp_path, '--batch-size', '1']
    for name in 'batch', 'auto':
        line = fails(train_rs.main, [*argv, '--bn-statistics', name, '--experiment', name], capfd)
        assert 'BatchNorm needs more than one value per channel, --batch-size 1' in line
