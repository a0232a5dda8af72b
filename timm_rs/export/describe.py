"""What a file records about itself, for timm_rs_runtime.format to read"""
import json
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.format import parse_metadata, preprocessing_of
from timm_rs_runtime.images import MODES

from ..data.classes import imagenet_classes
from ..evaluate import count_madds
from ..version import __version__
from .trace import ExportError, example_images

__all__ = ['describe', 'set_metadata']


def describe(
        model: nn.Module,
        resolutions: Sequence[int],
        class_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Return the metadata of a file.

    Args:
        model: Switchable network.
        resolutions: Input sizes in pixels.
        class_names: Names of the classes, in their order; if None those that the model records, or ImageNet's.

    Raises:
        ExportError: The network does not return one tensor.
        UserError: There is another number of class names than classes, one is not text of at most 1000 characters, or
            the preprocessing is not one of timm.
    """
    config = resolve_input_data_config(model)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    logits = _try(model, min(resolutions))
    num_classes = getattr(model, 'num_classes', logits.shape[-1])
    class_ids, imagenet_names = imagenet_classes(num_classes)
    if class_names is None:
        class_names = cfg.get('label_names') or ()
        if len(class_names) != num_classes:  # the weights are for other classes
            class_names = imagenet_names
    elif list(class_names) == class_ids:  # the folders of ImageNet
        class_names = imagenet_names
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f'There are {len(class_names)} class names, expected one for each of {num_classes} classes.')
    channels = config['input_size'][0]
    found = dict(
        timm_rs=__version__,
        architecture=cfg.get('architecture') or type(model).__name__,
        precision='float32',
        resolutions=list(resolutions),
        madds={str(r): count_madds(model, r, channels) for r in resolutions},
        num_classes=num_classes,
        class_names=None if class_names is None else list(class_names),
        class_ids=class_ids if class_names is imagenet_names else None,
        mean=[float(v) for v in config['mean']],
        std=[float(v) for v in config['std']],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        multilabel_threshold=getattr(model, 'multilabel_threshold', None),
    )
    if channels in MODES:  # others take no images, but batches
        preprocessing_of(found)
    parse_metadata(_as_texts(found), found['architecture'])  # what is written can be read
    return found


def _try(model: nn.Module, resolution: int) -> torch.Tensor:
    """Return what the network makes of an image."""
    network = model.at(resolution).eval()
    with torch.no_grad():
        logits = network(example_images(network, resolution, 2))
    if not isinstance(logits, torch.Tensor):
        raise ExportError(f'{type(model).__name__} returns a {type(logits).__name__}, expected one tensor of logits.')
    return logits


def _as_texts(metadata: Dict[str, Any]) -> Dict[str, str]:
    return {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}


def set_metadata(model: Any, metadata: Dict[str, Any]) -> None:
    """Write metadata into an ONNX model, values as JSON."""
    from onnx import helper

    helper.set_model_props(model, _as_texts(metadata))
    model.producer_name, model.producer_version = 'timm_rs', __version__
