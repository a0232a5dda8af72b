"""What PyTorch and timm do with a module, done with a switchable one"""
import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import (
    RESOLUTIONS,
    assert_equal,
    gradients,
    images,
    plain_key,
    plain_model,
    randomize_bn,
    rs_model,
    small_net,
)
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from timm_rs import PrivateBN, make_switchable


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


def switchable_net():
    """Return a network that is compiled in a second."""
    return randomize_bn(make_switchable(small_net(), RESOLUTIONS)).eval()


@pytest.mark.parametrize('duplicate', [
    copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.at(48)])
def test_copies_of_a_network_that_is_compiled_in_place_run_themselves(duplicate):
    model = rs_model()
    x = images(48)
    expected = model(x)
    model.compile(backend='eager')
    other = duplicate(model)
    assert_equal(other(x), expected)
    other.fc = torch.nn.Identity()
    assert other(x).shape != expected.shape


def test_compile_with_dynamic_shapes():
    model, pyramid = switchable_net(), images(*RESOLUTIONS)
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(model, backend='eager', dynamic=True, fullgraph=True)
        assert_equal(compiled(pyramid), model(pyramid))


def test_compile():
    model, pyramid = switchable_net(), images(*RESOLUTIONS)
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
    model, pyramid, graphs = switchable_net(), images(*RESOLUTIONS), []

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


def test_export_at_the_active_resolution():
    model, x = rs_model(), images(48)
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


def test_features_of_images_of_another_size_are_named_once():
    model = rs_model()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for x in images(*RESOLUTIONS):
            model(x)  # which chooses by their size
            model.forward_features(x)
            model.at(x.shape[-1]).forward_intermediates(x)
        with pytest.raises(UserWarning, match=r'active resolution, 32, for images of 48x48: switch_to\(48\) before'):
            model.forward_features(images(48))
        model.forward_features(images(48))
    assert not hasattr(make_switchable(torch.nn.Sequential(torch.nn.BatchNorm2d(3))), 'forward_features')


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


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('uses_alpha', [False, True])
@pytest.mark.parametrize('compiled', [False, True])
def test_distributed_in_a_loop_of_ones_own(process_group, uses_alpha, compiled):
    """Whether the loss weighs the resolutions with alpha or not, which DistributedDataParallel waits for."""
    model, pyramid = make_switchable(small_net(), RESOLUTIONS), images(*RESOLUTIONS)
    other = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    if compiled:
        torch.compiler.reset()
        parallel = torch.compile(parallel, backend='eager')

    def loss_of(net, alpha):
        weights = alpha.softmax(0) if uses_alpha else torch.ones(3)
        return sum(w * z.square().mean() for w, z in zip(weights, net(pyramid)))

    for _ in range(3):
        model.zero_grad()
        loss_of(parallel, model.alpha).backward()
    loss_of(other, other.alpha).backward()
    expected = gradients(other) if uses_alpha else dict(gradients(other), alpha=torch.zeros(3))
    torch.testing.assert_close(gradients(model), expected)


def test_distributed_one_resolution_at_a_time(process_group):
    """DistributedDataParallel has to look for the parameters of the others."""
    model = make_switchable(small_net(), RESOLUTIONS)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for i in (0, 1, 2, 0):
        model.zero_grad()
        (parallel(images(RESOLUTIONS[i])).square().mean() * model.alpha.softmax(0)[i]).backward()
        assert model[1][RESOLUTIONS[i]].weight.grad.abs().sum() > 0 and model.alpha.grad.abs().sum() > 0


def test_data_config_follows_the_active_resolution():
    model = rs_model()

    def size_of(net):
        maps = net.forward_features(images(net.pretrained_cfg['input_size'][-1]))
        assert net.pretrained_cfg['pool_size'] == maps.shape[-2:]
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
