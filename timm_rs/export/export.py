"""Switchable networks as files that run without timm

One ONNX file for all resolutions with one copy of the shared weights, or one resolution as a plain network. A file is
compared with the network before it gets its name.
"""
import copy
import io
import json
import logging
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.model_config import resolve_input_data_config
from timm.layers.conv2d_same import Conv2dSame
from timm.models._input import get_model_input_config
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.files import atomic_path, check_new_file
from timm_rs_runtime.format import preprocessing_of
from timm_rs_runtime.images import MODES
from timm_rs_runtime.ort import open_onnx
from timm_rs_runtime.unreadable import ReadErrors, UnreadableError

from ..evaluate import count_madds
from ..quant.quantize import StepFunction, fold, is_quantized
from ..switchable import SwitchableMixin
from ..version import __version__

__all__ = [
    'FORMATS',
    'ExportError',
    'describe',
    'export_int8',
    'export_resolution',
    'export_switchable',
    'reduce_batch_norms',
]

FORMATS = ('onnx', 'torch-export', 'torchscript')
TOLERANCE = 1e-4
OPSET = 17
_SEEDS = (0, 1, 2)
_STEP_TOLERANCE = 0.15
_INT8_TOLERANCE = 0.5


class ExportError(UserError, RuntimeError):
    """A network cannot be exported, or its file does not do what the network does; the message says why."""


def export_switchable(
        model: nn.Module,
        path: str,
        class_names: Optional[Sequence[str]] = None,
        tolerance: float = TOLERANCE,
        overwrite: bool = False,
) -> Dict[int, float]:
    """Write one ONNX file that serves every resolution, chosen by the height and width of the input.

    The weights that the resolutions share are in it once; each BatchNorm is a scale and a bias per resolution.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        class_names: Names of the classes, in their order; if None what the model tells.
        tolerance: Largest absolute difference of logits between the network and the file.
        overwrite: Replace a file of this name.

    Returns:
        The largest difference of logits found at each resolution.

    Raises:
        ExportError: The network cannot be traced or merged, or differs from its file by more than the tolerance.
        ValueError: The network is not switchable, or there is another number of names.
    """
    from .merge import build

    check_new_file(path, overwrite)
    metadata = _describe_switchable(model, class_names)
    plain = {r: _take(model, r) for r in model.resolutions}
    merged = build(_trace_all(plain, metadata['architecture']))
    set_metadata(merged, metadata)
    with atomic_path(path, overwrite) as partial:
        _save_onnx(merged, partial)
        return verify(_onnx_runner(partial), plain, metadata['architecture'], tolerance)


def export_int8(
        model: nn.Module,
        path: str,
        images: Sequence[Any],
        class_names: Optional[Sequence[str]] = None,
        batch_size: int = 4,
        overwrite: bool = False,
        errors: Optional[ReadErrors] = None,
) -> Dict[int, Dict[str, float]]:
    """Write one int8 ONNX file that serves every resolution, see timm_rs.export.int8.

    Args:
        model: Switchable network.
        path: File to write, complete or not at all.
        images: Images like those to come, as files or PIL images, for the ranges of activations; some 100.
        class_names: Names of the classes, in their order; if None what the model tells.
        batch_size: Images of a batch.
        overwrite: Replace a file of this name.
        errors: Where unreadable images are reported, which are left out; by default the first is an error.

    Returns:
        For each resolution how the file does on these images beside the network: 'agreement', the share with the same
        top-1, and 'error', the root mean square of the differences of logits over that of the logits (less their mean).

    Raises:
        ExportError: The network has no graph for all sizes or no int8 form, or its int8 form is far from it.
        ValueError: The network is not switchable, or there are no images.
    """
    from timm_rs_runtime.preprocess import stack

    from .int8 import QuantizationError, calibrate, quantize
    from .merge import build

    check_new_file(path, overwrite)
    metadata = dict(_describe_switchable(model, class_names), precision='int8')
    if not images:
        raise UserError('There are no images to calibrate on.')
    if len(metadata['mean']) not in MODES:
        channels = len(metadata['mean'])
        raise UserError(f"int8 is calibrated on images, but {metadata['architecture']} takes {channels} channels.")
    preprocessing = preprocessing_of(metadata)
    plain = {r: _take(model, r) for r in model.resolutions}
    graph = _trace_all(plain, metadata['architecture'])
    errors, mode = errors or ReadErrors(0), MODES[len(metadata['mean'])]
    batches = {r: [] for r in plain}
    for i in range(0, len(images), batch_size):
        opened = [errors.open(image, mode) for image in images[i:i + batch_size]]
        opened = [image for image in opened if image is not None]
        for r in plain if opened else ():
            batches[r].append(stack(opened, preprocessing, r))
    if not batches[model.resolutions[0]]:
        raise UnreadableError(f'None of the {len(images)} images can be read.')
    try:
        merged = build(quantize(graph, calibrate(graph, batches)))
    except QuantizationError as e:
        raise ExportError(f"{metadata['architecture']} cannot be quantized: {e}") from e
    set_metadata(merged, metadata)
    with atomic_path(path, overwrite) as partial:
        _save_onnx(merged, partial)
        run = _onnx_runner(partial)
        found = {r: _fidelity(run, network, batches[r]) for r, network in plain.items()}
        for resolution, row in found.items():
            if not row['error'] <= _INT8_TOLERANCE:
                raise ExportError(
                    f"The int8 form of {metadata['architecture']} is {row['error']:.0%} off at {resolution} px, "
                    f'expected at most {_INT8_TOLERANCE:.0%}; no file was written.')
    return found


