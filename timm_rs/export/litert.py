"""One LiteRT (TensorFlow Lite) file for all sizes, with a signature for each

The converter keeps constants of equal content once. So weights that the resolutions share are in the file once, unless
a BatchNorm that differs is fused into them, as the converter does with BatchNorms and multiplications alike. It does
not fuse convolutions: here a BatchNorm of images is a depthwise convolution of 1x1.
"""
import io
import json
import zipfile
from contextlib import redirect_stdout
from functools import partial
from typing import Any, Callable, Dict

import torch
import torch.nn as nn

from .batch_norm import split_batch_norms
from .trace import example_images, quiet, tracing
from .verify import Run

try:
    with quiet():
        import litert_torch
        from ai_edge_litert.interpreter import Interpreter
except ImportError as e:
    raise ImportError(
        "Exporting to LiteRT needs the packages of: pip install ./runtime '.[litert]', in an environment of its own."
    ) from e

__all__ = ['convert', 'load', 'save']

_SHARED = partial(split_batch_norms, form='convolution')


class _Named(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return dict(logits=self.network(images))


def convert(
        plain: Dict[int, nn.Module],
        batch_size: int,
        rewrite: Callable[[nn.Module], nn.Module] = _SHARED,
) -> Any:
    """Return the LiteRT model with a signature for each resolution.

    Args:
        plain: The plain network of each resolution.
        batch_size: Images of a batch.
        rewrite: Rewrites BatchNorms for inference.
    """
    converter = litert_torch
    for resolution, network in plain.items():
        images = example_images(network, resolution, batch_size)
        network = _Named(rewrite(network)).eval()
        converter = converter.signature(f'forward_{resolution}', network, sample_kwargs=dict(images=images))
    sizes = ', '.join(map(str, plain))
    with tracing(next(iter(plain.values())), sizes), redirect_stdout(io.StringIO()):  # its steps
        return converter.convert()


def save(model: Any, metadata: Dict[str, Any], path: str) -> None:
    """Write a model, and the metadata as timm_rs.json in a zip archive at its end, as TensorFlow Lite Metadata does."""
    with redirect_stdout(io.StringIO()):
        model.export(path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('timm_rs.json', json.dumps(metadata))


def load(path: str) -> Run:
    """Return what runs the signature of the size of the images."""
    interpreter = Interpreter(path)
    runners = {}

    def run(images: torch.Tensor) -> torch.Tensor:
        name = f'forward_{images.shape[-1]}'
        runners.setdefault(name, interpreter.get_signature_runner(name))
        return torch.from_numpy(runners[name](images=images.numpy())['logits'])
    return run
