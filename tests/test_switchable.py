import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

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
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from timm_rs import PrivateBN, SwitchableMixin, UnknownResolutionError, make_switchable

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


@pytest.mark.parametrize('order', [(64, 48, 32), (32, 64, 48)])
def test_list_comes_back_in_its_order(order):
    model = rs_model()
    model.switch_to(48)
    pyramid = images(*order)
    outputs = model(pyramid)
    assert model.resolution == 48
    assert isinstance(outputs, list)
    assert_equal(outputs, [model.at(r)(x) for r, x in zip(order, pyramid)])
    assert_equal(model(tuple(pyramid)), outputs)


@pytest.mark.parametrize('sizes, message', [
    ((), r'list of 0 sizes \(none\)'),
    ((64,), r'list of 1 sizes \(64x64\)'),
    ((64, 48), r'list of 2 sizes \(64x64, 48x48\)'),
    ((64, 64, 32), r'64x64, 64x64, 32x32'),
    ((64, 48, 32, 32), 'list of 4 sizes'),
    ((64, 48, 40), '40x40'),
])
def test_list_of_wrong_sizes(sizes, message):
    model = rs_model()
    model.switch_to(48)
    with pytest.raises(ValueError, match=f'{message}.*expected each of \\(64, 48, 32\\) once'):
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


def test_threads_side_by_side():
    model = rs_model()
    work = [(model.at(r), images(r)) for r in RESOLUTIONS] * 4
    with torch.no_grad():
        serial = [m(x) for m, x in work]

    def run(job):
        with torch.no_grad():
            return job[0](job[1])

    with ThreadPoolExecutor(len(RESOLUTIONS)) as pool:
        assert_equal(list(pool.map(run, work)), serial)


# What else PyTorch and timm do with a module

@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_duplicates(duplicate):
    model, pyramid = rs_model(), images(*RESOLUTIONS)
    model.switch_to(48)
    other = duplicate(model)
    assert type(other) is type(model) and (other.resolution, other.resolutions) == (48, RESOLUTIONS)
    assert_equal(other(pyramid), model(pyramid))
    other.switch_to(32)
    assert model.resolution == 48
    storages = {t.data_ptr() for m in (model, other) for t in m.parameters()}
    assert len(storages) == 2 * len(list(model.parameters()))
    assert type(other.at(32)) is timm.models.ResNet


def test_save_and_load_a_state_dict(tmp_path):
    model, other = rs_model(), rs_model()
    randomize_bn(model).alpha.data.uniform_()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    other.load_state_dict(torch.load(tmp_path / 'model.pth', weights_only=True), strict=True)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_to_dtype():
    model = rs_model().to(torch.float64)
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.float64}
    x = images(48).double()
    assert_equal(model.at(48)(x), model(x))


def test_to_memory_format():
    model, x = rs_model(), images(48)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)
    assert_equal(model.at(48)(x), model(x))


def test_train_and_eval_reach_every_resolution():
    model = rs_model()
    for mode in (True, False):
        model.train(mode)
        assert {m.training for m in model.modules()} == {mode}
    assert not model.at(32).training and model.train().at(32).training


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_training_touches_one_resolution(resolution):
    model = rs_model().train()
    before = copy.deepcopy(model.state_dict())
    model(images(resolution)).square().mean().backward()
    own = {k for k in before if plain_key(k)[1] == resolution}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in own if k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
    shared = {k for k, _ in model.named_parameters() if plain_key(k)[1] is None and k != 'alpha'}
    assert set(gradients(model)) == shared | {k for k, _ in model.named_parameters() if k in own}


def test_list_trains_every_resolution_once():
    model = rs_model().train()
    copies = {r: copy.deepcopy(model.at(r)) for r in RESOLUTIONS}
    pyramid = images(*RESOLUTIONS)
    model(pyramid)
    for r, x in zip(RESOLUTIONS, pyramid):
        copies[r](x)
        assert_equal(dict(model.at(r).named_buffers()), dict(copies[r].named_buffers()))


def test_ema():
    model = rs_model()
    model.switch_to(32)
    ema = ModelEmaV3(model, decay=0.75)
    before = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update(model)
    averaged = ema.module.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(averaged[key], value + 0.25)
    assert type(ema.module) is type(model)
    ema(images(48))
    assert (ema.module.resolution, model.resolution) == (48, 32)


