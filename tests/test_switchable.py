import copy
import multiprocessing
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import numpy as np
import pytest
import timm
import torch
import torch.fx
import torch.nn as nn
from conftest import (
    RESOLUTIONS,
    assert_equal,
    images,
    plain_key,
    plain_model,
    plain_state_dict,
    randomize_bn,
    rs_model,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, prune

from timm_rs import PrivateBN, SwitchableMixin, UnknownResolutionError, make_switchable
from timm_rs_runtime.errors import UserError

# Of BatchNorm2d in places and in a Sequential, of BatchNormAct2d, with squeeze-excite, with BatchNorm1d in the head.
NETWORKS = ('resnet18', 'test_resnet', 'mobilenetv2_100', 'test_byobnet', 'repvit_m0_9')


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


# Making a network switchable

def test_stays_the_same_object_and_class():
    plain = plain_model('resnet18')
    model = make_switchable(plain, RESOLUTIONS)
    assert model is plain
    assert isinstance(model, timm.models.ResNet) and isinstance(model, SwitchableMixin)
    assert (model.resolutions, model.resolution) == ((64, 48, 32), 64)
    assert isinstance(model.alpha, nn.Parameter)
    assert_equal(model.alpha.data, torch.zeros(3))


def test_adds_one_set_of_bn_per_resolution_and_the_ensemble_weights():
    plain = plain_model('resnet18')
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


@pytest.mark.parametrize('shape, above, below, share', [
    ((58, 58), 64, 48, (58 ** 2 - 48 ** 2) / (64 ** 2 - 48 ** 2)),
    ((40, 40), 48, 32, (40 ** 2 - 32 ** 2) / (48 ** 2 - 32 ** 2)),
    ((32, 48), 48, 32, 0.4),
])
@pytest.mark.parametrize('name', NETWORKS)
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


# Taking out

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
    plain, x = rs_model('resnet18').at(32), images(32)
    expected = plain(x)
    assert_equal(torch.jit.script(plain)(x), expected)
    assert_equal(torch.fx.symbolic_trace(plain)(x), expected)
    assert_equal(torch.export.export(plain, (x,)).module()(x), expected)


def test_at_can_be_fused():
    plain, x = copy.deepcopy(rs_model('resnet18').at(32)), images(32)
    expected = plain(x)
    block = plain.layer1[0]
    plain.conv1, plain.bn1 = fuse_conv_bn_eval(plain.conv1, plain.bn1), nn.Identity()
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_at_can_be_reparameterized():
    plain, x = rs_model('repvit_m0_9').at(64), images(64)
    expected = plain(x)
    fused = timm.utils.reparameterize_model(plain)
    assert sum(isinstance(m, _BatchNorm) for m in fused.modules()) == 0
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


# One switch per network and thread

def at_once(function, jobs, threads=4):
    """Return the results of jobs that many threads take in turns, all of them more than once."""
    barrier = Barrier(threads)

    def work(mine):
        barrier.wait()
        with torch.no_grad():
            return [function(*job) for job in mine]

    shares = [jobs[i::threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, shares))
    return [results[i % threads][i // threads] for i in range(len(jobs))]


@pytest.fixture
def fast_turns():
    """Let threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def random_jobs(count, sizes):
    generator = random.Random(0)
    return [generator.choice(sizes) for _ in range(count)]


def test_threads_side_by_side(fast_turns):
    model = rs_model()
    jobs = [(model.at(r), images(r)) for r in random_jobs(40, RESOLUTIONS)]
    with torch.no_grad():
        serial = [m(x) for m, x in jobs]
    assert_equal(at_once(lambda m, x: m(x), jobs), serial)


@pytest.mark.filterwarnings('ignore:.*no BatchNorm for')
@pytest.mark.parametrize('compiled', [False, True])
def test_threads_share_a_network(fast_turns, compiled):
    """At trained sizes, between them, and in lists, whatever the other threads run."""
    model = randomize_bn(make_switchable(small_net(), RESOLUTIONS)).eval() if compiled else rs_model()
    jobs = [(images(s),) for s in random_jobs(100, RESOLUTIONS if compiled else (*RESOLUTIONS, 56, 40))]
    jobs += [(images(*random.Random(i).sample(RESOLUTIONS, 2)),) for i in range(0 if compiled else 20)]
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, backend='eager')
    with torch.no_grad():
        serial = [model(x) for x, in jobs]
    assert_equal(at_once(model, jobs), serial)


def test_threads_choose_for_themselves(fast_turns):
    model = rs_model()

    def features(r, x):
        model.switch_to(r)
        return model.forward_features(x)

    jobs = [(r, images(64)) for r in random_jobs(40, RESOLUTIONS)]
    expected = [model.at(r).forward_features(x) for r, x in jobs]
    model.switch_to(32)
    assert_equal(at_once(features, jobs), expected)
    assert model.resolution == 32


def test_a_thread_that_has_not_chosen_takes_what_was_switched_to():
    model = rs_model()

    def elsewhere(function):
        return pool.submit(function).result()

    with ThreadPoolExecutor(1) as pool:
        for r in (48, 32, 64):
            model.switch_to(r)
            assert elsewhere(lambda: model.resolution) == r
        model(images(48))
        assert (model.resolution, elsewhere(lambda: model.resolution)) == (48, 64)
        elsewhere(lambda: model(images(32)))
        assert (model.resolution, elsewhere(lambda: model.resolution)) == (48, 32)


def replicate(model, count):
    """Do on the CPU what torch.nn.parallel.replicate does on GPUs."""
    modules = list(model.modules())
    copies = [[m._replicate_for_data_parallel() for m in modules] for _ in range(count)]
    for made in copies:
        places = dict(zip(modules, made))
        for module, replica in places.items():
            for name, child in module._modules.items():
                setattr(replica, name, places[child])
            for name, tensor in module._parameters.items():
                setattr(replica, name, tensor)
    return [made[0] for made in copies]


def test_replicas_of_data_parallel(fast_turns):
    model = rs_model()
    replicas, sizes = replicate(model, 2), random_jobs(80, RESOLUTIONS)
    jobs = [(replica, images(s)) for s in sizes for replica in replicas]
    with torch.no_grad():
        expected = [model(x) for _, x in jobs]
    model.switch_to(48)
    assert_equal(at_once(lambda replica, x: replica(x), jobs, threads=2), expected)
    pyramids = [(replica, images(*RESOLUTIONS)) for replica in replicas * 5]
    expected = [[model.at(r)(x) for r, x in zip(RESOLUTIONS, pyramid)] for _, pyramid in pyramids]
    assert_equal(at_once(lambda replica, x: replica(x), pyramids, threads=2), expected)
    assert model.resolution == 48


@pytest.mark.parametrize('how', ['set_grad_checkpointing', 'set_resolution_checkpointing'])
def test_threads_that_recompute(fast_turns, how):
    """Each its own network, as DataParallel's replicas are, and all of them the same layers."""
    model, other = (rs_model().train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    getattr(other, how)()
    pyramid = images(*RESOLUTIONS)

    def train(net):
        with torch.enable_grad():
            sum(z.square().mean() * (i + 1) for i, z in enumerate(net(pyramid))).backward()

    train(model)
    at_once(train, [(replica,) for replica in replicate(other, 2)], threads=2)
    for p in gradients(other).values():
        p.div_(2)
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-6)


def test_a_shallow_copy_switches_on_its_own():
    model = rs_model()
    model.switch_to(48)
    other = copy.copy(model)
    assert type(other) is type(model) and other.resolution == 48
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    other.switch_to(32)
    assert {m.resolution for m in other.modules() if isinstance(m, PrivateBN)} == {32} and model.resolution == 48
    assert_equal(other.forward_features(images(64)).shape, model.forward_features(images(64)).shape)
    x = images(64)
    assert_equal(other.forward_features(x), model.at(32).forward_features(x))
    assert_equal(model.forward_features(x), model.at(48).forward_features(x))


def test_a_forked_process_switches_on_its_own():
    model = rs_model()
    model.switch_to(48)
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()

    def switch():
        before = model.resolution
        model.switch_to(32)
        queue.put((before, model.resolution))

    process = context.Process(target=switch)
    process.start()
    assert queue.get() == (48, 32) and model.resolution == 48
    process.join()


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
