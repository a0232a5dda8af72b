"""What files record opens no other file, contacts nobody and builds nothing large; what is wrong is one line"""
import argparse
import json
import logging
import math
import shutil
import socket
import sys

import pytest
import safetensors.torch
import timm
import torch
import yaml
from test_convert import TINY, rs_model

from timm_rs.checkpoint import check_finite, read_checkpoint
from timm_rs.hub.convert import save_model
from timm_rs.load import load_model, load_weights, read_source, shapes_only
from timm_rs.plot import read_run
from timm_rs.records import check_run, find_checkpoint, read_summary, read_yaml
from timm_rs.train.summary import append_summary
from timm_rs_runtime.errors import UserError

NAME = 'rs_resnet10t'
_events = []


def _audit(event, args):
    if _events and event in ('open', 'socket.connect', 'socket.getaddrinfo', 'subprocess.Popen', 'urllib.Request'):
        _events.append((event, args[0]))


sys.addaudithook(_audit)  # it stays, and does nothing outside of a test


@pytest.fixture
def watched(monkeypatch):
    """Return what gives the names of files that were opened since; connections are refused."""
    def refuse(*_):
        raise AssertionError('A connection was opened.')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    _events.append(None)

    def opened():
        found = [str(what) for event, what in _events[1:] if event == 'open']
        assert all(event == 'open' for event, _ in _events[1:])
        return {name for name in found if 'site-packages' not in name and not name.endswith(('.py', '.pyc'))
                and not name.startswith(('/proc', '/sys', sys.base_prefix))}

    yield opened
    _events.clear()


def save(path, network, **args):
    args = dict(dict(model=NAME, num_classes=10, resolutions=list(network.resolutions), model_kwargs=TINY), **args)
    torch.save(dict(state_dict=network.state_dict(), args=argparse.Namespace(**args), epoch=3), path)
    return str(path)


OVERLAY = dict(url='http://127.0.0.1:9/weights.pth')


@pytest.mark.parametrize('kwargs', [
    dict(pretrained=True, pretrained_cfg_overlay=OVERLAY),
    dict(pretrained=True, pretrained_cfg=OVERLAY),
    dict(checkpoint_path='/nowhere/a.pth'),
    dict(cache_dir='/nowhere', pruned=True),
    dict(url='http://127.0.0.1:9', file='/nowhere/a.pth', hf_hub_id='user/name', state_dict={}),
])
def test_arguments_of_a_checkpoint_open_nothing(kwargs, tmp_path, watched, caplog):
    model = rs_model()
    path = save(tmp_path / 'a.pth', model, model_kwargs=dict(TINY, **kwargs))
    before = watched()
    loaded = load_model(path)
    assert watched() - before <= {path} and loaded.model.resolutions == model.resolutions
    assert f"{path}: the model arguments {', '.join(sorted(kwargs))} are left out" in caplog.text


@pytest.mark.parametrize('args, message', [
    (dict(model='hf-hub:user/name'), 'a.pth records the model hf-hub:user/name, which is not opened'),
    (dict(model='local-dir:/nowhere'), 'a.pth records the model local-dir:/nowhere, which is not opened'),
    (dict(model='https://example.org/a'), 'which is not opened: give --model'),
    (dict(model='/etc/passwd'), "Unknown model '/etc/passwd'"),
    (dict(model=7), 'a.pth: flags: model is 7, expected text'),
    (dict(num_classes=10 ** 9), 'a.pth: flags: num_classes is 1000000000, expected an integer from 0 to 1000000'),
    (dict(num_classes='ten'), "a.pth: flags: num_classes is 'ten', expected an integer"),
    (dict(resolutions=[64, 64]), 'flags: resolutions is [64, 64], expected different input sizes'),
    (dict(mean=[math.nan] * 3), 'flags: mean[0] is nan, expected a finite number'),
    (dict(std=[]), 'flags: std is [], expected a list of 1 to 4096 values'),
    (dict(crop_pct='1'), "flags: crop_pct is '1', expected a number"),
    (dict(model_kwargs='foo'), "flags: model_kwargs is 'foo', expected a dict"),
    (dict(model_kwargs=dict(stem_width=10 ** 9)), 'flags: model_kwargs.stem_width is 1000000000, expected'),
    (dict(model_kwargs=dict(TINY, no_such=1)), "a.pth as rs_resnet10t: ResNet.__init__() got an unexpected keyword"),
    (dict(model_kwargs=dict(TINY, layers=[10 ** 6] * 4)), 'describes a network of more than'),
    (dict(model_kwargs=dict(TINY, channels=[10 ** 6] * 4)), 'does not fit rs_resnet10t: '),
    (dict(num_classes=10 ** 6, model_kwargs=dict(TINY, stem_width=10 ** 5)), 'does not fit rs_resnet10t: '),
])
def test_bad_flags_of_a_checkpoint(args, message, tmp_path, watched):
    path = save(tmp_path / 'a.pth', rs_model(), **args)
    before = watched()
    with pytest.raises(UserError, match='^[^\n]*$') as e:
        load_model(path)
    assert message in str(e.value) and watched() - before <= {path}


