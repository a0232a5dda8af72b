"""Networks that are made switchable, and which BatchNorms serve an input"""
import copy
import warnings

import pytest
import timm
import torch
import torch.fx
import torch.nn as nn
from conftest import (
    NETWORKS,
    RESOLUTIONS,
    assert_equal,
    images,
    plain_model,
    plain_state_dict,
    randomize_bn,
    rs_model,
    small_net,
)
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs import PrivateBN, SwitchableMixin, UnknownResolutionError, make_switchable

# Making a network switchable

def test_stays_the_same_object_and_class():
    plain = plain_model()
    model = make_switchable(plain, RESOLUTIONS)
    assert model is plain
    assert isinstance(model, timm.models.ResNet) and isinstance(model, SwitchableMixin)
    assert (model.resolutions, model.resolution) == ((64, 48, 32), 64)
    assert isinstance(model.alpha, nn.Parameter)
    assert_equal(model.alpha.data, torch.zeros(3))


def test_adds_one_set_of_bn_per_resolution_and_the_ensemble_weights():
    plain = plain_model()
    size = sum(p.numel() for p in plain.parameters())
    bn_size = sum(p.numel() for m in plain.modules() if isinstance(m, _BatchNorm) for p in m.parameters())
    assert sum(p.numel() for p in make_switchable(plain, RESOLUTIONS).parameters()) == size + 2 * bn_size + 3


def test_starts_as_the_plain_network_at_every_resolution():
    plain = randomize_bn(plain_model())
    model = make_switchable(copy.deepcopy(plain), RESOLUTIONS)
    for x in images(*RESOLUTIONS):
        assert_equal(model(x), plain(x))


def test_a_layer_in_two_places_stays_one():
    bn = nn.BatchNorm2d(3)
    model = make_switchable(nn.Sequential(bn, nn.Conv2d(3, 3, 1), bn), (8, 4))
    assert isinstance(model[0], PrivateBN) and model[0] is model[2]
    assert len(list(model.parameters())) == 1 + 2 * 2 + 2


@pytest.mark.parametrize('build, message', [
    (lambda: nn.Linear(2, 2), 'Linear holds no BatchNorm'),
    (lambda: timm.create_model('test_vit'), 'VisionTransformer holds no BatchNorm'),
    (lambda: nn.BatchNorm2d(2), 'BatchNorm2d is a single layer'),
    (lambda: rs_model(), r'RSResNet is switchable already \(\(64, 48, 32\)\)'),
    (lambda: nn.Sequential(rs_model()), 'Sequential is switchable already'),
])
def test_refuses_a_module(build, message):
    with pytest.raises(ValueError, match=message):
        make_switchable(build(), (64, 32))


@pytest.mark.parametrize('resolutions, message', [
    ((), 'empty'),
    ((64, 64), 'names 64 twice'),
    ((64, 0), 'holds 0'),
    ((64, -1), 'holds -1'),
    ((64, 32.0), 'holds 32.0'),
    (64.0, 'holds 64.0'),
])
def test_refuses_resolutions_and_leaves_the_network(resolutions, message):
    plain = plain_model()
    keys = list(plain.state_dict())
    with pytest.raises(ValueError, match=message):
        make_switchable(plain, resolutions)
    assert type(plain) is timm.models.ResNet and list(plain.state_dict()) == keys


@pytest.mark.parametrize('name', ['alpha', 'at', 'switch_to', 'resolution', 'resolutions'])
def test_refuses_a_clash_of_attributes(name):
    net = small_net()
    setattr(net, name, 1)
    with pytest.raises(ValueError, match=f'attribute {name!r} of its own'):
        make_switchable(net, (64, 32))


# Switching

@pytest.mark.parametrize('name', NETWORKS)
def test_bit_equal_to_the_plain_network(name):
    model, plain = rs_model(name), plain_model(name)
    outputs = []
    for r, x in zip(RESOLUTIONS, images(*RESOLUTIONS)):
        plain.load_state_dict(plain_state_dict(model, r))
        expected = plain(x)
        assert_equal(model(x), expected)
        assert_equal(model.at(r)(x), expected)
        model.switch_to(r)
        assert_equal(model.forward_head(model.forward_features(x)), expected)
        outputs.append(expected)
    assert not torch.equal(outputs[0], outputs[1])


def test_resolutions_differ_by_their_bn():
    model, x = rs_model(), images(64)
    outputs = []
    for r in RESOLUTIONS:
        model.switch_to(r)
        outputs.append(model.forward_features(x))
    assert not any(torch.allclose(a, b) for a, b in zip(outputs, outputs[1:]))


def test_selects_by_size():
    model = rs_model()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for r in (48, 64, 64, 32):
            model(images(r))
            assert model.resolution == r