def test_compile_with_dynamic_shapes():
    model, pyramid = rs_model(), images(*RESOLUTIONS)
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(model, backend='eager', dynamic=True, fullgraph=True)
        assert_equal(compiled(pyramid), model(pyramid))


def test_compile():
    model, pyramid = rs_model(), images(*RESOLUTIONS)
    with torch.no_grad():
        expected = model(pyramid)
        torch.compiler.reset()
        compiled = torch.compile(model, backend='eager')
        for i in (0, 1, 2, 0):
            assert_equal(compiled(pyramid[i]), expected[i])
            assert model.resolution == RESOLUTIONS[i]
        assert_equal(compiled(pyramid), expected)
        assert model.resolution == RESOLUTIONS[0]


def test_compiled_training():
    model, pyramid = make_switchable(small_net(), RESOLUTIONS), images(*RESOLUTIONS)
    other = copy.deepcopy(model)
    torch.compiler.reset()
    for run in (model, torch.compile(other, backend='aot_eager')):
        sum(z.square().mean() * (i + 1) for i, z in enumerate(run(pyramid))).backward()
    torch.testing.assert_close(gradients(other), gradients(model))
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))


def test_compiles_once_per_resolution():
    model, pyramid, graphs = rs_model(), images(*RESOLUTIONS), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        for i in (0, 1, 2):
            compiled(pyramid[i])
        first = len(graphs)
        for i in (1, 0, 2, 2, 1, 1, 0, 0, 2, 0):  # whatever is active before
            compiled(pyramid[i])
    assert first >= 3 and len(graphs) == first


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_export_at_the_active_resolution(resolution):
    model, x = rs_model(), images(resolution)
    expected = model(x)
    program = torch.export.export(model, (x,))
    model.switch_to(RESOLUTIONS[0])
    assert_equal(program.module()(x), expected)


@pytest.mark.parametrize('resolution', RESOLUTIONS)
def test_features_at_the_active_resolution(resolution):
    model, x = rs_model(), images(64)
    model.switch_to(resolution)
    plain = model.at(resolution)
    assert_equal(model.forward_features(x), plain.forward_features(x))
    assert_equal(model.forward_head(model.forward_features(x), pre_logits=True),
                 plain.forward_head(plain.forward_features(x), pre_logits=True))
    assert_equal(model.forward_intermediates(x, indices=2), plain.forward_intermediates(x, indices=2))
    assert model.resolution == resolution


