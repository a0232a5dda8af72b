import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import RESOLUTIONS, assert_equal, images, plain_model, rs_model
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, dispatch_clip_grad, unwrap_model

from timm_rs import EnsembleDistillationLoss
from timm_rs.private_bn import tie_affine
from timm_rs.train import MultiResolutionTask, ResolutionPyramid

MODES = ('none', 'ens', 'ens_topdown')


def batch(n=4):
    return images(RESOLUTIONS[0], n=n), torch.arange(n) % 3


def build(mode='ens_topdown', **kwargs):
    return MultiResolutionTask(rs_model(**kwargs).train(), EnsembleDistillationLoss(mode), verbose=False)


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def step_by_hand(model, x, target, mode):
    """Run one step on the plain networks of each resolution, the loss written out from its definition."""
    z = [model.at(r)(y) for r, y in zip(RESOLUTIONS, ResolutionPyramid(RESOLUTIONS)(x))]
    p = [F.softmax(logits, 1) for logits in z]

    def cross_entropy(logits):
        return -F.log_softmax(logits, 1)[range(len(target)), target].mean()

    def divergence(t, s):
        return (t * (t / s).log()).sum(1).mean()

    loss = sum(cross_entropy(logits) for logits in z)
    if mode != 'none':
        alpha = F.softmax(model.alpha, 0)
        z_ens = sum(a * logits.detach() for a, logits in zip(alpha, z))
        p_ens = F.softmax(z_ens.detach(), 1)
        loss = loss + cross_entropy(z_ens)
        from_ens = sum(divergence(p_ens, s) for s in p)
        if mode == 'ens':
            loss = loss + from_ens
        else:
            topdown = sum(divergence(p[t].detach(), p[s]) for s in range(len(p)) for t in range(s))
            loss = loss + 2 / (len(p) + 1) * (from_ens + topdown)
    loss.backward()
    return loss, z


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
@pytest.mark.parametrize('mode', MODES)
def test_step_equals_one_by_hand(mode, name):
    task = build(mode, name=name)
    model = task.trainable_module
    model.alpha.data = torch.tensor([0.5, -0.5, 0.2])
    other, (x, target) = copy.deepcopy(model), batch()

    result = task(x, target)
    result['loss'].backward()
    loss, z = step_by_hand(other, x, target, mode)
    torch.testing.assert_close(result['loss'], loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result['output'], z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('levels', [(1, 2), (2,), (0, 2)])
@pytest.mark.parametrize('mode', MODES)
def test_step_of_some_resolutions(mode, levels):
    task, (x, target) = build(mode), batch()
    model = task.trainable_module
    other, before = copy.deepcopy(model), copy.deepcopy(model)
    task.levels = levels
    result = task(x, target)
    result['loss'].backward()
    pyramid = ResolutionPyramid(RESOLUTIONS)(x)
    logits = [other.at(RESOLUTIONS[i])(pyramid[i]) for i in levels]
    expected = EnsembleDistillationLoss(mode)(logits, target, other.alpha[list(levels)])
    expected['loss'].backward()
    torch.testing.assert_close(result['loss'], expected['loss'])
    torch.testing.assert_close(result['output'], logits)
    found, wanted = gradients(model), gradients(other)
    torch.testing.assert_close(found, wanted)
    for i, r in enumerate(RESOLUTIONS):
        same = torch.equal(model.bn1[r].running_mean, before.bn1[r].running_mean)
        assert same == (i not in levels)


@pytest.mark.parametrize('mode', MODES)
def test_every_parameter_learns(mode):
    task = build(mode)
    task(*batch())['loss'].backward()
    without = {n for n, p in task.trainable_module.named_parameters() if p.grad is None}
    assert without == ({'alpha'} if mode == 'none' else set())
    assert task.trainable_module.alpha.requires_grad == (mode != 'none')


def test_what_a_step_returns():
    result = build()(*batch())
    assert list(result) == ['loss', 'classification', 'ensemble', 'distillation', 'output']
    terms = [result[k] for k in ('classification', 'ensemble', 'distillation')]
    torch.testing.assert_close(result['loss'], sum(terms))
    assert all(t.item() > 0 for t in terms)
    assert [tuple(z.shape) for z in result['output']] == [(4, 10)] * 3


def test_one_forward_per_step():
    task, calls = build(), []
    task.trainable_module.register_forward_hook(lambda module, args, output: calls.append([len(a) for a in args]))
    task(*batch())
    assert calls == [[3]]


def test_is_a_training_task():
    task = MultiResolutionTask(rs_model(), verbose=False)
    assert isinstance(task, TrainingTask)
    assert task.criterion.mode == 'ens_topdown' and isinstance(task.criterion.criterion, nn.CrossEntropyLoss)
    assert (task.pyramid.resolutions, task.pyramid.flip) == (RESOLUTIONS, 'shared')


def test_pyramid_of_ones_own():
    model, (x, target) = rs_model(), batch()
    task = MultiResolutionTask(model, pyramid=ResolutionPyramid(RESOLUTIONS, 'independent', hflip=1.), verbose=False)
    assert_equal(task(x, target)['output'], model([y.flip(-1) for y in ResolutionPyramid(RESOLUTIONS)(x)]))


def test_pyramid_of_other_resolutions():
    with pytest.raises(ValueError, match=r'pyramid of \(64, 32\), expected the resolutions \(64, 48, 32\)'):
        MultiResolutionTask(rs_model(), pyramid=ResolutionPyramid((64, 32)), verbose=False)


def test_wrong_input_size():
    with pytest.raises(ValueError, match='48x48, expected the largest resolution 64'):
        build()(images(48), torch.tensor([0, 1]))


def test_mixed_images_and_soft_targets():
    task, (x, target) = build(), batch()
    x, target = Mixup(mixup_alpha=0.8, cutmix_alpha=1., label_smoothing=0.1, num_classes=10)(x, target)
    assert target.shape == (4, 10)
    result = task(x, target)
    log_p = [F.log_softmax(z, 1) for z in result['output']]
    torch.testing.assert_close(result['classification'], sum(-(target * v).sum(1).mean() for v in log_p))


def test_base_criterion():
    criterion = EnsembleDistillationLoss('ens', LabelSmoothingCrossEntropy(0.1))
    result = MultiResolutionTask(rs_model(), criterion, verbose=False)(*batch())
    expected = sum(F.cross_entropy(z, batch()[1], label_smoothing=0.1) for z in result['output'])
    torch.testing.assert_close(result['classification'], expected)


def test_loss_is_float32_under_autocast():
    task, (x, target) = build(), batch()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(x, target)
    assert {z.dtype for z in result['output']} == {torch.bfloat16}
    expected = EnsembleDistillationLoss()([z.float() for z in result['output']], target, task.trainable_module.alpha)
    assert_equal(result['loss'], expected['loss'])
    result['loss'].backward()
    assert {g.dtype for g in gradients(task.trainable_module).values()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_step():
    task, (x, target) = build(), batch()
    other = copy.deepcopy(task)
    other.trainable_module.set_grad_checkpointing()
    for t in (task, other):
        t(x, target)['loss'].backward()
    torch.testing.assert_close(gradients(other), gradients(task), rtol=1e-5, atol=1e-6)


def test_ema():
    task = build()
    model = task.trainable_module
    ema = task.setup_ema(decay=0.5)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task(*batch())['loss'].backward()
    optimizer.step()
    task.update_ema()
    assert isinstance(ema, ModelEmaV3) and not torch.equal(model.alpha, before['alpha'])
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[key] + model.state_dict()[key]) / 2)
    assert task.get_eval_model(ema=True)(images(48)).shape == (2, 10)


