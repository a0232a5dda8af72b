"""The classifier that is fitted before training begins"""
import logging
import random
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from command_lines import TINY
from PIL import Image

import train_rs
from timm_rs.train import MultiResolutionTask
from timm_rs.train.classifier import fit_classifier, fit_linear
from timm_rs.train.options import parse_args

COLOURS = dict(blue=(30, 60, 220), green=(30, 200, 60), red=(220, 40, 30))


def clusters(n, spread, sizes=2, num_features=20):
    """Return features [S, N, F] around a random mean for each of three classes, and the classes [N]."""
    generator = torch.Generator().manual_seed(n)
    means = 2 + 3 * torch.randn(3, num_features, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(n) % 3
    return means[classes] + spread * torch.randn(sizes, n, num_features, generator=generator), classes


@pytest.mark.parametrize('n, spread, least', [(300, 3., 0.95), (300, 8., 0.75), (9, 3., 0.6)])
def test_new_images_are_told_apart(n, spread, least):
    """With many images or fewer than features, and with about the confidence that is right."""
    features, classes = clusters(n, spread)
    weight, bias, accuracy = fit_linear(features, F.one_hot(classes, 3).float())
    new, expected = clusters(3000, spread)
    logits = new @ weight.T + bias
    assert accuracy.shape == (2,) and ((logits.argmax(-1) == expected).float().mean(1) > least).all()
    if n == 300:
        targets = expected.repeat(2)
        losses = [F.cross_entropy(s * logits.flatten(0, 1), targets).item() for s in (1, 0.1, 10)]
        assert losses[0] < min(losses[1:])
        assert (accuracy - (logits.argmax(-1) == expected).float().mean(1)).abs().max() < 0.15


def test_mixed_targets_and_constant_features():
    features, classes = clusters(300, 3.)
    features[..., 3] = 7.
    mixed = 0.9 * F.one_hot(classes, 3) + 0.1 * F.one_hot(classes.roll(1), 3)
    weight, bias, _ = fit_linear(features, mixed)
    assert weight.isfinite().all() and ((features @ weight.T + bias).argmax(-1) == classes).float().mean() > 0.95


@pytest.fixture(scope='module')
def colours(tmp_path_factory):
    """Noise around a colour for each of three classes."""
    root, generator = tmp_path_factory.mktemp('colours'), random.Random(0)
    for split, count in (('train', 20), ('validation', 10)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = bytes(min(255, max(0, c + generator.randint(-60, 60))) for _ in range(32 * 32) for c in colour)
                Image.frombytes('RGB', (32, 32), pixels).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet').state_dict(), path)
    return path


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv3_small_050', 'dla46x_c'])
def test_the_layer_is_found(name):
    """Linear layers of torch and of timm, and convolutions."""
    torch.manual_seed(0)
    model = timm.create_model(f'rs_{name}', num_classes=3, resolutions=(64, 32))
    task = MultiResolutionTask(model, verbose=False)
    args = parse_args(['x', '-b', '6', '--resolutions', '64', '32', '--num-classes', '3'])
    args.distributed, args.rank = False, 0
    images, target = torch.randn(6, 3, 64, 64), torch.arange(6) % 3
    loaders = SimpleNamespace(
        train=[(images, target)] * 5, begin_epoch=lambda epoch: None, prepare=lambda *batch: batch)
    fit_classifier(task, loaders, args)
    assert not model.training and all((z.argmax(-1) == target).all() for z in model(task.pyramid(images)))


def train(colours, weights, output, *flags):
    """Train without learning anything, and return what is saved."""
    train_rs.main([
        str(colours), *TINY, '--pretrained-path', str(weights), '--opt', 'sgd', '--lr', '0', '--epochs', '1',
        '--output', str(output), '--experiment', 'r', *flags])
    return torch.load(output / 'r' / 'last.pth.tar', weights_only=False)


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher', '--mixup', '0.2'], ['--channels-last', '--model-ema']])
def test_a_new_classifier_is_fitted(colours, weights, tmp_path, caplog, flags):
    caplog.set_level(logging.INFO)
    found = train(colours, weights, tmp_path, *flags)
    assert found['state_dict']['fc.weight'].any() and found['metric'] > 80
    assert caplog.text.count('The new classifier is fitted to the features of 60 images') == 1
    if '--model-ema' in flags:
        assert torch.equal(found['state_dict_ema']['fc.weight'], found['state_dict']['fc.weight'])


@pytest.mark.parametrize('flags', [
    [], ['--mixup', '0.2'],
    '--decoded-cache CACHE --mixup 0.2 --color-jitter 0 --train-interpolation bilinear'.split()])
def test_without_labels_it_is_fitted_to_the_answers(colours, weights, tmp_path, caplog, flags):
    """Whatever the folders of the training images are called, and however many there are."""
    train(colours, weights, tmp_path / 'teacher')
    images = tmp_path / 'images'
    shutil.copytree(colours / 'validation', images / 'validation')
    for i, path in enumerate(sorted((colours / 'train').glob('*/*'))):
        folder = images / 'train' / str(i % 5)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f'{i}.png')
    caplog.set_level(logging.INFO)
    found = train(
        images, weights, tmp_path, '--label-free', '--kd-model-name', str(tmp_path / 'teacher' / 'r'),
        *(str(tmp_path / 'cache') if flag == 'CACHE' else flag for flag in flags))
    assert found['metric'] > 80 and 'The new classifier is fitted to the features of 60 images' in caplog.text


def test_not_again_when_a_run_is_resumed(colours, weights, tmp_path, caplog):
    before = train(colours, weights, tmp_path)['state_dict']
    caplog.clear()
    caplog.set_level(logging.INFO)
    after = train(colours, weights, tmp_path, '--resume', 'auto', '--epochs', '2')['state_dict']
    assert torch.equal(after['fc.weight'], before['fc.weight']) and 'The new classifier' not in caplog.text


@pytest.mark.parametrize('flags, reason', [
    (['--new-classifier-init', 'zero'], None), (['--bce-loss'], 'the loss is not cross entropy'),
    (['--head-init-scale', '1'], 'flags set its first weights')])
def test_not_where_flags_say_otherwise(colours, weights, tmp_path, caplog, flags, reason):
    caplog.set_level(logging.INFO)
    found = train(colours, weights, tmp_path, *flags)['state_dict']
    assert bool(found['fc.weight'].any()) == ('--head-init-scale' in flags)
    assert 'The new classifier is fitted' not in caplog.text
    assert caplog.text.count(f'The new classifier is not fitted before training: {reason}.') == (reason is not None)


def test_training_itself_is_the_same_after_it(colours, weights, tmp_path):
    """Statistics, order and augmentation do not depend on it."""
    found = [train(colours, weights, tmp_path / init, '--bn-statistics', 'batch', '--new-classifier-init', init)
             for init in ('fitted', 'zero')]
    fitted, zero = (checkpoint['state_dict'] for checkpoint in found)
    assert all(torch.equal(value, zero[key]) for key, value in fitted.items() if not key.startswith('fc.'))
