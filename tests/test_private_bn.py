import copy
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import RESOLUTIONS, assert_equal, images, plain_model, randomize_bn, rs_model
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2
from timm.utils import freeze
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from timm_rs import PrivateBN, UnknownResolutionError, make_switchable
from timm_rs.private_bn import tie_affine
from timm_rs.resolutions import check_resolutions
from timm_rs_runtime.errors import UserError


def private_bn(bn=None, resolutions=RESOLUTIONS):
    """Return a container in eval mode whose BN layers differ from each other."""
    return randomize_bn(PrivateBN(bn if bn is not None else nn.BatchNorm2d(4), resolutions)).eval()


def by_formula(bn, x):
    """Normalize with running statistics, channels at dimension 1."""
    mean, var, weight, bias = (
        t.view(1, -1, *[1] * (x.ndim - 2)) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + bn.eps).sqrt() * weight + bias


def test_holds_equal_but_separate_copies():
    bn = randomize_bn(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
    container = PrivateBN(bn, (32, 64))
    assert (container.resolutions, container.resolution, len(container)) == ((64, 32), 64, 2)
    assert list(container) == [64, 32]
    for r in container:
        assert type(container[r]) is nn.BatchNorm2d
        assert (container[r].eps, container[r].momentum) == (1e-3, 0.2)
        assert_equal(container[r].state_dict(), bn.state_dict())
    storages = {t.data_ptr() for m in (bn, container) for t in (*m.parameters(), *m.buffers())}
    assert len(storages) == 3 * 5


def test_is_no_batch_norm_itself():
    assert not isinstance(PrivateBN(nn.BatchNorm2d(4), (64,)), _BatchNorm)


@pytest.mark.parametrize('module', [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)])
def test_takes_only_batch_norm(module):
    with pytest.raises(TypeError, match=f'BatchNorm layer, got {type(module).__name__}'):
        PrivateBN(module, (64, 32))


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_normalizes_with_the_active_one(resolution):
    container, x = private_bn(), torch.randn(2, 4, 5, 5)
    container.switch_to(resolution)
    torch.testing.assert_close(container(x), by_formula(container[resolution], x))


@pytest.mark.parametrize('shape', [(6, 4), (2, 4, 7)])
def test_batch_norm_1d(shape):
    container, x = private_bn(nn.BatchNorm1d(4)), torch.randn(shape)
    container.switch_to(32)
    torch.testing.assert_close(container(x), by_formula(container[32], x))


def test_batch_norm_act_keeps_activation_and_drop():
    container = private_bn(BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout))
    x = torch.randn(2, 4, 5, 5)
    for r in RESOLUTIONS:
        container.switch_to(r)
        assert type(container[r].act) is nn.SiLU and type(container[r].drop) is nn.Dropout
        torch.testing.assert_close(container(x), F.silu(by_formula(container[r], x)))


def test_answers_for_the_active_one():
    container = private_bn(BatchNormAct2d(4, eps=1e-3))
    for r in RESOLUTIONS:
        container.switch_to(r)
        for name in ('weight', 'bias', 'running_mean', 'running_var', 'act'):
            assert getattr(container, name) is getattr(container[r], name)
        assert (container.eps, container.num_features, container.affine) == (1e-3, 4, True)
    assert not hasattr(container, 'nonsense')


def test_what_is_set_is_set_for_all():
    container = private_bn(BatchNormAct2d(4))
    container.momentum, container.act = 0., nn.ReLU()
    means = [container[r].running_mean.clone() for r in RESOLUTIONS]
    container.train()(torch.rand(2, 4, 3, 3))
    for r, mean in zip(RESOLUTIONS, means):
        assert container[r].momentum == 0 and type(container[r].act) is nn.ReLU
        assert torch.equal(container[r].running_mean, mean)
    with pytest.raises(AttributeError, match=r'Each resolution has its own running_mean, set that of bn\[64\]'):
        container.running_mean = torch.ones(4)


