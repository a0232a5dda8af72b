"""The command line of train_rs.py, run in this process"""
import csv
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from command_lines import MODEL, TINY, fails, images, trained, validated  # noqa: F401

import train_rs
from timm_rs.records import LABEL_FILE
from timm_rs.train import MultiResolutionTask, loop
from timm_rs.train.loop import choose_levels
from timm_rs.train.model import build_model
from timm_rs.train.options import parse_args

ROOT = Path(__file__).parent.parent


def test_output_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert {'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'checkpoint-1.pth.tar'} <= names
    assert (trained / LABEL_FILE).read_text() == 'cat\ndog\n'
    args = yaml.safe_load((trained / 'args.yaml').read_text())
    assert args['model'] == MODEL and args['resolutions'] == [32, 16]
    assert args['num_classes'] == 2 and args['in_chans'] == 3
    assert vars(parse_args(['--config', str(trained / 'args.yaml')])) == dict(args, config=str(trained / 'args.yaml'))
    rows = list(csv.DictReader((trained / 'summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['0', '1']
    for row in rows:
        values = {k: float(v) for k, v in row.items()}
        assert values['eval_top1_mean'] == pytest.approx((values['eval_top1_32'] + values['eval_top1_16']) / 2)
        assert values['train_alpha_32'] + values['train_alpha_16'] == pytest.approx(1)
        terms = sum(values[f'train_{t}'] for t in ('classification', 'ensemble', 'distillation'))
        assert values['train_loss'] == pytest.approx(terms)


def test_best_checkpoint_follows_the_metric(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '3', '--eval-metric', 'loss_16', '--output', str(tmp_path),
        '--experiment', 'r'])
    losses = [float(row['eval_loss_16']) for row in csv.DictReader((tmp_path / 'r' / 'summary.csv').open())]
    best = torch.load(tmp_path / 'r' / 'model_best.pth.tar', weights_only=False)
    assert best['epoch'] == losses.index(min(losses))


def test_an_epoch_is_kept_where_its_row_cannot_be_written(images, tmp_path, monkeypatch, capfd):
    def damage(path, row):
        if row['epoch'] == 1:
            Path(path).write_bytes(b'\xff\xfe')  # as a spreadsheet saves it
        return append(path, row)

    append = train_rs.append_summary
    monkeypatch.setattr(train_rs, 'append_summary', damage)
    argv = [images, *TINY, '--epochs', '3', '--output', tmp_path, '--experiment', 'r']
    assert 'summary.csv' in fails(train_rs.main, argv, capfd)
    assert torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['epoch'] == 1


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_classes_of_both_splits_are_the_same(images, tmp_path, capfd, split):
    shutil.copytree(images, tmp_path / 'images')
    (tmp_path / 'images' / split / 'dog').rename(tmp_path / 'images' / split / 'a_new')
    line = fails(train_rs.main, [tmp_path / 'images', *TINY, '--output', tmp_path / 'out'], capfd)
    found, expected = ('a_new', 'cat') if split == 'validation' else ('cat', 'a_new')
    assert f"has other classes than 'train': class 0 is '{found}', expected '{expected}'; class 1 is" in line

    (tmp_path / 'classes.txt').write_text('cat\ndog\na_new\n')
    train_rs.main([
        str(tmp_path / 'images'), *TINY, '--output', str(tmp_path), '--experiment', 'r', '--epochs', '1',
        '--class-map', str(tmp_path / 'classes.txt'), '--num-classes', '3'])
    if split == 'validation':  # the map that the checkpoint records is not opened
        flags = '--checkpoint', str(tmp_path / 'r' / 'last.pth.tar'), '--class-map', str(tmp_path / 'classes.txt')
        rows = validated(tmp_path / 'images', tmp_path, *flags)
        row, = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
        assert rows[32]['loss'] == pytest.approx(float(row['eval_loss_32']), rel=1e-5)


def test_start_from_a_plain_checkpoint(images, tmp_path):
    """--initial-checkpoint takes timm's keys: with a learning rate of 0 the largest size stays timm's network."""
    plain = timm.create_model(MODEL[3:], num_classes=2).eval()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    train_rs.main([
        str(images), *TINY, '--lr', '0', '--epochs', '1', '--initial-checkpoint', str(tmp_path / 'plain.pth'),
        '--output', str(tmp_path), '--experiment', 'r'])
    model = timm.create_model(
        MODEL, resolutions=(32, 16), num_classes=2, checkpoint_path=str(tmp_path / 'r' / 'last.pth.tar'))
    for name, parameter in model.at(16).named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name))


@pytest.fixture
def steps(monkeypatch):
    """What each step of a training sees."""
    seen, forward = [], MultiResolutionTask.forward

    def record(self, input, target):
        model = self.trainable_module
        seen.append(dict(
            autocast=torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'), dtype=input.dtype,
            channels_last=input.is_contiguous(memory_format=torch.channels_last), soft=target.ndim == 2,
            recomputes=(model.grad_checkpointing, model._switch.recompute), mode=self.criterion.mode))
        return forward(self, input, target)

    monkeypatch.setattr(MultiResolutionTask, 'forward', record)
    return seen


@pytest.mark.parametrize('flags,count,seen', [
    # At smaller sizes torch's bf16 kernel for CPUs leaves gradients of a 3x3 convolution on 1x1 maps uninitialized.
    ('--amp --amp-dtype bfloat16 --channels-last --resolutions 64 48', 4,
     dict(autocast=torch.bfloat16, channels_last=True, dtype=torch.float32)),
    ('--model-dtype bfloat16 --opt adamw --lr 1e-3 --clip-grad 1 --resolutions 64 48', 4,
     dict(autocast=False, dtype=torch.bfloat16)),
    ('--mixup 0.4 --cutmix 1 --bce-loss --model-ema', 4, dict(soft=True, channels_last=False)),
    ('--mixup 0.4 --no-prefetcher --reprob 0.5 --flip independent', 4, dict(soft=True)),
    ('--aa rand-m9-mstd0.5 --grad-accum-steps 2 --layer-decay 0.8 --distill ens', 4, dict(soft=False, mode='ens')),
    ('--grad-checkpointing --memory lean --drop-path 0.2 --clip-grad 0.1 --clip-mode agc', 4,
     dict(recomputes=(True, True), mode='ens_topdown')),
    ('--no-aug --epochs 3 --use-multi-epochs-loader', 6, dict(recomputes=(False, False))),
])
def test_flags_together(images, tmp_path, steps, flags, count, seen):
    """Every step sees what the flags ask for, and they train a network that gives other answers than the first one."""
    train_rs.main([
        str(images), *TINY, '--epochs', '2', '--output', str(tmp_path), '--experiment', 'r', *flags.split()])
    assert len(steps) == count and all({k: step[k] for k in seen} == seen for step in steps)
    rows = list(csv.DictReader((tmp_path / 'r' / 'summary.csv').open()))
    assert len(rows) == count // 2 and len({row['eval_loss_mean'] for row in rows}) == len(rows)
    assert all(0 < float(row['train_loss']) < 20 for row in rows)


def test_flags_of_the_schedule(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'r',
        '--distill', 'none', '--sched', 'step', '--decay-epochs', '2', '--decay-rate', '0.1', '--sched-on-updates',
        '--val-interval', '2', '--save-epochs', '2'])
    rows = list(csv.DictReader((tmp_path / 'r' / 'summary.csv').open()))
    assert [float(row['lr']) for row in rows] == pytest.approx([0.05, 0.005, 0.005, 0.0005])
    assert [bool(row['eval_top1_mean']) for row in rows] == [False, True, False, True]
    assert {row['train_distillation'] for row in rows} <= {'0.0', ''}


