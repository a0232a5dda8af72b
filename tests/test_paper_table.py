"""The paper's comparison on a folder of images: its crops, its runs and its table"""
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_equal
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import _photographs
import _training
import paper_table
from _photographs import crop, random_boxes, resize_matrices

from timm_rs.train import EnsembleDistillationLoss


def test_crop_of_the_whole_image_is_an_antialiased_resize():
    x = torch.rand(2, 3, 40, 40)
    matrices = resize_matrices(torch.zeros(2), torch.full((2,), 40.), 40, 16)
    found = matrices[:, None] @ x @ matrices[:, None].transpose(-1, -2)
    torch.testing.assert_close(found, F.interpolate(x, size=(16, 16), mode='bilinear', antialias=True))


def test_crops_are_inside_flipped_and_repeatable():
    images = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32).contiguous()  # columns tell where
    crops = []
    for _ in '12':
        generator = torch.Generator().manual_seed(0)
        boxes = [random_boxes(i, 32, (0.2, 0.5), generator) for i in torch.arange(64).split(32)]
        crops.append(torch.cat([crop(images, b, 16) for b in boxes]))
    assert_equal(*crops)
    std = torch.tensor(_photographs.STD).view(3, 1, 1) * 255
    mean = torch.tensor(_photographs.MEAN).view(3, 1, 1) * 255
    columns = crops[0] * std + mean
    assert columns.min() > -0.01 and columns.max() < 31.01
    steps = (columns[..., -1] - columns[..., 0]).mean((1, 2))
    assert 16 < (steps < 0).sum() < 48
    widths = steps.abs() * 16 / 15
    assert 32 * (0.2 * 3 / 4) ** 0.5 - 1 < widths.min() < widths.max() < 32 * (0.5 * 4 / 3) ** 0.5 + 1


@pytest.fixture
def argv(tmp_path):
    generator = random.Random(0)
    for split, count in (('train', 20), ('val', 4)):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'pictures' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.frombytes('RGB', (40, 36), generator.randbytes(40 * 36 * 3)).save(folder / f'{i}.png')
    return [
        str(tmp_path / 'pictures'), '--model', 'test_resnet', '--sizes', '24', '32', '--epochs', '2', '--side', '36',
        '--batch-size', '8', '--lrs', '0.1', '--work', str(tmp_path / 'work'), '--output', str(tmp_path / 'table.csv'),
        '--device', 'cpu']


def train_all(args, search=False):
    """Train in this process."""
    args.work.mkdir(exist_ok=True)
    for run in paper_table.plan(args, search):
        paper_table.train(run, args)


def test_table(argv, tmp_path, capsys):
    args = paper_table.parse_args(argv)
    train_all(args)
    assert paper_table.plan(args, search=True) == []
    paper_table.main([*argv, '--table-only'])
    rows = list(csv.DictReader((tmp_path / 'table.csv').open()))
    methods = ['I-Nets', 'I-32', 'Parallel', 'RS-Net, ensemble alone', 'RS-Net', 'random size']
    assert [(row['method'], row['resolution']) for row in rows] == [(m, s) for m in methods for s in ('32', '24')]
    assert {(row['dataset'], row['model'], row['epochs'], row['seeds']) for row in rows} == {
        ('pictures', 'test_resnet', '2', '1')}
    for row in rows:
        assert 100 * int(float(row['top1_mean']) / 12.5) / 8 == float(row['top1_mean'])  # of eight images
        assert float(row['top5_mean']) == 100
    assert int(rows[0]['madds']) > int(rows[1]['madds']) > 0
    assert rows[0]['params'] == rows[10]['params'] < rows[8]['params']
    best = paper_table.read(paper_table.plan(args, False)[0], args)
    assert best['top1']['32'] == float(rows[0]['top1_mean']) and best['images_per_second'] > 0
    table = (tmp_path / 'table.md').read_text().splitlines()
    assert table[2].startswith('| size | MAdds | I-Nets | I-32 ') and len(table) == 6
    assert all((tmp_path / f'table.{kind}').stat().st_size for kind in ('png', 'json'))
    paper_table.main([*argv, '--dry-run'])
    assert capsys.readouterr().out.count('done') == 6


