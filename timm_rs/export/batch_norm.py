"""BatchNorm for inference: a scale and a bias, or part of the convolution before it"""
import copy
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
from timm.layers.conv2d_same import Conv2dSame
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .._compat import BatchNorm

__all__ = ['fuse_batch_norms', 'reduce_batch_norms', 'split_batch_norms']


def reduce_batch_norms(network: nn.Module) -> nn.Module:
    """Return a copy for inference whose BatchNorms have mean 0, variance 1 and epsilon 0: a scale and a bias.

    Example:
        >>> bn = reduce_batch_norms(nn.Sequential(nn.BatchNorm2d(2, eps=0.21))).get_submodule('0')
        >>> bn.weight.tolist(), bn.eps
        ([0.9090909361839294, 0.9090909361839294], 0.0)
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            scale = (module.running_var.double() + module.eps).rsqrt()
            bias = torch.zeros_like(scale)
            if module.affine:
                scale, bias = scale * module.weight.double(), module.bias.double()
            dtype = module.running_var.dtype
            module.weight = nn.Parameter(scale.to(dtype), requires_grad=False)
            module.bias = nn.Parameter((bias - module.running_mean.double() * scale).to(dtype), requires_grad=False)
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            module.eps = 0.
    return network


def fuse_batch_norms(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a copy for inference in which each BatchNorm that follows a convolution is fused into it.

    Nothing is fused where that changes the answers: where something else reads the output of such a convolution, or
    changes it in place before.

    Args:
        network: Plain network.
        images: A batch, to find out which layers follow each other.
    """
    original, network = network, reduce_batch_norms(network)
    made: Dict[int, Any] = {}  # outputs are kept, or another could get the same id
    pairs: Dict[nn.Module, nn.Module] = {}
    hooks = []
    for module in network.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            hooks.append(module.register_forward_hook(lambda m, _, out: made.update({id(out): (m, out)})))
        elif isinstance(module, BatchNorm):
            hooks.append(module.register_forward_pre_hook(
                lambda m, args: pairs.update({m: made[id(args[0])][0]} if id(args[0]) in made else {})))
    with torch.no_grad():
        expected = network(images)
    for hook in hooks:
        hook.remove()
    for parent in list(network.modules()):
        for name, bn in list(parent.named_children()):
            if bn in pairs:
                conv = pairs[bn]
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
                setattr(parent, name, _without_norm(bn))
    with torch.no_grad():
        is_same = torch.allclose(network(images), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    return network if is_same else reduce_batch_norms(original)


class _ScaleAndShift(nn.Module):
    def __init__(self, bn: nn.Module, shape: Tuple[int, ...]):
        super().__init__()
        self.register_buffer('scale', bn.weight.data.view(shape))
        self.register_buffer('shift', bn.bias.data.view(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale.dim() == x.dim():
            return x * self.scale + self.shift
        shape = (-1, *(1,) * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _depthwise(bn: nn.Module) -> nn.Module:
    conv = nn.Conv2d(len(bn.weight), len(bn.weight), 1, groups=len(bn.weight), dtype=bn.weight.dtype)
    conv.weight, conv.bias = nn.Parameter(bn.weight.data.view(-1, 1, 1, 1)), bn.bias
    return conv


def split_batch_norms(network: nn.Module, form: str = 'vector') -> nn.Module:
    """Return a copy for inference whose BatchNorms are a multiplication and an addition.

    Args:
        network: Plain network.
        form: Of those of images: with factors of shape [C] ('vector') or [1, C, 1, 1] ('image'), or a depthwise
            convolution of 1x1 ('convolution'). With 'image' XNNPACK takes 1.01 instead of 1.10 times as long for
            ResNet-18 as with BatchNorms fused.
    """
    network = reduce_batch_norms(network)
    for parent in list(network.modules()):
        for name, bn in list(parent.named_children()):
            if isinstance(bn, BatchNorm) and bn.track_running_stats:
                if form == 'convolution' and isinstance(bn, nn.BatchNorm2d):
                    layer = _depthwise(bn)
                else:
                    shape = (1, -1, 1, 1) if form == 'image' and isinstance(bn, nn.BatchNorm2d) else (-1,)
                    layer = _ScaleAndShift(bn, shape)
                setattr(parent, name, nn.Sequential(layer, _without_norm(bn)))
    return network


def _without_norm(bn: nn.Module) -> nn.Module:
    """Return what timm's layers do after the normalization."""
    rest = [m for n, m in bn.named_children() if n in ('drop', 'act') and not isinstance(m, nn.Identity)]
    return nn.Sequential(*rest) if rest else nn.Identity()
