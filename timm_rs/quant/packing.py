"""Packed state dicts: K bits for each quantized weight

A layer's `weight` becomes `weight_codes`, a row of bytes, and `weight_shape`; its `basis` stays. Codes of K bits follow
one another, the lowest bit first; bit i of a code says whether v_i is added or subtracted. Everything else stays as it
is.
"""
import math
from typing import Dict, Mapping

import torch

from timm_rs_runtime.errors import UserError

from .config import BITS
from .quantizers import QuantConv2d, code_table, level_index

__all__ = ['pack_state_dict', 'unpack_state_dict']

_CODES, _SHAPE, _BASIS, _WEIGHT = '.weight_codes', '.weight_shape', '.basis', '.weight'


def pack_state_dict(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return a state dict whose quantized weights are packed; the exact weights behind the levels are lost.

    Args:
        state_dict: State dict of a quantized network.

    Raises:
        ValueError: It holds no quantized weights.

    Example:
        >>> conv = QuantConv2d(16, 8, 3, bits=2)
        >>> packed = pack_state_dict(torch.nn.Sequential(conv).state_dict())
        >>> packed['0.weight_codes'].numel() == conv.weight.numel() * 2 // 8
        True
    """
    packed = {}
    for key, value in state_dict.items():
        basis = state_dict.get(key.removesuffix(_WEIGHT) + _BASIS)
        if not key.endswith(_WEIGHT) or basis is None:
            packed[key] = value
            continue
        levels, codes = code_table(basis, QuantConv2d.low)
        rows = value.reshape(len(basis), -1)
        codes = codes.to(rows.device).gather(1, level_index(rows, levels))
        name = key.removesuffix(_WEIGHT)
        packed[name + _CODES] = _to_bytes(codes.flatten(), basis.shape[1])
        packed[name + _SHAPE] = torch.tensor(value.shape, dtype=torch.int32, device=value.device)
    if packed.keys() == state_dict.keys():
        raise UserError('There are no quantized weights to pack, see timm_rs.quant.quantize.')
    return packed


def unpack_state_dict(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return a state dict with the weights of a packed one, each of them a level.

    Args:
        state_dict: Any state dict; one that is not packed is returned as it is.

    Raises:
        ValueError: It is damaged; the message names the layer.
    """
    unpacked = {}
    for key, value in state_dict.items():
        if not key.endswith((_CODES, _SHAPE)):
            unpacked[key] = value
        if not key.endswith(_CODES):
            continue
        name = key.removesuffix(_CODES)
        basis, shape = state_dict.get(name + _BASIS), state_dict.get(name + _SHAPE)
        if basis is None or shape is None:
            raise UserError(f'{key} is there, but {name}{_SHAPE if shape is None else _BASIS} is missing.')
        shape = shape.tolist() if shape.ndim == 1 and shape.dtype == torch.int32 else []
        if basis.ndim != 2 or basis.shape[1] not in BITS or len(shape) != 4 or shape[0] != len(basis) or min(shape) < 1:
            raise UserError(f'{name} has a basis {tuple(basis.shape)} for packed weights of shape {tuple(shape)}.')
        bits = basis.shape[1]
        size = math.ceil(math.prod(shape) * bits / 8)
        if value.dtype != torch.uint8 or value.ndim != 1 or len(value) != size:
            raise UserError(
                f'{key} is {tuple(value.shape)} {str(value.dtype).removeprefix("torch.")}, expected {size} bytes for '
                f'weights {tuple(shape)} at {bits} bits.')
        levels, order = code_table(basis, QuantConv2d.low)
        by_code = torch.empty_like(levels).scatter_(1, order, levels).to(basis.device, basis.dtype)
        codes = _from_bytes(value, bits, math.prod(shape))
        unpacked[name + _WEIGHT] = by_code.gather(1, codes.view(len(basis), -1)).view(shape)
    return unpacked


def _to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    stream = codes[:, None] >> torch.arange(bits, device=codes.device) & 1
    stream = torch.nn.functional.pad(stream.flatten(), (0, -codes.numel() * bits % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def _from_bytes(values: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    stream = (values.long()[:, None] >> torch.arange(8, device=values.device) & 1).flatten()[:count * bits]
    return (stream.view(count, bits) << torch.arange(bits, device=values.device)).sum(1)