def export_resolution(
        model: nn.Module,
        resolution: int,
        path: str,
        format: str = 'onnx',
        batch_size: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        tolerance: float = TOLERANCE,
        overwrite: bool = False,
) -> float:
    """Write the plain network of one resolution, BatchNorms folded into convolutions.

    Args:
        model: Switchable network.
        resolution: Input size in pixels.
        path: File to write, complete or not at all.
        format: 'onnx', 'torch-export' (for torch.export.load, AOTInductor) or 'torchscript' (for torch.jit.load).
        batch_size: Images of a batch, None for any number.
        class_names: Names of the classes, in their order; if None what the model tells. ONNX only.
        tolerance: Largest absolute difference of logits between the network and the file.
        overwrite: Replace a file of this name.

    Returns:
        The largest difference of logits found.

    Raises:
        ExportError: The network cannot be exported, or differs from its file by more than the tolerance.
        ValueError: There is no such resolution or format.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f'batch_size is {batch_size}, expected a positive number.')
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}, expected one of {', '.join(FORMATS)}.")
    if format == 'torch-export' and not path.endswith('.pt2'):
        raise UserError(f'{path}: torch.export.load wants a file whose name ends in .pt2.')
    check_new_file(path, overwrite)
    network = _take(model, resolution)
    metadata = describe(model, (resolution,), class_names)
    save, runner = {
        'onnx': (_write_onnx, _onnx_runner),
        'torch-export': (_write_torch_export, lambda p: torch.export.load(p).module()),
        'torchscript': (_write_torchscript, torch.jit.load),
    }[format]
    with atomic_path(path, overwrite) as partial, _quiet():
        try:
            save(network, resolution, batch_size, metadata, partial)
        except Exception as e:  # of the tracers, which have no common class
            raise ExportError(f"{metadata['architecture']} cannot be exported as {format}: {one_line(e, 300)}") from e
        batch_sizes = (batch_size,) if batch_size else (1, 3)
        errors = verify(runner(partial), {resolution: network}, metadata['architecture'], tolerance, batch_sizes)
    return errors[resolution]


def _take(model: nn.Module, resolution: int) -> nn.Module:
    """Return the plain network of one resolution in eval mode, of layers that every runtime knows."""
    network = model.at(resolution).eval()
    return fold(network) if is_quantized(network) else network


def reduce_batch_norms(network: nn.Module) -> nn.Module:
    """Return a copy for inference whose BatchNorms have mean 0, variance 1 and epsilon 0: a scale and a bias.

    Example:
        >>> bn = reduce_batch_norms(nn.Sequential(nn.BatchNorm2d(2, eps=0.21))).get_submodule('0')
        >>> bn.weight.tolist(), bn.eps
        ([0.9090909361839294, 0.9090909361839294], 0.0)
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            scale = (module.running_var.double() + module.eps).rsqrt()
            bias = torch.zeros_like(scale)
            if module.affine:
                scale, bias = scale * module.weight.double(), module.bias.double()
            dtype = module.running_var.dtype
            module.weight = nn.Parameter(scale.to(dtype), requires_grad=False)
            module.bias = nn.Parameter((bias - module.running_mean.double() * scale).to(dtype), requires_grad=False)
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            module.eps = 0.
    return network


