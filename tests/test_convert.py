"""From checkpoints to folders and back: timm-rs convert and calibrate, save_model, load_model"""
import argparse
import json
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
from command_lines import images as photographs  # noqa: F401
from command_lines import run
from conftest import assert_equal, images, randomize_bn
from PIL import Image

import timm_rs
import timm_rs.calibrate
from timm_rs.checkpoint import read_checkpoint
from timm_rs.evaluate import count_madds
from timm_rs.hub.convert import save_model
from timm_rs.load import load_model
from timm_rs.private_bn import tie_affine

RESOLUTIONS = (64, 48, 32)
NAME = 'resnet10t'
TINY = dict(channels=[8, 16, 24, 32], stem_width=8)


def rs_model(resolutions=RESOLUTIONS, **kwargs):
    kwargs = dict(dict(TINY, num_classes=10, resolutions=resolutions), **kwargs)
    return randomize_bn(timm.create_model(f'rs_{NAME}', **kwargs)).eval()


def training_checkpoint(model, name, **args):
    """Return what timm's saver writes, with a moving average of zeros."""
    ema = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    args = argparse.Namespace(model=name, num_classes=10, **args)
    return dict(epoch=3, arch=name, state_dict=model.state_dict(), state_dict_ema=ema, args=args, metric=50.)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Return a switchable network and its checkpoint as train_rs.py writes it."""
    model = rs_model()
    path = tmp_path_factory.mktemp('run') / 'model_best.pth.tar'
    args = dict(resolutions=list(RESOLUTIONS), mean=[0.5] * 3, std=[0.25] * 3, interpolation='', crop_pct=1.0,
                in_chans=3, gp=None, bn_eps=None, model_kwargs=TINY, lr=0.3, data_dir='/data/of/me/flowers')
    torch.save(training_checkpoint(model, f'rs_{NAME}', **args), path)
    return model, str(path)


def create(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def test_convert_a_training_run(trained, tmp_path):
    model, path = trained
    run('convert', path, '--output', tmp_path / 'out')
    converted = create(tmp_path / 'out')
    assert type(converted) is type(model) and converted.resolutions == RESOLUTIONS
    assert_equal(dict(converted.state_dict()), dict(model.state_dict()))
    for x in images(*RESOLUTIONS):
        assert_equal(converted(x), model(x))
    data = timm.data.resolve_model_data_config(converted)
    assert (list(data['mean']), list(data['std']), data['crop_pct']) == ([0.5] * 3, [0.25] * 3, 1.0)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == f'rs_{NAME}' and config['model_args']['resolutions'] == list(RESOLUTIONS)
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o777 & ~umask


def test_convert_a_run_folder(trained, tmp_path):
    model, path = trained
    run('convert', f'local-dir:{os.path.dirname(path)}', '--output', tmp_path / 'out')
    x = images(64)
    assert_equal(create(tmp_path / 'out')(x), model(x))


def test_convert_the_moving_average(trained, tmp_path):
    run('convert', trained[1], '--output', tmp_path / 'out', '--use-ema')
    assert not any(v.any() for v in create(tmp_path / 'out').state_dict().values())


def test_extract_one_resolution(trained, tmp_path, capsys):
    model, path = trained
    run('convert', path, '--output', tmp_path / 'plain', '--extract', 48)
    assert f'{NAME} at 48' in capsys.readouterr().out
    plain = create(tmp_path / 'plain')
    assert type(plain) is timm.models.ResNet and plain.pretrained_cfg['architecture'] == NAME
    assert timm.data.resolve_model_data_config(plain)['input_size'] == (3, 48, 48)
    x = images(48)
    assert_equal(plain(x), model(x))
    assert 'resolutions' not in (tmp_path / 'plain' / 'config.json').read_text()


def test_folder_converts_again_and_to_other_resolutions(trained, tmp_path):
    model, path = trained
    run('convert', path, '--output', tmp_path / 'one')
    run('convert', tmp_path / 'one', '--output', tmp_path / 'plain', '--extract', 32)
    x = images(32)
    assert_equal(create(tmp_path / 'plain')(x), model(x))
    with pytest.warns(UserWarning, match='40 from 32'):
        run('convert', tmp_path / 'one', '--output', tmp_path / 'other', '--resolutions', 64, 40)
    other = create(tmp_path / 'other')
    assert other.resolutions == (64, 40)
    assert_equal(dict(other.at(40).state_dict()), dict(model.at(32).state_dict()))


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pth.tar'])
def test_convert_plain_timm_checkpoints(suffix, tmp_path):
    plain = randomize_bn(timm.create_model(NAME, num_classes=7, in_chans=1)).eval()
    path = tmp_path / f'plain{suffix}'
    if suffix == '.safetensors':
        safetensors.torch.save_file(plain.state_dict(), path)
    elif suffix == '.pth':
        torch.save(plain.state_dict(), path)
    else:  # of timm's train.py under DistributedDataParallel, which names its model
        checkpoint = training_checkpoint(plain, NAME)
        checkpoint['args'].num_classes = 7
        checkpoint['state_dict'] = {f'module.{k}': v for k, v in plain.state_dict().items()}
        torch.save(checkpoint, path)
    model = [] if suffix == '.pth.tar' else ['--model', NAME if suffix == '.pth' else f'rs_{NAME}']
    run('convert', path, '--output', tmp_path / 'out', '--resolutions', *RESOLUTIONS, *model)
    converted = create(tmp_path / 'out')
    assert converted.num_classes == 7
    for x in images(*RESOLUTIONS, channels=1):
        assert_equal(converted(x), plain(x))


def test_convert_networks_of_other_classifiers(tmp_path):
    model = timm.create_model(f'rs_{NAME}', resolutions=RESOLUTIONS, num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'none.pth')
    run('convert', tmp_path / 'none.pth', '--model', f'rs_{NAME}', '--num-classes', 0, '--output', tmp_path / 'none')
    assert create(tmp_path / 'none').num_classes == 0
    torch.save(timm.create_model('repvit_m0_9', num_classes=6).state_dict(), tmp_path / 'two.pth')
    assert load_model(str(tmp_path / 'two.pth'), 'repvit_m0_9').model.num_classes == 6


def test_calibrate_a_network_of_four_channels(tmp_path):
    pytest.importorskip('sklearn')
    save_model(rs_model(in_chans=4), str(tmp_path / 'four'))
    run('calibrate', tmp_path / 'four', '--resolution', 40, '--dataset', 'digits', '--images', 64, '--workers', 0,
        '--method', 'statistics', '--output', tmp_path / 'out')
    assert create(tmp_path / 'out').resolutions == (64, 48, 40, 32)


def test_calibrate_on_a_folder_of_images(tmp_path, capsys, caplog):
    """They need not be in class folders, and those that cannot be read are named."""
    save_model(rs_model(), str(tmp_path / 'model'))
    for split, count in (('train', 70), ('val', 3)):
        (tmp_path / 'data' / split).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((70, 70), 20 + i).save(tmp_path / 'data' / split / f'{i:02}.webp')
    (tmp_path / 'data' / 'train' / '11.webp').write_bytes(b'')
    argv = ['calibrate', tmp_path / 'model', '--resolution', 40, '--method', 'statistics', '--workers', 0, '--data-dir',
            tmp_path / 'data']
    run(*argv, '--output', tmp_path / 'out')
    assert f'Read 69 images of {tmp_path}/data/train, 1 more cannot be read.' in capsys.readouterr().out
    assert f'Cannot read image {tmp_path}/data/train/11.webp (not an image, expected one of JPEG, ' in caplog.text
    assert create(tmp_path / 'out').resolutions == (64, 48, 40, 32)
    with pytest.raises(SystemExit):
        run(*argv, '--max-unreadable', 0, '--output', tmp_path / 'none')
    assert '1 images cannot be read, expected at most 0 (--max-unreadable)' in capsys.readouterr().err
    assert not (tmp_path / 'none').exists()


def test_calibrate_reports_the_accuracy(tmp_path, capsys, caplog):
    caplog.set_level('INFO')
    pytest.importorskip('sklearn')
    save_model(rs_model(in_chans=1), str(tmp_path / 'model'))
    argv = ['calibrate', tmp_path / 'model', '--resolution', 40, '--dataset', 'digits', '--images', 64, '--workers', 0]
    run(*argv, '--test-split', 'val', '--output', tmp_path / 'out')
    assert 'Tuned 40 px, epoch 2 of 2: KL divergence' in caplog.text and 'Acc@1 at 40 px: ' in caplog.text
    save_model(rs_model(in_chans=1, num_classes=9), str(tmp_path / 'nine'))
    with pytest.raises(SystemExit):
        run('calibrate', tmp_path / 'nine', *argv[2:], '--test-split', 'val', '--output', tmp_path / 'none')
    assert '--test-split val has 10 classes, the model has 9' in capsys.readouterr().err


def test_calibrate_reports_no_accuracy_on_other_classes(photographs, tmp_path, capsys):
    save_model(rs_model(num_classes=2), tmp_path / 'model', ['cat', 'emu'])
    with pytest.raises(SystemExit):
        run('calibrate', tmp_path / 'model', '--resolution', 40, '--data-dir', photographs, '--method', 'copy',
            '--test-split', 'validation', '--output', tmp_path / 'none')
    assert "has other classes than the model: class 1 is 'dog', expected 'emu'" in capsys.readouterr().err


def test_images_of_a_mode_that_only_training_reads(trained, tmp_path, capsys):
    checkpoint = torch.load(trained[1], weights_only=False)
    checkpoint['args'].input_img_mode = 'YCbCr'
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    with pytest.raises(SystemExit):
        run('convert', tmp_path / 'last.pth.tar', '--output', tmp_path / 'none')
    assert "takes images in Pillow's mode YCbCr (--input-img-mode), which only" in capsys.readouterr().err


def test_modes_survive_the_count_of_multiply_adds():
    model = timm.create_model(NAME).train()
    model.bn1.eval()
    count_madds(model, 64)
    assert model.training and model.conv1.training and not model.bn1.training


def test_weights_of_another_preprocessing_and_variant(tmp_path):
    plain = randomize_bn(timm.create_model(NAME, num_classes=10, **TINY)).eval()
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    run('convert', tmp_path / 'plain.safetensors', '--model', f'rs_{NAME}', '--output', tmp_path / 'out',
        '--resolutions', *RESOLUTIONS, '--model-kwargs', *(f'{k}={v}' for k, v in TINY.items()),
        '--mean', 0.5, 0.5, 0.5, '--std', 0.25, 0.25, 0.25, '--interpolation', 'bilinear', '--crop-pct', 0.9)
    model = create(tmp_path / 'out')
    x = images(48)
    assert_equal(model(x), plain(x))
    data = timm.data.resolve_model_data_config(model)
    assert (*data['mean'], *data['std']) == (0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    assert (data['interpolation'], data['crop_pct']) == ('bilinear', 0.9)


def test_label_names(trained, tmp_path, capsys):
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join('abcdefghij'))
    run('convert', trained[1], '--output', tmp_path / 'out', '--label-names', labels)
    assert list(create(tmp_path / 'out').pretrained_cfg['label_names']) == list('abcdefghij')
    labels.write_text('cat\ndog\n')
    line = run('convert', trained[1], '--output', tmp_path / 'two', '--label-names', labels, code=1, capsys=capsys)
    assert line.endswith('There are 2 label names, expected one for each of 10 classes.')


class Code:
    def __reduce__(self):
        return os.system, ('touch /nonexistent/code_has_run',)


BAD_FILES = {
    'missing.pth': (None, 'missing.pth does not exist, expected a checkpoint'),
    'empty.pth': (b'', 'is damaged or not a checkpoint'),
    'text.pth.tar': (b'hello world', 'is damaged or not a checkpoint'),
    'image.pth': (b'\xff\xd8\xff\xe0' + bytes(range(256)), 'is damaged or not a checkpoint'),
    'text.safetensors': (b'hello world', 'is damaged or not a checkpoint'),
    'pickle.pth': (pickle.dumps(dict(state_dict=Code()), protocol=2), 'is refused: reading it would run code'),
    'pickle4.pth': (pickle.dumps(dict(state_dict=Code()), protocol=4), 'is damaged or not a checkpoint'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_files_that_are_no_checkpoints(name, tmp_path, capsys):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = run('convert', tmp_path / name, '--model', f'rs_{NAME}', '--output', tmp_path / 'out', code=1, capsys=capsys)
    assert name in line and message in line
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('save, message', [
    (lambda path: torch.save(dict(state_dict=Code()), path), 'is refused: reading it would run code'),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), 'is refused: reading it would run code'),
    (lambda path: torch.save([torch.zeros(1)], path), 'There are no weights in it'),
    (lambda path: torch.save(dict(epoch=3, lr=0.1), path), 'There are no weights in it'),
    (lambda path: torch.save(dict(state_dict={}), path), 'There are no weights in it'),
    (lambda path: torch.save(dict(bert=torch.zeros(1)), path), 'conv1.0.weight'),
])
def test_files_of_torch_that_are_no_weights_of_it(save, message, tmp_path, capsys):
    save(tmp_path / 'a.pth')
    line = run('convert', tmp_path / 'a.pth', '--model', f'rs_{NAME}', '--output', tmp_path / 'out', code=1,
               capsys=capsys)
    assert 'a.pth' in line and message in line
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


@pytest.mark.parametrize('suffix', ['.pth.tar', '.safetensors'])
def test_truncated_checkpoint(suffix, trained, tmp_path, capsys):
    path = tmp_path / f'cut{suffix}'
    if suffix == '.safetensors':
        safetensors.torch.save_file(trained[0].state_dict(), path)
    else:
        path.write_bytes(open(trained[1], 'rb').read())
    os.truncate(path, path.stat().st_size // 2)
    line = run('convert', path, '--model', f'rs_{NAME}', '--output', tmp_path / 'out', code=1, capsys=capsys)
    assert f'cut{suffix} is damaged or not a checkpoint' in line


@pytest.mark.parametrize('flags, message', [
    (['--model', 'rs_resnet18'], 'does not fit rs_resnet18: conv1.weight'),
    (['--model', 'rs_resnet_18'], "Unknown model 'rs_resnet_18', did you mean rs_resnet"),
    (['--extract', '40'], 'Unknown resolution 40, this network has 64, 48, 32.'),
    (['--num-classes', '5'], 'fc.weight is (10, 32), expected (5, 32)'),
    (['--resolutions', '64', '64'], 'names 64 twice'),
    (['--label-names', 'nowhere.txt'], 'nowhere.txt does not exist'),
    (['--mean', '0.5', '0.5'], 'mean is (0.5, 0.5), expected one value or 3'),
    (['--std', '0'], '--std is 0.0, expected a finite number above 0'),
    (['--interpolation', 'cubic'], "--interpolation is 'cubic', expected one of nearest, "),
])
def test_arguments_that_do_not_fit(flags, message, trained, tmp_path, capsys):
    assert message in run('convert', trained[1], '--output', tmp_path / 'out', *flags, code=1, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_output_is_never_overwritten(trained, tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'folder').mkdir()
    run('convert', trained[1], '--output', tmp_path / 'folder')  # which is empty
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'folder').iterdir()}
    for name in ('file', 'folder'):
        line = run('convert', trained[1], '--output', tmp_path / name, code=1, capsys=capsys)
        assert f'{name} exists and is not overwritten' in line
    assert (tmp_path / 'file').read_text() == 'mine'
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'folder').iterdir()} == before


def test_output_that_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    line = run('convert', trained[1], '--output', tmp_path / 'file' / 'out', code=1, capsys=capsys)
    assert f"{tmp_path / 'file'} is a file or lies in one" in line and (tmp_path / 'file').read_text() == 'mine'


def test_nothing_is_left_of_a_write_that_fails(trained, tmp_path, monkeypatch, capsys):
    def fail(tensors, path):
        path.write_bytes(b'half')
        raise safetensors.SafetensorError('No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', fail)
    line = run('convert', trained[1], '--output', tmp_path / 'out', code=1, capsys=capsys)
    assert line.endswith('out: No space left on device')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('config, message', [
    (None, 'holds no weights (model.safetensors, '),
    ('{"architecture": ', 'config.json is not valid JSON'),
    ('{"architecture": "resnet10t", "num_classes": 10, "pretrained_cfg": {}}', 'holds no weights'),
])
def test_folders_that_are_no_models(config, message, tmp_path, capsys):
    (tmp_path / 'model').mkdir()
    if config:
        (tmp_path / 'model' / 'config.json').write_text(config)
    line = run('convert', tmp_path / 'model', '--output', tmp_path / 'out', code=1, capsys=capsys)
    assert 'model' in line and message in line


def test_plain_folder_becomes_switchable(trained, tmp_path):
    run('convert', trained[1], '--output', tmp_path / 'plain', '--extract', 32)
    run('convert', tmp_path / 'plain', '--resolutions', 32, 24, '--output', tmp_path / 'out')
    plain, model = create(tmp_path / 'plain'), create(tmp_path / 'out')
    assert model.resolutions == (32, 24)
    for x in images(32, 24):
        assert_equal(model(x), plain(x))


def test_save_model_leaves_the_network_as_it_is(tmp_path):
    model = rs_model().to(memory_format=torch.channels_last)
    model.switch_to(32)
    save_model(model, str(tmp_path / 'out'))
    assert model.resolution == 32 and not model.conv1[0].weight.is_contiguous()
    saved = create(tmp_path / 'out')
    assert timm.data.resolve_model_data_config(saved)['input_size'] == (3, 64, 64)
    assert_equal(dict(saved.state_dict()), dict(model.state_dict()))


def test_save_model_of_make_switchable(tmp_path):
    model = randomize_bn(timm_rs.make_switchable(timm.create_model(NAME, num_classes=3), RESOLUTIONS))
    save_model(model, str(tmp_path / 'out'))
    assert_equal(dict(create(tmp_path / 'out').state_dict()), dict(model.state_dict()))
    own = timm_rs.make_switchable(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), RESOLUTIONS)
    with pytest.raises(ValueError, match='not a model that timm.create_model can build'):
        save_model(own, str(tmp_path / 'own'))
    assert not (tmp_path / 'own').exists()


def test_save_model_of_tied_parameters(tmp_path):
    model = rs_model()
    tie_affine(model)
    save_model(model, str(tmp_path / 'out'))
    assert_equal(dict(create(tmp_path / 'out').state_dict()), dict(model.state_dict()))
    assert model.bn1[32].weight is model.bn1[64].weight


@pytest.mark.parametrize('head', [
    torch.nn.Linear(96, 6), torch.nn.Sequential(torch.nn.Linear(96, 10))], ids=['Linear', 'Sequential'])
def test_save_model_refuses_a_classifier_that_is_not_built_again(tmp_path, head):
    model = rs_model()
    model.fc = head
    with pytest.raises(ValueError, match='fc is a .* change classifiers by reset_classifier'):
        save_model(model, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_load_model_tells_of_the_run(trained):
    loaded = load_model(trained[1])
    assert loaded.epoch == 3 and loaded.args['lr'] == 0.3 and not loaded.model.training


def test_read_and_pick(tmp_path):
    torch.save(dict(model=dict(a=torch.ones(1)), model_ema=dict(a=torch.zeros(1))), tmp_path / 'a.pth')
    found = [read_checkpoint(str(tmp_path / 'a.pth'), use_ema).state_dict['a'] for use_ema in (False, True, None)]
    assert [a.item() for a in found] == [1, 0, 0]