def test_flags_that_are_not_plain_are_left_out(tmp_path):
    found = read_checkpoint(save(tmp_path / 'a.pth', rs_model(), lr=0.3, state=torch.zeros(3), tags=['a'])).args
    assert found['lr'] == 0.3 and found['tags'] == ['a'] and 'state' not in found
    assert check_run({3: 'x', 'lr': 1}, 'a.pth') == {'lr': 1}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'model'
    save_model(rs_model(), str(folder))
    return folder


@pytest.mark.parametrize('change, message', [
    (lambda c: c.update(architecture='resnet10'), "Unknown model (resnet10)"),
    (lambda c: c.update(architecture='hf-hub:user/name'), 'Cannot load'),
    (lambda c: c.update(architecture='rs_resnet18'), 'Cannot load'),
    (lambda c: c.update(architecture=None), 'config.json: architecture is None, expected text'),
    (lambda c: c.pop('architecture'), 'config.json: architecture is missing, expected text'),
    (lambda c: c['pretrained_cfg'].update(mean=[]), 'config.json: pretrained_cfg.mean is [], expected a list of 1'),
    (lambda c: c['pretrained_cfg'].update(std=[0, 1, 1]), 'pretrained_cfg.std[0] is 0, expected a finite number'),
    (lambda c: c['pretrained_cfg'].update(input_size=[3, 9999, 64]), 'input_size[1] is 9999, expected an integer'),
    (lambda c: c['pretrained_cfg'].update(num_classes=-1), 'pretrained_cfg.num_classes is -1, expected an integer'),
    (lambda c: c.update(pretrained_cfg=[]), 'pretrained_cfg is [], expected a dict'),
    (lambda c: c.update(model_args=dict(c['model_args'], resolutions=[])), 'Cannot load'),
    (lambda c: c.update(model_args=dict(c['model_args'], layers=[10 ** 6] * 4)), 'of more than'),
    (lambda c: c['model_args'].update(channels=[10 ** 5] * 4), 'config.json describes a network of'),
    (lambda c: c['model_args'].update(stem_width=[[[[[[1]]]]]]), 'model_args.stem_width'),
])
def test_bad_configs(change, message, folder, tmp_path, watched):
    shutil.copytree(folder, tmp_path / 'm')
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    change(config)
    (tmp_path / 'm' / 'config.json').write_text(json.dumps(config))
    before = watched()
    with pytest.raises(UserError, match='^[^\n]*$') as e:
        load_model(str(tmp_path / 'm'))
    assert message in str(e.value) and str(tmp_path / 'm') in str(e.value)
    assert all(str(tmp_path / 'm') in name for name in watched() - before)


def test_sources_in_a_config_are_left_out(folder, tmp_path, watched, caplog):
    shutil.copytree(folder, tmp_path / 'm')
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    places = dict(url='http://127.0.0.1:9/a.pth', file='/nowhere', hf_hub_id='user/name', custom_load=True, tag='x')
    config['pretrained_cfg'].update(places, source='hf-hub')
    config['model_args'].update(pretrained_cfg_overlay=OVERLAY, checkpoint_path='/nowhere', cache_dir='/nowhere')
    (tmp_path / 'm' / 'config.json').write_text(json.dumps(config))
    before = watched()
    loaded = load_model(str(tmp_path / 'm'))
    assert all(name.startswith(str(tmp_path / 'm')) for name in watched() - before)
    assert not any(loaded.model.pretrained_cfg.get(k) for k in (*places, 'source', 'state_dict'))
    assert 'cache_dir, checkpoint_path, pretrained_cfg_overlay are left out' in caplog.text


