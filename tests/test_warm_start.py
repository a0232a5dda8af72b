"""Plain and switchable weights from files, in every format and adapted in every way that timm knows"""
import argparse

import pytest
import safetensors.torch
import timm
import torch
from conftest import assert_equal, images, randomize_bn

from timm_rs.hub.convert import save_model
from timm_rs.load import load_model, read_preprocessing
from timm_rs.train import MultiResolutionTask
from timm_rs.train.loaders import resolve_data_config
from timm_rs.train.loop import choose_statistics
from timm_rs.train.model import build_model
from timm_rs.train.options import parse_args
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.preprocess import PREPROCESSING

RESOLUTIONS = (64, 48, 32)
TINY = dict(channels=(8, 16, 24, 32))
MODELS = {'resnet18': TINY, 'test_efficientnet': {}}
FORMATS = ('weights.safetensors', 'weights.pth', 'training.pth.tar', 'ema.pth.tar', 'ddp.pth.tar')


def create(name, path=None, **kwargs):
    """Create a model as timm does, with the weights of a file for pretrained ones."""
    if path is not None:
        kwargs.update(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    if name.startswith('rs_'):
        kwargs.setdefault('resolutions', RESOLUTIONS)
    return timm.create_model(name, **MODELS[name.replace('rs_', '')], **kwargs).eval()


def write(model, path):
    """Write weights in the format of the name of the file."""
    state_dict = {k: v.clone() for k, v in model.state_dict().items()}
    if path.suffix == '.safetensors':
        safetensors.torch.save_file(state_dict, path)
    elif path.suffix == '.pth':
        torch.save(state_dict, path)
    else:  # of a training run, which timm prefers the moving average of
        key = 'state_dict_ema' if path.name.startswith('ema') else 'state_dict'
        if path.name.startswith('ddp'):
            state_dict = {f'module.{k}': v for k, v in state_dict.items()}
        other = {k: torch.zeros_like(v) for k, v in state_dict.items()}
        checkpoint = dict(state_dict=other, epoch=3, args=argparse.Namespace(model='resnet18'), optimizer={})
        torch.save(dict(checkpoint, **{key: state_dict}), path)


@pytest.fixture(scope='module', params=MODELS)
def plain(request, tmp_path_factory):
    """Return a plain network of 1000 classes and the folder of its files."""
    folder = tmp_path_factory.mktemp('plain')
    model = randomize_bn(create(request.param))
    for name in FORMATS if request.param == 'resnet18' else FORMATS[:1]:
        write(model, folder / name)
    return request.param, model, folder


@pytest.fixture(scope='module')
def switchable(tmp_path_factory):
    """Return a switchable ResNet18 of 1000 classes and the folder of its files."""
    folder = tmp_path_factory.mktemp('switchable')
    model = randomize_bn(create('rs_resnet18'))
    model.alpha.data = torch.tensor([1., 2., 3.])
    for name in FORMATS:
        write(model, folder / name)
    return model, folder


def assert_same_at_every_size(model, expected, channels=3):
    """Compare the logits with those of a plain network."""
    for x in images(*RESOLUTIONS, channels=channels):
        assert_equal(model(x), expected(x))


def test_plain_file(plain):
    name, model, folder = plain
    for path in folder.iterdir():  # in every format that there is of this network
        assert_same_at_every_size(create(f'rs_{name}', path), model)
        assert_same_at_every_size(create(f'rs_{name}', checkpoint_path=str(path)), model)


def test_plain_file_with_other_classes(plain):
    name, model, folder = plain
    adapted = create(f'rs_{name}', folder / FORMATS[0], num_classes=5)
    assert adapted.num_classes == 5 and adapted(images(48)).shape == (2, 5)
    assert create(f'rs_{name}', folder / FORMATS[0], num_classes=0)(images(48)).shape[1] == model.num_features
    for x in images(*RESOLUTIONS):
        adapted.switch_to(x.shape[-1])
        assert_equal(adapted.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize('channels', [1, 4])
def test_plain_file_with_other_channels(channels, plain):
    name, _, folder = plain
    path = folder / FORMATS[0]
    adapted = create(f'rs_{name}', path, in_chans=channels)
    assert_same_at_every_size(adapted, create(name, path, in_chans=channels), channels)


def test_plain_file_for_features(plain):
    name, _, folder = plain
    path = folder / FORMATS[0]
    kwargs = dict(features_only=True, out_indices=(1, 3), in_chans=1)
    adapted, expected = create(f'rs_{name}', path, **kwargs), create(name, path, **kwargs)
    assert adapted.feature_info.channels() == expected.feature_info.channels()
    assert_same_at_every_size(adapted, expected, channels=1)


@pytest.mark.parametrize('file', FORMATS)
def test_switchable_file(file, switchable):
    model, folder = switchable
    for loaded in (create('rs_resnet18', folder / file), create('rs_resnet18', checkpoint_path=str(folder / file))):
        assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))