@pytest.mark.parametrize('register, value', [
    ('register_buffer', torch.zeros(1)),
    ('register_parameter', nn.Parameter(torch.zeros(1))),
    ('add_module', nn.ReLU()),
])
def test_everything_can_be_given_something(register, value):
    """As programs that count operations do; from the inside out, as `apply` goes."""
    model = rs_model()
    keys = len(model.state_dict())
    model.apply(lambda module: getattr(module, register)('total_ops', value))
    assert len(model.state_dict()) - keys == (register != 'add_module') * len(list(model.modules()))
    assert model.bn1[48].total_ops is model.bn1.total_ops is value


def test_answers_for_what_a_batch_norm_has_only():
    container = private_bn()
    container[64].extra = 1
    assert not hasattr(container, 'extra') and container.track_running_stats is True


def loader_of(size, batches=3):
    return [(images(size, n=4), torch.zeros(4)) for _ in range(batches)]


def test_update_bn_is_refused_unless_it_is_given_a_resolution():
    model = rs_model()
    for net in (copy.deepcopy(model).eval(), AveragedModel(model).train()):
        momenta = {m: m.momentum for m in net.modules() if isinstance(m, _BatchNorm)}
        is_training = net.training
        with pytest.raises(UserError, match=r'update_bn\(loader, model.at\(size\)\)'):
            update_bn(loader_of(64), net)
        assert {m: m.momentum for m in momenta} == momenta and None not in momenta.values()
        assert {m.training for m in net.modules()} == {is_training}
    loaders = {r: loader_of(r) for r in RESOLUTIONS}
    for r, loader in loaders.items():
        update_bn(loader, model.at(r))
    for r, loader in loaders.items():  # the mean over batches of what the first layer sees, at every resolution
        seen = [model.conv1[0](x) for x, _ in loader]
        expected = torch.stack([z.mean((0, 2, 3)) for z in seen]).mean(0)
        torch.testing.assert_close(model.conv1[1][r].running_mean, expected, rtol=1e-4, atol=1e-5)
        assert model.conv1[1][r].momentum == 0.1


