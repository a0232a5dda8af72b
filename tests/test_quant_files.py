"""State dicts and files of quantized networks: saved, packed, shared and loaded"""
import json
import os

import pytest
import timm
import torch
from conftest import assert_equal, images, randomize_bn, rs_model
from safetensors.torch import load_file, save_file
from test_hub import REPO, assert_restores, hub  # noqa: F401
from test_hub import create as create_from_hub
from test_quant_models import RESOLUTIONS, bases, q_model, quantizers, settle

from timm_rs import make_switchable
from timm_rs.hub.convert import save_model
from timm_rs.load import load_model, load_weights
from timm_rs.quant import QuantConv2d, is_quantized, pack_state_dict, quantize, unpack_state_dict
from timm_rs_cli import main


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('bits', range(1, 9))
def test_packing(bits):
    model = q_model(weight_bits=bits)
    state = state_of(model)
    packed = pack_state_dict(state)
    for name, conv in quantizers(model, QuantConv2d).items():
        assert packed[f'{name}.weight_codes'].numel() == -(-conv.weight.numel() * bits // 8)
        assert f'{name}.weight' not in packed
    unpacked = unpack_state_dict(packed)
    assert set(unpacked) == set(state)
    for name, conv in quantizers(model, QuantConv2d).items():
        assert_equal(unpacked[f'{name}.weight'], conv.quantized_weight.detach())
    x = images(48)
    expected = model(x)
    model.load_state_dict(unpacked)
    assert_equal(model(x), expected)  # levels take themselves
    assert_equal(pack_state_dict(model.state_dict()), packed)
    assert_equal(unpack_state_dict(state), state)


def test_packing_nothing():
    with pytest.raises(ValueError, match='no quantized weights to pack'):
        pack_state_dict(rs_model().state_dict())


@pytest.mark.parametrize('damage, message', [
    (lambda s, n: s.update({f'{n}.weight_codes': s[f'{n}.weight_codes'][:-1]}), r'codes is \(\d+,\) uint8, expec'),
    (lambda s, n: s.update({f'{n}.weight_codes': s[f'{n}.weight_codes'].float()}), 'float32, expected .* bytes for'),
    (lambda s, n: s.update({f'{n}.weight_shape': s[f'{n}.weight_shape'] * 0}), 'packed weights of shape'),
    (lambda s, n: s.update({f'{n}.basis': s[f'{n}.basis'].repeat(1, 2)}), 'at 4 bits'),
    (lambda s, n: s.update({f'{n}.basis': s[f'{n}.basis'].repeat(1, 9)}), r'has a basis \(\d+, 18\)'),
    (lambda s, n: s.pop(f'{n}.basis'), 'is there, but .*basis is missing'),
    (lambda s, n: s.pop(f'{n}.weight_shape'), 'is there, but .*weight_shape'),
])
def test_damaged_packed_files(tmp_path, damage, message):
    model = q_model()
    packed = {k: v.contiguous() for k, v in pack_state_dict(state_of(model)).items()}
    damage(packed, 'layer2.0.conv1')
    save_file(packed, tmp_path / 'model.safetensors')
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as e:
        load_weights(model, str(tmp_path / 'model.safetensors'))
    assert 'model.safetensors: ' in str(e.value) and 'layer2.0.conv1' in str(e.value) and '\n' not in str(e.value)
    assert_equal(state_of(model), before)


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    quantization = dict(weight_bits=2, activation_bits=3, skip=['layer4.*'])
    model = timm.create_model(
        'rs_test_resnet', resolutions=RESOLUTIONS, num_classes=6, quantization=quantization)
    return settle(randomize_bn(model))


@pytest.mark.parametrize('packed', [False, True])
def test_folder(trained, packed, tmp_path):
    save_model(trained, str(tmp_path / 'model'), packed=packed)
    assert not any('weight_codes' in k for k in trained.state_dict())
    name = f"local-dir:{tmp_path / 'model'}"
    model = timm.create_model(name, pretrained=True).eval()
    x = images(32)
    assert_equal(model(x), trained(x))
    assert bases(model).keys() == bases(trained).keys()
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    assert_equal(features(x), trained.at(32).forward_intermediates(x, indices=[1, 3], intermediates_only=True))
    other = timm.create_model(name, pretrained=True, num_classes=3, resolutions=(32, 16)).eval()
    assert_equal(other.at(32).forward_features(x), trained.at(32).forward_features(x))
    assert_equal(load_model(str(tmp_path / 'model')).model(x), trained(x))
    stored = load_file(tmp_path / 'model' / 'model.safetensors')
    assert ('layer1.0.conv1.weight' in stored) != packed and 'layer4.0.conv1.weight' in stored
    again = timm.create_model(name)
    assert is_quantized(again)


def test_folder_of_a_network_quantized_by_hand(tmp_path):
    model = settle(quantize(make_switchable(timm.create_model('test_resnet', num_classes=5), RESOLUTIONS), 3))
    save_model(model, str(tmp_path / 'model'), packed=True)
    x = images(48)
    assert_equal(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()(x), model(x))


def test_file_size(tmp_path):
    model = timm.create_model('rs_resnet18_w2a32')
    save_model(model, str(tmp_path / 'packed'), packed=True)
    config = json.loads((tmp_path / 'packed' / 'config.json').read_text())
    assert config['model_type'] == 'timm_rs_packed'  # which transformers does not know
    assert os.path.getsize(tmp_path / 'packed' / 'model.safetensors') <= 5.5e6


def test_extract(trained, tmp_path):
    with pytest.raises(ValueError, match='quantizes its activations, but networks of timm do not'):
        save_model(trained.at(32), str(tmp_path / 'plain'))
    assert not os.listdir(tmp_path)
    model = settle(timm.create_model('rs_test_resnet', resolutions=RESOLUTIONS, quantization=dict(weight_bits=2)))
    save_model(model.at(32), str(tmp_path / 'plain'))
    plain, x = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval(), images(32)
    assert type(plain) is timm.models.ResNet and plain.layer1[0].conv1.weight[0].unique().numel() == 4
    assert_equal(plain(x), model(x))


@pytest.mark.parametrize('packed', [False, True])
def test_hub(hub, trained, packed, tmp_path):
    save_model(trained, str(tmp_path / 'model'))
    main(['push', str(tmp_path / 'model'), REPO, *['--packed'][:packed]])
    restored = create_from_hub()
    if not packed:
        assert_restores(trained, restored)
    for x in images(*RESOLUTIONS):
        assert_equal(restored(x), trained(x))
    assert 'have weights of 2 bits, activations of 3 (' in hub.files(REPO)['README.md'].decode()
    config = json.loads(hub.files(REPO)['config.json'])
    assert config['model_args']['quantization'] == dict(
        weight_bits=2, activation_bits=3, skip=['layer4.*'], fixed_activation_basis=False)


def test_float_weights_for_a_quantized_network(tmp_path):
    source = rs_model(num_classes=10)
    torch.save(source.state_dict(), tmp_path / 'float.pth')
    model = quantize(rs_model(num_classes=10))
    load_weights(model, str(tmp_path / 'float.pth'))
    expected = quantize(source, trained=True)
    assert_equal(state_of(model), state_of(expected))
    created = timm.create_model(
        'rs_test_resnet', resolutions=RESOLUTIONS, num_classes=10, quantization=dict(weight_bits=2), pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'float.pth'), num_classes=10))
    assert_equal(state_of(created), state_of(expected))