def describe(
        model: nn.Module,
        resolutions: Sequence[int],
        class_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Return what a file tells of itself: timm_rs_runtime.Session reads it.

    Raises:
        ValueError: There is another number of class names than classes, or the preprocessing is not one of timm.
    """
    config = resolve_input_data_config(model)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    num_classes = model.num_classes
    if class_names is None:
        class_names = cfg.get('label_names') or ()
        if len(class_names) != num_classes:  # of weights for other classes
            class_names = _imagenet_names(num_classes)
    elif list(class_names) == _wordnet_ids(num_classes):  # the folders of ImageNet
        class_names = _imagenet_names(num_classes)
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f'There are {len(class_names)} class names, the model has {num_classes} classes.')
    channels = config['input_size'][0]
    found = dict(
        timm_rs=__version__,
        architecture=cfg.get('architecture') or type(model).__name__,
        precision='float32',
        resolutions=list(resolutions),
        madds={str(r): count_madds(model, r, channels) for r in resolutions},
        num_classes=num_classes,
        class_names=None if class_names is None else list(class_names),
        mean=[float(v) for v in config['mean']],
        std=[float(v) for v in config['std']],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
    )
    if channels in MODES:  # others take no images, but batches
        preprocessing_of(found)
    return found


def trace_onnx(network: nn.Module, resolution: int, batch_size: Optional[int] = None, fold: bool = False) -> Any:
    """Return the ONNX model of a plain network at one size.

    Args:
        network: Network in eval mode.
        resolution: Input size in pixels.
        batch_size: Images of a batch, None for any number.
        fold: Fold BatchNorms into convolutions.

    Raises:
        ExportError: The network cannot be traced.
    """
    try:
        import onnx
    except ImportError as e:
        raise ImportError("Exporting to ONNX needs the packages of: pip install ./runtime '.[export]'.") from e
    file = io.BytesIO()
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE  # the latter folds nothing
    options = {} if batch_size else dict(dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}})
    try:
        with _quiet():
            # The exporter of torch.export writes a BatchNorm's parts in as many nodes, and takes ten times as long.
            torch.onnx.export(
                network, (_random_images(network, resolution, batch_size or 2, 0),), file, dynamo=False, training=mode,
                input_names=['images'], output_names=['logits'], opset_version=OPSET, **options)
    except Exception as e:  # of the tracer, which has no common class
        raise ExportError(f'{type(network).__name__} cannot be traced at {resolution} px: {one_line(e, 300)}') from e
    return onnx.load_from_string(file.getvalue())


def _describe_switchable(model: nn.Module, class_names: Optional[Sequence[str]]) -> Dict[str, Any]:
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{type(model).__name__} is not switchable, expected a network of make_switchable.')
    return describe(model, model.resolutions, class_names)


def _fidelity(run: Any, network: nn.Module, batches: Sequence[np.ndarray]) -> Dict[str, float]:
    """Return how logits of an int8 file stand to those of the network."""
    with torch.inference_mode():
        expected = np.concatenate([network(torch.from_numpy(b)).numpy() for b in batches]).astype(np.float64)
    actual = np.concatenate([run(torch.from_numpy(b)) for b in batches])
    spread = np.sqrt(np.mean((expected - expected.mean(-1, keepdims=True)) ** 2))
    return dict(
        agreement=float(np.mean(expected.argmax(-1) == actual.argmax(-1))),
        error=float(np.sqrt(np.mean((actual - expected) ** 2)) / max(spread, 1e-12)),
    )


def _trace_all(plain: Dict[int, nn.Module], name: str) -> Any:
    from .merge import MergeError, merge

    try:
        return merge([trace_onnx(reduce_batch_norms(n), r) for r, n in plain.items()], tuple(plain))
    except MergeError as e:
        raise ExportError(f'{name} has no graph that serves all sizes: {e}') from e


def verify(
        run: Any,
        plain: Dict[int, nn.Module],
        name: str,
        tolerance: float = TOLERANCE,
        batch_sizes: Sequence[int] = (1, 3),
) -> Dict[int, float]:
    """Return the largest absolute difference between logits of a file and of networks, over a few random batches.

    Args:
        run: Computes logits of a tensor.
        plain: The network of each resolution.
        name: Of the network, for the message.
        tolerance: Largest difference; that of float32 rounding, 1e-6 of the largest logit, is always allowed. Where
            activations are quantized, rounding moves some of them by a whole level: there the root mean square of the
            differences may be 15 % of that of the logits (less their mean) too.
        batch_sizes: Taken in turns.

    Raises:
        ExportError: A difference is larger, or none at all (NaN).
    """
    errors = {}
    for resolution, network in plain.items():
        batches = [_random_images(network, resolution, batch_sizes[s % len(batch_sizes)], s) for s in _SEEDS]
        with torch.inference_mode():
            expected = torch.cat([network(images) for images in batches])
        difference = torch.cat([torch.as_tensor(run(images)) for images in batches]) - expected
        error = errors[resolution] = difference.abs().max().item()
        is_close = error <= max(tolerance, 1e-6 * expected.abs().max().item())
        if not is_close and any(isinstance(m, StepFunction) for m in network.modules()):
            spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
            is_close = bool(difference.square().mean().sqrt() <= _STEP_TOLERANCE * spread)
        if not is_close:
            raise ExportError(
                f'The exported {name} differs from the network by {error:.2g} at {resolution} px, '
                f'expected at most {tolerance:.0e}; no file was written.')
    return errors


def set_metadata(model: Any, metadata: Dict[str, Any]) -> None:
    """Write metadata into an ONNX model, values as JSON."""
    from onnx import helper

    helper.set_model_props(model, {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()})
    model.producer_name, model.producer_version = 'timm_rs', __version__


def _imagenet_names(num_classes: int) -> Optional[Sequence[str]]:
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(num_classes)]


def _wordnet_ids(num_classes: int) -> Optional[Sequence[str]]:
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    return None if subset is None else list(ImageNetInfo(subset).label_names())


def _random_images(network: nn.Module, resolution: int, batch_size: int, seed: int) -> torch.Tensor:
    channels = get_model_input_config(network)['input_size'][0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, channels, resolution, resolution, generator=generator)


def _write_onnx(
        network: nn.Module,
        resolution: int,
        batch_size: Optional[int],
        metadata: Dict[str, Any],
        path: str,
) -> None:
    model = trace_onnx(network, resolution, batch_size, fold=True)
    set_metadata(model, metadata)
    _save_onnx(model, path)


def _save_onnx(model: Any, path: str) -> None:
    with open(path, 'wb') as f:
        f.write(model.SerializeToString())


def _write_torch_export(
        network: nn.Module,
        resolution: int,
        batch_size: Optional[int],
        metadata: Dict[str, Any],
        path: str,
) -> None:
    program = export_program(network, resolution, batch_size)
    torch.export.save(program, path, extra_files={'timm_rs.json': json.dumps(metadata)})


def export_program(network: nn.Module, resolution: int, batch_size: Optional[int] = None) -> Any:
    """Return a torch.export.ExportedProgram of a plain network, BatchNorms folded into convolutions."""
    images = _random_images(network, resolution, batch_size or 2, 0)
    shapes = None if batch_size else ({0: torch.export.Dim('batch')},)
    return torch.export.export(fold_batch_norms(network, images), (images,), dynamic_shapes=shapes)


def fold_batch_norms(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a copy for inference in which each BatchNorm that follows a convolution is folded into it.

    Args:
        network: Plain network.
        images: Batch to find out on what follows what.
    """
    network = reduce_batch_norms(network)
    made: Dict[int, Any] = {}  # outputs are kept, or another could get the same id
    pairs: Dict[nn.Module, nn.Module] = {}
    hooks = []
    for module in network.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            hooks.append(module.register_forward_hook(lambda m, _, out: made.update({id(out): (m, out)})))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(
                lambda m, args: pairs.update({m: made[id(args[0])][0]} if id(args[0]) in made else {})))
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    for parent in list(network.modules()):
        for name, bn in list(parent.named_children()):
            if bn in pairs:
                conv = pairs[bn]
                bias = bn.bias if conv.bias is None else bn.bias + bn.weight * conv.bias
                conv.weight = nn.Parameter(conv.weight * bn.weight[:, None, None, None], requires_grad=False)
                conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
                rest = [m for n, m in bn.named_children() if n in ('drop', 'act') and not isinstance(m, nn.Identity)]
                setattr(parent, name, nn.Sequential(*rest) if rest else nn.Identity())
    return network


def _write_torchscript(
        network: nn.Module,
        resolution: int,
        batch_size: Optional[int],
        metadata: Dict[str, Any],
        path: str,
) -> None:
    images = _random_images(network, resolution, batch_size or 2, 0)
    with torch.no_grad():
        script = torch.jit.freeze(torch.jit.trace(fold_batch_norms(network, images), images))
    with open(path, 'wb') as file:  # torch takes only some names
        torch.jit.save(script, file, _extra_files={'timm_rs.json': json.dumps(metadata)})


def _onnx_runner(path: str) -> Any:
    session = open_onnx(path, threads=torch.get_num_threads())
    return lambda images: session.run(None, {'images': images.numpy()})[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what tracers say of Python values that are constant here, such as sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
