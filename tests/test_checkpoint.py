import math
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from conftest import RESOLUTIONS, assert_equal, images, plain_model, plain_state_dict, randomize_bn, rs_model
from timm.layers import convert_splitbn_model

from timm_rs import PrivateBN, make_switchable
from timm_rs.checkpoint import adapt_state_dict, extract_resolution, state_dict_resolutions
from timm_rs.resolutions import nearest_resolution


def tiny_vgg():
    """Return a VGG whose Sequential indices, such as `features.1`, read like resolutions."""
    return timm.models.VGG([4, 'M', 8], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01).eval()


def with_alpha(model):
    """Give the ensemble weights of each resolution a value of its own: log(resolution)."""
    model.alpha.data = torch.tensor([math.log(r) for r in model.resolutions])
    return model


@pytest.mark.parametrize('size, expected', [
    ((200, 200), 192),
    ((176, 176), 160),  # 30976 is 5888 below 192^2 and 5376 above 160^2
    ((1, 1), 96),
    ((1000, 1000), 224),
    ((128, 288), 192),  # 36864 = 192^2, another shape
])
def test_nearest_resolution(size, expected):
    assert nearest_resolution(*size, (224, 192, 160, 128, 96)) == expected


def test_nearest_resolution_takes_the_larger_of_two():
    assert nearest_resolution(5, 5, (7, 1)) == nearest_resolution(5, 5, (1, 7)) == 7  # 49 - 25 = 25 - 1


@pytest.mark.parametrize('build, expected', [
    (plain_model, None),
    (tiny_vgg, None),
    (rs_model, RESOLUTIONS),
    (lambda: make_switchable(tiny_vgg(), (5, 1)), (5, 1)),
])
def test_state_dict_resolutions(build, expected):
    assert state_dict_resolutions(build().state_dict()) == expected


def test_plain_weights_go_to_every_resolution():
    plain = randomize_bn(plain_model())
    model = with_alpha(rs_model())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = model.load_state_dict(plain.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    for x in images(*RESOLUTIONS):
        assert_equal(model(x), plain(x))
    assert_equal(model.alpha.data, torch.tensor([64., 48., 32.]).log())  # a plain file has nothing to say about it


def test_copies_of_plain_weights_are_separate():
    state_dict = plain_model().state_dict()
    adapted = adapt_state_dict(state_dict, ['bn1'], (64, 32), torch.zeros(2))
    adapted['bn1.64.weight'].fill_(7.)
    assert not (adapted['bn1.32.weight'] == 7.).any() and not (state_dict['bn1.weight'] == 7.).any()


def test_same_resolutions_load_as_they_are():
    source, model = with_alpha(rs_model()), rs_model()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.load_state_dict(source.state_dict())
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize('resolutions, origin, message', [
    ((64, 32), (64, 32), None),
    ((64, 40, 32), (64, 32, 32), '40 from 32'),  # 1600 is 704 below 48^2 and 576 above 32^2
    ((72, 48), (64, 48), '72 from 64'),
    ((96, 50, 16), (64, 48, 32), '96 from 64, 50 from 48, 16 from 32'),
])
def test_other_resolutions_start_from_the_nearest(resolutions, origin, message):
    source, model = with_alpha(rs_model()), rs_model(resolutions=resolutions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model.load_state_dict(source.state_dict())
    if message is None:
        assert not caught
    else:
        (warning,) = caught
        assert str(warning.message).endswith(f'nearest BatchNorm: {message}.')
        assert '(64, 48, 32)' in str(warning.message)
    for r, o in zip(resolutions, origin):
        assert_equal(plain_state_dict(model, r), plain_state_dict(source, o))
    assert_equal(model.alpha.data, torch.tensor(origin).float().log())


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_extract_resolution(resolution):
    model = rs_model()
    plain = plain_model()
    extracted = extract_resolution(model.state_dict(), resolution)
    assert_equal(extracted, plain_state_dict(model, resolution))
    plain.load_state_dict(extracted, strict=True)
    x = images(resolution)
    assert_equal(plain(x), model(x))


@pytest.mark.parametrize('build, held', [
    (rs_model, r'the resolutions \(64, 48, 32\)'),
    (plain_model, 'no private BatchNorm'),
])
def test_extract_unknown_resolution(build, held):
    with pytest.raises(ValueError, match=f'resolution 40 from a state dict that holds {held}'):
        extract_resolution(build().state_dict(), 40)


def test_sequential_indices_are_no_resolutions():
    plain = randomize_bn(tiny_vgg())
    resolutions = (5, 1)  # as are the indices of the BN layers
    names = [n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert names == ['features.1', 'features.5']
    model = make_switchable(tiny_vgg(), resolutions)
    model.load_state_dict(plain.state_dict())
    assert [n for n, m in model.named_modules() if isinstance(m, PrivateBN)] == names
    for r in resolutions:
        extracted = extract_resolution(model.state_dict(), r)
        assert_equal(extracted, dict(plain.state_dict()))
        assert_equal(dict(model.at(r).state_dict()), extracted)

    other = make_switchable(tiny_vgg(), (5, 4))
    randomize_bn(model)
    with pytest.warns(UserWarning, match='4 from 5'):  # 16 - 1 > 25 - 16
        other.load_state_dict(model.state_dict())
    assert_equal(dict(other.at(4).state_dict()), extract_resolution(model.state_dict(), 5))


@pytest.mark.parametrize('build', [
    lambda: make_switchable(nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False)), (64, 32)),
    lambda: make_switchable(nn.Sequential(
        nn.BatchNorm2d(8), nn.Identity(), nn.InstanceNorm2d(8, track_running_stats=True)), (64, 32)),
    lambda: convert_splitbn_model(make_switchable(nn.Sequential(nn.BatchNorm2d(8)), (64, 32)), 2),
], ids=['no statistics', 'statistics of others', 'split'])
def test_weights_come_back_into_their_network(build):
    model, other = build(), build()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.rand(tensor.shape).to(tensor.dtype)
    other.load_state_dict(model.state_dict())
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_another_network_is_refused_as_usual():
    with pytest.raises(RuntimeError, match='size mismatch for fc.weight'):
        rs_model(num_classes=5).load_state_dict(rs_model(num_classes=7).state_dict())
    state_dict = rs_model().state_dict()
    del state_dict['fc.weight']
    with pytest.raises(RuntimeError, match='Missing key.*fc.weight'):
        rs_model().load_state_dict(state_dict)
    assert rs_model().load_state_dict(state_dict, strict=False).missing_keys == ['fc.weight']
