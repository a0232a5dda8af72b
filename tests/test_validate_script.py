"""The command line of validate_rs.py, run in this process"""
import argparse
import csv
import json
import shutil

import pytest
import timm
import torch
from command_lines import MODEL, TINY, fails, images, trained, validated  # noqa: F401
from timm.data import create_dataset, create_loader

import train_rs
import validate_rs
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


# Flags of timm 1.0.31 and of earlier versions that had --amp-impl.
VALIDATE_FLAGS = (
    'data-dir dataset split num-samples dataset-download class-map input-key input-img-mode target-key '
    'dataset-trust-remote-code model pretrained workers batch-size img-size in-chans input-size use-train-size '
    'crop-pct crop-mode crop-border-pixels mean std interpolation num-classes gp log-freq checkpoint num-gpu test-pool '
    'no-prefetcher pin-mem channels-last device amp amp-dtype amp-impl model-dtype tf-preprocessing use-ema fuser '
    'fast-norm reparam model-kwargs torchcompile-mode torchscript torchcompile aot-autograd results-file '
    'results-format real-labels valid-labels retry seed metrics-avg naflex-loader naflex-max-seq-len'
).split()


def test_validation_knows_the_flags_of_timm():
    assert {f'--{flag}' for flag in VALIDATE_FLAGS} <= set(validate_rs.create_parser()._option_string_actions)


def test_validation_takes_the_flags_of_timm(images, trained, tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(validate_rs, 'set_fast_norm', lambda: calls.append(1))
    argv = [str(images), '--checkpoint', str(trained / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    path = tmp_path / 'table'
    flags = (
        '--results-format json --no-prefetcher --fast-norm --seed 1 --num-gpu 1 --use-train-size --amp-impl native '
        '--input-size 3 32 32 --torchcompile eager --torchcompile-mode default').split()
    validate_rs.main([*argv, '--results-file', str(path), *flags])
    row, = json.loads(path.read_text())
    assert row['resolution'] == 32 and calls == [1]
    flags = '--results-format csv --img-size 32 --crop-border-pixels 3'.split()
    (tmp_path / 'table.json').write_text('mine')
    argv = [*argv, '--results-file', f'{path}.json', *flags]
    assert 'table.json exists and is not overwritten' in fails(validate_rs.main, argv, capfd)
    validate_rs.main([*argv, '--overwrite'])
    cropped, = csv.DictReader((tmp_path / 'table.json').open())
    assert float(cropped['top5']) == row['top5'] and float(cropped['loss']) != row['loss']


def test_validation_fuses_the_branches_of_a_plain_model(images, tmp_path):
    model = timm.create_model('mobileone_s0', num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    flags = f'--model mobileone_s0 --num-classes 2 --img-size 32 --checkpoint {tmp_path}/plain.pth'.split()
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
    (['--model', MODEL, '--input-size', '3', '32', '16'], '--input-size 3 32 16: expected a square'),
    (['--model', MODEL, '--input-size', '3', '32', '32', '--in-chans', '1'], '--input-size 3 32 32: expected'),
    (['--model', MODEL, '--num-gpu', '2'], '--num-gpu'),
    *(([f"--{flag.replace('_', '-')}", '1'], 'is not supported: ') for flag in validate_rs._REFUSED),
])
def test_bad_validation_input(images, capfd, flags, message):
    assert message in fails(validate_rs.main, [images, '--workers', '0', '--device', 'cpu', *flags], capfd)


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
