"""The command line of validate_rs.py, run in this process"""
import argparse
import csv
import json
import os
import shutil
import time

import pytest
import timm
import torch
from command_lines import MODEL, TINY, fails, images, trained, validated  # noqa: F401
from PIL import Image
from timm.data import create_dataset, create_loader

import train_rs
import validate_rs
from timm_rs.evaluate import choose_amp, evaluate
from timm_rs.hub.convert import save_model
from timm_rs.records import LABEL_FILE


def test_validation_equals_timm_loader_image_for_image(images, trained, tmp_path, capsys):
    """Predictions of timm's loader for one size with model.at(size) give the very counts that we print."""
    results = tmp_path / 'results.json'
    validate_rs.main([
        str(images), '--checkpoint', str(trained / 'last.pth.tar'), '--workers', '0', '--device', 'cpu', '--batch-size',
        '5', '--results-file', str(results)])
    rows = {row['resolution']: row for row in json.loads(results.read_text())}
    assert list(rows) == [32, 16, 'ens']
    table = capsys.readouterr().out
    assert 'top-1' in table and len(table.strip().splitlines()) == 4

    model = timm.create_model(
        MODEL, resolutions=(32, 16), num_classes=2, checkpoint_path=str(trained / 'last.pth.tar')).eval()
    logits = {}
    for r in (32, 16):
        plain = model.at(r)
        config = timm.data.resolve_model_data_config(plain)
        loader = create_loader(
            create_dataset('', images, 'validation'), batch_size=4, device=torch.device('cpu'), num_workers=0, **config)
        with torch.no_grad():
            batches = [(plain(x), y) for x, y in loader]
        logits[r], target = (torch.cat(t) for t in zip(*batches))
        assert rows[r]['top1'] == 100 * (logits[r].argmax(1) == target).float().mean().item()
        loss = torch.nn.functional.cross_entropy(logits[r], target).item()
        assert rows[r]['loss'] == pytest.approx(loss, rel=1e-5)
        assert rows[r]['params'] == sum(p.numel() for p in model.parameters())
    ensemble = sum(w * z for w, z in zip(model.alpha.softmax(0), logits.values()))
    assert rows['ens']['loss'] == pytest.approx(torch.nn.functional.cross_entropy(ensemble, target).item(), rel=1e-5)


def test_one_pass_gives_timms_pixels(images):
    from timm_rs.data.datasets import PyramidNormalizer, create_eval_loader
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg('resnet10t').to_dict())
    ours = create_eval_loader(create_dataset('', images, 'validation'), (32, 24), 3, config)
    normalize = PyramidNormalizer(config['mean'], config['std'], torch.device('cpu'))
    for position, size in enumerate((32, 24)):
        theirs = create_loader(
            create_dataset('', images, 'validation'), batch_size=3, device=torch.device('cpu'), num_workers=0,
            **dict(config, input_size=(3, size, size)))
        for (pyramid, target), (x, y) in zip(ours, theirs):
            torch.testing.assert_close(normalize(pyramid[position]), x, rtol=0, atol=0)
            torch.testing.assert_close(target, y)


def test_untrained_size_says_which_batchnorm_serves(images, trained, caplog):
    validate_rs.main([
        str(images), '--checkpoint', str(trained / 'last.pth.tar'), '--img-size', '20', '40', '--workers', '0',
        '--device', 'cpu'])
    assert '20 px was not trained: the BatchNorms between those of 32 and 16 px serve.' in caplog.text
    assert '40 px was not trained: the BatchNorms of 32 px serve.' in caplog.text


def test_validate_a_plain_timm_model(images, tmp_path, capfd):
    torch.save(timm.create_model('resnet10t', num_classes=2).state_dict(), tmp_path / 'plain.pth')
    validate_rs.main([
        str(images), '--model', 'resnet10t', '--checkpoint', str(tmp_path / 'plain.pth'), '--num-classes', '2',
        '--img-size', '32', '16', '--workers', '0', '--device', 'cpu'])
    lines = capfd.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ['32', '16']


def test_validation_reads_images_as_training_did(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--input-img-mode', 'YCbCr', '--epochs', '1', '--output', str(tmp_path), '--experiment',
        'r'])
    row, = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
    rows = validated(images, tmp_path, '--checkpoint', str(tmp_path / 'r' / 'last.pth.tar'))
    assert float(row['eval_loss_32']) == pytest.approx(rows[32]['loss'], rel=1e-5)