def test_statistics_can_be_estimated_in_a_loop_of_ones_own():
    model = rs_model().train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    pyramids = [images(*RESOLUTIONS) for _ in range(2)]
    for pyramid in pyramids:
        model(pyramid)
    expected = torch.stack([model.conv1[0](pyramid[1]).mean((0, 2, 3)) for pyramid in pyramids]).mean(0)
    torch.testing.assert_close(model.conv1[1][48].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_getitem_and_contains():
    container = PrivateBN(nn.BatchNorm2d(4), RESOLUTIONS)
    assert 48 in container and 40 not in container and '48' not in container
    with pytest.raises(KeyError) as e:
        container[40]
    assert isinstance(e.value, UnknownResolutionError)
    assert str(e.value) == 'Unknown resolution 40, this network has 64, 48, 32.'


def test_unknown_resolution_leaves_the_active_one():
    container = PrivateBN(nn.BatchNorm2d(4), RESOLUTIONS)
    container.switch_to(48)
    with pytest.raises(UnknownResolutionError, match='40.*64, 48, 32'):
        container.switch_to(40)
    assert container.resolution == 48


def test_layers_of_one_network_switch_together():
    model = rs_model()
    private = [m for m in model.modules() if isinstance(m, PrivateBN)]
    private[3].switch_to(32)
    assert len(private) > 3 and {m.resolution for m in private} == {model.resolution} == {32}


@pytest.mark.parametrize('given, kept', [((32, 64), (64, 32)), ([96], (96,)), (96, (96,)), (range(2, 5), (4, 3, 2))])
def test_check_resolutions_sorts(given, kept):
    assert check_resolutions(given) == kept


@pytest.mark.parametrize('given, message', [
    ((), 'empty'),
    ((64, 0), r'holds 0, expected positive integers'),
    ((64, -32), r'holds -32, expected positive integers'),
    ((64, 32.0), r'holds 32.0, expected positive integers'),
    ((64, '32'), r"holds '32', expected positive integers"),
    ((64, True), r'holds True, expected positive integers'),
    (64.0, r'holds 64.0, expected positive integers'),
    (None, r'holds None, expected positive integers'),
    ((64, 32, 64), r'names 64 twice'),
])
def test_check_resolutions_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        check_resolutions(given)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])  # of BatchNorm2d and of BatchNormAct2d
def test_sync_conversion_recurses(name):
    plain, model = plain_model(name), rs_model(name)
    before = dict(model.state_dict())
    expected = [type(m).__name__ for m in convert_sync_batchnorm(plain).modules() if isinstance(m, nn.SyncBatchNorm)]
    model = convert_sync_batchnorm(model)
    found = [type(m).__name__ for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert found == [t for t in expected for _ in RESOLUTIONS] != []
    assert_equal(dict(model.state_dict()), before)
    assert isinstance(model.bn1, PrivateBN) and not isinstance(model.at(32).bn1, PrivateBN)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_freeze_and_unfreeze_recurse(name):
    model, pyramid = rs_model(name), images(*RESOLUTIONS)
    expected = model(pyramid)
    types = [type(m) for m in model.modules()]
    trainable = len(list(model.parameters()))

    model = freeze_batch_norm_2d(model)
    frozen = [m for m in model.modules() if 'Frozen' in type(m).__name__]
    assert len(frozen) == sum(issubclass(t, _BatchNorm) for t in types) > 0
    assert len(list(model.parameters())) == trainable - 2 * len(frozen)
    torch.testing.assert_close(model(pyramid), expected, rtol=1e-4, atol=1e-5)

    model = unfreeze_batch_norm_2d(model).eval()
    assert [type(m) for m in model.modules()] == types
    assert_equal(model(pyramid), expected)


def test_hooks_stay_at_the_place():
    bn, seen = nn.BatchNorm2d(4), []
    handle = bn.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    net = make_switchable(nn.Sequential(nn.Conv2d(3, 4, 1), bn), (8, 4)).eval()
    net(images(8, 4))
    assert seen == ['PrivateBN', 'PrivateBN']
    net.at(4)(images(4))
    assert seen[2:] == ['BatchNorm2d']
    handle.remove()
    net(images(4))
    assert len(seen) == 3


@pytest.mark.parametrize('when', ['before', 'after'])
def test_full_backward_hooks_stay_at_the_place(when):
    net, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), []

    def hook(module, grad_input, grad_output):
        seen.append((type(module).__name__, grad_input[0].shape))

    if when == 'before':
        net[1].register_full_backward_hook(hook)
    make_switchable(net, (8, 4))
    if when == 'after':
        net[1].register_full_backward_hook(hook)
    net(images(8)).sum().backward()
    net.at(4)(images(4)).sum().backward()
    assert seen == [('PrivateBN', (2, 4, 8, 8)), ('BatchNorm2d', (2, 4, 4, 4))]


class Watch:
    """Owns a hook, keeps what it sees, and cannot be copied."""

    def __init__(self, model=None):
        self.model, self.lock, self.seen = model, threading.Lock(), []

    def hook(self, module, args, output):
        with self.lock:
            self.seen.append((module, output))


def test_taking_out_shares_the_owner_of_a_hook():
    model = rs_model()
    watch = Watch(model)
    model.bn1.register_forward_hook(watch.hook)
    model.layer1.register_forward_hook(partial(Watch.hook, watch))
    model(images(64)).sum()  # what it has kept has a graph by now
    plain = model.at(32)
    assert not any(isinstance(m, PrivateBN) for m in plain.modules())
    plain(images(32))
    modules, outputs = zip(*watch.seen)
    assert modules == (model.bn1, model.layer1, plain.bn1, plain.layer1) and watch.model is model
    assert all(output.requires_grad for output in outputs)


