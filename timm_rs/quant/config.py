"""How a network is quantized"""
from dataclasses import dataclass, fields
from typing import Any, Mapping, Sequence, Union

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
            check_bits(self.activation_bits, 'activation_bits', f', or {FLOAT_BITS}')
        elif self.fixed_activation_basis:
            raise UserError('fixed_activation_basis needs activation_bits from 1 to 8.')
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, (list, tuple)) or not all(isinstance(name, str) for name in skip):
            raise UserError(f'skip is {self.skip!r}, expected names of layers.')
        object.__setattr__(self, 'skip', tuple(skip))

    @classmethod
    def of(cls, values: Any) -> 'QuantConfig':
        """Return it as it is, or made of a mapping of its attributes.

        Raises:
            UserError: It is something else.
        """
        known = [field.name for field in fields(cls)]
        if isinstance(values, Mapping) and set(values) <= set(known):
            return cls(**values)
        if isinstance(values, cls):
            return values
        raise UserError(f"quantization is {values!r}, expected a mapping with some of {', '.join(known)}.")


def check_bits(bits: Any, what: str, or_else: str = '') -> int:
    """Return a number of bits.

    Raises:
        UserError: It is not an integer from 1 to 8.

    Example:
        >>> check_bits(2, 'weight_bits')
        2
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise UserError(f'{what} is {bits!r}, expected an integer from {BITS[0]} to {BITS[-1]}{or_else}.')
    return bits
