from math import exp, log

import pytest
import timm.loss
import torch
import torch.nn as nn

from timm_rs import EnsembleDistillationLoss

MODES = ('none', 'ens', 'ens_topdown')
TERMS = ('loss', 'classification', 'ensemble', 'distillation')

# Two images with two classes, at two resolutions with equal ensemble weights. The probabilities of the first image are
# (.9, .1) and (.5, .5), and as the ensemble's logits are (log 3, 0) its probabilities are (.75, .25). For the second
# they are (.2, .8) and (.5, .5), and (1/3, 2/3) for the ensemble's logits (0, log 2).
LOGITS = [[[log(9), 0.], [0., log(4)]], [[0., 0.], [0., 0.]]]
TARGET = [0, 1]
CLASSIFICATION = -(log(.9) + log(.8)) / 2 + log(2)  # 0.85740
ENSEMBLE = -(log(.75) + log(2 / 3)) / 2  # 0.34657
ENS_TO_1 = (.75 * log(.75 / .9) + .25 * log(.25 / .1) + 1 / 3 * log(5 / 3) + 2 / 3 * log(5 / 6)) / 2  # 0.07053
ENS_TO_2 = (.75 * log(.75 / .5) + .25 * log(.25 / .5) + 1 / 3 * log(2 / 3) + 2 / 3 * log(4 / 3)) / 2  # 0.09372
ONE_TO_2 = (.9 * log(.9 / .5) + .1 * log(.1 / .5) + .2 * log(.2 / .5) + .8 * log(.8 / .5)) / 2  # 0.28040
DISTILLATION = dict(none=0., ens=ENS_TO_1 + ENS_TO_2, ens_topdown=2 / 3 * (ENS_TO_1 + ENS_TO_2 + ONE_TO_2))
TOTAL = dict(none=0.857399, ens=1.368225, ens_topdown=1.500410)


def softmax(row):
    e = [exp(v) for v in row]
    return [v / sum(e) for v in e]


def by_loops(logits, target, a, mode):
    """Return the terms of the loss and its gradients, for target probabilities, as sums over single numbers.

    With p the probabilities, y the target, N images, w the factor of the distillation and T(s) the teachers of s:
    dL / dz_snc = (p_snc - y_nc + w sum_{t in T(s)} (p_snc - p_tnc)) / N and
    dL / da_s = alpha_s / N sum_nc (p_ens,nc - y_nc) (z_snc - z_ens,nc).
    """
    size, count, classes = len(logits), len(logits[0]), len(logits[0][0])
    alpha = softmax(a)
    ens = [[sum(alpha[s] * logits[s][n][c] for s in range(size)) for c in range(classes)] for n in range(count)]
    p = {s: [softmax(row) for row in logits[s]] for s in range(size)}
    p['ens'] = [softmax(row) for row in ens]
    teachers = {s: dict(none=[], ens=['ens'], ens_topdown=['ens', *range(s)])[mode] for s in range(size)}
    weight = 2 / (size + 1) if mode == 'ens_topdown' else 1

    def cross_entropy(q):
        return sum(-target[n][c] * log(q[n][c]) for n in range(count) for c in range(classes)) / count

    def divergence(t, s):
        return sum(t[n][c] * log(t[n][c] / s[n][c]) for n in range(count) for c in range(classes)) / count

    terms = dict(
        classification=sum(cross_entropy(p[s]) for s in range(size)),
        ensemble=cross_entropy(p['ens']) if mode != 'none' else 0.,
        distillation=weight * sum(divergence(p[t], p[s]) for s in range(size) for t in teachers[s]),
    )
    terms['loss'] = sum(terms.values())
    logits_grad = [[[
        (p[s][n][c] - target[n][c] + weight * sum(p[s][n][c] - p[t][n][c] for t in teachers[s])) / count
        for c in range(classes)] for n in range(count)] for s in range(size)]
    alpha_grad = [
        alpha[s] / count * sum(
            (p['ens'][n][c] - target[n][c]) * (logits[s][n][c] - ens[n][c])
            for n in range(count) for c in range(classes)
        ) if mode != 'none' else 0.
        for s in range(size)
    ]
    return terms, logits_grad, alpha_grad


def as_tensors(logits, a):
    return [torch.tensor(z, requires_grad=True) for z in logits], torch.tensor(a, requires_grad=True)


def random_case(size=4, count=3, classes=5):
    logits = torch.randn(size, count, classes, dtype=torch.float64) * 2
    return logits.tolist(), torch.randn(size, dtype=torch.float64).tolist()


@pytest.mark.parametrize('mode', MODES)
def test_numbers_worked_out_by_hand(mode):
    logits, a = as_tensors(LOGITS, [0.5, 0.5])
    losses = EnsembleDistillationLoss(mode)(logits, torch.tensor(TARGET), a)
    expected = dict(
        classification=CLASSIFICATION,
        ensemble=0. if mode == 'none' else ENSEMBLE,
        distillation=DISTILLATION[mode],
        loss=TOTAL[mode],
    )
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, abs=1e-6)