def test_gains_are_of_the_same_seeds(argv, tmp_path, monkeypatch):
    args = paper_table.parse_args([*argv, '--seeds', '0', '1', '--methods', 'inet', 'parallel', 'ens_topdown'])
    args.work.mkdir()
    reached = dict(inet={0: (80, 70), 1: (84, 71)}, parallel={1: (85, 70)}, ens_topdown={0: (82, 75), 1: (85, 76)})
    for run in paper_table.plan(args, False):
        values = dict(zip(('32', '24'), reached[run.method].get(run.seed, ())))
        if values:
            result = dict(method=run.method, sizes=run.sizes, seed=run.seed, params=5, seconds=1., cost=1.)
            paper_table.write(run, dict(result, top1=values, top5=values), args)
    paper_table.main([*argv, '--seeds', '0', '1', '--table-only'])
    caption, _, heads, _, *lines = (tmp_path / 'table.md').read_text().splitlines()
    assert caption.endswith(
        'mean and standard deviation over 2 seeds; in brackets the gain over the I-Net of that size and seed.')
    assert heads == '| size | MAdds | I-Nets, 2 seeds | I-32, 2 seeds | Parallel, 1 seed | RS-Net, 2 seeds |'
    assert [line.split(' | ')[2:] for line in lines] == [
        ['82.0 ± 2.8', '82.0 ± 2.8 (+0.0)', '85.0 (+1.0)', '83.5 ± 2.1 (+1.5) |'],
        ['70.5 ± 0.7', '70.5 ± 0.7 (+0.0)', '70.0 (-1.0)', '75.5 ± 0.7 (+5.0) |']]


def test_learning_rate_is_chosen_on_held_out_images(argv):
    args = paper_table.parse_args([*argv, '--lrs', '0.01', '0.1', '--search-epochs', '1', '--methods', 'ens'])
    train_all(args, search=True)
    results = {run.lr: paper_table.read(run, args) for run in paper_table.plan(args, True)}
    means = {lr: (r['top1']['32'] + r['top1']['24']) / 2 for lr, r in results.items()}
    assert set(means) == {0.01, 0.1}
    (run,) = paper_table.plan(args, False)
    assert means[run.lr] == max(means.values())
    photographs = paper_table.load(args)
    assert photographs.num_fit == 36 and len(photographs.held_out[32]) == 4


def test_moving_average_of_sampled_sizes(argv):
    argv = [*argv, '--sizes', '40', '36', '32', '24', '--methods', 'ens_topdown', '--sampled', '--epochs', '1']
    args = paper_table.parse_args([*argv, '--ema', '1'])
    run, = paper_table.plan(args, False)
    for seed in range(4):
        chosen = _training.choose_levels(run, args, torch.Generator().manual_seed(seed))
        assert chosen in ((0, 1, 3), (0, 2, 3))
    train_all(args)
    torch.manual_seed(0)  # an average of decay 1 stays where the network began
    began = _training.create_network(run, args, 2).state_dict()
    found = torch.load(args.work / f'{run.name}.pth')
    assert_equal(
        {k: v for k, v in found.items() if v.is_floating_point()},
        {k: v.half() for k, v in began.items() if v.is_floating_point()})
    steps = {size: int(found[f'bn1.{size}.num_batches_tracked']) for size in run.sizes}
    assert steps[40] == steps[24] == steps[36] + steps[32] == 5


def test_more_steps_of_the_smaller_sizes(argv):
    argv = [*argv, '--sizes', '40', '36', '32', '24', '--methods', 'inet', 'ens_topdown', '--small-steps', '0.5']
    args = paper_table.parse_args([*argv, '--epochs', '1'])
    *plain, run = paper_table.plan(args, False)
    generator = torch.Generator().manual_seed(0)
    drawn = [_training.choose_levels(run, args, generator) for _ in range(400)]
    assert set(drawn) == {(0, 1, 2, 3), (2, 3)} and 160 < drawn.count((2, 3)) < 240
    assert {_training.choose_levels(r, args, generator) for r in plain} == {(0,)}
    paper_table.train(run, args)
    found = torch.load(args.work / f'{run.name}.pth')
    steps = [int(found[f'bn1.{size}.num_batches_tracked']) for size in run.sizes]
    assert steps[0] == steps[1] < steps[2] == steps[3] == 5