@pytest.mark.parametrize('flags,channels', [
    ('--in-chans 1', 1), ('--in-chans 4', 4), ('--input-size 1 32 32', 1),
])
def test_channels(images, tmp_path, flags, channels):
    train_rs.main([
        str(images), *TINY, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'r', *flags.split()])
    last = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)
    weight = next(v for v in last['state_dict'].values() if v.ndim == 4)
    assert weight.shape[1] == last['args'].in_chans == channels


def test_some_updates_of_the_smaller_sizes(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'r', '--small-steps', '0.5',
        '--resolutions', '32', '24', '16'])
    found = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['state_dict']
    steps = [int(found[f'bn1.{r}.num_batches_tracked']) for r in (32, 24, 16)]
    assert 0 < steps[0] < steps[1] == steps[2]
    args = parse_args(['x', '--small-steps', '0.25', '--resolutions', '32', '24', '16'])
    drawn = [choose_levels(args, epoch, update) for epoch in range(20) for update in range(20)]
    assert set(drawn) == {None, (1, 2)} and 60 < drawn.count((1, 2)) < 140


def test_the_last_epochs_train_all_sizes(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'r',
        '--resolutions', '32', '16', '--sizes-per-update', '1', '--all-sizes-from', '0.5'])
    found = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['state_dict']
    steps = [int(found[f'bn1.{r}.num_batches_tracked']) for r in (32, 16)]
    assert sum(steps) == 4 + 2 * 4  # two updates per epoch
    assert min(steps) >= 4


