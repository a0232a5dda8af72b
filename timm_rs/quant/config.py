"""How a network is quantized"""
from dataclasses import dataclass
from typing import Any, Sequence, Union

from timm_rs_runtime.errors import UserError

__all__ = ['BITS', 'FLOAT_BITS', 'QuantConfig', 'check_bits']

BITS = range(1, 9)
FLOAT_BITS = 32  # activations that stay as they are


@dataclass(frozen=True)
class QuantConfig:
    """How the convolutions of a network are quantized.

    Attributes:
        weight_bits: Bits of each weight, 1 to 8.
        activation_bits: Bits of each activation, 1 to 8, or 32 to leave them as they are.
        skip: Names of layers that stay as they are, beside the first and the classifier, with wildcards.
        fixed_activation_basis: Learn the bases of activations from the largest resolution only.

    Raises:
        UserError: Bits are out of range, or activations are to have a fixed basis and none.

    Example:
        >>> QuantConfig(weight_bits=4, skip='layer1.*')
        QuantConfig(weight_bits=4, activation_bits=32, skip=('layer1.*',), fixed_activation_basis=False)
    """
    weight_bits: int = 2
    activation_bits: int = FLOAT_BITS
    skip: Union[str, Sequence[str]] = ()
    fixed_activation_basis: bool = False

    def __post_init__(self):
        check_bits(self.weight_bits, 'weight_bits')
        if self.activation_bits != FLOAT_BITS:
            check_bits(self.activation_bits, 'activation_bits')
        elif self.fixed_activation_basis:
            raise UserError('fixed_activation_basis needs activation_bits from 1 to 8.')
        object.__setattr__(self, 'skip', (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))


def check_bits(bits: Any, what: str) -> int:
    """Return a number of bits.

    Raises:
        UserError: It is not an integer from 1 to 8.

    Example:
        >>> check_bits(2, 'weight_bits')
        2
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise UserError(f'{what} is {bits!r}, expected an integer from {BITS[0]} to {BITS[-1]}.')
    return bits