@pytest.mark.parametrize('options', [[], ['--sampled'], ['--small-steps', '0.3']])
@pytest.mark.parametrize('method', ['ens', 'random_size', 'inet'])
def test_cost_is_of_the_sizes_that_are_trained(argv, method, options):
    args = paper_table.parse_args([*argv, '--sizes', '48', '40', '36', '32', '24', '--methods', method, *options])
    for run in paper_table.plan(args, False):
        generator, drawn = torch.Generator().manual_seed(0), 2000
        counts = torch.zeros(len(run.sizes))
        for _ in range(drawn):
            counts[list(_training.choose_levels(run, args, generator))] += 1
        torch.testing.assert_close(
            torch.tensor(_training.level_shares(run, args)), counts / drawn, rtol=0, atol=0.05)
        forward = paper_table.cost(run, args) / 3 / args.epochs
        shares = zip(_training.level_shares(run, args), run.sizes)
        assert forward == pytest.approx(sum(share * paper_table.madds(args, s) for share, s in shares))


@pytest.mark.parametrize('method, graphs', [('ens_topdown', 1), ('random_size', 2)])
def test_replayed_steps_do_what_eager_ones_do(argv, monkeypatch, method, graphs):
    class Replay:
        """Stands in for a CUDA graph: does again what was captured, on the same tensors."""

        def __init__(self, step, static, chosen):
            self.step, self.static, self.chosen, self.terms = step, static, chosen, torch.zeros(4)
            replays.append(self)

        def replay(self):
            self.terms.copy_(self.step._update(self.static, self.chosen))

    def capture(step, boxes, chosen):
        static = _photographs.Boxes(*(x.clone() for x in boxes))
        graph = Replay(step, static, chosen)
        return graph, static, graph.terms

    replays, found = [], []
    monkeypatch.setattr(_training.Step, '_capture', capture)
    monkeypatch.setattr(_training.Step, 'EAGER', 1)
    for replayed in (False, True):
        args = paper_table.parse_args([*argv, '--methods', method, '--distill-ramp', '3', '--lrs', '0.01'])
        args.work.mkdir(exist_ok=True)
        args.cuda_graphs = replayed
        run, = paper_table.plan(args, False)
        result, weights = _training.train_network(run, args, paper_table.load(args), args.work / f'{replayed}.ckpt')
        found.append((weights, result['loss']))
    assert len(replays) == graphs
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


def test_a_mean_loss_is_a_smaller_rate_and_a_larger_decay(argv):
    found = []
    for rate, decay, options in ((0.02, 0.01, []), (0.01, 0.02, ['--no-mean-loss'])):
        args = paper_table.parse_args([*argv, '--methods', 'ens_topdown', *options, '--weight-decay', str(decay)])
        args.work.mkdir(exist_ok=True)
        run = _training.Run('ens_topdown', (32, 24), rate, 0)
        checkpoint = args.work / f'{rate}.ckpt'
        found.append(_training.train_network(run, args, paper_table.load(args), checkpoint)[1])
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)  # in half precision
    torch.manual_seed(0)
    began = _training.create_network(run, args, 2).state_dict()
    assert (found[0]['fc.weight'] - began['fc.weight']).abs().max() > 0.01


def test_runs_in_processes_side_by_side(argv, tmp_path):
    options = ['--methods', 'inet', '--lrs', '0.01', '0.1', '--search-epochs', '1', '--epochs', '1', '--jobs', '2']
    command = [sys.executable, paper_table.__file__, *argv, *options]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert 'of 2 networks chose 0.' in done.stdout
    names = {path.name.replace('0.01', 'LR').replace('0.1', 'LR') for path in (tmp_path / 'work').glob('inet*.json')}
    assert names == {f'inet-{s}-lrLR-seed0{kind}.json' for s in (24, 32) for kind in ('', '-search')}
    assert (tmp_path / 'table.csv').exists()
    (tmp_path / 'work' / 'inet-24-lr0.1-seed0-search.json').unlink()
    (tmp_path / 'work' / 'inet-24-lr0.1-seed0-search.ckpt').mkdir()  # which no process can read
    failed = subprocess.run(command, timeout=300, capture_output=True, text=True)
    assert failed.returncode == 1 and 'inet-24-lr0.1-seed0-search ended with 1.' in failed.stderr


@pytest.mark.parametrize('kind', ['classes', 'temperature'])
def test_learned_ensembles(argv, kind, monkeypatch):
    made = []
    ensemble = _training.ENSEMBLES[kind]
    monkeypatch.setitem(_training.ENSEMBLES, kind, lambda *args: made.append(ensemble(*args)) or made[0])
    args = paper_table.parse_args([*argv, '--methods', 'ens_topdown', '--ensemble', kind])
    train_all(args)
    (learned,) = made[0].parameters()
    assert learned.abs().min() > 0  # it began at zero, where the ensemble is the paper's
    result = paper_table.read(*paper_table.plan(args, False), args)
    assert result['loss']['ens'] > 0
    logits, alpha = torch.randn(2, 3, 2), torch.tensor([0.5, -0.5])
    with torch.no_grad():
        assert not torch.allclose(made[0].ensemble(logits, alpha), ensemble('ens', 2, 2).ensemble(logits, alpha))
        expected = EnsembleDistillationLoss().ensemble(logits, alpha)
        torch.testing.assert_close(ensemble('ens', 2, 2).ensemble(logits, alpha), expected)