def test_switchable_file_with_other_classes_channels_and_resolutions(switchable):
    model, folder = switchable
    with pytest.warns(UserWarning, match='40 from 32'):  # 1600 is 704 below 48^2 and 576 above 32^2
        adapted = create('rs_resnet18', folder / FORMATS[0], num_classes=5, in_chans=1, resolutions=(64, 40))
    assert adapted.alpha.tolist() == [1., 3.] and adapted(images(64, channels=1)).shape == (2, 5)
    for resolution, source in ((64, 64), (40, 32)):
        own, theirs = adapted.at(resolution).state_dict(), model.at(source).state_dict()
        assert all(torch.equal(own[k], theirs[k]) for k in own if k not in ('conv1.weight', 'fc.weight', 'fc.bias'))
    assert_equal(adapted.conv1.weight.data, model.conv1.weight.data.sum(1, keepdim=True))  # as timm does


def test_switchable_file_for_features(switchable):
    model, folder = switchable
    adapted = create('rs_resnet18', folder / FORMATS[0], features_only=True)
    for x in images(*RESOLUTIONS):
        model.switch_to(x.shape[-1])
        assert_equal(adapted(x)[-1], model.forward_features(x))


def build(flag, path, num_classes, *extra):
    """Build a ResNet18 as the training script does."""
    args = parse_args([
        '--model', 'rs_resnet18', '--resolutions', *map(str, RESOLUTIONS), '--num-classes', str(num_classes),
        flag, str(path), '--model-kwargs', f"channels={TINY['channels']}",
        *extra,
    ])
    args.distributed = False
    return build_model(args, torch.device('cpu')).eval()


@pytest.mark.parametrize('flag, num_classes', [('--pretrained-path', 5), ('--initial-checkpoint', 1000)])
@pytest.mark.parametrize('kind', ['plain', 'switchable'])
def test_flags_of_the_training_script(flag, num_classes, kind, switchable, tmp_path):
    model, folder = switchable
    if kind == 'plain':
        model = randomize_bn(create('resnet18'))
        write(model, tmp_path / 'training.pth.tar')
        folder = tmp_path
    built = build(flag, folder / 'training.pth.tar', num_classes)
    assert built.num_classes == num_classes
    for x in images(*RESOLUTIONS):
        for network in (built, model):
            if hasattr(network, 'switch_to'):
                network.switch_to(x.shape[-1])
        assert_equal(built.forward_features(x), model.forward_features(x))
    if flag == '--initial-checkpoint':
        assert_equal(built.fc.weight.data, model.fc.weight.data)


@pytest.mark.parametrize('content, initial, pretrained', [
    (dict(bert=torch.zeros(2, 2)), 'does not fit rs_resnet18: conv1.weight, ', 'No weights of the checkpoint fit'),
    ([torch.zeros(2, 2)], 'There are no weights in it', 'There are no weights in it'),
    (b'hello', 'is damaged or not a checkpoint', 'is damaged or not a checkpoint'),
])
def test_foreign_files(content, initial, pretrained, tmp_path):
    path = tmp_path / 'foreign.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for flag, message in (('--initial-checkpoint', initial), ('--pretrained-path', pretrained)):
        with pytest.raises(ValueError, match=message):
            build(flag, path, 5)


@pytest.mark.parametrize('left_out, count', [('layer4.1.', 10), ('running_', 42), ('fc', 0), ('num_batches', 0)])
def test_incomplete_files(left_out, count, tmp_path, caplog):
    state_dict = create('resnet18', num_classes=3).state_dict()  # 21 BatchNorms, as many convolutions, a classifier
    torch.save({k: v for k, v in state_dict.items() if left_out not in k}, tmp_path / 'weights.pth')
    build('--pretrained-path', tmp_path / 'weights.pth', 5)
    assert ('which begin as those of a new network' in caplog.text) == bool(count)
    assert f'lacks {count} of the ' in caplog.text or not count


@pytest.mark.parametrize('plain', ['test_efficientnet'], indirect=True)
def test_file_of_another_network(plain):
    with pytest.raises(UserError, match='The checkpoint does not fit rs_resnet18: .*size mismatch for bn1.weight'):
        build('--pretrained-path', plain[2] / FORMATS[0], 5)


CONFIG = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bicubic', crop_pct=0.7)


