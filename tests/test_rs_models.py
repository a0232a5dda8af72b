import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from conftest import RESOLUTIONS, assert_equal, images, plain_state_dict, randomize_bn
from timm.models import get_pretrained_cfg, save_for_hf
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs import PrivateBN, explain_unknown_model
from timm_rs.models.rs_models import OTHER_MODELS, RS_MODELS

BASE = 'test_resnet'
NAME = f'rs_{BASE}'
PAPER = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x8d',
         'mobilenetv2_100')  # the networks of the authors' code


def create(name=NAME, resolutions=RESOLUTIONS, **kwargs):
    return timm.create_model(name, resolutions=resolutions, **kwargs).eval()


def trained(base=BASE, **kwargs):
    """Return a plain network that differs from a new one also in its BN."""
    return randomize_bn(timm.create_model(base, **kwargs)).eval()


def rs_trained(**kwargs):
    model = randomize_bn(create(**kwargs))
    model.alpha.data.uniform_(-1, 1)
    return model


def from_file(path, **cfg):
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), **cfg))


@pytest.fixture
def rs_file(tmp_path):
    """A switchable network of 1000 classes and the file of its weights."""
    model = rs_trained()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'rs.pth')
    return model, tmp_path / 'rs.pth'


@pytest.mark.parametrize('name, size', [
    ('rs_resnet18', '11.18'), ('rs_resnet50', '24.58'), ('rs_mobilenetv2_100', '3.47'),
])
def test_parameters_as_published(name, size):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert model.resolutions == (224, 192, 160, 128, 96)
    assert f'{sum(p.numel() for p in model.parameters()) / 2 ** 20:.2f}' == size


# The registry

def test_registered_under_timms_names():
    names = {f'rs_{b}' for b in (*RS_MODELS, *OTHER_MODELS)}
    assert set(timm.list_models('rs_*')) == set(timm.list_models(module='rs_models')) == names
    assert set(PAPER) <= set(RS_MODELS)
    assert {'rs_resnext50_32x4d', 'rs_resnext101_32x8d'} <= set(timm.list_models('rs_*resnext*'))


@pytest.mark.parametrize('base', PAPER)
def test_pretrained_tags_are_timms(base):
    tags = {n.partition('.')[2] for n in timm.list_models(f'{base}.*', pretrained=True)}
    assert {n.partition('.')[2] for n in timm.list_models(f'rs_{base}.*', pretrained=True)} == tags != set()
    for tag in (None, *tags):
        cfg, own = (get_pretrained_cfg(f'{n}.{tag}' if tag else n) for n in (base, f'rs_{base}'))
        assert (own.tag, own.hf_hub_id, own.url) == (cfg.tag, cfg.hf_hub_id, cfg.url)
        assert (own.mean, own.std, own.crop_pct, own.num_classes) == (cfg.mean, cfg.std, cfg.crop_pct, cfg.num_classes)
        assert own.input_size == (3, 224, 224) and own.test_input_size is None


def test_configuration_names_the_rs_model_and_at_the_plain_one():
    with torch.device('meta'):
        model = create('rs_resnet18.tv_in1k')
    cfg, plain = model.pretrained_cfg, model.at(32).pretrained_cfg
    assert (cfg['architecture'], cfg['tag'], cfg['input_size']) == ('rs_resnet18', 'tv_in1k', (3, 64, 64))
    assert (plain['architecture'], plain['tag'], plain['input_size']) == ('resnet18', 'tv_in1k', (3, 32, 32))
    assert model.default_cfg is cfg and cfg['hf_hub_id'] == 'timm/resnet18.tv_in1k'


def test_pool_size_is_that_of_the_size():
    model = timm.create_model('rs_test_efficientnet')  # timm's own size is 160
    for net in (model, model.at(96)):
        side = net.default_cfg['input_size'][-1]
        assert net.default_cfg['pool_size'] == net.forward_features(images(side)).shape[-2:]
    assert get_pretrained_cfg('rs_inception_v3').pool_size == (8, 8)  # it does not pad, so nothing follows from 299 px