@pytest.mark.parametrize('ema', [False, True])
def test_checkpoint_state(ema):
    task, other = build(), build()
    for t in (task, other):
        t.setup_ema()
        t(*batch())['loss'].backward()
        torch.optim.SGD(t.trainable_module.parameters(), lr=0.1).step()
        t.update_ema(step=2)
    weights = copy.deepcopy(task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict'])
    assert 'alpha' in weights and 'fc.weight' in weights
    other.load_checkpoint_state(weights, ema=ema)
    assert_equal(dict(unwrap_model(other.get_eval_model(ema=ema)).state_dict()), dict(weights))


def test_compiled():
    task, (x, target) = build(resolutions=(64, 32)), batch()
    other = copy.deepcopy(task)
    torch.compiler.reset()
    other.compile(backend='eager')
    results = [t(x, target) for t in (task, other)]
    for result in results:
        result['loss'].backward()
    assert_equal(*results)
    assert_equal(*(gradients(unwrap_model(t.trainable_module)) for t in (task, other)))
    assert list(other.get_checkpoint_state()['state_dict']) == list(task.get_checkpoint_state()['state_dict'])


def test_plain_parts_are_refused():
    with pytest.raises(ValueError, match='ResNet is a plain network'):
        MultiResolutionTask(plain_model())
    with pytest.raises(ValueError, match='criterion CrossEntropyLoss'):
        MultiResolutionTask(rs_model(), torch.nn.CrossEntropyLoss())


def test_adaptive_clipping_leaves_the_weights_of_the_ensemble():
    task = MultiResolutionTask(rs_model(), verbose=False)
    task(images(RESOLUTIONS[0], n=4), torch.arange(4))['loss'].backward()
    alpha = task.trainable_module.alpha
    before = alpha.grad.clone()
    dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), 1e-2, mode='agc')
    assert before.any() and torch.equal(alpha.grad, before)