@pytest.mark.parametrize('kind, flags, expected', [
    ('folder', ['--model', 'local-dir:{}', '--pretrained'], dict(CONFIG, crop_mode='squash')),
    ('folder', ['--pretrained-path', '{}'], dict(CONFIG, crop_mode='squash')),
    ('folder', ['--initial-checkpoint', '{}', '--mean', '0.7', '0.8', '0.9'], dict(
        CONFIG, mean=(0.7, 0.8, 0.9), crop_mode='squash')),
    ('run', ['--pretrained-path', '{}'], CONFIG),
    ('run', ['--initial-checkpoint', '{}', '--in-chans', '3'], CONFIG),
    ('run', ['--pretrained-cfg-overlay', 'mean=(0.1,0.2,0.3)'], dict(mean=CONFIG['mean'])),
    ('run', [], {}),
])
def test_preprocessing_goes_from_the_weights_to_the_checkpoint(kind, flags, expected, tmp_path):
    model, source = create('rs_test_efficientnet'), tmp_path / kind
    if kind == 'folder':
        model.pretrained_cfg.update(CONFIG, crop_mode='squash')
        save_model(model, str(source))
    else:
        source.mkdir()
        args = argparse.Namespace(model='rs_test_efficientnet', resolutions=RESOLUTIONS, **CONFIG)
        torch.save(dict(state_dict=model.state_dict(), args=args), source / 'last.pth.tar')
    args = parse_args(['--model', 'rs_test_efficientnet', '--num-classes', '1000', *(f.format(source) for f in flags)])
    args.distributed = False
    built = build_model(args, torch.device('cpu'))
    trained_with = resolve_data_config(args, built)
    for name, value in {**timm.get_pretrained_cfg('rs_test_efficientnet').to_dict(), **expected}.items():
        assert name not in PREPROCESSING or trained_with[name] == value
    torch.save(dict(state_dict=built.state_dict(), args=args), tmp_path / 'new.pth.tar')
    read = load_model(str(tmp_path / 'new.pth.tar')).model.pretrained_cfg
    assert {k: read[k] for k in PREPROCESSING} == {k: trained_with[k] for k in PREPROCESSING}


def test_a_config_that_is_not_read_is_noted(tmp_path, recwarn):
    folder = tmp_path / 'model'
    save_model(create('rs_resnet18', num_classes=3), str(folder))
    load_model(str(folder))
    read_preprocessing(str(folder))
    assert not [w for w in recwarn if 'config.json' in str(w.message)]
    path = str(folder / 'model.safetensors')
    with pytest.warns(UserWarning, match=f'config.json beside it.*give its folder, {folder}'):
        load_model(path, 'rs_resnet18', model_kwargs=TINY)
    with pytest.warns(UserWarning, match='config.json beside it'):
        read_preprocessing(path)


