"""One Core ML package for all sizes, with a function for each

Constants of equal content are stored once for all functions. So weights that the resolutions share are in the package
once, unless a BatchNorm that differs is fused into them, which coremltools does by default.
Packages are written on Linux and macOS, but only Apple's systems run them.
"""
import copy
import io
import json
import os
import tempfile
from contextlib import contextmanager, redirect_stderr
from typing import Any, Dict, Iterator

import numpy as np
import torch
import torch.nn as nn

from .batch_norm import reduce_batch_norms
from .trace import example_images, quiet, tracing
from .verify import Run

try:
    with quiet():
        import coremltools
except ImportError as e:
    raise ImportError("Exporting to Core ML needs the packages of: pip install ./runtime '.[coreml]'.") from e

__all__ = ['convert', 'in_16_bits', 'save']

_FUSIONS = {'common::fuse_conv_batchnorm', 'common::fuse_conv_scale'}


def in_16_bits(plain: Dict[int, nn.Module]) -> Run:
    """Return what computes the network of the size of the images in 16 bits, except its images and logits."""
    half = {r: copy.deepcopy(network).half() for r, network in plain.items()}

    def run(images: torch.Tensor) -> torch.Tensor:
        with tracing(plain[images.shape[-1]], images.shape[-1]):
            return half[images.shape[-1]](images.half()).float()
    return run


def convert(network: nn.Module, resolution: int, batch_size: int, precision: str) -> Any:
    """Return the Core ML model of a plain network at one size."""
    passes = coremltools.PassPipeline()
    passes.remove_passes(_FUSIONS)
    images = example_images(network, resolution, batch_size)
    with tracing(network, resolution), _without_progress(), torch.no_grad():
        program = torch.export.export(reduce_batch_norms(network), (images,)).run_decompositions({})
        return coremltools.convert(
            program, inputs=[coremltools.TensorType('images', images.shape, np.float32)],
            outputs=[coremltools.TensorType('logits', dtype=np.float32)], pass_pipeline=passes, skip_model_load=True,
            minimum_deployment_target=coremltools.target.iOS18,  # the first with several functions
            compute_precision=coremltools.precision.FLOAT16 if precision == 'fp16' else coremltools.precision.FLOAT32)


def save(models: Dict[int, Any], metadata: Dict[str, Any], path: str) -> None:
    """Write the models as functions forward_224, ... of one package, the first one the default."""
    functions = coremltools.utils.MultiFunctionDescriptor()
    with quiet(), _without_progress(), tempfile.TemporaryDirectory() as folder:
        for resolution, model in models.items():
            single = os.path.join(folder, f'{resolution}.mlpackage')
            model.save(single)
            functions.add_function(single, 'main', f'forward_{resolution}')
            functions.default_function_name = functions.default_function_name or f'forward_{resolution}'
        merged = os.path.join(folder, 'merged.mlpackage')
        coremltools.utils.save_multifunction(functions, merged)
        package = coremltools.models.MLModel(merged, skip_model_load=True)
        package.user_defined_metadata.update({k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()})
        package.save(path)


@contextmanager
def _without_progress() -> Iterator[None]:
    """Leave out the bars of coremltools, which has no option for that."""
    with redirect_stderr(io.StringIO()):
        yield