def test_random_size_of_a_network_that_shares_all(images, tmp_path):
    """The steps of every size sum up to all of them, and the network is the same at every size."""
    train_rs.main([
        str(images), *TINY, '--epochs', '4', '--output', str(tmp_path), '--experiment', 'r', '--private', 'none',
        '--resolutions', '32', '24', '16', '--sizes-per-update', '1', '--distill', 'none'])
    found = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['state_dict']
    steps = [int(found[f'bn1.{r}.num_batches_tracked']) for r in (32, 24, 16)]
    assert sum(steps) == 4 * 2 and max(steps) < 8
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        for r in (24, 16):
            assert torch.equal(found[f'bn1.{r}.{name}'], found[f'bn1.32.{name}'])
    assert not torch.equal(found['bn1.32.running_mean'], torch.zeros_like(found['bn1.32.running_mean']))
    args = parse_args(['x', '--sizes-per-update', '2', '--resolutions', '32', '24', '16'])
    drawn = [choose_levels(args, epoch, update) for epoch in range(10) for update in range(20)]
    assert {levels: drawn.count(levels) > 40 for levels in drawn} == {(0, 1): True, (0, 2): True, (1, 2): True}


def test_one_resolution(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'r', '--resolutions', '16',
        '--distill', 'none'])
    row, = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
    assert row['eval_top1_16'] == row['eval_top1_mean'] == row['eval_top1_ens']


@pytest.mark.parametrize('flags', ['--opt adamw --lr 0.01', '--opt sgd', '--opt lookahead_adamw --lr 0.01'])
def test_updates_of_the_smaller_sizes_leave_the_larger_ones_alone(images, tmp_path, monkeypatch, flags):
    """Although the optimizer has momentum from before."""
    monkeypatch.setattr(loop, 'choose_levels', lambda args, epoch, update: None if epoch == 0 else (1,))
    train_rs.main([
        str(images), *TINY, '--epochs', '2', '--output', str(tmp_path), '--experiment', 'r', '--small-steps', '0.5',
        *flags.split()])
    first, last = (torch.load(tmp_path / 'r' / f'{name}.pth.tar', weights_only=False)['state_dict']
                   for name in ('checkpoint-0', 'last'))
    same = {key for key, value in first.items() if torch.equal(value, last[key])}
    assert {key for key in first if '.32.' in key} <= same
    assert not {'conv1.0.weight', 'bn1.16.weight', 'bn1.16.bias'} & same


def test_shared_affine_parameters_are_saved_for_every_size(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'r', '--private', 'statistics'])
    found = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['state_dict']
    largest = {k: v for k, v in found.items() if '.32.' in k}
    for key, value in largest.items():
        is_equal = torch.equal(found[key.replace('.32.', '.16.')], value)
        assert is_equal == (not key.endswith(('running_mean', 'running_var')))
    weight = largest['bn1.32.weight']
    assert not torch.equal(weight, torch.ones_like(weight))
    model = timm.create_model(
        MODEL, resolutions=(32, 16), num_classes=2, checkpoint_path=str(tmp_path / 'r' / 'last.pth.tar'))
    assert model.bn1[32].weight is not model.bn1[16].weight


def test_resume_refuses_another_network(images, trained, tmp_path, capfd):
    argv = [images, *TINY, '--output', tmp_path, '--resume', trained / 'last.pth.tar', '--resolutions', '32', '24']
    assert 'was trained with --resolutions [32, 16]' in fails(train_rs.main, argv, capfd)


