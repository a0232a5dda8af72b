"""The quantizers against a literal transcription of LQ-Nets in float64"""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_equal

from timm_rs.quant import ActivationQuantizer, QuantConv2d, quantizers
from timm_rs.quant.quantize import StepFunction

ALL_BITS = range(1, 9)
NORMAL_QUANTILE = 0.6745


class Reference:
    """One quantizer of one basis, as written: codes, levels, thresholds, QEM and its zero-debiased average."""

    def __init__(self, basis, alphabet, epsilon):
        self.v, self.epsilon = np.array(basis, dtype=np.float64), epsilon
        self.all_codes = np.array(list(itertools.product(alphabet, repeat=len(basis))), dtype=np.float64)
        self.m, self.t = np.zeros(len(basis)), 0

    def quantize(self, x):
        """Return the levels that values take, and their codes."""
        by_level = sorted(self.all_codes, key=lambda code: code @ self.v)
        levels = np.array([code @ self.v for code in by_level])
        thresholds = (levels[1:] + levels[:-1]) / 2
        index = (x[:, None] > thresholds).sum(1)
        return levels[index], np.array(by_level)[index]

    def update(self, x):
        _, b = self.quantize(x)
        eye = np.eye(len(self.v))
        v = np.linalg.solve(b.T @ b + self.epsilon * eye, b.T @ x + self.epsilon * self.v)
        self.m = 0.9 * self.m + 0.1 * v
        self.t += 1
        self.v = self.m / (1 - 0.9 ** self.t)


def he_conv(*args, **kwargs):
    """Return a layer whose weights are as large as its initial basis takes them to be."""
    conv = QuantConv2d(*args, **kwargs)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out')
    return conv


def weight_reference(conv):
    n = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels
    k = conv.bits
    basis = [2 ** i * NORMAL_QUANTILE * math.sqrt(2 / n) / 2 ** (k - 1) for i in range(k)]
    return [Reference(basis, (-1, 1), 1e-4) for _ in range(conv.out_channels)]


def activation_reference(bits):
    return Reference([2 ** i * NORMAL_QUANTILE * 2 / (2 ** bits - 1) for i in range(bits)], (0, 1), 0.)


def double(x):
    return x.detach().double().numpy()


def bases(references):
    return torch.tensor(np.stack([r.v for r in references]))


def values_of(references, rows):
    """Return the levels that the rows of a tensor take, rounded once."""
    return torch.tensor(np.stack([r.quantize(row)[0] for r, row in zip(references, double(rows))])).to(rows.dtype)


def assert_close(basis, references):
    torch.testing.assert_close(basis.double(), bases(references), rtol=1e-6, atol=1e-6)


# The specification

@pytest.mark.parametrize('bits', ALL_BITS)
def test_weights_follow_the_specification(bits):
    conv = he_conv(12, 5, 3, bits=bits)
    references = weight_reference(conv)
    assert_close(conv.basis, references)
    for _ in range(4):
        rows = conv.weight.detach().flatten(1)
        held = copy.deepcopy(references)
        for reference, basis in zip(held, double(conv.basis)):
            reference.v = basis
        assert_equal(conv.quantized_weight.detach().flatten(1), values_of(held, rows))  # before the update
        for reference, row in zip(references, double(rows)):
            reference.update(row)
        assert_close(conv.basis, references)
        with torch.no_grad():
            conv.weight += 0.1 * torch.randn_like(conv.weight) * conv.weight.std()
    assert conv.basis_updates == 4


@pytest.mark.parametrize('bits', ALL_BITS)
def test_activations_follow_the_specification(bits):
    quantizer, reference = ActivationQuantizer(bits), activation_reference(bits)
    assert_close(quantizer.basis, [reference])
    for _ in range(4):
        x = torch.relu(torch.randn(6, 8, 5, 5))
        held = copy.deepcopy(reference)
        held.v = double(quantizer.basis)[0]
        assert_equal(quantizer(x).flatten()[None], values_of([held], x.flatten()[None]))
        reference.update(double(x).flatten())
        assert_close(quantizer.basis, [reference])


