"""Plain networks as graphs of ONNX, torch.export and TorchScript"""
import io
import logging
import warnings
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Union

import torch
import torch.nn as nn

from timm_rs_runtime.errors import UserError, one_line

from .._compat import get_model_input_config, without_onnx_log
from .batch_norm import fuse_batch_norms

__all__ = [
    'ExportError', 'example_images', 'quiet', 'trace_onnx', 'trace_program', 'trace_torchscript', 'tracing']

OPSET = 17


class ExportError(UserError, RuntimeError):
    """A network cannot be exported, or its file does not compute what the network does; the message says why."""


def trace_onnx(network: nn.Module, resolution: int, batch_size: Optional[int] = None, fuse: bool = False) -> Any:
    """Return the ONNX model of a plain network at one size.

    Args:
        network: Network in eval mode.
        resolution: Input size in pixels.
        batch_size: Images of a batch, None for any number.
        fuse: Fuse BatchNorms into the convolutions before them.

    Raises:
        ExportError: The network cannot be traced.
    """
    try:
        import onnx
    except ImportError as e:
        raise ImportError("Exporting to ONNX needs the packages of: pip install ./runtime '.[export]'.") from e
    file = io.BytesIO()
    mode = torch.onnx.TrainingMode.EVAL if fuse else torch.onnx.TrainingMode.PRESERVE  # the latter fuses nothing
    options = {} if batch_size else dict(dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}})
    others = 'Formats that do not need ONNX may hold it: executorch, coreml, and for one size torch-export.'
    with tracing(network, resolution, others), without_onnx_log():
        # The exporter of torch.export writes a BatchNorm's parts in as many nodes, and takes ten times as long.
        torch.onnx.export(
            network, (example_images(network, resolution, batch_size or 2),), file, dynamo=False, training=mode,
            input_names=['images'], output_names=['logits'], opset_version=OPSET, **options)
    return onnx.load_from_string(file.getvalue())


def trace_program(network: nn.Module, resolution: int, batch_size: Optional[int] = None) -> Any:
    """Return the torch.export program of a plain network at one size, see trace_onnx; its BatchNorms are fused."""
    images = example_images(network, resolution, batch_size or 2)
    shapes = None if batch_size else ({0: torch.export.Dim('batch')},)
    with tracing(network, resolution):
        return torch.export.export(fuse_batch_norms(network, images), (images,), dynamic_shapes=shapes)


def trace_torchscript(network: nn.Module, resolution: int, batch_size: Optional[int] = None) -> Any:
    """Return the TorchScript of a plain network at one size, see trace_onnx; its BatchNorms are fused."""
    images = example_images(network, resolution, batch_size or 2)
    with tracing(network, resolution), torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(fuse_batch_norms(network, images), images))


def example_images(network: nn.Module, resolution: int, batch_size: int, seed: int = 0) -> torch.Tensor:
    """Return images as a network gets them: noise with the spectrum of photographs, mean 0 and deviation 1.

    The amplitude of a frequency is inverse to it. White noise is unlike any image, and its logits may be far larger
    than those of images.

    Example:
        >>> images = example_images(nn.Flatten(), 32, 4)
        >>> images.shape, bool((images[..., 1:] - images[..., :-1]).std() < 1)
        (torch.Size([4, 3, 32, 32]), True)
    """
    channels = get_model_input_config(network)['input_size'][0]
    white = torch.randn(
        batch_size, channels, resolution, resolution, generator=torch.Generator().manual_seed(seed))
    frequency = torch.hypot(torch.fft.fftfreq(resolution)[:, None], torch.fft.rfftfreq(resolution))
    images = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.clamp(min=1 / resolution), s=white.shape[2:])
    deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
    return (images - mean) / deviation


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what tracers print about Python values that are constant here, such as sizes."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def tracing(network: nn.Module, resolution: Union[int, str], hint: str = '') -> Iterator[None]:
    """Trace quietly; what tracers raise, which has no common class, becomes an ExportError that ends with a hint."""
    try:
        with quiet():
            yield
    except Exception as e:
        message = f'{type(network).__name__} cannot be traced at {resolution} px: {one_line(e, 300)} {hint}'
        raise ExportError(message.rstrip()) from e