def test_folders_of_timm_are_read_as_timm_reads_them(folder, tmp_path):
    name, args = read_source(f'local-dir:{folder}')
    assert name == NAME and args['resolutions'] == (64, 48, 32) or args['resolutions'] == [64, 48, 32]
    plain = timm.create_model('test_resnet', num_classes=4, in_chans=1)
    timm.models.save_for_hf(plain, tmp_path / 'plain', safe_serialization=True)
    loaded = load_model(str(tmp_path / 'plain'), keep_plain=True).model.eval()
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(loaded(x), plain.eval()(x), rtol=0, atol=0)
    assert loaded.pretrained_cfg['num_classes'] == 4 and 'state_dict' not in loaded.pretrained_cfg
    switchable = load_model(str(tmp_path / 'plain'), resolutions=(64, 32)).model
    torch.testing.assert_close(switchable(x), plain(x), rtol=0, atol=0)


def test_config_names_classes_at_the_top_once(folder, tmp_path):
    model = rs_model()
    model.pretrained_cfg['label_names'] = [f'class {i}' for i in range(10)]
    save_model(model, str(tmp_path / 'm'))
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    assert config['num_classes'] == 10 and 'num_classes' not in config['model_args']
    assert config['label_names'][3] == 'class 3' and 'label_names' not in config['pretrained_cfg']
    of_timm = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    for loaded in (of_timm, load_model(str(tmp_path / 'm')).model):
        assert loaded.num_classes == 10 and loaded.pretrained_cfg['label_names'][3] == 'class 3'
    model.reset_classifier(4)
    save_model(model, str(tmp_path / 'four'))
    assert 'label_names' not in json.loads((tmp_path / 'four' / 'config.json').read_text())


# Weights

BROKEN = [
    (lambda w: w['fc.weight'].__setitem__((0, 0), math.nan), 'fc.weight holds 1 of 320 values that are not finite'),
    (lambda w: w['bn1.48.bias'].fill_(math.inf), 'bn1.48.bias holds 16 of 16 values that are not finite'),
    (lambda w: w['bn1.32.running_var'].__setitem__(0, -1.), 'bn1.32.running_var holds -1, expected variances'),
]


@pytest.mark.parametrize('damage, message', BROKEN)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_that_are_not_finite(damage, message, suffix, tmp_path):
    weights = {k: v.clone() for k, v in rs_model().state_dict().items()}
    damage(weights)
    path = str(tmp_path / f'a{suffix}')
    safetensors.torch.save_file(weights, path) if suffix == '.safetensors' else torch.save(weights, path)
    for read in (
        lambda: load_model(path, NAME, model_kwargs=TINY),
        lambda: load_weights(rs_model(), path),
        lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=path), **TINY),
    ):
        with pytest.raises(UserError) as e:
            read()
        assert f'{path}: {message}' in str(e.value)


def test_networks_that_are_not_finite_are_not_saved(tmp_path):
    model = rs_model()
    model.fc.bias.data[3] = math.nan
    with pytest.raises(UserError, match='rs_resnet10t: fc.bias holds 1 of 10 values that are not finite'):
        save_model(model, str(tmp_path / 'm'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2])
def test_finite_in_any_precision(dtype):
    good = torch.tensor([1., -2.]).to(dtype)
    check_finite(dict(a=good, b=good[:0], c=torch.tensor([3])), 'x')
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match='x: a holds 1 of'):
            check_finite(dict(a=torch.tensor([1., bad]).to(dtype)), 'x')