@pytest.mark.parametrize('given, kept', [
    (dict(), (224, 192, 160, 128, 96)),
    (dict(resolutions=(32, 64)), (64, 32)),
    (dict(resolutions=[32, 64]), (64, 32)),
    (dict(resolutions=32), (32,)),
])
def test_resolutions_are_remembered(given, kept):
    model = timm.create_model(NAME, num_classes=2, **given)
    assert model.resolutions == kept
    assert model._model_args == dict(resolutions=given.get('resolutions', kept), num_classes=2)
    again = timm.create_model(NAME, **json.loads(json.dumps(model._model_args)))  # as a config.json would
    assert again.resolutions == kept and again.num_classes == 2
    assert 'resolutions' not in model.at(kept[0])._model_args


@pytest.mark.parametrize('name, what, near', [
    ('rs_resnet55', "Unknown model 'rs_resnet55', did you mean ", 'rs_resnet50'),
    ('rs_mobilnetv2', "Unknown model 'rs_mobilnetv2', did you mean ", 'rs_mobilenetv2_100'),
    ('resnet50', "'resnet50' is not a Resolution Switchable Network, did you mean ", 'rs_resnet50?'),
    ('resnet50.a1_in1k', "'resnet50' is not a Resolution Switchable Network, did you mean ", 'rs_resnet50?'),
    ('xyz', "Unknown model 'xyz', see ", "timm.list_models('rs_*')."),
])
def test_explain_unknown_model(name, what, near):
    explained = explain_unknown_model(name)
    assert explained.startswith(what) and near in explained and '\n' not in explained


# Keywords

@pytest.mark.parametrize('base, kwargs', [
    (BASE, dict(num_classes=7)),
    (BASE, dict(num_classes=0)),
    (BASE, dict(in_chans=1)),
    (BASE, dict(drop_path_rate=0.2)),
    (BASE, dict(drop_rate=0.3)),
    (BASE, dict(global_pool='max')),
    (BASE, dict(output_stride=8)),
    (BASE, dict(features_only=True)),
    (BASE, dict(features_only=True, out_indices=(1, 3))),
    ('test_efficientnet', dict(num_classes=7, in_chans=1, drop_path_rate=0.2, global_pool='max')),
    ('test_efficientnet', dict(features_only=True, out_indices=(0, 2), output_stride=16)),
])
def test_keywords_pass_through(base, kwargs):
    plain, model = trained(base, **kwargs), create(f'rs_{base}', **kwargs)
    drops = [[getattr(m, 'drop_prob', getattr(m, 'p', None)) for m in net.modules() if 'Drop' in type(m).__name__]
             for net in (plain, model)]
    assert drops[0] == drops[1]
    assert getattr(model, 'drop_rate', None) == getattr(plain, 'drop_rate', None)
    assert model._model_args == dict(plain._model_args, resolutions=RESOLUTIONS)
    if 'features_only' in kwargs:
        assert model.feature_info.channels() == plain.feature_info.channels()
    model.load_state_dict(plain.state_dict())
    for x in images(*RESOLUTIONS, channels=kwargs.get('in_chans', 3)):
        assert_equal(model(x), plain(x))


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match='nonsense'):
        create(nonsense=1)


@pytest.mark.parametrize('resolutions', [(), (64, 64), (64, -1), ('64',)])
def test_bad_resolutions_are_refused(resolutions):
    with pytest.raises(ValueError, match='resolutions'):
        create(resolutions=resolutions)


# Weights of a plain network, of which test_warm_start.py has more

def test_plain_file_starts_every_resolution(tmp_path):
    plain = trained()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = create(**from_file(tmp_path / 'plain.pth'))
    for x in images(*RESOLUTIONS):
        assert_equal(model(x), plain(x))
    assert model.pretrained_cfg['file'] == str(tmp_path / 'plain.pth')
    assert 'state_dict' not in {k for k, v in model.pretrained_cfg.items() if v is not None}


# Weights of a switchable network

def test_rs_file(rs_file):
    source, path = rs_file
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = create(**from_file(path))
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))


def test_rs_file_with_other_resolutions(rs_file):
    source, path = rs_file
    with pytest.warns(UserWarning, match='nearest BatchNorm: 40 from 32') as caught:
        model = create(resolutions=(64, 40), **from_file(path))
    assert len(caught) == 1
    assert_equal(plain_state_dict(model, 64), plain_state_dict(source, 64))
    assert_equal(plain_state_dict(model, 40), plain_state_dict(source, 32))
    assert_equal(model.alpha.data, source.alpha.data[[0, 2]])


