"""Learned quantizers with a basis of K values (Zhang et al., "LQ-Nets", ECCV 2018, arXiv 1807.10029)

A value x becomes the inner product of a code b and a basis v of K entries, one of 2^K levels. Codes are {-1, 1}^K for
weights, where each output channel has a basis, and {0, 1}^K for activations, where a layer has one. Every forward pass
in training quantizes with the basis that it finds and then moves this basis towards the one that fits the codes best
in the least-squares sense (one iteration of QEM, algorithm 1 of LQ-Nets). Gradients know nothing of the basis.

The tables of levels and the fit are float64 and have one row per basis; what is as large as the tensors is float32.
"""
import math
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers.padding import pad_same

from ..resolutions import Switch, is_recomputing
from .config import check_bits

__all__ = [
    'ActivationSite',
    'ActivationQuantizer',
    'QuantConv2d',
    'QuantConv2dSame',
    'code_table',
    'level_index',
    'weight_basis',
]

RETENTION = 0.9  # share of the old basis that the moving average keeps in an update
NORMAL_QUANTILE = 0.6745  # a quarter of a normal distribution lies above

_MAX_COMPARED = 32  # thresholds; where there are as many, each value is searched
_CHUNK = {'cpu': 2 ** 16, None: 2 ** 24}  # elements at a time: what fits into a cache, or bounds the memory elsewhere


