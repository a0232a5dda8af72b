"""From a model to a folder that timm.create_model loads"""
import copy
import json
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import save_for_hf

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_folder, check_new_folder

from ..checkpoint import check_finite
from ..data.classes import imagenet_classes
from ..models.rs_models import PREFIX
from ..quant.packing import pack_state_dict
from ..quant.quantize import StepFunction, fold, is_quantized
from ..switchable import SwitchableMixin

__all__ = ['architecture_of', 'save_model', 'write_model']


def save_model(
        model: nn.Module,
        folder: str,
        label_names: Optional[Sequence[str]] = None,
        packed: bool = False,
) -> None:
    """Write a switchable or a plain network as safetensors and config.json, complete or not at all.

    `timm.create_model('local-dir:<folder>', pretrained=True)` loads it, a switchable one after `import timm_rs`.

    Args:
        model: A network of timm. A plain one with quantized weights is folded, see timm_rs.quant.fold.
        folder: Folder to make; it must not exist, or be empty.
        label_names: Names of the classes, in their order; if None those that the model records, or ImageNet's.
        packed: Write the weights of a quantized network as K bits each, see timm_rs.quant.pack_state_dict.

    Raises:
        UserError: The folder exists, timm cannot build the network again, it has nothing to pack, a weight is not
            finite, or the number of names is wrong.

    Example:
        >>> import tempfile, timm_rs
        >>> folder = tempfile.mkdtemp() + '/model'
        >>> save_model(timm.create_model('rs_resnet10t', resolutions=(64, 32)), folder)
        >>> timm.create_model(f'local-dir:{folder}', pretrained=True).resolutions
        (64, 32)
    """
    check_new_folder(folder)
    try:
        with atomic_folder(folder) as partial:
            write_model(model, partial, label_names, packed)
    except SafetensorError as e:
        raise OSError(f'Cannot write {folder}: {e}') from e


def write_model(
        model: nn.Module,
        folder: str,
        label_names: Optional[Sequence[str]] = None,
        packed: bool = False,
) -> None:
    """Write what save_model writes into an existing folder."""
    if is_quantized(model) and not isinstance(model, SwitchableMixin):
        name, model = type(model).__name__, fold(model)
        if any(isinstance(m, StepFunction) for m in model.modules()):
            raise UserError(f'{name} quantizes its activations, but networks of timm do not: save the switchable one.')
    architecture, args = architecture_of(model), {}
    if isinstance(model, SwitchableMixin):
        args = dict(resolutions=list(model.resolutions))
        if is_quantized(model):
            args.update(quantization=asdict(model._quantization))
    if architecture not in timm.list_models(architecture):  # which hides names that are registered to say why not
        raise UserError(f'{type(model).__name__} is not a model that timm.create_model can build again.')
    _check_classifier(model)
    if label_names is None:
        label_names = model.pretrained_cfg.get('label_names') or ()
        label_names = label_names if len(label_names) == model.num_classes else imagenet_classes(model.num_classes)[1]
    elif len(label_names) != model.num_classes:
        raise UserError(
            f'There are {len(label_names)} label names, expected one for each of {model.num_classes} classes.')
    check_finite(model.state_dict(), architecture)
    with _ready_to_save(model, packed) as ready:
        config = dict(pretrained_cfg=dict(architecture=architecture), label_names=label_names)
        save_for_hf(ready, folder, model_config=config, model_args=args, safe_serialization=True)
    path = Path(folder, 'config.json')
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # is at the top already; transformers fails on a second one
    config['pretrained_cfg'].pop('label_names', None)
    if packed:
        config['model_type'] = 'timm_rs_packed'  # transformers would begin with new weights where it finds packed ones
    if getattr(model, 'multilabel_threshold', None):
        config.update(
            problem_type='multi_label_classification',  # as transformers calls it
            multilabel_threshold=model.multilabel_threshold)
    path.write_text(json.dumps(config, indent=2))


def architecture_of(model: nn.Module) -> Optional[str]:
    """Return the name by which timm.create_model builds a network, None if it is not one of timm."""
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if isinstance(model, SwitchableMixin) and architecture and not architecture.startswith(PREFIX):
        return PREFIX + architecture  # made by make_switchable
    return architecture


def _check_classifier(model: nn.Module) -> None:
    """Raise UserError if a network has a classifier that timm would not build for its num_classes."""
    names = model.pretrained_cfg.get('classifier')
    modules = dict(model.named_modules())
    for name in (names,) if isinstance(names, str) else names or ():
        head = modules.get(name)
        rows = getattr(getattr(head, 'weight', None), 'shape', (model.num_classes,))[0]
        if isinstance(head, nn.Sequential) or model.num_classes and rows != model.num_classes:
            raise UserError(
                f'{name} is a {type(head).__name__} that timm.create_model would not build for num_classes '
                f'{model.num_classes}: change classifiers by reset_classifier.')


@contextmanager
def _ready_to_save(model: nn.Module, packed: bool) -> Iterator[nn.Module]:
    """Give a network as timm can save it, with the largest resolution active, whose size goes into config.json."""
    if isinstance(model, SwitchableMixin):
        model = copy.copy(model)  # the same tensors, but a resolution of its own
        model.switch_to(model.resolutions[0])
    hook = model.register_state_dict_post_hook(partial(_prepare_tensors, packed=packed))
    try:
        yield model
    finally:
        hook.remove()


def _prepare_tensors(module: nn.Module, state_dict: Dict[str, torch.Tensor], *_: Any, packed: bool) -> None:
    """Bring a state dict into the form that safetensors needs: contiguous tensors that share no memory (tie_affine)."""
    seen = set()
    for key, tensor in state_dict.items():
        state_dict[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    tensors = {k: v.contiguous() for k, v in (pack_state_dict(state_dict) if packed else state_dict).items()}
    state_dict.clear()
    state_dict.update(tensors)