@pytest.mark.parametrize('private', ['affine', 'statistics'])
def test_half_of_batchnorm_is_shared(argv, private):
    args = paper_table.parse_args([*argv, '--methods', 'ens_topdown', '--private', private, '--epochs', '1'])
    train_all(args)
    run, = paper_table.plan(args, False)
    found = torch.load(args.work / f'{run.name}.pth')
    same = {key.rpartition('.')[2]: True for key in found if '.32.' in key}
    for key, value in found.items():
        if '.32.' in key:
            same[key.rpartition('.')[2]] &= torch.equal(value, found[key.replace('.32.', '.24.')])
    shared = ('weight', 'bias') if private == 'statistics' else ('running_mean', 'running_var')
    assert {key for key, equal in same.items() if equal} == {*shared, 'num_batches_tracked'}


def test_quantized_networks(argv):
    quantized = ['--weight-bits', '2', '--activation-bits', '2', '--methods', 'inet', 'ens_topdown', '--epochs', '1']
    args = paper_table.parse_args([*argv, *quantized])
    train_all(args)
    for run in paper_table.plan(args, False):
        model = _training.create_network(run, args, 2)
        model.load_state_dict(torch.load(args.work / f'{run.name}.pth'))
        weight = model.eval().layer1[0].conv2.quantized_weight
        assert weight[0].unique().numel() <= 4
        assert type(model).__name__ == ('RSResNet' if run.switchable else 'ResNet')


@pytest.mark.parametrize('method', ['inet', 'ens_topdown'])
def test_begins_with_pretrained_weights_of_other_classes(argv, tmp_path, method):
    path = tmp_path / 'weights.pth'
    plain = timm.create_model('test_resnet')
    torch.save(plain.state_dict(), path)
    args = paper_table.parse_args([*argv, '--methods', method, '--pretrained-path', str(path)])
    paper_table.check_network(args)
    run, *_ = paper_table.plan(args, False)
    model = _training.create_network(run, args, 2)
    assert_equal(model.conv1[0].weight, plain.conv1[0].weight)
    assert model.num_classes == 2


def test_arguments_of_the_model(argv):
    args = paper_table.parse_args([*argv, '--model-kwargs', 'in_chans=3', 'drop_rate=0.25'])
    for run in paper_table.plan(args, False):
        assert _training.create_network(run, args, 2).drop_rate == 0.25
    for _ in range(2):  # a tuple is a list in recipe.json
        args = paper_table.parse_args([*argv, '--model', 'resnet10t', '--model-kwargs', 'layers=(1,1,1,1)'])
        paper_table.check_recipe(args)
        paper_table.keep_recipe(args)


def test_a_stopped_run_goes_on(argv, monkeypatch, tmp_path):
    found = []
    for stop in (False, True):
        args = paper_table.parse_args([*argv, '--methods', 'ens_topdown', '--work', str(tmp_path / str(stop))])
        args.work.mkdir()
        (run,) = paper_table.plan(args, False)
        if stop:
            with monkeypatch.context() as patch:
                patch.setattr(_training, 'SECONDS_BETWEEN_CHECKPOINTS', 0)
                patch.setattr(_training.os, 'replace', stop_after(1, '.ckpt'))
                with pytest.raises(KeyboardInterrupt):
                    paper_table.train(run, args)
            assert paper_table.read(run, args) is None
        paper_table.train(run, args)
        found.append((torch.load(args.work / f'{run.name}.pth'), paper_table.read(run, args)['top1']))
    assert_equal(found[0], found[1])


def stop_after(count, suffix):
    from os import replace

    def replace_and_stop(source, target):
        nonlocal count
        replace(source, target)
        if str(target).endswith(suffix):
            count -= 1
            if not count:
                raise KeyboardInterrupt
    return replace_and_stop


