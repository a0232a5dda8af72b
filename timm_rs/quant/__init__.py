"""Quantized Resolution Switchable Networks"""
from .packing import pack_state_dict, unpack_state_dict
from .quantize import fold, is_quantized, quantize
from .quantizers import ActivationQuantizer, QuantConv2d

__all__ = [
    'ActivationQuantizer',
    'QuantConv2d',
    'fold',
    'is_quantized',
    'pack_state_dict',
    'quantize',
    'unpack_state_dict',
]