def test_ensemble_follows_its_weights():
    # alpha = (3/4, 1/4), so z_ens = (3/4 log 9, 0) and (0, 3/4 log 4)
    logits, a = as_tensors(LOGITS, [log(3), 0.])
    expected = (log(1 + 9 ** -.75) + log(1 + 4 ** -.75)) / 2
    losses = EnsembleDistillationLoss('ens')(logits, torch.tensor(TARGET), a)
    assert losses['ensemble'].item() == pytest.approx(expected, abs=1e-6)


def test_default_is_the_full_loss():
    assert EnsembleDistillationLoss().mode == 'ens_topdown'


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['hard', 'soft'])
@pytest.mark.parametrize('size', [1, 2, 5])
def test_loss_and_gradients_equal_loops(mode, kind, size):
    logits, a = random_case(size)
    soft = torch.rand(3, 5).softmax(1)
    target = soft.argmax(1) if kind == 'hard' else soft
    rows = nn.functional.one_hot(target, 5).tolist() if kind == 'hard' else soft.tolist()
    terms, logits_grad, alpha_grad = by_loops(logits, rows, a, mode)

    z, alpha = as_tensors(logits, a)
    losses = EnsembleDistillationLoss(mode)(z, target, alpha)
    losses['loss'].backward()
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(terms, rel=1e-5, abs=1e-5)
    for s in range(size):
        torch.testing.assert_close(z[s].grad, torch.tensor(logits_grad[s]), rtol=1e-5, atol=1e-5)
    grad = alpha.grad if alpha.grad is not None else torch.zeros(size)
    torch.testing.assert_close(grad, torch.tensor(alpha_grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('term, reaches', [
    ('classification', (True, True, True, False)),
    ('ensemble', (False, False, False, True)),
    ('distillation', (True, True, True, False)),
])
def test_what_each_term_trains(term, reaches):
    z, alpha = as_tensors(*random_case(3))
    EnsembleDistillationLoss()(z, torch.tensor([0, 1, 2]), alpha)[term].backward()
    assert tuple(t.grad is not None and bool(t.grad.any()) for t in (*z, alpha)) == reaches


def test_no_gradient_reaches_a_teacher():
    # The ensemble is all but equal to the largest resolution, which then is a teacher and has nothing to learn.
    z, alpha = as_tensors(random_case(3)[0], [30., 0., 0.])
    EnsembleDistillationLoss()(z, torch.tensor([0, 1, 2]), alpha)['distillation'].backward()
    torch.testing.assert_close(z[0].grad, torch.zeros_like(z[0]), rtol=0, atol=1e-6)
    assert z[1].grad.abs().max() > 1e-2 and z[2].grad.abs().max() > 1e-2


def test_gradient_of_the_ensemble_weights_comes_from_the_ensemble_term():
    logits, a = random_case()
    target = torch.tensor([0, 1, 2])
    grads = []
    for term in ('loss', 'ensemble'):
        z, alpha = as_tensors(logits, a)
        EnsembleDistillationLoss()(z, target, alpha)[term].backward()
        grads.append(alpha.grad)
    assert torch.equal(*grads) and grads[0].any()


def test_equal_resolutions_teach_nothing():
    z = torch.randn(3, 5)
    losses = EnsembleDistillationLoss()([z, z, z], torch.tensor([0, 1, 2]), torch.randn(3))
    assert losses['distillation'].item() == pytest.approx(0, abs=1e-6)
    assert losses['ensemble'].item() == pytest.approx(losses['classification'].item() / 3, abs=1e-6)


def test_order_of_resolutions_is_the_direction_of_teaching():
    logits, a = random_case(2)
    target, criterion = torch.tensor([0, 1, 2]), EnsembleDistillationLoss()
    z, alpha = as_tensors(logits, a)
    forth, back = criterion(z, target, alpha), criterion(z[::-1], target, alpha.flip(0))
    assert forth['ensemble'].item() == pytest.approx(back['ensemble'].item())
    assert abs(forth['distillation'].item() - back['distillation'].item()) > 1e-2


@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(label_smoothing=.2), timm.loss.LabelSmoothingCrossEntropy(.2),
])
def test_label_smoothing(criterion):
    # -.8 log p_y - .1 (log p_0 + log p_1)
    def smoothed(p, q):
        return -.9 * log(p) - .1 * log(q)

    logits, a = as_tensors(LOGITS, [0., 0.])
    losses = EnsembleDistillationLoss('ens', criterion)(logits, torch.tensor(TARGET), a)
    single = (smoothed(.9, .1) + smoothed(.8, .2)) / 2
    assert losses['classification'].item() == pytest.approx(single + log(2), abs=1e-6)
    assert losses['ensemble'].item() == pytest.approx((smoothed(.75, .25) + smoothed(2 / 3, 1 / 3)) / 2, abs=1e-6)
    assert losses['distillation'].item() == pytest.approx(ENS_TO_1 + ENS_TO_2, abs=1e-6)