def test_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    unet = smp.Unet('tu-rs_resnet18', encoder_weights=None, classes=2)
    encoder = unet.encoder.model
    assert encoder.resolutions == (224, 192, 160, 128, 96)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for size in (96, 128):
        before = {k: v.clone() for k, v in unet.state_dict().items()}
        masks = unet(torch.randn(2, 3, size, size))
        assert masks.shape == (2, 2, size, size) and encoder.resolution == size
        torch.nn.functional.cross_entropy(masks, torch.ones(2, size, size, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {k.rsplit('.', 2)[-2] for k, v in unet.state_dict().items() if not torch.equal(v, before[k])}
        assert str(size) in changed and not changed & set(map(str, set(encoder.resolutions) - {size}))


WARM = dict(
    opt='adamw', lr_base=3e-4, lr_base_size=64, epochs=10, warmup_epochs=0, sched_on_updates=True,
    loss_reduction='mean', bn_statistics='auto', scale=[0.35, 1.0])
SCRATCH = dict(
    opt='sgd', lr_base=0.1, lr_base_size=256, epochs=300, warmup_epochs=5, sched_on_updates=False,
    loss_reduction='sum', bn_statistics='batch', scale=[0.08, 1.0])


@pytest.mark.parametrize('flags, expected', [
    ('', SCRATCH),
    ('--pretrained', WARM),
    ('--pretrained-path x', WARM),
    ('--initial-checkpoint x', WARM),
    ('--pretrained --epochs 300 --warmup-epochs 5', dict(WARM, epochs=300, warmup_epochs=5)),  # given
    ('--pretrained --scale 0.08 1', dict(WARM, scale=[0.08, 1.])),
    ('--pretrained --opt sgd', dict(WARM, opt='sgd', lr_base=0.1, lr_base_size=256)),
    ('--pretrained --lr-base 0.2', dict(WARM, lr_base=0.2, lr_base_size=256)),
    ('--pretrained --lr 0.01 --bn-statistics batch', dict(WARM, lr_base=0.1, lr_base_size=256, bn_statistics='batch')),
    ('--config c.yaml', dict(WARM, epochs=7, sched_on_updates=False)),
    ('--config c.yaml --epochs 8', dict(WARM, epochs=8, sched_on_updates=False)),
])
def test_defaults_from_trained_weights(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.yaml').write_text('pretrained: true\nepochs: 7\nsched_on_updates: false\n')
    args = vars(parse_args(flags.split()))
    assert {k: args[k] for k in expected} == expected


@pytest.mark.parametrize('flags, is_high', [
    ('--pretrained --lr 0.01', True),
    ('--pretrained --lr-base 0.1', True),
    ('--pretrained --lr 0.001', False),
    ('--pretrained', False),
    ('--pretrained --opt sgd --lr 0.01', False),
    ('--lr 0.1', False),
])
def test_a_rate_that_is_meant_for_sgd_is_noted(flags, is_high, caplog):
    parse_args(flags.split())
    assert ('The learning rate is high for adamw' in caplog.text) == is_high


@pytest.mark.parametrize('flag, num_classes, extra, is_zero', [
    ('--pretrained-path', 5, [], True),
    ('--pretrained-path', 5, ['--head-init-scale', '0.5'], False),
    ('--initial-checkpoint', 1000, [], False),
])
def test_a_new_classifier_begins_at_zero(flag, num_classes, extra, is_zero, switchable):
    built = build(flag, switchable[1] / FORMATS[0], num_classes, *extra)
    assert all(bool(p.any()) != is_zero for p in built.fc.parameters())
    assert bool(built.conv1.weight.any())


WNIDS = ('n01440764', 'n02102040', 'n02979186')
LABELS = ('tench, Tinca tinca', 'English springer', 'Cassette_player')  # the same classes


@pytest.mark.parametrize('labels, classes, is_new', [
    (LABELS, WNIDS, False),
    (LABELS, ('tench', 'english springer', 'cassette player'), False),
    (LABELS, ('cat', 'cow', 'dog'), True),
    (LABELS, (WNIDS[1], WNIDS[0], WNIDS[2]), True),  # the same ones in another order
    (None, ('cat', 'cow', 'dog'), False),  # not known, so only the number counts
    (LABELS, None, False),
])
def test_classes_are_compared_by_name(labels, classes, is_new, tmp_path, caplog):
    caplog.set_level('INFO')
    save_model(create('rs_resnet18', num_classes=3), str(tmp_path / 'model'), labels)
    args = parse_args(['--model', f"local-dir:{tmp_path / 'model'}", '--pretrained'])
    args.distributed = False
    built = build_model(args, torch.device('cpu'), classes and {name: i for i, name in enumerate(classes)})
    assert args.new_classifier == is_new and bool(built.fc.weight.any()) != is_new
    assert ('class 0 is' in caplog.text) == is_new


def step(task, x):
    """Train for a step, on images of the largest resolution."""
    task.train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.1)
    task(x, torch.arange(len(x)) % 3)['loss'].backward()
    optimizer.step()


@pytest.mark.parametrize('keep', [True, False])
def test_kept_statistics_stay_while_the_rest_learns(keep):
    task = MultiResolutionTask(randomize_bn(create('rs_resnet18')), verbose=False)
    task.keep_statistics = keep
    before = {k: v.clone() for k, v in task.trainable_module.state_dict().items()}
    step(task, images(64, n=4))
    moved = {k for k, v in task.trainable_module.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.endswith('running_mean') for k in moved) != keep
    for resolution in RESOLUTIONS:
        assert {f'bn1.{resolution}.weight', f'layer4.1.bn2.{resolution}.bias', 'conv1.weight'} <= moved
    assert task.trainable_module.training and not task.eval().trainable_module.training


def test_batch_statistics_are_compared_with_the_running_ones():
    model = create('rs_resnet18')
    task, x = MultiResolutionTask(model, verbose=False), images(64, n=16)
    for bn in model.modules():
        if isinstance(bn, torch.nn.BatchNorm2d):
            bn.momentum = 1.
    with torch.no_grad():
        model.train()(task.pyramid(x))  # the running statistics are those of this batch, up to N / (N - 1) of variances
    state = {k: v.clone() for k, v in model.state_dict().items()}
    args = argparse.Namespace(distributed=False, resolutions=RESOLUTIONS, rank=0, world_size=1, local_rank=0)
    assert min(task.measure_statistics(x)) > 0.98 and choose_statistics(task, x, args) == 'batch'
    assert_equal(dict(model.state_dict()), state)
    assert all(bn.track_running_stats for bn in model.modules() if isinstance(bn, torch.nn.BatchNorm2d))
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, torch.nn.BatchNorm2d):  # each channel passes on another share of its values
                bn.running_mean.copy_(torch.linspace(-2., 2., len(bn.running_mean)))
    assert max(task.measure_statistics(x)) < 0.7 and choose_statistics(task, x, args) == 'running'