def test_rs_file_of_few_classes(tmp_path):
    source = rs_trained(num_classes=5)
    torch.save(source.state_dict(), tmp_path / 'rs.pth')
    model = create(num_classes=5, **from_file(tmp_path / 'rs.pth', num_classes=5))
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))
    with pytest.raises(RuntimeError, match='size mismatch for fc'):
        create(checkpoint_path=str(tmp_path / 'rs.pth'))


def test_rs_file_for_features(rs_file):
    source, path = rs_file
    resolutions = (64, 32)
    model = create(resolutions=resolutions, features_only=True, out_indices=(0, 2, 4), **from_file(path))
    for r in resolutions:
        x = images(r)
        assert_equal(model(x), source.at(r).forward_intermediates(x, indices=[0, 2, 4], intermediates_only=True))
    assert_equal(model.alpha.data, source.alpha.data[[RESOLUTIONS.index(r) for r in resolutions]])


def test_file_of_one_resolution_is_a_plain_one(rs_file, tmp_path):
    source, _ = rs_file
    torch.save(source.at(48).state_dict(), tmp_path / 'plain.pth')
    plain, x = timm.create_model(BASE, **from_file(tmp_path / 'plain.pth')).eval(), images(48)
    assert_equal(plain(x), source(x))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='none.pth does not exist'):
        create(**from_file(tmp_path / 'none.pth'))


@pytest.mark.parametrize('name', ['rs_densenet264d', 'rs_resnet18_w2a32'])
def test_without_pretrained_weights(name):
    with pytest.raises(ValueError, match=f'no pretrained weights for {name}, create it with pretrained=False'):
        timm.create_model(name, pretrained=True)


# Folders as on the hub

@pytest.fixture
def folder(tmp_path):
    """A switchable network of 6 classes and the folder that timm saved it to."""
    model = rs_trained(num_classes=6)
    model.switch_to(32)  # must not matter
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    return model, f'local-dir:{tmp_path / "model"}'


def test_folder(folder):
    source, name = folder
    model = timm.create_model(name, pretrained=True).eval()
    assert (model.resolutions, model.resolution, model.num_classes) == (RESOLUTIONS, 64, 6)
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))
    for x in images(*RESOLUTIONS):
        assert_equal(model(x), source(x))
    config = json.loads(Path(name.partition(':')[2], 'config.json').read_text())
    assert config['architecture'] == NAME and config['model_args']['resolutions'] == list(RESOLUTIONS)


def test_folder_without_its_weights(folder):
    source, name = folder
    model = timm.create_model(name)
    assert model.resolutions == RESOLUTIONS and model.num_classes == 6
    assert not torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize('kwargs', [dict(num_classes=3), dict(in_chans=1), dict(resolutions=(64, 32))])
def test_folder_adapted(folder, kwargs):
    source, name = folder
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    assert model.num_classes == kwargs.get('num_classes', 6)
    x = images(32, channels=kwargs.get('in_chans', 3))
    expected = source.at(32).forward_features(x.expand(-1, 3, -1, -1))
    model.switch_to(32)
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-3, atol=1e-4)


def test_folder_for_features(folder):
    source, name = folder
    model = timm.create_model(name, pretrained=True, features_only=True, out_indices=(2,)).eval()
    for r, x in zip(RESOLUTIONS, images(*RESOLUTIONS)):
        assert_equal(model(x), source.at(r).forward_intermediates(x, indices=[2], intermediates_only=True))


def test_folder_saved_again(folder, tmp_path):
    source, name = folder
    save_for_hf(timm.create_model(name, pretrained=True), tmp_path / 'again', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True)
    assert_equal(dict(again.state_dict()), dict(source.state_dict()))


def test_folder_of_one_resolution(folder, tmp_path):
    source, _ = folder
    save_for_hf(source.at(48), tmp_path / 'plain', safe_serialization=True)
    plain = timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True).eval()
    x = images(48)
    assert type(plain) is timm.models.ResNet and plain.pretrained_cfg['input_size'] == (3, 48, 48)
    assert not any(isinstance(m, PrivateBN) for m in plain.modules())
    assert sum(isinstance(m, _BatchNorm) for m in plain.modules()) > 0
    assert_equal(plain(x), source(x))