def test_moving_average_starts_from_the_weights_that_are_resumed(images, trained, tmp_path):
    train_rs.main([
        str(images), *TINY, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'r', '--resume',
        str(trained / 'last.pth.tar'), '--model-ema', '--model-ema-decay', '1'])
    before, after = (torch.load(f / 'last.pth.tar', weights_only=False) for f in (trained, tmp_path / 'r'))
    for name, value in before['state_dict'].items():
        if not name.endswith('num_batches_tracked'):
            torch.testing.assert_close(after['state_dict_ema'][name], value, rtol=0, atol=0)
    assert not torch.equal(after['state_dict']['fc.weight'], before['state_dict']['fc.weight'])


def test_flags_win_over_the_optimizer_that_is_resumed(images, trained, tmp_path):
    flags = '--epochs 4 --stop-epoch 3 --lr 0.001 --momentum 0.8 --weight-decay 0.01'.split()
    train_rs.main([
        str(images), *TINY, *flags, '--output', str(tmp_path), '--experiment', 'r', '--resume',
        str(trained / 'last.pth.tar')])
    row, = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
    assert float(row['lr']) == pytest.approx(0.001 * (1 - 0.5 ** 0.5) / 2)  # the cosine at epoch 3 of 4
    groups = torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['optimizer']['param_groups']
    found = [(g['initial_lr'], g['momentum'], g['weight_decay']) for g in groups]
    assert found == [(0.001, 0.8, 0), (0.001, 0.8, 0.01)]


@pytest.mark.parametrize('flags', [
    '--opt lamb --layer-decay 0.8', '--opt lookahead_adamw --sched none',
    '--private statistics --loss-reduction mean --weight-decay 0.01', '--small-steps 0.5',
])
def test_resume_with_the_same_flags_changes_nothing(images, tmp_path, flags):
    argv = [str(images), *TINY, '--output', str(tmp_path), *flags.split(), '--epochs', '2']
    train_rs.main([*argv, '--experiment', 'whole'])
    train_rs.main([*argv, '--experiment', 'parts', '--stop-epoch', '1'])
    train_rs.main([*argv, '--experiment', 'parts', '--resume', 'auto'])
    whole, parts = (torch.load(tmp_path / n / 'last.pth.tar', weights_only=False) for n in ('whole', 'parts'))
    for key in ('state_dict', 'optimizer'):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)


@pytest.mark.parametrize('flags', [
    '--opt adamw', '--distill none', '--weight-decay 0', '--layer-decay 0.8'])
def test_resume_refuses_an_optimizer_that_does_not_fit(images, trained, tmp_path, capfd, flags):
    argv = [str(images), *TINY, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'r', *flags.split(),
            '--resume', str(trained / 'last.pth.tar')]
    line = fails(train_rs.main, argv, capfd)
    name = flags.split()[0]
    before = {
        '--opt': 'sgd', '--distill': 'ens_topdown', '--weight-decay': '2e-05', '--layer-decay': 'None'}[name]
    assert f'optimizer with {name} {before}, which does not fit {flags}' in line.replace('0.0:', '0:')
    assert 'give --no-resume-opt' in line
    train_rs.main([*argv, '--no-resume-opt'])


def test_resume_refuses_to_tie_what_was_private(images, trained, tmp_path, capfd):
    argv = [str(images), *TINY, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'r', '--private',
            'statistics', '--no-resume-opt', '--resume', str(trained / 'last.pth.tar')]
    assert 'was trained with --private both, but now it is statistics' in fails(train_rs.main, argv, capfd)
    argv[-2] = '--initial-checkpoint'
    argv.remove('--no-resume-opt')
    train_rs.main([*argv, '--lr', '0', '--epochs', '1'])
    before, after = (torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
                     for folder in (trained, tmp_path / 'r'))
    torch.testing.assert_close(after['bn1.16.weight'], before['bn1.32.weight'], rtol=0, atol=0)
    assert not torch.equal(before['bn1.16.weight'], before['bn1.32.weight'])


@pytest.mark.parametrize('warmup', [0, 1, 3])
def test_plateau_goes_on_at_its_rate(images, tmp_path, warmup):
    """At the one that it had come to, not at that of the flags, nor at that of the warm-up, unless this goes on."""
    argv = [str(images), *TINY, '--output', str(tmp_path), '--experiment', 'r', '--epochs', '4', '--sched', 'plateau',
            '--patience-epochs', '0', '--decay-rate', '0.5', '--lr', '0.08', '--warmup-lr', '0.02', '--warmup-epochs',
            str(warmup), '--eval-metric', 'top5']  # 100 % of two classes, always
    stop = 2 if warmup == 3 else 3
    train_rs.main([*argv, '--stop-epoch', str(stop)])
    train_rs.main([*argv, '--resume', 'auto'])
    rates = [float(row['lr']) for row in csv.DictReader((tmp_path / 'r' / 'summary.csv').open())]
    assert rates == pytest.approx({  # the first metric that a plateau sees is better than none
        0: [0.08, 0.04, 0.02, 0.02], 1: [0.08, 0.08, 0.04, 0.04], 3: [0.04, 0.06, 0.08, 0.08]}[warmup])


