"""Quantized Resolution Switchable Networks"""
from .config import QuantConfig
from .packing import pack_state_dict, unpack_state_dict
from .quantize import fold, is_quantized, quantize
from .quantizers import ActivationQuantizer, QuantConv2d

__all__ = [
    'ActivationQuantizer',
    'QuantConfig',
    'QuantConv2d',
    'fold',
    'is_quantized',
    'pack_state_dict',
    'quantize',
    'unpack_state_dict',
]