@pytest.mark.parametrize('labels,images', [('mean', 4), ('sum', 2)])
def test_several_labels_per_image(labels, images):
    """Two images with two labels; KL of a label is between the answers yes and no, of probabilities p and 1 - p."""
    def kl(p, q):
        return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))

    large, small = ((.9, .5), (.5, .8)), ((.5, .5), (.5, .8))
    z = [torch.tensor(p).logit() for p in (large, small)]
    target = torch.tensor([[1., 0.], [0., 1.]])
    losses = EnsembleDistillationLoss('ens_topdown', labels=labels)(z, target, torch.zeros(2))
    # Only the first label differs: the ensemble's logit is log(9) / 2, so it answers 3/4.
    assert losses['distillation'].item() == pytest.approx(
        (kl(.75, .9) + kl(.75, .5) + kl(.9, .5)) * 2 / 3 / images, abs=1e-6)
    # and the base criterion, here binary cross entropy over all labels
    assert losses['classification'].item() == pytest.approx(
        -(log(.9) + log(.5) + log(.5) + log(.8) + log(.5) + log(.5) + log(.5) + log(.8)) / 4, abs=1e-6)
    assert losses['ensemble'].item() == pytest.approx(-(log(.75) + log(.5) + log(.5) + log(.8)) / 4, abs=1e-6)
    with pytest.raises(ValueError, match="Unknown kind of labels 'two', expected one of one, mean, sum"):
        EnsembleDistillationLoss(labels='two')


def test_binary_cross_entropy():
    # Sigmoids of the first image are (.9, .5), of the second (.5, .8); of the ensemble (.75, .5) and (.5, 2/3).
    criterion = timm.loss.BinaryCrossEntropy(smoothing=0.)
    logits, a = as_tensors(LOGITS, [0., 0.])
    losses = EnsembleDistillationLoss('ens', criterion)(logits, torch.tensor(TARGET), a)
    single = -(log(.9) + log(.5) + log(.5) + log(.8)) / 4
    assert losses['classification'].item() == pytest.approx(single + log(2), abs=1e-6)
    assert losses['ensemble'].item() == pytest.approx(-(log(.75) + 2 * log(.5) + log(2 / 3)) / 4, abs=1e-6)
    assert losses['distillation'].item() == pytest.approx(ENS_TO_1 + ENS_TO_2, abs=1e-6)


def test_soft_targets():
    logits, a = as_tensors(LOGITS, [0., 0.])
    target = torch.tensor([[.5, .5], [.25, .75]])
    losses = EnsembleDistillationLoss('ens', timm.loss.SoftTargetCrossEntropy())(logits, target, a)
    expected = -(.5 * log(.9) + .5 * log(.1) + .25 * log(.2) + .75 * log(.8)) / 2 + log(2)
    assert losses['classification'].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_float32_under_autocast(dtype):
    logits = [torch.randn(3, 5).mul(4).to(dtype).requires_grad_() for _ in range(3)]
    alpha, target, criterion = torch.randn(3), torch.tensor([0, 1, 2]), EnsembleDistillationLoss()
    expected = criterion([z.float() for z in logits], target, alpha)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = criterion(logits, target, alpha)
    for term in TERMS:
        assert losses[term].dtype == torch.float32
        assert losses[term].item() == expected[term].item()
    losses['loss'].backward()
    assert {z.grad.dtype for z in logits} == {dtype}


def test_holds_no_state():
    assert not EnsembleDistillationLoss().state_dict() and not list(EnsembleDistillationLoss().parameters())


def test_unknown_mode():
    with pytest.raises(ValueError, match="'both', expected one of none, ens, ens_topdown"):
        EnsembleDistillationLoss('both')
    with pytest.raises(ValueError, match="reduction 'none', expected one of sum, mean"):
        EnsembleDistillationLoss(reduction='none')


@pytest.mark.parametrize('mode', MODES)
def test_mean_over_resolutions(mode):
    logits, a = random_case()
    found = []
    for reduction in EnsembleDistillationLoss.REDUCTIONS:
        z, alpha = as_tensors(logits, a)
        losses = EnsembleDistillationLoss(mode, reduction=reduction)(z, torch.tensor([0, 1, 2]), alpha)
        losses['loss'].backward()
        found.append((losses, [x.grad for x in z] + [alpha.grad] * (mode != 'none')))
    (sums, of_sum), (means, of_mean) = found
    assert means['loss'].item() == pytest.approx(sums['loss'].item() / 4)
    assert all(means[term].equal(sums[term]) for term in TERMS[1:])
    torch.testing.assert_close(of_mean, [g / 4 for g in of_sum])


@pytest.mark.parametrize('mode', MODES)
def test_as_many_weights_as_resolutions(mode):
    with pytest.raises(ValueError, match='logits of 2 resolutions and 3 ensemble weights'):
        EnsembleDistillationLoss(mode)([torch.zeros(1, 2)] * 2, torch.tensor([0]), torch.zeros(3))