@pytest.mark.parametrize('workers', ['0', '1'])
def test_mixing_ends(images, tmp_path, monkeypatch, workers):
    """Also in the workers of the loader."""
    mixed = []

    def forward(self, images, target):
        mixed.append(bool((target.amax(1) < 1).any()))
        return step(self, images, target)

    step = MultiResolutionTask.forward
    monkeypatch.setattr(MultiResolutionTask, 'forward', forward)
    train_rs.main([
        str(images), *TINY, '--epochs', '2', '--output', str(tmp_path), '--mixup', '1', '--mixup-off-epoch', '1',
        '--smoothing', '0', '--workers', workers])
    half = len(mixed) // 2
    assert any(mixed[:half]) and not any(mixed[half:])


def test_resolutions_are_those_of_the_model():
    args = parse_args(['x', '--model', 'rs_resnet10t.imagenette', '--pretrained'])
    args.distributed = False
    build_model(args, torch.device('cpu'))
    assert args.resolutions == [48, 40, 32, 24]


def test_output_is_never_overwritten(images, trained, capfd):
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    argv = [images, *TINY, '--output', trained.parent, '--experiment', trained.name]
    assert 'exists and is not overwritten' in fails(train_rs.main, argv, capfd)
    assert before == {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}


def test_config_sets_defaults_that_flags_override(tmp_path):
    (tmp_path / 'c.yaml').write_text('lr: 3e-4\nresolutions: [96, 128]\nsplit_bn: false\nkd_temperature: 4.0\n')
    args = parse_args(['--config', str(tmp_path / 'c.yaml'), '--epochs', '7'])
    assert (args.lr, args.resolutions, args.epochs) == (3e-4, [128, 96], 7)
    assert parse_args(['--config', str(tmp_path / 'c.yaml'), '--lr', '1']).lr == 1


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_recipes_parse_and_name_a_model(path):
    args = parse_args(['--config', str(path)])
    assert timm.is_model(args.model) and args.model == re.split(r'[.-]', path.stem)[0]


def test_loss_that_is_not_finite_names_step_and_resolution(images, tmp_path, capfd):
    argv = [images, *TINY, '--epochs', '2', '--output', tmp_path, '--experiment', 'r', '--lr', '1e30']
    line = fails(train_rs.main, argv, capfd)
    assert re.search(r'not finite at batch \d+: logits at resolution 32, 16', line)
    assert not (tmp_path / 'r' / 'last.pth.tar').exists()


def test_unreadable_images_are_named_and_counted(images, tmp_path, capfd, caplog):
    root = tmp_path / 'images'
    shutil.copytree(images, root)
    broken = root / 'train' / 'cat' / '1.jpg'
    broken.write_bytes(broken.read_bytes()[:100])
    argv = [str(root), *TINY, '--epochs', '1', '--output', str(tmp_path), '--workers', '1', '--batch-size', '5']
    train_rs.main([*argv, '--experiment', 'skips'])
    log = caplog.text
    assert f'Cannot read image {broken}' in log and f'1 unreadable images so far: {broken}' in log
    assert '--max-unreadable' in fails(train_rs.main, [*argv, '--experiment', 'stops', '--max-unreadable', '0'], capfd)


def test_full_disk_keeps_the_last_checkpoint(images, tmp_path, capfd, monkeypatch):
    save, calls = torch.save, 0

    def full_disk(state, path, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(path).write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, 'save', full_disk)
    argv = [images, *TINY, '--epochs', '3', '--output', tmp_path, '--experiment', 'r']
    assert 'No space left on device' in fails(train_rs.main, argv, capfd)
    assert torch.load(tmp_path / 'r' / 'last.pth.tar', weights_only=False)['epoch'] == 0
    assert not list((tmp_path / 'r').glob('tmp*'))
