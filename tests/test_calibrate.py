"""A resolution that was not trained"""
import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from conftest import assert_equal, images, randomize_bn, rs_model
from timm.utils import freeze

from timm_rs import PrivateBN, add_resolution, make_switchable
from timm_rs.calibrate import METHODS
from timm_rs.data.readers import UNREADABLE
from timm_rs.data.resample import downscale


class TwoLayers(torch.nn.Module):
    """A convolution that copies its input, then BN: statistics can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data.copy_(torch.eye(3)[:, :, None, None])
        self.bn = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


def loader(size, n=96, batch=32):
    return [images(size, n=batch) for _ in range(n // batch)]


def test_statistics_are_those_of_all_images_at_once():
    model = make_switchable(TwoLayers().eval(), (64, 32))
    batches = [images(64, n=40), images(64, n=30) * 3 + 1]  # the mean of their variances is not the variance
    add_resolution(model, 48, batches, method='statistics')
    small = downscale(torch.cat(batches), 48)
    flat = small.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.bn[48].running_mean.double(), flat.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bn[48].running_var.double(), flat.var(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_other_resolutions_stay(method):
    model = rs_model(resolutions=(64, 32))
    before = copy.deepcopy(model)
    add_resolution(model, 48, loader(64), method=method, epochs=1)
    assert model.resolutions == (64, 48, 32) and model.resolution == 64 and not model.training
    assert [k for k in model.state_dict() if k.startswith('bn1.')] == [
        f'bn1.{r}.{k}' for r in (64, 48, 32)
        for k in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]
    old, new = before.state_dict(), model.state_dict()
    for name in old:
        if name != 'alpha' and not (method == 'tune_bn_head' and name.startswith('fc.')):
            assert_equal(new[name], old[name])
    x = images(48)
    assert_equal(model(x), model.at(48)(x))
    assert len(model.alpha) == 3
    reloaded = rs_model(resolutions=(64, 48, 32))
    reloaded.load_state_dict(new)
    assert_equal(reloaded(x), model(x))


def test_new_layers_lie_between_their_neighbours_by_area():
    model = rs_model(resolutions=(64, 32))
    add_resolution(model, 48, method='copy')
    share = (48 ** 2 - 32 ** 2) / (64 ** 2 - 32 ** 2)
    for module in model.modules():
        if isinstance(module, PrivateBN):
            expected = (1 - share) * module[32].weight + share * module[64].weight
            torch.testing.assert_close(module[48].weight, expected)


def test_outside_of_the_range_the_nearest_serves():
    model = rs_model(resolutions=(64, 32))
    add_resolution(model, 24, method='copy')
    assert_equal(model.bn1[24].state_dict(), model.bn1[32].state_dict())
    add_resolution(model, 80, method='copy')
    assert model.resolutions == (80, 64, 32, 24)
    assert_equal(model.bn1[80].state_dict(), model.bn1[64].state_dict())


def test_tuning_brings_the_new_size_nearer_to_its_teacher():
    model = rs_model(resolutions=(64,))
    batches = loader(64, n=128, batch=64)
    large = torch.cat(batches)
    small = downscale(large, 40)

    def divergence(network):
        log_p = [z.log_softmax(-1) for z in (network.at(40)(small), network.at(64)(large))]
        return torch.nn.functional.kl_div(*log_p, reduction='batchmean', log_target=True).item()

    with torch.no_grad():
        measured = divergence(add_resolution(copy.deepcopy(model), 40, batches, method='statistics'))
    tuned = add_resolution(copy.deepcopy(model), 40, batches, method='tune_bn', epochs=10, lr=3e-3)
    with torch.no_grad():
        assert divergence(tuned) < 0.9 * measured


def test_divergence_and_accuracy_are_reported(caplog):
    """The new size answers as its only neighbour does, until it is taught."""
    caplog.set_level('INFO')
    model, x = rs_model(resolutions=(64,)), images(64, n=8)
    labels = model.at(64)(downscale(x, 40)).argmax(1)
    labels[:2] = (labels[:2] + 1) % model.num_classes
    labels[-1] = UNREADABLE  # of an image that cannot be read
    add_resolution(model, 40, loader(64), epochs=2, lr=0.05, test_loader=[(x[:5], labels[:5]), (x[5:], labels[5:])])
    after = (model.at(40)(downscale(x, 40)).argmax(1) == labels)[:7].double().mean().item()
    first, second, accuracy = caplog.messages
    assert first.startswith('Tuned 40 px, epoch 1 of 2: KL divergence from the answers at 64 px 0.')
    assert float(second.split()[-3]) < float(first.split()[-3])
    assert accuracy == f'Acc@1 at 40 px: {100 * 5 / 7:.2f} before, {100 * after:.2f} after.'


def test_several_labels_are_taught_one_by_one(caplog):
    """With one label, what a softmax would teach is nothing."""
    caplog.set_level('INFO')
    model, x = rs_model(resolutions=(64,), num_classes=1), images(64, n=8)
    model.multilabel_threshold = 0.5
    with torch.no_grad():
        z = model.at(64)(downscale(x, 40))[:, 0]
    labels = torch.zeros(8, 1)
    labels[z.argsort(descending=True)[[0, 2]]] = 1.  # found first and third: precision 1 and 2 / 3
    labels[z.argmin()] = UNREADABLE
    add_resolution(model, 40, loader(64), epochs=2, lr=0.05, test_loader=[(x[:5], labels[:5]), (x[5:], labels[5:])])
    first, second, precision = caplog.messages
    assert 0 < float(second.split()[-3]) < float(first.split()[-3])
    assert precision.startswith(f'mAP at 40 px: {100 * (1 + 2 / 3) / 2:.2f} before, ')


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'copy'])
def test_failure_on_the_way_leaves_the_network_alone(method):
    model = randomize_bn(rs_model(resolutions=(64, 32))).train()
    model.bn1.eval()  # a frozen layer
    model.switch_to(32)
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match='channels'):
        add_resolution(model, 48, [*loader(64), torch.rand(4, 1, 64, 64)], method=method)
    assert_equal(dict(model.state_dict()), dict(before.state_dict()))
    assert [m.training for m in model.modules()] == modes
    assert model.resolutions == (64, 32) and model.resolution == 32
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model(torch.rand(2, 3, 32, 32)).isfinite().all()
    add_resolution(model, 48, loader(64), method=method)
    assert [m.training for m in model.modules() if not isinstance(m, torch.nn.BatchNorm2d)] == [
        m.training for m in before.modules() if not isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'copy'])
def test_frozen_networks_learn_a_size(method):
    """As they do where nothing is frozen, and frozen they stay."""
    original, batches = rs_model(), loader(64)
    expected = add_resolution(copy.deepcopy(original), 40, batches, method=method)
    model = copy.deepcopy(original).requires_grad_(False)
    with torch.no_grad():
        add_resolution(model, 40, batches, method=method)
    assert_equal(dict(model.state_dict()), dict(expected.state_dict()))
    assert not any(p.requires_grad for p in model.bn1[40].parameters())
    model = copy.deepcopy(original)
    freeze(model, 'layer1')
    add_resolution(model, 40, batches, method=method)
    between = add_resolution(original, 40, method='copy')
    assert_equal(dict(model.layer1.state_dict()), {
        k: v for k, v in between.layer1.state_dict().items() if 'num_batches' not in k})
    assert not torch.equal(model.layer2[0].bn1[40].running_mean, between.layer2[0].bn1[40].running_mean) \
        or not torch.equal(model.layer2[0].bn1[40].weight, between.layer2[0].bn1[40].weight)


@pytest.mark.parametrize('fails', [False, True])
def test_a_second_classifier_for_distillation_learns_too(fails):
    model = timm.create_model('rs_swiftformer_xs', resolutions=(64, 32), num_classes=4)
    before = [copy.deepcopy(head) for head in model.get_classifier()]
    kwargs = dict(method='tune_bn_head', epochs=1, lr=1e30 if fails else 1e-3)
    with pytest.raises(ValueError, match='is not finite') if fails else nullcontext():
        add_resolution(model, 48, loader(64, 64), **kwargs)
    after = list(model.get_classifier())
    assert len(before) == len(after) == 2
    assert all(torch.equal(b.weight, a.weight) == fails for b, a in zip(before, after))


def test_what_gives_no_logits_is_not_taught():
    model = rs_model(features_only=True)
    with pytest.raises(ValueError, match='returns a list, expected logits'):
        add_resolution(model, 40, loader(64))
    with pytest.raises(ValueError, match='has no classifier to teach'):
        add_resolution(model, 40, loader(64), method='tune_bn_head')
    assert model.resolutions == (64, 48, 32)


@pytest.mark.parametrize('resolution,batches,kwargs,message', [
    (64, None, {}, 'expected a new size'),
    (64, None, {}, 'expected a new size'),
    (0, None, {}, 'holds 0, expected positive integers'),
    (True, None, {}, 'holds True, expected positive integers'),
    (48, [torch.rand(64, 3, 64, 64)], dict(lr=1e30), 'The loss at 48 px is not finite, expected a smaller lr'),
    (48, None, {}, 'needs a loader'),
    (48, [torch.rand(8, 3, 64, 64)], {}, 'gives 8 images, expected at least 64'),
    (48, [torch.rand(64, 3, 48, 48)], {}, 'images of 48x48, expected 64x64'),
    (48, None, dict(method='magic'), "Unknown method 'magic'"),
    (48, iter([torch.rand(64, 3, 64, 64)]), {}, 'The loader is an iterator'),
    (48, [torch.rand(64, 3, 64, 64)], dict(epochs=0), 'epochs is 0'),
    (48, [torch.rand(64, 3, 64, 64)], dict(epochs=1.5), 'epochs is 1.5, expected an integer'),
    (48, [torch.rand(64, 3, 64, 64)], dict(lr=-1.), 'lr is -1.0, expected a finite number above 0'),
    (48, [torch.full((64, 3, 64, 64), torch.nan)], {}, 'images with values that are NaN or infinite'),
    (48, [torch.full((64, 3, 64, 64), torch.inf)], dict(method='statistics'), 'images with values that are NaN'),
    (48, [dict(image=torch.rand(64, 3, 64, 64))], {}, 'The loader gives dict, expected batches'),
    (48, [(torch.rand(3, 64, 64), 0)] * 64, {}, 'The loader gives tensors of 3 dimensions, expected batches'),
])
def test_bad_input_leaves_the_network_alone(resolution, batches, kwargs, message):
    model = randomize_bn(rs_model(resolutions=(64, 32)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_resolution(model, resolution, batches, **kwargs)
    assert_equal(dict(model.state_dict()), dict(before))
    with pytest.raises(ValueError, match='expected a switchable one'):
        add_resolution(model.at(64), 48, batches)