def test_runs_of_two_recipes_do_not_mix(argv):
    paper_table.main([*argv, '--dry-run'])
    assert not Path(argv[argv.index('--work') + 1]).exists()
    paper_table.keep_recipe(paper_table.parse_args(argv))
    paper_table.main([*argv, '--dry-run'])
    with pytest.raises(SystemExit, match='work holds runs with --epochs 2, not --epochs 3; choose another --work'):
        paper_table.main([*argv, '--epochs', '3', '--dry-run'])
    with pytest.raises(SystemExit, match='holds runs with --dataset pictures, not --dataset pets'):
        paper_table.main([*argv, '--dataset', 'pets', '--dry-run'])
    (Path(argv[0]) / 'val' / 'cat' / '0.png').unlink()
    with pytest.raises(SystemExit, match='holds runs with 40 images in train/ and 8 images in val/, not 40 .* and 7 '):
        paper_table.main([*argv, '--dry-run'])


def test_published_runs_are_taken_over(argv, tmp_path):
    options = ['--methods', 'parallel', '--lrs', '0.01', '0.1', '--search-epochs', '1']
    args = paper_table.parse_args([*argv, *options])
    train_all(args, search=True)
    train_all(args)
    paper_table.main([*argv, *options, '--table-only'])
    options += ['--include', str(tmp_path / 'table.json'), '--work', str(tmp_path / 'other')]
    paper_table.main([*argv, *options, '--dry-run'])
    found = sorted(path.name for path in (tmp_path / 'work').glob('parallel*.json'))
    assert len(found) == 3
    for name in found:
        assert (tmp_path / 'other' / name).read_text() == (tmp_path / 'work' / name).read_text()
    with pytest.raises(SystemExit, match='table.json holds runs with --ema 0, not --ema 0.9'):
        paper_table.main([*argv, *options, '--dry-run', '--ema', '0.9', '--work', str(tmp_path / 'third')])
    for name, content in (('missing', None), ('broken', '{'), ('foreign', '{"recipe": {}}')):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=f'Cannot read .*{name}, expected a .json that this script wrote'):
            paper_table.main([*argv, '--include', str(tmp_path / name), '--work', str(tmp_path / 'fourth')])
    table = json.loads((tmp_path / 'table.json').read_text())
    del table['recipe']['resample'], table['recipe']['small_steps']  # a table of before there were such options
    (tmp_path / 'before.json').write_text(json.dumps(table))
    with pytest.raises(SystemExit, match='before.json holds runs with --resample antialiased, not --resample matched'):
        paper_table.main(
            [*argv, *options, '--include', str(tmp_path / 'before.json'), '--work', str(tmp_path / 'fourth')])
    with pytest.raises(SystemExit, match='table.json holds runs with --dataset pictures, not --dataset pets'):
        paper_table.main([*argv, *options, '--dataset', 'pets', '--work', str(tmp_path / 'fourth')])
    assert not (tmp_path / 'third').exists() and not (tmp_path / 'fourth').exists()


def other_name(folder):
    (folder / 'val' / 'cat').rename(folder / 'val' / 'cow')


def no_image(folder):
    for path in (folder / 'val' / 'cat').iterdir():
        path.rename(path.with_suffix('.txt'))


def loose_image(folder):
    (folder / 'train' / 'cat' / '0.png').rename(folder / 'train' / '0.png')


def deep_image(folder):
    (folder / 'train' / 'cat' / 'deep').mkdir()
    (folder / 'train' / 'cat' / '0.png').rename(folder / 'train' / 'cat' / 'deep' / '0.png')


def few_images(folder):
    for path in (folder / 'train').glob('*/??.png'):
        path.unlink()
    for path in (folder / 'train' / 'dog').glob('[1-9].png'):
        path.unlink()
    for path in (folder / 'train' / 'cat').glob('[7-9].png'):
        path.unlink()


@pytest.mark.parametrize('change, message', [
    (other_name, 'train has no image of cow, expected all classes in both splits'),
    (no_image, 'val has no image of cat, expected all classes in both splits'),
    (loose_image, '0.png: expected images in the folder of a class'),
    (deep_image, '0.png: expected images in the folder of a class'),
    (few_images, '7 training images do not make a batch of 8, give a smaller --batch-size'),
])
def test_folders_that_give_no_fair_comparison(argv, tmp_path, capsys, change, message):
    change(tmp_path / 'pictures')
    with pytest.raises(SystemExit):
        paper_table.main([*argv, '--lrs', '0.1', '0.2'])
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'work').exists()