@pytest.mark.parametrize('bits', [2, 8])
def test_a_value_on_a_threshold_takes_the_level_below(bits):
    quantizer = ActivationQuantizer(bits).eval()
    quantizer.basis.copy_(2. ** torch.arange(bits))  # levels 0, 1, 2, ...: midpoints are exact
    x = torch.tensor([0.5, 0.50001, 1.5, 2.49999, 2.5, 1e9])
    assert quantizer(x).tolist() == [0, 1, 1, 2, 2, 2 ** bits - 1]


def test_levels_are_sorted_whatever_the_basis():
    conv = he_conv(64, 1, 1, bits=2).eval()
    conv.basis.copy_(torch.tensor([[2., -1.]]))
    expected = Reference([2., -1.], (-1, 1), 0.).quantize(double(conv.weight).flatten())[0]
    assert_equal(conv.quantized_weight.detach().flatten().double(), torch.tensor(expected))


@pytest.mark.parametrize('training', [True, False])
def test_two_bits_are_four_levels_per_channel(training):
    conv = he_conv(32, 6, 3, bits=2).train(training)
    for _ in range(3):
        weight = conv.quantized_weight
    assert [row.unique().numel() for row in weight] == [4] * 6


@pytest.mark.parametrize('bits, best', [(1, 0.3634), (2, 0.1175)])  # of Max (1960) for a Gaussian
@pytest.mark.parametrize('scale', [0.5, 1., 3.])
def test_gaussian_weights(bits, best, scale):
    conv = he_conv(512, 8, 3, bits=bits)
    conv.weight.data *= scale
    for _ in range(60):
        weight = conv.quantized_weight
    errors = ((weight - conv.weight) ** 2).sum((1, 2, 3)) / (conv.weight ** 2).sum((1, 2, 3))
    assert errors.max() <= 0.13 * best / 0.1175
    assert errors.mean() >= 0.97 * best


def test_the_initial_basis_is_forgotten():
    one, other = he_conv(8, 4, 3), he_conv(8, 4, 3)
    other.load_state_dict(one.state_dict())
    other.basis.mul_(1.0001)  # the same codes
    for conv in (one, other):
        assert_equal(conv.quantized_weight > 0, conv.weight > 0)
    torch.testing.assert_close(one.basis, other.basis, rtol=1e-5, atol=0)


def test_eval_changes_nothing():
    conv, quantizer = he_conv(3, 4, 3).eval(), ActivationQuantizer().eval()
    before = copy.deepcopy((conv.state_dict(), quantizer.state_dict()))
    conv(quantizer(torch.rand(2, 3, 8, 8)))
    assert_equal((conv.state_dict(), quantizer.state_dict()), before)


# Gradients

@pytest.mark.parametrize('training', [True, False])
def test_gradients(training):
    conv, quantizer = he_conv(3, 4, 3).train(training), ActivationQuantizer().train(training)
    x = torch.rand(2, 3, 8, 8).mul(4).requires_grad_()
    with torch.no_grad():
        q, weight = copy.deepcopy(quantizer)(x), copy.deepcopy(conv).quantized_weight
    top = quantizer.basis.sum()
    assert 0.2 < (x > top).float().mean() < 0.9
    q.requires_grad_()
    weight.requires_grad_()
    gradient = torch.randn(2, 4, 6, 6)
    F.conv2d(q, weight, conv.bias).backward(gradient)
    conv(quantizer(x)).backward(gradient)
    assert_equal(conv.weight.grad, weight.grad)  # as it is
    assert_equal(x.grad, torch.where(x <= top, q.grad, 0.))  # of min(x, top)


# What real activations do

def test_a_bit_that_is_not_used_stays():
    quantizer = ActivationQuantizer(2)
    v0, v1 = quantizer.basis[0].tolist()
    quantizer(torch.zeros(3, 4, 2, 2))
    assert quantizer.basis[0].tolist() == [v0, v1] and quantizer.basis_updates == 1
    quantizer = ActivationQuantizer(2)
    quantizer(torch.tensor([0., 0.5, 0.6]))  # only the first bit
    torch.testing.assert_close(quantizer.basis[0], torch.tensor([0.55, v1]))
    quantizer = ActivationQuantizer(2)
    quantizer(torch.tensor([0., 7., 9.]))  # both bits, always together: their sum is known, their difference stays
    torch.testing.assert_close(quantizer.basis[0], torch.tensor([4. - (v1 - v0) / 2, 4. + (v1 - v0) / 2]))


