"""What `at()` returns: the plain network, on the same tensors"""
import copy
from threading import Lock

import numpy as np
import pytest
import timm
import torch
import torch.fx
import torch.nn as nn
from conftest import NETWORKS, TINY, assert_equal, images, plain_key, plain_model, rs_model, small_net
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, prune

from timm_rs import make_switchable
from timm_rs_runtime.errors import UserError


@pytest.mark.parametrize('name', NETWORKS)
def test_at_is_the_plain_network_on_the_same_tensors(name):
    model = rs_model(name)
    plain = plain_model(name)
    out = model.at(48)
    assert type(out) is type(plain)
    assert [type(m) for m in out.modules()] == [type(m) for m in plain.modules()]
    assert not hasattr(out, 'alpha') and not hasattr(out, 'switch_to')
    assert set(vars(out)) == set(vars(plain))
    shared = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {**dict(out.named_parameters()), **dict(out.named_buffers())}
    assert list(held) == list({**dict(plain.named_parameters()), **dict(plain.named_buffers())})
    expected = {(plain_key(k)[0]): v for k, v in shared.items() if plain_key(k)[1] in (None, 48) and k != 'alpha'}
    assert all(held[k] is v for k, v in expected.items()) and len(held) == len(expected)


def test_at_keeps_the_mode_of_every_module():
    """Also in a graph of torch.fx, which torch copies into train mode."""
    model = rs_model(features_only=True, out_indices=(0, 2), feature_cls='fx').eval()
    assert not any(m.training for m in model.at(48).modules())
    x = images(48)
    assert_equal(model.at(48)(x), model(x))
    model = rs_model().train()
    model.layer1.eval()
    assert [m.training for m in model.at(48).layer1.modules()] == [False] * len(list(model.at(48).layer1.modules()))
    assert model.at(48).training and model.at(48).layer2.training


def test_numbers_of_numpy_are_resolutions():
    model = make_switchable(small_net(), np.array([64, 48]))
    assert model.resolutions == (64, 48) and type(model.resolutions[0]) is int
    assert_equal(dict(model.at(48.0).state_dict()), dict(model.at(np.int64(48)).state_dict()))


@pytest.mark.parametrize('take', [lambda m: m.at(48), copy.copy, copy.deepcopy])
def test_both_names_of_the_configuration_follow(take):
    view = take(rs_model())
    if hasattr(view, 'switch_to'):
        view.switch_to(np.int64(48))
    assert view.default_cfg is view.pretrained_cfg
    assert view.pretrained_cfg['input_size'] == (3, 48, 48) and type(view.pretrained_cfg['input_size'][1]) is int


def test_at_leaves_the_network_alone():
    model = rs_model()
    keys, cfg = list(model.state_dict()), copy.deepcopy(model.pretrained_cfg)
    model.at(32).reset_classifier(3)
    assert list(model.state_dict()) == keys and model.pretrained_cfg == cfg
    assert (model.resolution, model.num_classes) == (64, 10)


def test_training_one_trains_the_other():
    model = rs_model()
    plain, x = model.at(48).train(), images(48)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(x).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {k for k in after if plain_key(k)[1] in (None, 48) and k != 'alpha'}
    assert_equal(model(x), plain.eval()(x))


def test_copy_of_at_is_on_its_own():
    model = rs_model()
    alone = copy.deepcopy(model.at(48)).double()
    assert model.fc.weight.dtype == torch.float32
    assert alone(images(48).double()).dtype == torch.float64


def test_at_can_be_scripted_traced_and_exported():
    plain, x = rs_model('resnet10t', **TINY).at(32), images(32)
    expected = plain(x)
    assert_equal(torch.jit.script(plain)(x), expected)
    assert_equal(torch.fx.symbolic_trace(plain)(x), expected)
    assert_equal(torch.export.export(plain, (x,)).module()(x), expected)


def test_at_can_be_fused():
    plain, x = copy.deepcopy(rs_model('resnet10t', **TINY).at(32)), images(32)
    expected = plain(x)
    block = plain.layer1[0]
    plain.conv1[-1], plain.bn1 = fuse_conv_bn_eval(plain.conv1[-1], plain.bn1), nn.Identity()
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_at_can_be_reparameterized():
    plain, x = rs_model('repvit_m0_9').at(64), images(64)
    expected = plain(x)
    fused = timm.utils.reparameterize_model(plain)
    assert sum(isinstance(m, _BatchNorm) for m in fused.modules()) == 0
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


# A view copies nothing

def test_at_of_a_pruned_network():
    model = rs_model()
    prune.l1_unstructured(model.conv1[0], 'weight', amount=0.5)
    prune.random_unstructured(model.bn1[48], 'weight', amount=2)
    x = images(48)
    expected = model(x)
    plain = model.at(48)
    assert_equal(plain(x), expected)
    assert plain.conv1[0].weight_orig is model.conv1[0].weight_orig
    with torch.no_grad():
        model.conv1[0].weight_orig.mul_(2)
    assert_equal(plain(x), model(x))
    assert not torch.equal(plain(x), expected)


def test_at_of_a_network_that_keeps_results():
    model, x = rs_model('levit_128s', resolutions=(224,)), images(224)
    model(x)  # attention biases, with their graph
    model.lock, model.last = Lock(), model.alpha * 2
    plain = model.at(224)
    assert plain.lock is model.lock and plain.last.data_ptr() == model.last.data_ptr()
    del model.lock, plain.lock
    copied = copy.deepcopy(plain)  # a graph could not be copied
    assert_equal(copied(x), model(x))


def test_hooks_can_be_added_to_a_view():
    model, seen = rs_model(), []
    plain = model.at(48)
    for module in (plain, plain.bn1, plain.layer1):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    plain(images(48))
    handle.remove()
    plain(images(48))
    model(images(48))
    assert len(seen) == 6 + 5


def test_hooks_of_the_state_dict_see_the_view():
    model, seen = rs_model(), []
    model.layer1.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    plain = model.at(48)
    plain.load_state_dict(plain.state_dict())
    assert seen == [plain.layer1]


@pytest.mark.parametrize('name', ['repvit_m0_9', 'mobileone_s0'])
def test_all_resolutions_cannot_be_fused_into_one(name):
    model = rs_model(name, resolutions=(64, 32))
    before = dict(model.state_dict())
    for inplace in (False, True):
        with pytest.raises(UserError, match=r'reparameterize_model\(model.at\(size\)\)'):
            timm.utils.reparameterize_model(model, inplace=inplace)
    assert_equal(dict(model.state_dict()), before)
    x = images(32)
    fused = timm.utils.reparameterize_model(model.at(32))
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)