def test_files_of_another_kind(tmp_path):
    model = q_model(weight_bits=3)
    for name, state in (('full', state_of(model)), ('packed', pack_state_dict(state_of(model)))):
        path = str(tmp_path / f'{name}.pth')
        torch.save(dict(state), path)
        with pytest.raises(ValueError, match=r'pth: conv1.3 is quantized at 3 bits, expected the 2 bits of'):
            load_weights(q_model(weight_bits=2), path)
        with pytest.raises(ValueError, match=r'pth: The weights are quantized, .* is not'):
            load_weights(rs_model(), path)
        for quantization, message in ((None, 'weights are quantized, .* is not'), (dict(weight_bits=2), 'at 3 bits')):
            with pytest.raises(ValueError, match=message):
                timm.create_model(
                    'rs_test_resnet', resolutions=RESOLUTIONS, num_classes=10, quantization=quantization,
                    pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=10))


def test_commands_tell_in_one_line(tmp_path, capsys):
    save_model(rs_model('resnet10t'), str(tmp_path / 'float'))
    with pytest.raises(SystemExit):
        main(['convert', str(tmp_path / 'float'), '--output', str(tmp_path / 'packed'), '--packed'])
    error = capsys.readouterr().err
    assert error == ('timm-rs convert: error: There are no quantized weights to pack, see timm_rs.quant.quantize.\n')
    assert os.listdir(tmp_path) == ['float']
