"""Switchable networks as files that run without timm

One ONNX file for all resolutions with one copy of the shared weights, or one resolution as a plain network. A file is
compared with the network before it gets its name.
"""
import io
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_folder, atomic_path, check_new_file, check_new_folder
from timm_rs_runtime.format import preprocessing_of
from timm_rs_runtime.images import MODES
from timm_rs_runtime.ort import open_onnx
from timm_rs_runtime.unreadable import ReadErrors, UnreadableError

from ..checkpoint import check_finite
from ..quant.quantize import fold, is_quantized
from ..switchable import SwitchableMixin
from .batch_norm import reduce_batch_norms, split_batch_norms
from .describe import describe, set_metadata
from .trace import ExportError, quiet, trace_onnx, trace_program, trace_torchscript
from .verify import Run, compare_int8, verify

__all__ = [
    'FORMATS', 'INT8_FORMATS', 'PRECISIONS',
    'export_coreml', 'export_executorch', 'export_int8', 'export_litert', 'export_resolution', 'export_switchable',
]

FORMATS = ('onnx', 'torch-export', 'torchscript')
INT8_FORMATS = ('qdq', 'qoperator')
PRECISIONS = ('float32', 'fp16')


def export_switchable(
        model: nn.Module,
        path: str,
        class_names: Optional[Sequence[str]] = None,
        tolerance: float = 0.,
        overwrite: bool = False,
        precision: str = 'float32',
        split_batch_norm: bool = False,
) -> Dict[int, float]:
    """Write one ONNX file that serves every resolution, chosen by the height and width of the input.

    The weights that the resolutions share are in it once; each BatchNorm is a scale and a bias per resolution.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        class_names: Names of the classes, in their order; if None those that the model records.
        tolerance: Largest difference of logits between the file and the network in float64 that is accepted, besides
            what rounding explains.
        overwrite: Replace a file of this name.
        precision: 'float32', or 'fp16' for weights and activations of 16 bits; images and logits stay float32.
        split_batch_norm: Write each BatchNorm as a multiplication and an addition. MNN and tract need it: they take
            BatchNormalization only with constant parameters. ONNX Runtime is slower with it where sizes are not fixed.

    Returns:
        The largest difference of logits found at each resolution.

    Raises:
        ExportError: The network cannot be traced or merged, or differs from its file.
        UserError: The network is not switchable, a weight is not finite, or the number of names is wrong.
    """
    check_new_file(path, overwrite)
    _check_precision(precision)
    plain, metadata = _take_all(model, class_names)
    graph = _trace_all(plain, metadata['architecture'], split_batch_norms if split_batch_norm else reduce_batch_norms)
    from .merge import build  # needs onnx

    with atomic_path(path, overwrite) as partial:
        run = _save_onnx(build(graph), dict(metadata, precision=precision), partial)
        return verify(run, plain, metadata['architecture'], tolerance, precision=precision)


def export_int8(
        model: nn.Module,
        path: str,
        images: Sequence[Any],
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 4,
        overwrite: bool = False,
        errors: Optional[ReadErrors] = None,
        int8_format: str = 'qdq',
) -> Dict[int, Dict[str, float]]:
    """Write one int8 ONNX file that serves every resolution, see timm_rs.export.int8.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        images: Images like those in use, as files or PIL images, for the ranges of activations; about 100.
        batch_size: Images of a batch.
        class_names, overwrite: See export_switchable.
        errors: Where unreadable images are reported, which are left out; by default the first one is raised.
        int8_format: 'qdq', which every runtime reads, or 'qoperator' for Session(mode='low_memory').

    Returns:
        For each resolution how the file compares with the network on these images: 'agreement', the share with the
        same top-1, and 'error', the root mean square of the differences of logits over that of the logits (less their
        mean).

    Raises:
        ExportError: The network has no graph for all sizes or no int8 form, or its int8 form is far from it.
        UserError: The network is not switchable, a weight is not finite, or there are no images.
    """
    check_new_file(path, overwrite)
    if int8_format not in INT8_FORMATS:
        raise UserError(f"Unknown int8_format {int8_format!r}, expected {' or '.join(INT8_FORMATS)}.")
    if not images:
        raise UserError('There are no images to measure the ranges of activations on.')
    plain, metadata = _take_all(model, class_names)
    name = metadata['architecture']
    graph = _trace_all(plain, name)
    batches = _read(images, batch_size, metadata, errors or ReadErrors(0))
    from .int8 import Int8Error, measure_ranges, to_int8  # needs onnx
    from .merge import build

    try:
        graph = to_int8(graph, measure_ranges(graph, batches), int8_format)
    except Int8Error as e:
        raise ExportError(f'{name} has no int8 form: {e}') from e
    with atomic_path(path, overwrite) as partial:
        run = _save_onnx(build(graph), dict(metadata, precision='int8'), partial)
        return compare_int8(run, plain, batches, name)