@pytest.mark.parametrize('bits', ALL_BITS)
def test_few_weights_of_a_channel(bits):
    conv = he_conv(4, 4, 3, groups=4, bits=bits)  # nine
    for _ in range(10):
        weight = conv.quantized_weight
    assert conv.basis.isfinite().all() and (weight - conv.weight).abs().max() < conv.weight.abs().max()


@pytest.mark.parametrize('bits', [2, 5])
def test_nan_is_not_hidden_in_training(bits):
    x = torch.rand(2, 3, 4, 4)
    quantizer, conv = ActivationQuantizer(bits), QuantConv2d(3, 3, 1, bits=bits)
    basis = quantizer.basis.clone()
    x[1, 2, 3, 3] = math.nan
    assert quantizer(x).isnan().any()
    conv.weight.data[1, 0] = math.nan
    assert conv(torch.ones(1, 3, 4, 4)).isnan().flatten(2).any(2).tolist() == [[False, True, False]]
    assert torch.equal(quantizer.basis, basis)


def test_an_overflow_is_not_for_ever():
    quantizer = ActivationQuantizer(2)
    x = torch.rand(100)
    quantizer(x)
    before = quantizer.basis.clone()
    quantizer(torch.cat([x, torch.tensor([torch.inf])]))
    assert_equal(quantizer.basis, before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    conv, quantizer = he_conv(8, 8, 3), ActivationQuantizer()
    expected = copy.deepcopy((conv, quantizer))
    x = torch.rand(4, 8, 9, 9).to(dtype)
    for _ in range(3):
        expected[1](x.float()), expected[0].quantized_weight
        with torch.autocast('cpu', dtype):
            q = quantizer(x)
            assert q.dtype == dtype and conv(q).dtype == dtype and q.unique().numel() <= 4
    for actual, module in zip((conv, quantizer), expected):
        assert_equal(actual.state_dict(), module.state_dict())


def test_memory_format_and_chunks(monkeypatch):
    conv, quantizer = he_conv(8, 16, 3), ActivationQuantizer()
    x = torch.rand(3, 8, 7, 5)
    q, weight = quantizer(x), conv.quantized_weight
    monkeypatch.setitem(quantizers._CHUNK, 'cpu', 100)
    other_conv, other = he_conv(8, 16, 3), ActivationQuantizer()
    with torch.no_grad():
        other_conv.weight.copy_(conv.weight)
    other_conv.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    other_q, other_weight = other(x), other_conv.quantized_weight
    assert_equal((other_q, other_weight), (q, weight))
    assert other_q.is_contiguous(memory_format=torch.channels_last)
    assert other_weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close((other.basis, other_conv.basis), (quantizer.basis, conv.basis), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('bits', [1, 2, 6])
def test_steps_are_those_of_the_quantizer(bits):
    quantizer = ActivationQuantizer(bits)
    x = torch.randn(1000)
    quantizer(x)
    quantizer.eval()
    assert_equal(StepFunction(*quantizer.steps())(x), quantizer(x))


@pytest.mark.parametrize('bits', [0, 9, 32, -1, 2., '2', None, True])
def test_bits_out_of_range(bits):
    for create in (lambda: he_conv(3, 4, 3, bits=bits), lambda: ActivationQuantizer(bits)):
        with pytest.raises(ValueError, match=f'bits is {bits!r}, expected an integer from 1 to 8'):
            create()


# torch.compile

@pytest.mark.parametrize('bits, dynamic', [(2, None), (6, True)])
def test_compile(bits, dynamic):
    eager = nn.Sequential(ActivationQuantizer(bits), QuantConv2d(4, 4, 3, bits=bits))
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for n in (2, 4, 3) if dynamic else (2, 2, 2):
        x = torch.rand(n, 4, 8, 8)
        gradients = []
        for model, call in ((eager, eager), (compiled, run)):
            inputs = x.clone().requires_grad_()
            y = call(inputs)
            y.square().sum().backward()
            gradients.append((y.detach(), inputs.grad, model[1].weight.grad))
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert compiled[1].basis_updates == 3
