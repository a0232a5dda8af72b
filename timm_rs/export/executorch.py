"""One ExecuTorch program for all sizes, run by XNNPACK

A program has a method per resolution, each for input of a fixed size. ExecuTorch keeps constants of equal content once,
so weights that the resolutions share are in the file once, unless a BatchNorm that differs is fused into them. In
float32 a BatchNorm therefore stays a multiplication and an addition. In int8 its scale becomes part of the scales of
the weights, of which there is one per output channel, and the integers stay equal.

In int8 the ranges of activations are measured, except those of linear layers, which take the range of each batch and
return float32: logits have a long tail, and would be cut off at the largest that was measured.
"""
import copy
import dataclasses
import json
from typing import Any, Dict, Sequence

import numpy as np
import torch
import torch.nn as nn

from .batch_norm import fuse_batch_norms, split_batch_norms
from .trace import example_images, quiet, tracing
from .verify import Run

try:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
        from torchao.quantization.pt2e import PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
except ImportError as e:
    raise ImportError("Exporting to ExecuTorch needs the packages of: pip install ./runtime '.[executorch]'.") from e

__all__ = ['load', 'lower', 'trace_float', 'trace_int8']

_LEVELS = 127
# The quantizer's own is 2 ** -12: channels that a small BatchNorm scale makes smaller would lose their levels.
_LEAST_SCALE = 1e-8


def trace_float(plain: Dict[int, nn.Module], batch_size: int) -> Dict[int, Any]:
    """Return the torch.export program of each resolution; BatchNorms multiply and add."""
    return {r: _trace(split_batch_norms(network, form='image'), network, r, batch_size) for r, network in plain.items()}


def trace_int8(plain: Dict[int, nn.Module], batches: Dict[int, Sequence[np.ndarray]]) -> Dict[int, Any]:
    """Return the torch.export program of each resolution in int8, with the same integers as weights.

    Args:
        plain: The plain network of each resolution, largest first; they share their weights.
        batches: Preprocessed images [N, C, H, W] of each resolution, for the ranges of activations; all of one N.
    """
    config, linear = (get_symmetric_quantization_config(is_per_channel=True, is_dynamic=d) for d in (False, True))
    observer = PerChannelMinMaxObserver.with_args(eps=_LEAST_SCALE)
    weight = dataclasses.replace(config.weight, observer_or_fake_quant_ctr=observer)
    config, linear = (dataclasses.replace(c, weight=weight) for c in (config, linear))
    programs, first = {}, None
    for resolution, network in plain.items():
        fused = fuse_batch_norms(_on_levels(network), example_images(network, resolution, 2))
        first = first or fused
        fused = split_batch_norms(_with_signs_of(fused, first), form='image')
        images = [torch.from_numpy(batch) for batch in batches[resolution]]
        traced = _trace(fused, network, resolution, len(images[0])).module()
        with tracing(network, resolution), torch.no_grad():
            prepared = prepare_pt2e(
                traced, XNNPACKQuantizer().set_global(config).set_operator_type(torch.ops.aten.linear.default, linear))
            for batch in images:
                prepared(batch)
            programs[resolution] = torch.export.export(convert_pt2e(prepared), (images[0],))
    return programs


def lower(programs: Dict[int, Any], metadata: Dict[str, Any], path: str) -> None:
    """Write the programs as methods forward_224, ..., with methods that return `resolutions` and `metadata` (JSON)."""
    constants = dict(resolutions=list(programs), metadata=json.dumps(metadata, ensure_ascii=False))
    with quiet():
        program = to_edge_transform_and_lower(
            {f'forward_{r}': p for r, p in programs.items()}, partitioner=[XnnpackPartitioner()],
            constant_methods=constants)
        with open(path, 'wb') as file:
            program.to_executorch().write_to_file(file)


def load(path: str) -> Run:
    """Return what runs the method of the size of the images, which have to be contiguous in memory."""
    program = Runtime.get().load_program(path)
    methods = {r: program.load_method(f'forward_{r}') for r in program.load_method('resolutions').execute([])}
    return lambda images: methods[images.shape[-1]].execute([images.contiguous()])[0].clone()


def _trace(network: nn.Module, source: nn.Module, resolution: int, batch_size: int) -> Any:
    with tracing(source, resolution):
        return torch.export.export(network.eval(), (example_images(source, resolution, batch_size),))


def _on_levels(network: nn.Module) -> nn.Module:
    """Return a copy with weights on the levels of int8: every scaling of a channel then has the same integers."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.data
            step = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp(min=1e-20) / _LEVELS
            layer.weight.data = (weight / step).round() * step
    return network


class _Signs(nn.Module):
    def __init__(self, signs: torch.Tensor):
        super().__init__()
        self.register_buffer('signs', signs.view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.signs


def _with_signs_of(network: nn.Module, first: nn.Module) -> nn.Module:
    """Give convolutions the signs of those of the first network, where BatchNorm had changed these, in place.

    The signs of their output channels change after them instead.
    """
    for name, conv in list(network.named_modules()):
        if isinstance(conv, nn.Conv2d):
            signs = (conv.weight.data * first.get_submodule(name).weight.data).flatten(1).sum(1).sign()
            signs[signs == 0] = 1.
            if (signs < 0).any():
                conv.weight.data *= signs.view(-1, 1, 1, 1)
                conv.bias.data *= signs
                network.set_submodule(name, nn.Sequential(conv, _Signs(signs)))
    return network