def export_executorch(
        model: nn.Module,
        path: str,
        images: Sequence[Any] = (),
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 1,
        tolerance: float = 0.,
        overwrite: bool = False,
        errors: Optional[ReadErrors] = None,
) -> Dict[int, Any]:
    """Write one ExecuTorch program with a method for each resolution, see timm_rs.export.executorch.

    The method forward_160 takes images [batch_size, C, 160, 160], contiguous in memory; `resolutions` returns the sizes
    and `metadata` the preprocessing and the class names as JSON.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        images: If given the program is in int8, see export_int8.
        batch_size: Images of a batch.
        class_names, tolerance, overwrite: See export_switchable.
        errors: See export_int8.

    Returns:
        As export_switchable, or with images as export_int8.

    Raises:
        ExportError: The network cannot be traced or lowered, or differs from its file.
        UserError: The network is not switchable, a weight is not finite, or the number of names is wrong.
    """
    check_new_file(path, overwrite)
    _check_batch_size(batch_size)
    plain, metadata = _take_all(model, class_names)
    from .executorch import load, lower, trace_float, trace_int8  # needs executorch

    if images:
        metadata['precision'] = 'int8'
        batches = _read(images, batch_size, metadata, errors or ReadErrors(0))
        batches = {r: [b for b in some if len(b) == batch_size] for r, some in batches.items()}
        if not all(batches.values()):
            raise UserError(f'There are fewer readable images than batch_size, {batch_size}.')
        programs = trace_int8(plain, batches)
    else:
        programs = trace_float(plain, batch_size)
    with atomic_path(path, overwrite) as partial:
        lower(programs, metadata, partial)
        run = load(partial)
        if images:
            return compare_int8(run, plain, batches, metadata['architecture'])
        return verify(run, plain, metadata['architecture'], tolerance, (batch_size,))


def export_litert(
        model: nn.Module,
        path: str,
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 1,
        tolerance: float = 0.,
        overwrite: bool = False,
) -> Dict[int, float]:
    """Write one LiteRT file with a signature for each resolution, see timm_rs.export.litert.

    The signature forward_160 takes `images` [batch_size, C, 160, 160] and returns `logits`.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        batch_size: Images of a batch.
        class_names, tolerance, overwrite: See export_switchable.

    Returns:
        As export_switchable.

    Raises:
        ExportError: The network cannot be traced or converted, or differs from its file.
        UserError: The network is not switchable, a weight is not finite, or the number of names is wrong.
    """
    check_new_file(path, overwrite)
    _check_batch_size(batch_size)
    plain, metadata = _take_all(model, class_names)
    from .litert import convert, load, save  # needs litert-torch

    with atomic_path(path, overwrite) as partial:
        save(convert(plain, batch_size), metadata, partial)
        return verify(load(partial), plain, metadata['architecture'], tolerance, (batch_size,))


def export_coreml(
        model: nn.Module,
        path: str,
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 1,
        tolerance: float = 0.,
        precision: str = 'float32',
) -> None:
    """Write one Core ML package with a function for each resolution, see timm_rs.export.coreml.

    The function forward_160 takes images [batch_size, C, 160, 160]. The package is not compared with the network, for
    only Apple's systems run it; in fp16 the network itself is, computed in 16 bits.

    Args:
        model: Switchable network.
        path: Folder to write, NAME.mlpackage, complete or not at all.
        batch_size: Images of a batch.
        class_names, tolerance, precision: See export_switchable.

    Raises:
        ExportError: The network cannot be traced or converted, or is another one in 16 bits.
        UserError: The network is not switchable, a weight is not finite, or the number of names is wrong.
    """
    path = os.fspath(path)
    if not path.endswith('.mlpackage'):
        raise UserError(f'{path}: expected a name that ends in .mlpackage, which Core ML needs.')
    check_new_folder(path)
    _check_batch_size(batch_size)
    _check_precision(precision)
    plain, metadata = _take_all(model, class_names)
    from .coreml import convert, in_16_bits, save  # needs coremltools

    if precision == 'fp16':
        verify(in_16_bits(plain), plain, metadata['architecture'], tolerance, (batch_size,), precision)
    models = {r: convert(network, r, batch_size, precision) for r, network in plain.items()}
    with atomic_folder(path) as partial:
        save(models, dict(metadata, precision=precision), partial)