def test_images_that_cannot_be_taken(argv, tmp_path, capsys):
    folder = tmp_path / 'pictures' / 'train' / 'cat'
    (folder / 'a.webp').write_bytes(b'')
    for name in ('0.png', '1.png'):
        (folder / name).write_bytes((folder / name).read_bytes()[:90])
    args = paper_table.parse_args(argv)
    args.work.mkdir()
    with pytest.raises(SystemExit, match='2 images cannot be read, remove or convert them: .*cat/[01].png'):
        paper_table.load(args)
    assert 'a.webp' in capsys.readouterr().err
    for name in ('0.png', '1.png'):
        (folder / name).unlink()
    Image.new('I;16', (40, 36), 30000).save(folder / '2.png')
    with pytest.raises(SystemExit, match='1 images have more than 8 bits a channel, .*2.png'):
        paper_table.load(args)


def test_images_are_decoded_anew_when_they_change(argv, tmp_path):
    args = paper_table.parse_args(argv)
    args.work.mkdir()
    first = paper_table.load(args)
    when = (args.work / 'photographs.pt').stat().st_mtime_ns
    assert torch.equal(paper_table.load(args).train, first.train)
    assert (args.work / 'photographs.pt').stat().st_mtime_ns == when
    (tmp_path / 'pictures' / 'val' / 'cat' / '0.png').unlink()
    assert len(paper_table.load(args).val_labels) == len(first.val_labels) - 1


def test_a_rate_that_diverges_is_not_chosen(argv, capsys):
    options = ['--lrs', '0.01', '1e30', '--search-epochs', '1', '--methods', 'ens_topdown']
    args = paper_table.parse_args([*argv, *options])
    train_all(args, search=True)
    (run,) = paper_table.plan(args, False)
    assert run.lr == 0.01
    paper_table.warn_of_the_edge(args)
    assert '1 of 1 networks chose 0.01, the smallest of --lrs' in capsys.readouterr().out
    args.lrs, args.epochs = [1e30], 1
    with pytest.raises(SystemExit, match='the loss is not finite in epoch 0'):
        paper_table.train(*paper_table.plan(args, False), args)


@pytest.mark.parametrize('options, message', [
    (['--model', 'resnet_none'], r'Cannot create resnet_none: Unknown model \(resnet_none\)'),
    (['--model', 'vit_tiny_patch16_224', '--methods', 'ens'], 'Cannot create rs_vit_tiny_patch16_224: .*BatchNorm'),
    (['--model', 'vgg11_bn', '--sizes', '8'], 'vgg11_bn does not run at 8 px: '),
    (['--initial-checkpoint', __file__], 'Cannot create test_resnet: '),
])
def test_networks_that_cannot_be(argv, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        paper_table.main([*argv, *options])
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('options,message', [
    (['--epochs', '0'], '--epochs is at least 1, not 0'),
    (['--small-steps', '1'], '--small-steps is a share of at least 0 and below 1, not 1'),
    (['--small-steps', '0.5', '--ensemble', 'classes'], 'needs all sizes in each step, not --small-steps'),
    (['--small-steps', '0.5', '--sampled'], '--sampled and --small-steps exclude each other'),
    (['--pretrained', '--pretrained-path', __file__], 'exclude each other'),
    (['--pretrained-path', 'nowhere.pth'], '--pretrained-path: nowhere.pth is no file'),
    (['--cuda-graphs'], '--cuda-graphs needs --device cuda, and no --torchcompile'),
    (['--jobs', '0'], '--jobs is 1 or more'),
    (['--device', 'cuda', '--torchcompile', '--jobs', '2'], '--jobs is 1 or more, and 1 with --torchcompile on a GPU'),
    (['--weight-bits', '9'], '--weight-bits is 1 to 8, or 32 for float, not 9'),
    (['--activation-bits', '2'], '--activation-bits needs --weight-bits'),
    (['--sampled', '--ensemble', 'classes'], '--ensemble classes needs all sizes in each step, not --sampled'),
])
def test_options_that_cannot_be(argv, options, message, capsys):
    with pytest.raises(SystemExit):
        paper_table.main([*argv, *options, '--dry-run'])
    assert message in capsys.readouterr().err


def test_folder_without_images(argv, capsys, tmp_path):
    with pytest.raises(SystemExit):
        paper_table.main([str(tmp_path), *argv[1:]])
    assert f'{tmp_path} holds no train/ with a folder of images per class' in capsys.readouterr().err
    assert not (tmp_path / 'work').exists()