@pytest.mark.parametrize('clip', [nn.utils.clip_grad_value_, nn.utils.clip_grad_norm_])
def test_gradients_are_clipped_after_they_are_adjusted(clip):
    task = MultiResolutionTask(rs_model().train(), EnsembleDistillationLoss(reduction='mean'), verbose=False)
    for _ in range(2):
        task.trainable_module.zero_grad()
        task(*batch())['loss'].backward()
        found = torch.cat([g.flatten() for g in gradients(task.trainable_module).values()]).norm()
        clip(task.get_clip_parameters(), 1e-4)
        task.adjust_gradients()
        clipped = torch.cat([g.flatten() for g in gradients(task.trainable_module).values()])
        assert found > 1e-2 and clipped.abs().max() <= 1e-4
        assert clip is nn.utils.clip_grad_value_ or clipped.norm() <= 1.01e-4


@pytest.mark.parametrize('reduction', EnsembleDistillationLoss.REDUCTIONS)
@pytest.mark.parametrize('levels', [None, (0, 2)])
@pytest.mark.parametrize('tied', [False, True])
def test_private_parameters_learn_from_the_loss_of_their_own_resolution(reduction, levels, tied):
    """And what is shared from the mean, or the sum, over the resolutions that a step trains."""
    model, (x, target) = rs_model().double().train(), batch()
    if tied:
        tie_affine(model)
    task = MultiResolutionTask(model, EnsembleDistillationLoss('none', reduction=reduction), verbose=False)
    task.levels, trained = levels, [RESOLUTIONS[i] for i in levels or range(len(RESOLUTIONS))]
    own = {}
    for r, y in zip(RESOLUTIONS, task.pyramid(x.double())):
        model.zero_grad()
        plain = model.at(r)
        F.cross_entropy(plain(y), target).backward()
        own[r] = {n: p.grad.clone() for n, p in plain.named_parameters()}
    for p in model.parameters():  # of a step before, which trained another resolution
        p.grad = torch.zeros_like(p)
    task(x.double(), target)['loss'].backward()
    task.adjust_gradients()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert any(name not in parameters for name in own[trained[0]])
    for name in own[trained[0]]:
        layer, _, kind = name.rpartition('.')
        total = sum(own[r][name] for r in trained)
        shared = total / len(trained) if reduction == 'mean' else total
        for r in RESOLUTIONS:
            is_private = name not in parameters and not tied
            parameter = parameters[name if name in parameters else f'{layer}.{r}.{kind}']
            expected = (own[r][name] if r in trained else None) if is_private else shared
            assert (parameter.grad is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)  # the loss is in float32