def export_resolution(
        model: nn.Module,
        resolution: int,
        path: str,
        format: str = 'onnx',
        batch_size: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        tolerance: float = 0.,
        overwrite: bool = False,
        precision: str = 'float32',
) -> float:
    """Write the plain network of one resolution, BatchNorms fused into convolutions.

    Args:
        model: Switchable network.
        resolution: Input size in pixels.
        path: File to write, complete or not at all.
        format: 'onnx', 'torch-export' (for torch.export.load) or 'torchscript' (for torch.jit.load).
        batch_size: Images of a batch, None for any number.
        class_names, tolerance, overwrite: See export_switchable.
        precision: See export_switchable, for 'onnx'.

    Returns:
        The largest difference of logits found.

    Raises:
        ExportError: The network cannot be traced, or differs from its file.
        UserError: There is no such resolution or format, or a weight is not finite.
    """
    if batch_size is not None:
        _check_batch_size(batch_size)
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}, expected one of {', '.join(FORMATS)}.")
    _check_precision(precision)
    if precision != 'float32' and format != 'onnx':
        raise UserError(f'{precision} is written to ONNX files, expected format onnx instead of {format}.')
    if format == 'torch-export' and not os.fspath(path).endswith('.pt2'):
        raise UserError(f'{path}: expected a name that ends in .pt2, which torch.export.load needs.')
    check_new_file(path, overwrite)
    network = _take(model, resolution)
    metadata = dict(describe(model, (resolution,), class_names), precision=precision)
    extra_files = {'timm_rs.json': json.dumps(metadata)}
    with atomic_path(path, overwrite) as partial, quiet():
        if format == 'onnx':
            run = _save_onnx(trace_onnx(network, resolution, batch_size, fuse=True), metadata, partial)
        elif format == 'torch-export':
            content = io.BytesIO()  # torch would end the process where the disk is full
            torch.export.save(trace_program(network, resolution, batch_size), content, extra_files=extra_files)
            Path(partial).write_bytes(content.getbuffer())
            run = torch.export.load(partial).module()
        else:
            with open(partial, 'wb') as file:  # torch does not accept every name
                torch.jit.save(trace_torchscript(network, resolution, batch_size), file, _extra_files=extra_files)
            run = torch.jit.load(partial)
        batch_sizes = (batch_size,) if batch_size else (1, 3)
        found = verify(run, {resolution: network}, metadata['architecture'], tolerance, batch_sizes, precision)
        return found[resolution]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f'batch_size is {batch_size}, expected a positive number.')


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"Unknown precision {precision!r}, expected {' or '.join(PRECISIONS)}.")


def _check_switchable(model: nn.Module) -> None:
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{type(model).__name__} is not switchable, expected a network of make_switchable.')


def _take(model: nn.Module, resolution: int) -> nn.Module:
    """Return the plain network of one resolution in eval mode, with layers that every runtime has."""
    _check_switchable(model)
    network = model.at(resolution).eval()
    check_finite(network.state_dict(), f'{type(network).__name__} at {resolution} px')
    return fold(network) if is_quantized(network) else network


def _take_all(model: nn.Module, class_names: Optional[Sequence[str]]) -> Tuple[Dict[int, nn.Module], Dict[str, Any]]:
    """Return the plain network of each resolution, and the metadata of their file."""
    _check_switchable(model)
    plain = {r: _take(model, r) for r in model.resolutions}
    return plain, describe(model, model.resolutions, class_names)


def _read(
        images: Sequence[Any],
        batch_size: int,
        metadata: Dict[str, Any],
        errors: ReadErrors,
) -> Dict[int, List[np.ndarray]]:
    """Return the preprocessed batches of each resolution, without the images that cannot be read."""
    channels = len(metadata['mean'])
    if channels not in MODES:
        name = metadata['architecture']
        raise UserError(f'The ranges of activations are measured on images, but {name} takes {channels} channels.')
    preprocessing, mode = preprocessing_of(metadata), MODES[channels]
    batches = {resolution: [] for resolution in metadata['resolutions']}
    opened = (image for image in (errors.open(image, mode) for image in images) if image is not None)
    while group := list(islice(opened, batch_size)):
        for resolution in batches:
            batches[resolution].append(np.stack([preprocessing(image, resolution) for image in group]))
    if not any(batches.values()):
        raise UnreadableError(f'None of the {len(images)} images can be read.')
    return batches


def _trace_all(
        plain: Dict[int, nn.Module],
        name: str,
        rewrite: Callable[[nn.Module], nn.Module] = reduce_batch_norms,
) -> Any:
    """Return the graph of a network at all sizes, its BatchNorms rewritten for inference."""
    models = [trace_onnx(rewrite(network), resolution) for resolution, network in plain.items()]
    from .merge import MergeError, merge  # needs onnx

    try:
        return merge(models, tuple(plain))
    except MergeError as e:
        raise ExportError(
            f'{name} has no graph that serves all sizes: {e} Write one size (--resolution), or a function for each '
            '(executorch, coreml).') from e


def _save_onnx(model: Any, metadata: Dict[str, Any], path: str) -> Run:
    """Write an ONNX model in the precision of its metadata, and return what runs it."""
    import onnx

    if metadata['precision'] == 'fp16':
        from onnxruntime.transformers.float16 import convert_float_to_float16  # needs onnx
        from onnxruntime.transformers.onnx_model import OnnxModel

        with quiet():  # about weights that are too small
            model = convert_float_to_float16(model, keep_io_types=True)
        OnnxModel.graph_topological_sort(model.graph)  # the Cast of the images is at the end
    set_metadata(model, metadata)
    onnx.checker.check_model(model)
    with open(path, 'wb') as f:
        f.write(model.SerializeToString())
    session = open_onnx(path, threads=torch.get_num_threads())
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