@pytest.mark.parametrize('shape, resolution', [
    ((58, 58), 64),  # 3364 is 732 below 64^2 and 1060 above 48^2
    ((40, 40), 32),  # 1600 is 704 below 48^2 and 576 above 32^2
    ((128, 32), 64),  # the area of 64^2
    ((32, 48), 32),  # 1536 is 768 below 48^2 and 512 above 32^2
    ((80, 60), 64),
    ((30, 30), 32),
])
def test_untrained_size_takes_the_nearest_in_training(shape, resolution):
    model, x = rs_model().train(), torch.randn(2, 3, *shape)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning) as caught:
        output = model(x)
        model(x)
    (warning,) = caught
    assert f'{shape[0]}x{shape[1]}' in str(warning.message) and str(warning.message).endswith(f'serves: {resolution}.')
    assert warning.filename == __file__
    assert model.resolution == resolution
    assert_equal(output, twin.at(resolution)(x))


@pytest.mark.parametrize('name, shape, above, below, share', [
    ('test_resnet', (58, 58), 64, 48, (58 ** 2 - 48 ** 2) / (64 ** 2 - 48 ** 2)),
    ('test_resnet', (40, 40), 48, 32, (40 ** 2 - 32 ** 2) / (48 ** 2 - 32 ** 2)),
    *((name, (32, 48), 48, 32, 0.4) for name in NETWORKS),
])
def test_untrained_size_takes_what_lies_between_its_neighbours(name, shape, above, below, share):
    model, x = rs_model(name), torch.randn(2, 3, *shape)
    expected = model.at(below)
    mixed = copy.deepcopy(expected)
    high = model.at(above).state_dict()
    mixed.load_state_dict({
        k: torch.lerp(v, high[k], share) if v.is_floating_point() else v for k, v in mixed.state_dict().items()})
    with pytest.warns(UserWarning, match=f'{shape[0]}x{shape[1]}, one between those of {above} and {below} serves'):
        output = model(x)
    torch.testing.assert_close(output, mixed(x))
    assert (output - expected(x)).abs().max() > 1e-3
    x = images(48)
    assert_equal(model(x), model.at(48)(x))


@pytest.mark.parametrize('shape, resolution', [((64, 64), 64), ((128, 32), 64), ((80, 60), 64), ((30, 30), 32)])
@pytest.mark.filterwarnings('ignore:.*no BatchNorm for')
def test_beyond_the_range_the_nearest_serves(shape, resolution):
    model, x = rs_model(), torch.randn(2, 3, *shape)
    assert_equal(model(x), model.at(resolution)(x))


def test_each_untrained_size_warns():
    model = rs_model()
    with pytest.warns(UserWarning) as caught:
        for size in (40, 50, 40, 50):
            model(images(size))
    assert ['40x40' in str(w.message) for w in caught] == [True, False]


@pytest.mark.parametrize('order', [(64, 48, 32), (32, 64, 48), (32, 64), (32,)])
def test_list_comes_back_in_its_order(order):
    model = rs_model()
    model.switch_to(48)
    pyramid = [images(size) for size in order]
    outputs = model(pyramid)
    assert model.resolution == 48
    assert isinstance(outputs, list)
    assert_equal(outputs, [model.at(r)(x) for r, x in zip(order, pyramid)])
    assert_equal(model(tuple(pyramid)), outputs)


@pytest.mark.parametrize('sizes, message', [
    ((), r'list of 0 sizes \(none\)'),
    ((40,), r'list of 1 sizes \(40x40\)'),
    ((64, 64), r'list of 2 sizes \(64x64, 64x64\)'),
    ((64, 64, 32), r'64x64, 64x64, 32x32'),
    ((64, 48, 32, 32), 'list of 4 sizes'),
    ((64, 48, 40), '40x40'),
])
def test_list_of_wrong_sizes(sizes, message):
    model = rs_model()
    model.switch_to(48)
    with pytest.raises(ValueError, match=f'{message}.*expected each of \\(64, 48, 32\\) at most once'):
        model([images(s) for s in sizes])
    assert model.resolution == 48


def test_list_of_oblong_images():
    with pytest.raises(ValueError, match='32x128'):
        rs_model()([torch.randn(1, 3, 32, 128), *images(48, 32)])


@pytest.mark.parametrize('resolution', [40, '64', None, (64,)])
def test_unknown_resolution(resolution):
    model = rs_model()
    for choose in (model.switch_to, model.at):
        with pytest.raises(UnknownResolutionError, match='this network has 64, 48, 32') as e:
            choose(resolution)
        assert isinstance(e.value, KeyError) and repr(resolution) in str(e.value)


def test_input_too_small_for_the_network():
    model = make_switchable(small_net(), (64, 32))
    with pytest.warns(UserWarning, match='8x8'), pytest.raises(ValueError) as e:
        model(images(8))
    assert 'cannot take an input of 8x8, expected one of (64, 32)' in str(e.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match='channels'):
        rs_model()(images(64, channels=2))