def code_table(basis: torch.Tensor, low: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the levels of bases in ascending order, and where each stands when its code is read as a binary number.

    Args:
        basis: [R, K], one basis a row.
        low: What a bit of 0 stands for in a code, -1 or 0.

    Returns:
        Levels [R, 2^K] in float64, and their codes as numbers from 0 to 2^K - 1 [R, 2^K], bit i weighing v_i.

    Example:
        >>> levels, codes = code_table(torch.tensor([[1., 2.]]), low=-1)
        >>> levels.tolist(), codes.tolist()
        ([[-3.0, -1.0, 1.0, 3.0]], [[0, 1, 2, 3]])
    """
    basis = _wide(basis)
    numbers = torch.arange(2 ** basis.shape[1], device=basis.device)
    levels = sum(_bit(numbers, i, low) * basis[:, i:i + 1] for i in range(basis.shape[1]))
    return levels.sort(dim=1, stable=True)


def weight_basis(deviation: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the initial bases [R, K] for normal weights of a standard deviation [R].

    Example:
        >>> weight_basis(torch.tensor([1.]), bits=2).tolist()
        [[0.337..., 0.674...]]
    """
    steps = 2. ** torch.arange(1 - bits, 1, device=deviation.device, dtype=deviation.dtype)
    return deviation[:, None] * NORMAL_QUANTILE * steps


def level_index(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return which of the ascending levels of its row each value takes: the one above all midpoints that it exceeds.

    Args:
        x: [R, N].
        levels: [R, L].

    Example:
        >>> level_index(torch.tensor([[-9., 0., 0.1]]), torch.tensor([[-1., 1.]]).double()).tolist()
        [[0, 0, 1]]
    """
    x = x if x.dtype == torch.float64 else x.float()
    return torch.searchsorted(_thresholds(levels, x.dtype).to(x.device), x.contiguous())


class ActivationSite(nn.Identity):
    """A place to quantize activations; a network with such places quantizes them only there (timm_rs.quant)."""


class _LearnedBasis(nn.Module):
    """What both quantizers have in common: the buffers basis [R, K] and basis_updates, and what happens to them.

    The moving average of bases is zero-debiased: with m <- 0.9 m + 0.1 v* and t <- t + 1 the basis is m / (1 - 0.9^t).
    As m follows from the basis and t, only these two are kept: v <- v + (v* - v) 0.1 / (1 - 0.9^t). The first update
    replaces the initial basis. A moving average of the model (timm's ModelEmaV3) averages the bases like the weights
    that they fit.
    """

    bits: int
    low: int  # what a bit of 0 stands for

    def _setup(self, basis: torch.Tensor, switch: Optional[Switch]) -> None:
        self.bits = basis.shape[1]
        self.register_buffer('basis', basis)
        self.register_buffer('basis_updates', torch.zeros((), dtype=torch.int64, device=basis.device))
        self._switch = switch
        self._first_pass: Dict[Optional[int], torch.Tensor] = {}

    @torch.no_grad()
    def _quantize(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the levels that values take, and the table of levels; update the basis in training.

        Args:
            x: Values of any shape if there is one basis, else [R, ...].
        """
        basis, update = self.basis, self.training
        if self.training and not torch.compiler.is_compiling():
            resolution = self._switch.active if self._switch is not None else None
            if is_recomputing():  # with the basis of the forward pass, which other resolutions have updated since
                basis, update = self._first_pass.get(resolution, basis), False
            else:
                self._first_pass[resolution] = basis.clone()
        update = update and self._learns()
        levels, codes = code_table(basis, self.low)
        values = levels.to(x.device, x.dtype)
        work = x if x.dtype == torch.float64 else x.float()
        thresholds = _thresholds(levels, work.dtype).to(x.device)
        work, shape, order = _as_rows(work, len(basis))
        quantized, sums = work.new_empty(work.shape, dtype=x.dtype), []
        for index in _chunks(work):
            code, above = _encode(work[index], thresholds[index[0]], update)
            table = values[index[0]]
            if update:  # otherwise training would go on, unnoticed, with NaN taken for the lowest level
                table = table.masked_fill(above[1, :, :1].isnan().to(table.device), math.nan)
            quantized[index] = table.gather(1, code)
            sums.append(above)
        if update:
            above = torch.stack(sums).sum(0) if len(basis) == 1 else torch.cat(sums, 1)
            self._update(*_normal_equations(above, codes, self.low), x.numel() // len(basis))
        return quantized.view(shape).permute(order), values

    def _learns(self) -> bool:
        return True

    def _update(self, gram: torch.Tensor, moment: torch.Tensor, count: int) -> None:
        """Move the basis towards the best one for the codes.

        Args:
            gram: B'B of the codes B, the upper triangle row by row [R, K (K + 1) / 2].
            moment: B'x [R, K].
            count: Values per basis.
        """
        old = _wide(self.basis)
        gram, moment, count = self._share(_wide(gram), _wide(moment), count)
        matrix = gram.new_empty(len(gram), self.bits, self.bits)
        i, j = torch.triu_indices(self.bits, self.bits, device=gram.device)
        matrix[:, i, j] = matrix[:, j, i] = gram
        residual = moment - (matrix * old[:, None]).sum(2)
        matrix.diagonal(dim1=1, dim2=2).add_(self._damping(count))
        fitted = old + torch.linalg.solve_ex(matrix, residual.unsqueeze(2))[0].squeeze(2)
        fitted = torch.where(fitted.isfinite(), fitted, old)  # an overflow under autocast must not last
        self.basis_updates.add_(1)
        share = (1 - RETENTION) / (1 - RETENTION ** _wide(self.basis_updates))
        self.basis.copy_(old + (fitted - old) * share)

    def _share(self, gram: torch.Tensor, moment: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor, Any]:
        return gram, moment, count

    def _damping(self, count: Any) -> Any:
        raise NotImplementedError


class QuantConv2d(_LearnedBasis, nn.Conv2d):
    """A convolution whose weights take 2^K levels in every output channel.

    The weights that it learns keep their key; buffers are `basis` [out_channels, K] and `basis_updates`. The basis is
    fitted to v* = (B'B + eI)^-1 (B'w + e v), e = 1e-4. The gradient of the levels goes to the weights unchanged. A list
    of S resolutions makes S updates in its order, which in training is largest first. Processes that train together
    have the same weights, so they find the same bases.

    Args:
        in_channels: See nn.Conv2d, as the other arguments.
        bits: K, 1 to 8.

    Attributes:
        input_quantizer: An ActivationQuantizer for the input of this layer, or None.

    Raises:
        ValueError: K is out of range.

    Example:
        >>> conv = QuantConv2d(3, 8, 3, bits=2).eval()
        >>> conv.quantized_weight[0].unique().numel()
        4
    """

    low = -1

    def __init__(self, *args: Any, bits: int = 2, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.setup(bits)

    def setup(self, bits: int, switch: Optional[Switch] = None) -> None:
        """Begin with the basis for weights of He's initialization.

        Args:
            bits: K, 1 to 8.
            switch: Switch of the network.
        """
        n = self.kernel_size[0] * self.kernel_size[1] * self.out_channels
        deviation = self.weight.new_full((self.out_channels,), math.sqrt(2 / n))
        self._setup(weight_basis(deviation, check_bits(bits, 'bits')), switch)
        self.input_quantizer = None

    @property
    def quantized_weight(self) -> torch.Tensor:
        """Levels of the weights, in their shape; in training each look updates the basis."""
        return _PassGradient.apply(self.weight, self._quantize(self.weight)[0], None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self._conv_forward(x, self.quantized_weight, self.bias)

    def _damping(self, count: int) -> float:
        return 1e-4

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, bits={self.bits}'


class QuantConv2dSame(QuantConv2d):
    """The same for timm's Conv2dSame, which pads by the size of its input."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return super()._conv_forward(pad_same(x, self.kernel_size, self.stride, self.dilation), weight, bias)


class ActivationQuantizer(_LearnedBasis):
    """Quantizes activations, which a ReLU has made positive, to 2^K levels that begin with 0.

    Buffers are `basis` [1, K] and `basis_updates`. The basis is fitted to all images of all processes; entries that
    the codes leave open, because a bit was not used, stay as they are. The gradient is that of min(x, top level).

    Args:
        bits: K, 1 to 8.
        switch: Switch of the network.
        fixed: Learn only from the largest resolution.
        device: Device of the basis.
        dtype: Dtype of the basis.

    Raises:
        ValueError: K is out of range.

    Example:
        >>> quantizer = ActivationQuantizer(bits=2).eval()
        >>> quantizer(torch.tensor([0., 0.3, 0.5, 7.])).tolist()
        [0.0, 0.449..., 0.449..., 1.348...]
    """

    low = 0

    def __init__(
            self,
            bits: int = 2,
            switch: Optional[Switch] = None,
            fixed: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        exponents = torch.arange(check_bits(bits, 'bits'), device=device, dtype=dtype or torch.get_default_dtype())
        self._setup((2 ** exponents * (NORMAL_QUANTILE * 2 / (2 ** bits - 1)))[None], switch)
        self.fixed = fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, levels = self._quantize(x)
        return _PassGradient.apply(x, quantized, levels[:, -1])

    def steps(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the levels [2^K] in ascending order, and the thresholds that a value exceeds to take the next one."""
        levels, _ = code_table(self.basis, self.low)
        dtype, device = self.basis.dtype, self.basis.device
        return levels[0].to(device, dtype), _thresholds(levels, dtype)[0].to(device)

    def _learns(self) -> bool:
        return not self.fixed or self._switch is None or self._switch.active == self._switch.resolutions[0]

    def _share(self, gram: torch.Tensor, moment: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor, Any]:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return gram, moment, count
        sums = torch.cat([gram[0], moment[0], gram.new_full((1,), count)])
        dist.all_reduce(sums)
        return sums[:gram.shape[1]][None], sums[gram.shape[1]:-1][None], sums[-1]

    def _damping(self, count: Any) -> Any:
        return 1e-10 * count  # just enough for a solution that is not unique

    def extra_repr(self) -> str:
        return f'bits={self.bits}{", fixed" if self.fixed else ""}'


class _PassGradient(torch.autograd.Function):
    """The levels with a gradient for the values: unchanged, or zero for the values above the top level."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantized: torch.Tensor, top: Optional[torch.Tensor]) -> torch.Tensor:
        if top is not None:
            ctx.save_for_backward(x, top)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[torch.Tensor, None, None]:
        saved = ctx.saved_tensors
        if saved:
            x, top = saved
            gradient = gradient * (x <= top)
        return gradient, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == 'mps':  # has no float64
        x = x.cpu()
    return x.double()


def _bit(numbers: torch.Tensor, i: int, low: int) -> torch.Tensor:
    bit = (numbers >> i) & 1
    return bit if low == 0 else 2 * bit - 1


def _thresholds(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the midpoints of neighbouring levels, rounded down: the same values of dtype exceed them."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    rounded = middle.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded > middle, below, rounded)


def _as_rows(x: torch.Tensor, rows: int) -> Tuple[torch.Tensor, torch.Size, List[int]]:
    """Return values as rows [R, N] in their order in memory, and how to view and permute them back."""
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    dims = [0, 2, 3, 1] if channels_last else list(range(x.ndim))
    x = x.permute(dims)
    return x.reshape(rows, -1), x.shape, [dims.index(d) for d in range(len(dims))]


def _chunks(x: torch.Tensor) -> Iterator[Tuple[slice, slice]]:
    """Yield slices of a few rows [R, N] at a time, or of parts of the only row."""
    rows, length = x.shape
    size = _CHUNK.get(x.device.type, _CHUNK[None])
    if torch.compiler.is_compiling() or x.numel() <= size:  # a compiler fuses what is done to each value
        yield slice(None), slice(None)
    elif rows == 1:
        for start in range(0, length, size):
            yield slice(None), slice(start, start + size)
    else:
        step = max(1, size // length)
        for start in range(0, rows, step):
            yield slice(start, start + step), slice(None)


def _encode(x: torch.Tensor, thresholds: torch.Tensor, learn: bool) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Return which level of its row each value takes and, to learn, what takes each level or one above it.

    Args:
        x: Values [R, N].
        thresholds: Between the levels [R, L - 1].
        learn: Return the second one too.

    Returns:
        Levels as indices [R, N], and the number and the sum of the values [2, R, L] in float64.
    """
    if thresholds.shape[1] >= _MAX_COMPARED:
        index = torch.searchsorted(thresholds.contiguous(), x.contiguous())
        if not learn:
            return index, None
        wide = _wide(torch.stack([torch.ones_like(x), x]))
        sums = wide.new_zeros(2, len(x), thresholds.shape[1] + 1)
        sums.scatter_add_(2, index.to(wide.device).expand_as(wide), wide)
        return index, sums.flip(2).cumsum(2).flip(2)
    count, exceeds = torch.zeros_like(x), torch.empty_like(x)  # CPUs are slow with bool
    sums = [x.new_full((len(x),), x.shape[1]), x.sum(1)]
    for threshold in thresholds.split(1, dim=1):
        torch.gt(x, threshold, out=exceeds)
        count += exceeds
        if learn:
            sums += [exceeds.sum(1), (exceeds * x).sum(1)]
    return count.int().long(), _wide(torch.stack([torch.stack(sums[i::2], 1) for i in range(2)]))


def _normal_equations(above: torch.Tensor, codes: torch.Tensor, low: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return B'B, the upper triangle row by row [R, K (K + 1) / 2], and B'x [R, K] for codes B and values x.

    Args:
        above: See _encode.
        codes: See code_table.
        low: What a bit of 0 stands for.
    """
    ones, values = above - nn.functional.pad(above[..., 1:], (0, 1))  # the number and the sum at each level
    codes = codes.to(above.device)
    bits = range(codes.shape[1].bit_length() - 1)
    b = [_bit(codes, i, low) for i in bits]
    gram = torch.stack([(b[i] * b[j] * ones).sum(1) for i in bits for j in bits if i <= j], 1)
    return gram, torch.stack([(c * values).sum(1) for c in b], 1)