@pytest.mark.parametrize('weights, message', [
    ({'a': torch.zeros(1).expand(10 ** 6, 10 ** 6)}, 'a is (1000000, 1000000), but the file holds fewer values for it'),
    ({'a': torch.zeros(3).to_sparse()}, 'a is a torch.sparse_coo tensor on cpu, expected a dense one'),
    ({'a': torch.zeros(3, device='meta')}, 'a is a torch.strided tensor on meta, expected a dense one'),
    ({3: torch.zeros(3)}, 'There are no weights in it'),
    ({'state_dict': {('a',): torch.zeros(3)}}, 'There are no weights in it'),
    (dict.fromkeys(map(str, range(20)), torch.zeros(1000)), 'the weights share their memory more than 16 times'),
])
def test_tensors_that_are_not_weights(weights, message, tmp_path):
    torch.save(weights, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth') as e:
        read_checkpoint(str(tmp_path / 'a.pth'))
    assert message in str(e.value)


@pytest.mark.parametrize('weights', [
    {'alpha': torch.zeros(2), 'bn.99999.running_mean': torch.zeros(3), 'bn.64.running_mean': torch.zeros(3)},
    {'alpha': torch.zeros(()), 'bn1.64.running_mean': torch.zeros(3)},
    {'alpha': torch.zeros(3), 'bn1.64.running_mean': torch.zeros(3)},
    {'alpha': torch.zeros(1), 'bn1.64.running_mean': torch.zeros(3), 'bn1.a': torch.zeros(3), 'bn1.64': torch.zeros(3)},
    {'conv1.module.weight': torch.zeros(3), 'bn1.bn_99999.weight': torch.zeros(3)},
    {'features.0.0.module.weight': torch.zeros(3), 'features.0.1.bn_0.weight': torch.zeros(3),
     'conv.0.module.weight': torch.zeros(3), 'conv.1.bn_0.weight': torch.zeros(3),
     'features.1.conv.x.bn_0.weight': torch.zeros(3)},
    {'fc.weight_codes': torch.zeros(3), 'fc.weight_shape': torch.zeros(4), 'fc.basis': torch.zeros(3)},
])
def test_keys_of_other_networks_are_one_line(weights, tmp_path):
    torch.save(weights, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth'):
        load_model(str(tmp_path / 'a.pth'), NAME, resolutions=(32,))


def test_no_more_tensors_than_a_file_holds_are_built():
    with pytest.raises(UserError, match='x describes a network of more than 10008 tensors'), shapes_only('x', 1):
        for _ in range(10 ** 6):
            torch.nn.Linear(1000, 1000)
    assert all(p.device.type == 'cpu' for p in torch.nn.Linear(2, 2).parameters())


# Runs

def test_output_folders_are_checkpoints(tmp_path):
    model, other = rs_model(), rs_model()
    save(tmp_path / 'last.pth.tar', other)
    assert find_checkpoint(str(tmp_path)) == load_model(str(tmp_path)).source == str(tmp_path / 'last.pth.tar')
    save(tmp_path / 'model_best.pth.tar', model)
    loaded = load_model(str(tmp_path))
    assert loaded.source == str(tmp_path / 'model_best.pth.tar') and loaded.epoch == 3
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    load_weights(other, str(tmp_path))
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_summary(tmp_path):
    path = str(tmp_path / 'summary.csv')
    assert read_summary(path) == []
    for epoch in range(3):
        append_summary(path, dict(epoch=epoch, loss=0.1 + 0.2, lr=1e-5, top1=None if epoch == 1 else 50))
    rows = [dict(epoch=epoch, loss=0.1 + 0.2, lr=1e-5) for epoch in (1, 2)]
    assert read_summary(path)[1:] == [rows[0], dict(rows[1], top1=50)]
    append_summary(path, dict(epoch=1, loss=2.))  # after a run was resumed
    assert [row['epoch'] for row in read_summary(path)] == [0, 1] and read_summary(path)[1]['loss'] == 2.


@pytest.mark.parametrize('content, message', [
    ('epoch,lr\n0,fast\n', "summary.csv: line 2: lr is 'fast', expected a number"),
    ('epoch,lr\n0\n', 'summary.csv: a row and the header have different numbers of values'),
    ('epoch,lr\n0,1,2\n', 'a row and the header have different numbers of values'),
    ('epoch,"lr\n', 'summary.csv is not valid CSV: unexpected end of data'),
    (f'epoch,lr\n0,{"1" * 200000}\n', 'is not valid CSV: field larger than field limit'),
])
def test_bad_summaries(content, message, tmp_path):
    (tmp_path / 'summary.csv').write_text(content)
    with pytest.raises(UserError) as e:
        read_summary(str(tmp_path / 'summary.csv'))
    assert message in str(e.value)


def test_yaml(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text('')
    assert read_yaml(str(path)) == {}
    path.write_text('base: &b {x: 1}\nmore:\n  <<: *b\n  y: 2\nlr: 2001-99-99\nrate: 1e-3\nnone:\n')
    assert read_yaml(str(path)) == dict(
        base=dict(x=1), more=dict(x=1, y=2), lr='2001-99-99', rate='1e-3', none=None)


@pytest.mark.parametrize('content, message', [
    ('a: [', 'a.yaml is not valid YAML: while parsing a flow'),
    ('a: !!timestamp 2001-99-99', 'a.yaml is not valid YAML: month must be in 1..12'),
    ('a: !!python/object/apply:os.getcwd []', 'could not determine a constructor'),
    ('- 1', 'a.yaml: the content is [1], expected a dict'),
    ('1: x', 'a.yaml: 1 is 1, expected text'),
    ('\0', 'a.yaml is not valid YAML'),
    ('[' * 5000, 'is not valid YAML: maximum recursion depth'),
    ('a: ' + '9' * 5000, 'is not valid YAML: Exceeds the limit'),
    ('x: &x {' + ', '.join(f'k{i}: 1' for i in range(1001)) + '}', 'a mapping of more than 1000 fields'),
    ('a' * 2 ** 18 + 'a', 'is larger than 262144 bytes'),
])
def test_bad_yaml(content, message, tmp_path):
    (tmp_path / 'a.yaml').write_text(content)
    with pytest.raises(UserError, match='^[^\n]*$') as e:
        read_yaml(str(tmp_path / 'a.yaml'))
    assert message in str(e.value)


def test_args_of_a_run_open_nothing(tmp_path, watched, caplog):
    caplog.set_level(logging.WARNING)
    append_summary(str(tmp_path / 'summary.csv'), dict(
        epoch=0, eval_top1_32=20., eval_top1_16=10., eval_top1_ens=21., eval_top1_mean=15.))
    args = dict(model=NAME, num_classes=2, model_kwargs=dict(TINY, pretrained=True, pretrained_cfg_overlay=OVERLAY))
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args))
    before = watched()
    assert list(read_run(str(tmp_path)).madds()) == [32, 16]
    assert all(name.startswith(str(tmp_path)) for name in watched() - before)
    for change, message in (
        (dict(model='local-dir:/nowhere'), 'holds no weights'),
        (dict(model='no_such'), 'Cannot load'),
        (dict(model_kwargs=dict(layers=[10 ** 6] * 4)), 'of more than'),
        (dict(in_chans=0), 'args.yaml: flags: in_chans is 0, expected an integer from 1'),
    ):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(args, **change)))
        with pytest.raises(UserError, match=message):
            read_run(str(tmp_path)).madds()


def test_flags_of_another_network_are_not_taken(tmp_path):
    model = rs_model()
    path = save(tmp_path / 'a.pth', model, model='hf-hub:user/name')
    assert torch.equal(load_model(path, NAME).model.fc.weight, model.fc.weight)  # which the user names here
    path = save(tmp_path / 'b.pth', model, model='rs_resnet10t.x')
    assert torch.equal(load_model(path, 'resnet10t').model.fc.weight, model.fc.weight)
    with pytest.raises(UserError, match='does not fit rs_resnet18: conv1.weight'):
        load_model(path, 'rs_resnet18')
    with pytest.raises(UserError, match='does not fit rs_resnet10t: .*conv1'):  # without the widths of another
        load_model(save(tmp_path / 'c.pth', model, model='rs_resnet18'), NAME)


def test_config_builds_the_network_for_others(folder):
    """transformers passes num_classes beside model_args."""
    config = json.loads((folder / 'config.json').read_text())
    model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    assert model.load_state_dict(weights).missing_keys == []
