"""Files compared with the networks they were made from"""
import copy
from typing import Callable, Dict, Sequence

import numpy as np
import torch
import torch.nn as nn

from ..quant.quantize import StepFunction
from .trace import ExportError, example_images

__all__ = ['compare_int8', 'verify']

_SEEDS = (0, 1, 2)
# The files of 41 networks of 29 architectures were off by at most 0.24 of what these two accept; those of 24 single
# layers before a mean over up to 448 x 448 pixels, which ONNX Runtime sums in another order, by 0.68. In fp16, files of
# 6 networks were off by at most 0.18 of it.
_ROUNDING = 5  # times the network's own
_LEAST_ROUNDING = 1e-6  # relative to the largest logit
_FP16_ROUNDING = 0.02  # relative to the largest logit
_STEP_TOLERANCE = 0.15
_INT8_TOLERANCE = 0.5

Run = Callable[[torch.Tensor], torch.Tensor]


def verify(
        run: Run,
        plain: Dict[int, nn.Module],
        name: str,
        tolerance: float = 0.,
        batch_sizes: Sequence[int] = (1, 3),
        precision: str = 'float32',
) -> Dict[int, float]:
    """Return the largest difference between logits of a file and of networks in float64, over a few batches.

    What rounding explains is accepted: in float32 5 times the largest difference of the network itself in float32, in
    fp16 2 % of the largest logit. If activations are quantized, rounding moves some of them by a whole level: then the
    network in float32 is the reference, and the root mean square of the differences may be 15 % of that of the logits
    (less their mean).

    Args:
        run: Computes the file's logits.
        plain: The network of each resolution.
        name: Of the network, for the message.
        tolerance: Largest difference that is accepted in any case.
        batch_sizes: Taken in turns.
        precision: Of the file.

    Raises:
        ExportError: A difference is larger, or not a number.
    """
    errors = {}
    for resolution, network in plain.items():
        batches = [example_images(network, resolution, batch_sizes[s % len(batch_sizes)], s) for s in _SEEDS]
        has_steps = any(isinstance(m, StepFunction) for m in network.modules())
        rounded = _logits(network, batches)
        exact = rounded if has_steps else _logits_in_float64(network, batches)
        difference = _logits(run, batches) - exact
        error = errors[resolution] = _largest(difference)
        explained = _ROUNDING * max(_largest(rounded - exact), _LEAST_ROUNDING * _largest(exact))
        if precision == 'fp16':
            explained = max(explained, _FP16_ROUNDING * _largest(exact))
        if error <= max(tolerance, explained) or (has_steps and _relative_error(difference, exact) <= _STEP_TOLERANCE):
            continue
        raise ExportError(
            f'The exported {name} differs from the network by {error:.2g} at {resolution} px, expected at most '
            f'{explained:.2g}, which rounding explains; no file was written. --tolerance accepts more.')
    return errors


def compare_int8(
        run: Run,
        plain: Dict[int, nn.Module],
        batches: Dict[int, Sequence[np.ndarray]],
        name: str,
) -> Dict[int, Dict[str, float]]:
    """Return for each resolution how an int8 file compares with the network, see export_int8.

    Args:
        run: Computes the file's logits.
        plain: The network of each resolution.
        batches: Preprocessed images of each resolution.
        name: Of the network, for the message.

    Raises:
        ExportError: The error is more than one half, or not a number.
    """
    found = {}
    for resolution, network in plain.items():
        images = [torch.from_numpy(batch) for batch in batches[resolution]]
        expected, actual = (_logits(f, images).double() for f in (network, run))
        agreement = (_decisions(expected) == _decisions(actual)).double().mean().item()
        found[resolution] = dict(agreement=agreement, error=_relative_error(actual - expected, expected))
        if not found[resolution]['error'] <= _INT8_TOLERANCE:
            raise ExportError(
                f"The int8 form of {name} is {found[resolution]['error']:.0%} off at {resolution} px, "
                f'expected at most {_INT8_TOLERANCE:.0%}; no file was written.')
    return found


def _decisions(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1) if logits.shape[-1] > 1 else logits > 0


def _logits(run: Run, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([run(images) for images in batches])


def _logits_in_float64(network: nn.Module, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    try:
        return _logits(copy.deepcopy(network).double(), [images.double() for images in batches])
    except RuntimeError:  # a part of it works only in float32
        return _logits(network, batches)


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def _relative_error(difference: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the root mean square of differences over that of logits less their mean over classes; of one over images.
    """
    spread = (logits - logits.mean(-1 if logits.shape[-1] > 1 else 0, keepdim=True)).square().mean().sqrt()
    return (difference.square().mean().sqrt() / spread.clamp(min=1e-12)).item()