def test_taking_out_copies_the_owner_of_a_hook_that_is_a_part_of_the_network():
    model = rs_model()
    model.watch = Watch()
    del model.watch.lock
    model.watch.lock = nullcontext()
    model.watch.model = model
    model.bn1.register_forward_hook(model.watch.hook)
    plain = model.at(32)
    plain(images(32))
    assert plain.watch.model is plain and len(plain.watch.seen) == 1 and model.watch.seen == []


def test_state_dict_names_the_resolution():
    keys = rs_model('resnet10t', resolutions=(224, 160)).state_dict().keys()
    for key in ('bn1.224.weight', 'bn1.160.running_var', 'layer1.0.bn1.224.bias', 'layer2.0.downsample.2.160.weight'):
        assert key in keys
    assert 'bn1.weight' not in keys


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_switch_on_their_own(duplicate):
    container, x = private_bn(BatchNormAct2d(4)), torch.randn(2, 4, 5, 5)
    container.switch_to(48)
    other = duplicate(container)
    assert other.resolution == 48
    assert_equal(other(x), container(x))
    other.switch_to(32)
    assert container.resolution == 48
    assert_equal(other(x), container[32](x))


@pytest.mark.parametrize('duplicate', [lambda m: m, copy.deepcopy])
def test_resolutions_train_one_set_of_affine_parameters(duplicate):
    model = rs_model()
    keys = set(model.state_dict())
    tie_affine(model)
    model = duplicate(model)
    assert set(model.state_dict()) == keys
    assert len(list(model.parameters())) == len(list(plain_model('test_resnet').parameters())) + 1
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))
    logits = model.train()(images(*RESOLUTIONS))
    sum(z.square().sum() for z in logits).backward()
    optimizer.step()
    bn = model.layer1[0].bn1
    for r in RESOLUTIONS[1:]:
        assert_equal(bn[r].weight, bn[RESOLUTIONS[0]].weight)
        assert not torch.equal(bn[r].running_mean, bn[RESOLUTIONS[0]].running_mean)
    other = rs_model()
    other.load_state_dict(model.state_dict())
    assert other.layer1[0].bn1[48].weight is not other.layer1[0].bn1[64].weight
    for x in images(*RESOLUTIONS):
        assert_equal(other.eval()(x), model.eval()(x))


def test_frozen_layers_are_recomputed():
    batch = images(*RESOLUTIONS)
    for checkpointing in ('set_grad_checkpointing', 'set_resolution_checkpointing'):
        model = rs_model().train()
        freeze(model, 'layer1')
        other = copy.deepcopy(model)
        getattr(model, checkpointing)()
        for m in (model, other):
            sum(z.square().sum() for z in m(batch)).backward()
        found, expected = (
            {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, other))
        assert 'layer2.0.conv1.weight' in expected and 'layer1.0.conv1.weight' not in expected
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tied_network_takes_the_affine_parameters_of_the_largest():
    state_dict = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in rs_model().state_dict().items()}
    model = rs_model()
    tie_affine(model)
    keys = list(state_dict)
    model.load_state_dict(state_dict)
    assert list(state_dict) == keys
    for r in RESOLUTIONS:
        assert_equal(model.bn1[r].bias, state_dict[f'bn1.{RESOLUTIONS[0]}.bias'])
        assert_equal(model.bn1[r].running_mean, state_dict[f'bn1.{r}.running_mean'])


def test_layers_without_affine_parameters_stay_so():
    bn = PrivateBN(nn.BatchNorm2d(4, affine=False), (64, 32))
    tie_affine(bn)
    assert bn[32].weight is None and bn[32].running_mean is not bn[64].running_mean


def test_is_a_leaf_for_fx():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), private_bn(), nn.ReLU()).eval()
    traced, x = create_feature_extractor(net, {'2': 'out'}), images(8)
    for r in RESOLUTIONS:
        net[1].switch_to(r)
        assert_equal(traced(x)['out'], net(x))
    assert isinstance(traced.get_submodule('1'), PrivateBN)


def test_prints_the_active_resolution():
    container = PrivateBN(nn.BatchNorm2d(4), RESOLUTIONS)
    container.switch_to(48)
    assert 'active=48' in repr(container)