@pytest.mark.parametrize('feature_cls', [None, 'dict', 'hook', 'getter'])
def test_features_only(feature_cls):
    net = timm.create_model('test_resnet', features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval()
    net_class, channels = type(net), net.feature_info.channels()
    model = randomize_bn(make_switchable(net, RESOLUTIONS))
    assert model.feature_info.channels() == channels
    for r, x in zip(RESOLUTIONS, images(*RESOLUTIONS)):
        features = model(x)
        assert type(model.at(r)) is net_class and len(features) == 2
        assert_equal(features, model.at(r)(x))


def test_classifier():
    model = rs_model()
    assert model.get_classifier() is model.fc
    model.reset_classifier(4)
    assert model.num_classes == 4
    for x in images(*RESOLUTIONS):
        assert model(x).shape == (2, 4)
    assert model.at(32).get_classifier() is not None and model.at(32).num_classes == 4


@pytest.mark.parametrize('name', ['levit_128s', 'repvit_m0_9'])
def test_reset_classifier_that_brings_new_bn(name):
    model = rs_model(name)
    model.switch_to(32)
    model.reset_classifier(4)
    held = [m for m in model.modules() if isinstance(m, PrivateBN)]
    assert sum(isinstance(m, _BatchNorm) for m in model.modules()) == len(RESOLUTIONS) * len(held)
    head = [m for m in model.head.modules() if isinstance(m, PrivateBN)]
    assert head and {m.resolution for m in head} == {32}
    model.switch_to(48)
    assert {m.resolution for m in held} == {48}
    assert not any(isinstance(m, PrivateBN) for m in model.at(48).modules())


def test_new_head_runs_at_every_resolution():
    model = rs_model('repvit_m0_9')
    model.reset_classifier(4)
    randomize_bn(model)
    for r, x in zip(RESOLUTIONS, images(*RESOLUTIONS)):
        assert_equal(model(x), model.at(r)(x))


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv2_100'])
def test_optimizer_groups_are_those_of_the_plain_network(name):
    model, plain = rs_model(name), plain_model(name)

    def settings(net):
        optimizer = create_optimizer_v2(net, opt='sgd', lr=0.1, weight_decay=0.05, layer_decay=0.5)
        names = {p: n for n, p in net.named_parameters()}
        listed = [(names[p], g['weight_decay'], g['lr_scale']) for g in optimizer.param_groups for p in g['params']]
        assert len(listed) == len(names)
        return {n: rest for n, *rest in listed}

    of_plain, of_model = settings(plain), settings(model)
    decay, lr_scale = of_model.pop('alpha')
    assert (decay, lr_scale) == (0., 1.)
    assert of_model == {n: of_plain[plain_key(n)[0]] for n in of_model}
    assert len({scale for _, scale in of_model.values()}) > 2


@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_alpha_never_decays(layer_decay):
    model = rs_model()
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    (group,) = [g for g in optimizer.param_groups if any(p is model.alpha for p in g['params'])]
    assert group['weight_decay'] == 0.
    assert 'alpha' in model.no_weight_decay()


def test_no_weight_decay_keeps_the_networks_own():
    plain = timm.create_model('levit_128s')
    own = set(plain.no_weight_decay())
    assert own and make_switchable(plain, (64, 32)).no_weight_decay() == own | {'alpha'}


def test_group_matcher():
    model = rs_model()
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_grad_checkpointing_recomputes_each_resolution(name):
    model, pyramid = rs_model(name).train(), images(*RESOLUTIONS)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for net in (model, other):
        sum(z.square().mean() * (i + 1) for i, z in enumerate(net(pyramid))).backward()
    assert len(gradients(model)) == len(list(model.parameters())) - 1
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-5, atol=1e-6)


def test_grad_checkpointing_after_separate_forwards():
    model = rs_model()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    pyramid = images(*RESOLUTIONS)
    for net in (model, other):
        loss = sum(net(x).square().mean() for x in pyramid)
        net.switch_to(64)
        loss.backward()
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-5, atol=1e-6)


def test_grad_checkpointing_can_be_switched_off():
    model = rs_model()
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing
    loss = model(images(32)).square().mean()
    model.switch_to(64)
    loss.backward()
    assert model.resolution == 64  # no backward hook was left


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_resolution_checkpointing_gives_the_same_step(name):
    model, pyramid = rs_model(name, drop_path_rate=0.5).train(), images(*RESOLUTIONS)
    other, passes = copy.deepcopy(model), []
    other.set_resolution_checkpointing()
    other.bn1.register_forward_hook(lambda module, args, output: passes.append(other.resolution))
    for net in (model, other):
        torch.manual_seed(1)
        sum(z.square().mean() * (i + 1) for i, z in enumerate(net(pyramid))).backward()
    assert passes[:3] == sorted(passes[3:], reverse=True) == [64, 48, 32]
    assert_equal(gradients(other), gradients(model))
    assert_equal(dict(other.named_buffers()), dict(model.named_buffers()))
    assert all(m.track_running_stats for m in other.modules() if isinstance(m, _BatchNorm))


def test_data_config_follows_the_active_resolution():
    model = rs_model()

    def size_of(net):
        return resolve_model_data_config(net)['input_size']

    assert size_of(model) == (3, 64, 64)
    model(images(48))
    assert size_of(model) == (3, 48, 48)
    model.switch_to(32)
    assert size_of(model) == (3, 32, 32)
    assert size_of(model.at(64)) == (3, 64, 64)
    assert size_of(model) == (3, 32, 32)


def test_any_network_will_do():
    model = randomize_bn(make_switchable(small_net(), (32, 16))).eval()
    assert isinstance(model, nn.Sequential) and type(model.at(16)) is nn.Sequential
    assert len(model) == 5 and model[0].weight is model.at(16)[0].weight
    pyramid = images(32, 16)
    assert_equal(model(pyramid), [model.at(32)(pyramid[0]), model.at(16)(pyramid[1])])
    assert model.no_weight_decay() == {'alpha'}