def test_validation_takes_over_what_the_model_was_trained_with(images, tmp_path):
    train_rs.main([
        str(images), *TINY, '--model', 'rs_test_efficientnet', '--bn-eps', '0.5', '--epochs', '1', '--output',
        str(tmp_path), '--experiment', 'r'])
    row, = csv.DictReader((tmp_path / 'r' / 'summary.csv').open())
    rows = validated(images, tmp_path, '--checkpoint', str(tmp_path / 'r' / 'last.pth.tar'))
    for r in (32, 16):
        assert float(row[f'eval_loss_{r}']) == pytest.approx(rows[r]['loss'], rel=1e-5)


def test_validation_reads_images_of_the_channels_of_the_model(images, tmp_path):
    folder = tmp_path / 'grey'
    save_model(timm.create_model(MODEL, resolutions=(32, 16), num_classes=2, in_chans=1).eval(), str(folder))
    assert list(validated(images, tmp_path, '--model', f'local-dir:{folder}')) == [32, 16, 'ens']


def test_validation_takes_the_flags_of_timm(images, trained, tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(validate_rs, 'set_fast_norm', lambda: calls.append(1))
    argv = [str(images), '--checkpoint', str(trained / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    path = tmp_path / 'table'
    flags = (
        '--results-format json --no-prefetcher --fast-norm --seed 1 --num-gpu 1 --use-train-size --amp-impl native '
        '--input-size 3 32 32 --torchcompile eager --torchcompile-mode default').split()
    monkeypatch.setattr(torch, 'compile', lambda model, **given: calls.append(given) or model)
    validate_rs.main([*argv, '--results-file', str(path), *flags])
    row, = json.loads(path.read_text())
    assert row['resolution'] == 32 and calls == [1, dict(backend='eager', mode='default')]
    flags = '--results-format csv --img-size 32 --crop-border-pixels 3'.split()
    (tmp_path / 'table.json').write_text('mine')
    argv = [*argv, '--results-file', f'{path}.json', *flags]
    assert 'table.json exists and is not overwritten' in fails(validate_rs.main, argv, capfd)
    validate_rs.main([*argv, '--overwrite'])
    cropped, = csv.DictReader((tmp_path / 'table.json').open())
    assert float(cropped['top5']) == row['top5'] and float(cropped['loss']) != row['loss']


@pytest.mark.parametrize('workers', ['0', '1'])
def test_a_border_that_leaves_nothing(images, trained, workers, capfd):
    argv = [images, '--checkpoint', trained / 'last.pth.tar', '--crop-border-pixels', '999', '--workers', workers]
    assert '--crop-border-pixels 999 leaves nothing of an image of ' in fails(validate_rs.main, argv, capfd)


@pytest.mark.parametrize('flags', ['--amp', '--model-dtype bfloat16', '--amp --model-dtype bfloat16'])
def test_validation_in_bfloat16(images, trained, tmp_path, flags):
    """At sizes whose last maps are larger than 1x1, where torch's kernels for CPUs are right."""
    argv = ['--checkpoint', str(trained / 'last.pth.tar'), '--img-size', '64', '48']
    found, expected = (validated(images, tmp_path, *argv, *more.split()) for more in (flags, ''))
    for size in (64, 48):
        assert found[size]['loss'] == pytest.approx(expected[size]['loss'], rel=0.05)
        assert found[size]['loss'] != expected[size]['loss']


def test_validation_fuses_the_branches_of_a_plain_model(images, tmp_path):
    model = timm.create_model('repvgg_a0', num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    flags = f'--model repvgg_a0 --num-classes 2 --img-size 32 --checkpoint {tmp_path}/plain.pth'.split()
    before, after = (validated(images, tmp_path, *flags, *more)[32] for more in ([], ['--reparam']))
    assert after['params'] < before['params'] and after['loss'] == pytest.approx(before['loss'], rel=1e-4)


def test_validation_compares_the_classes_that_are_named_beside_the_checkpoint(images, trained, tmp_path, capfd):
    shutil.copy(trained / 'last.pth.tar', tmp_path)
    argv = [str(images), '--checkpoint', str(tmp_path / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    shutil.copy(trained / LABEL_FILE, tmp_path)
    validate_rs.main(argv)
    (tmp_path / LABEL_FILE).write_text('bird\ncat\n')
    assert f"has other classes than {tmp_path}/{LABEL_FILE}: class 0 is 'cat', expected 'bird'; class 1 is 'dog', " \
        "expected 'cat'" in fails(validate_rs.main, argv, capfd)


@pytest.mark.parametrize('flags,message', [
    (['--checkpoint', 'nowhere.pth'], 'nowhere.pth does not exist'),
    (['--model', 'rs_resnet10'], 'did you mean rs_resnet10'),
    (['--model', MODEL, '--img-size', '0'], '--img-size is 0, expected an integer from 1 to 4096'),
    (['--model', MODEL, '--img-size', '32', '100000'], '--img-size is 100000, expected an integer from 1 to 4096'),
    (['--model', MODEL, '--batch-size', '0'], '--batch-size is 0, expected an integer from 1 to '),
    (['--model', MODEL, '--workers', '1000000000'], '--workers is 1000000000, expected an integer from 0 to 1024'),
    (['--model', MODEL, '--workers', '-1'], '--workers is -1, expected an integer from 0 to 1024'),
    (['--results-file', 'nowhere/x.csv', '--model', MODEL], 'nowhere does not exist, expected a folder for x.csv'),
    (['--results-file', 'x.txt'], 'expected a name that ends in .csv or .json'),
    ([], 'give --checkpoint, --model, or both'),
    (['--model', 'rs_resnet10t.imagenette'], 'has 2 classes, the model has 10'),
    (['--model', 'rs_preresnet18'], 'Cannot load rs_preresnet18: There are no pretrained weights'),
    (['--model', MODEL], f'Cannot load {MODEL}: '),  # there is no network
    (['--model', 'rs_resnet10t.imagenette', '--split', ''], "as the split instead of ''"),
    (['--model', 'rs_resnet10t.imagenette', '--reparam'], '--reparam is for plain models'),
    (['--model', MODEL, '--task', 'multilabel', '--real-labels', 'x.json'], '--real-labels does not go with'),
    (['--model', MODEL, '--input-size', '3', '32', '16'], '--input-size 3 32 16: expected a square'),
    (['--model', MODEL, '--input-size', '3', '32', '32', '--in-chans', '1'], '--input-size 3 32 32: expected'),
    (['--model', MODEL, '--num-gpu', '2'], '--num-gpu'),
    (['--model', MODEL, '--crop-pct', '0'], '--crop-pct is 0.0, expected a number of at least 0.1 and at most 4'),
    (['--model', MODEL, '--std', '0', '1', '1'], '--std is 0.0, expected a finite number above 0'),
    (['--model', MODEL, '--seed', '-1'], '--seed is -1, expected an integer from 0 to 4294967295'),
    (['--model', MODEL, '--device', 'gpu'], '--device gpu: Expected one of cpu, cuda'),
    (['--model', MODEL, '--device', 'mps'], '--device mps: '),
    (['--model', MODEL, '--crop-border-pixels', '-3'], '--crop-border-pixels is -3, expected an integer from 0'),
    (['--model', 'rs_resnet10t.imagenette', '--target-key', 'label'], '--target-key label is for data sets hfds/'),
    (['--model', 'rs_resnet10t.imagenette', '--mean', '0', '0'], '--mean [0.0, 0.0]: mean must have one value or 3'),
    (['--model', 'rs_resnet10t.imagenette', '--class-map', 'nowhere'], '--class-map nowhere does not exist or is not'),
    *(([f"--{flag.replace('_', '-')}", '1'], 'is not supported: ') for flag in validate_rs._REFUSED),
])
def test_bad_validation_input(images, capfd, flags, message):
    assert message in fails(validate_rs.main, [images, '--workers', '0', '--device', 'cpu', *flags], capfd)


def test_classes_that_the_network_names_are_compared_too(images, tmp_path, capfd):
    model = timm.create_model(MODEL, resolutions=(32, 16), num_classes=2).eval()
    save_model(model, tmp_path / 'model', ['cat', 'dog'])
    validated(images, tmp_path, '--model', f"local-dir:{tmp_path / 'model'}")
    save_model(model, tmp_path / 'other', ['cat', 'emu'])
    argv = [images, '--model', f"local-dir:{tmp_path / 'other'}", '--device', 'cpu', '--workers', '0']
    assert "other classes than the model: class 1 is 'dog', expected 'emu'" in fails(validate_rs.main, argv, capfd)


def test_sizes_of_a_plain_network_are_those_of_images(images, tmp_path, capfd):
    save_model(timm.create_model(MODEL[3:], num_classes=2).eval(), tmp_path / 'plain')
    argv = [images, '--model', f"local-dir:{tmp_path / 'plain'}", '--device', 'cpu', '--resolutions', '32']
    assert '--resolutions is for a switchable network, expected --img-size' in fails(validate_rs.main, argv, capfd)


def test_images_beside_the_class_folders(images, trained, tmp_path, capfd):
    shutil.copytree(images, tmp_path / 'loose')
    shutil.copy(images / 'train' / 'cat' / '1.jpg', tmp_path / 'loose' / 'validation' / 'cover.jpg')
    argv = [tmp_path / 'loose', '--checkpoint', trained / 'last.pth.tar', '--device', 'cpu']
    assert 'holds images outside of its class folders' in fails(validate_rs.main, argv, capfd)


def test_class_maps_that_do_not_fit(images, trained, tmp_path, capfd):
    argv = [images, '--workers', '0', '--device', 'cpu', '--checkpoint', trained / 'last.pth.tar', '--class-map']
    (tmp_path / 'three.txt').write_text('cat\nemu\ndog\n')
    assert 'has 3 classes, the model has 2' in fails(validate_rs.main, [*argv, tmp_path / 'three.txt'], capfd)
    (tmp_path / 'map.pkl').write_text('cat')
    assert 'map.pkl cannot be read: ' in fails(validate_rs.main, [*argv, tmp_path / 'map.pkl'], capfd)
    os.mkfifo(tmp_path / 'pipe.txt')
    assert 'is not a regular file' in fails(validate_rs.main, [*argv, tmp_path / 'pipe.txt'], capfd)


def test_validation_of_a_checkpoint_of_other_classes(images, trained, capfd):
    argv = [images, '--checkpoint', trained / 'last.pth.tar', '--num-classes', '5', '--device', 'cpu']
    assert 'fc.weight is (2, 96), expected (5, 96)' in fails(validate_rs.main, argv, capfd)


@pytest.mark.parametrize('args', [dict(model='resnet10t'), argparse.Namespace(arch='resnet10t')])
def test_validation_of_a_checkpoint_of_another_program(images, tmp_path, capfd, args):
    model = timm.create_model(MODEL[3:], num_classes=2)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'x.pth')
    argv = [str(images), '--checkpoint', str(tmp_path / 'x.pth'), '--device', 'cpu', '--workers', '0']
    assert 'does not record its model, give --model' in fails(validate_rs.main, argv, capfd)
    validate_rs.main([*argv, '--model', MODEL[3:], '--num-classes', '2', '--img-size', '32'])


def test_validation_says_that_there_is_a_moving_average(images, tmp_path, caplog):
    train_rs.main([
        str(images), *TINY, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'r', '--model-ema'])
    argv = [str(images), '--checkpoint', str(tmp_path / 'r' / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    for flags in ([], ['--use-ema']):
        caplog.clear()
        validate_rs.main([*argv, *flags])
        assert ('not their moving average, which is --use-ema' in caplog.text) == (not flags)


@pytest.fixture
def imagenet(tmp_path):
    """Return a folder of five images named as those of ImageNet, the last of which cannot be read."""
    for i in range(5):
        path = tmp_path / 'images' / ('cat', 'dog')[i % 2] / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (50 * i, 0, 0)).save(path)
    path.write_bytes(b'not an image')
    return tmp_path / 'images'


def test_real_labels(imagenet, trained, tmp_path, capfd):
    """Right, wrong (there are two classes), right and of no class; what cannot be read does not count."""
    path = tmp_path / 'real.json'
    path.write_text('[[0, 1], [7], [1, 0], [], [7]]')
    argv = ['--checkpoint', str(trained / 'last.pth.tar'), '--real-labels', str(path)]
    rows = validated(imagenet, tmp_path, *argv)
    assert all(row['top1'] == row['top5'] == pytest.approx(200 / 3) for row in rows.values())
    assert {(row['images'], row['unreadable']) for row in rows.values()} == {(3, 1)}
    path.write_text('[[], [], [], [1], [0]]')  # one counts, the loss is that of its label in the data set, dog
    loss = validated(imagenet, tmp_path, *argv)[32]['loss']
    other = tmp_path / 'one' / 'dog' / 'a.JPEG'
    other.parent.mkdir(parents=True)
    (other.parents[1] / 'cat').mkdir()
    shutil.copy(imagenet / 'dog' / 'ILSVRC2012_val_00000004.JPEG', other)
    (tmp_path / 'classes.txt').write_text('cat\ndog\n')
    expected = validated(other.parents[1], tmp_path, *argv[:2], '--class-map', str(tmp_path / 'classes.txt'))
    assert loss == pytest.approx(expected[32]['loss'])


@pytest.mark.parametrize('content,message', [
    ('[[0], [1]]', 'has labels of 2 images, the data set has 5'),
    ('[[0], [1], 2, 3, 4]', 'real.json: [2] is 2, expected'),
    (f"[{', '.join(['[0]'] * 50000)}]", 'has labels of 50000 images, the data set has 5'),
])
def test_real_labels_that_do_not_fit(imagenet, trained, tmp_path, capfd, content, message):
    (tmp_path / 'real.json').write_text(content)
    argv = [imagenet, '--checkpoint', trained / 'last.pth.tar', '--device', 'cpu', '--workers', '0', '--real-labels']
    assert message in fails(validate_rs.main, [*argv, tmp_path / 'real.json'], capfd)


def test_valid_labels(images, tmp_path, capfd):
    """Of a network of three classes the last and the first: the same as a network of these two."""
    three = timm.create_model(MODEL, resolutions=(32, 16), num_classes=3).eval()
    two = timm.create_model(MODEL, resolutions=(32, 16), num_classes=2).eval()
    torch.nn.init.normal_(three.fc.weight)
    state = three.state_dict()
    two.load_state_dict({**state, **{k: state[k][[2, 0]] for k in ('fc.weight', 'fc.bias')}})
    save_model(three, str(tmp_path / 'three'))
    save_model(two, str(tmp_path / 'two'))
    path = tmp_path / 'labels.txt'
    path.write_text('2\n0\n')
    found, expected = (
        validated(images, tmp_path, '--model', f'local-dir:{tmp_path / name}', *more)
        for name, more in (('three', ['--valid-labels', str(path)]), ('two', [])))
    for key, row in found.items():
        assert [row[n] for n in ('top1', 'top5', 'loss')] == pytest.approx(
            [expected[key][n] for n in ('top1', 'top5', 'loss')], rel=1e-5)
    argv = [images, '--model', f"local-dir:{tmp_path / 'three'}", '--device', 'cpu', '--workers', '0', '--valid-labels']
    for content, message in (
            ('2\n0\n1\n', f'has 2 classes, --valid-labels {path} has 3'), ('dog\n', 'expected the index of a class'),
            ('3\n0\n', 'line[0] is 3, expected an integer from 0 to 2'), ('2\n2\n', 'class 2 is in two lines')):
        path.write_text(content)
        assert message in fails(validate_rs.main, [*argv, path], capfd)
    assert '/none does not exist or' in fails(validate_rs.main, [*argv, tmp_path / 'none'], capfd)


def test_retry_takes_smaller_batches(images, trained, tmp_path, capfd, monkeypatch):
    sizes, evaluate = [], validate_rs.evaluate

    def fill_memory(network, loader, *args, **kwargs):
        sizes.append(loader.batch_size)
        if loader.batch_size > 3:
            raise torch.OutOfMemoryError('out of memory')
        return evaluate(network, loader, *args, **kwargs)

    monkeypatch.setattr(validate_rs, 'evaluate', fill_memory)
    argv = ['--checkpoint', str(trained / 'last.pth.tar'), '--batch-size', '8']
    assert len(validated(images, tmp_path, *argv, '--retry')) == 3 and sizes == [8, 6, 4, 3]
    line = fails(validate_rs.main, [images, *argv, '--device', 'cpu', '--workers', '0'], capfd)
    assert 'Out of memory with batches of 8 images: out of memory' in line


def test_mirrored_images():
    class Corner(torch.nn.Linear):
        def forward(self, x):
            return x[:, :, 0, 0]

    images = torch.tensor([[[[4., 0.], [9., 9.]], [[0., 2.], [9., 9.]]]])  # classes 4 and 0, mirrored 0 and 2
    for mirrored, logits in ((False, [4., 0.]), (True, [2., 1.])):
        found = evaluate(Corner(1, 1), [([images], torch.tensor([0]))], (2,), lambda x: x, mirrored=mirrored)
        expected = torch.nn.functional.cross_entropy(torch.tensor([logits]), torch.tensor([0]))
        assert found[2]['loss'] == pytest.approx(expected.item())


@pytest.mark.parametrize('name,slow,expected', [
    (None, True, torch.bfloat16), (None, False, torch.bfloat16), ('float16', True, torch.float16)])
def test_mixed_precision_on_a_cpu(caplog, name, slow, expected):
    class Net(torch.nn.Linear):
        resolutions = (64, 32)

        def forward(self, x):
            assert x.shape == (8, 1, 32, 32) and not self.training
            time.sleep(0.02 if torch.is_autocast_enabled('cpu') == slow else 0.001)

    model = Net(1, 1)
    assert choose_amp(model, torch.device('cpu'), name, 1) == expected and model.training
    text = f'--amp in {str(expected)[6:]} takes'
    assert (text in caplog.text) == slow and ('times as long as float32 on this CPU' in caplog.text) == slow
