"""From a checkpoint of any kind to a model, and from a model to a folder that timm.create_model loads"""
import argparse
import copy
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import is_model, save_for_hf

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_folder, check_new_folder

from ..checkpoint import (
    adapt_reference,
    adapt_state_dict,
    explain_mismatch,
    is_reference,
    pick_state_dict,
    read_checkpoint,
    read_weights,
    state_dict_resolutions,
)
from ..models.rs_models import PREFIX, RESOLUTIONS, explain_unknown_model
from ..private_bn import PrivateBN
from ..quant.packing import pack_state_dict
from ..quant.quantize import StepFunction, adapt_bases, fold, is_quantized
from ..resolutions import check_resolutions
from ..switchable import SwitchableMixin, make_switchable

__all__ = [
    'LoadedModel',
    'describe_for_timm',
    'load_model',
    'load_weights',
    'model_args',
    'ready_to_save',
    'save_model',
]

# The authors' code feeds images in [0, 1] and validates on the central crop of images resized to size / 0.875.
_REFERENCE_DATA = dict(mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='bilinear', crop_pct=0.875)
# What timm tells of its own weights of an architecture, which are not those that are loaded here.
_ORIGIN = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
           'label_descriptions')


@dataclass
class LoadedModel:
    """A model and what its checkpoint tells of the training.

    Attributes:
        model: Switchable network in eval mode; its pretrained_cfg holds the preprocessing that it was trained with.
        args: Flags of the training run, empty if unknown.
        epoch: Epoch of the checkpoint, None if unknown.
    """
    model: nn.Module
    args: Dict[str, Any] = field(default_factory=dict)
    epoch: Optional[int] = None


def load_model(
        source: str,
        name: Optional[str] = None,
        resolutions: Optional[Sequence[int]] = None,
        num_classes: Optional[int] = None,
        use_ema: bool = False,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
) -> LoadedModel:
    """Build a switchable network from a checkpoint, which tells itself what is left open here, as far as it can.

    Args:
        source: A file of train_rs.py, of timm (weights or training checkpoint, plain or switchable) or of the authors'
            code; a folder with config.json, or a name for timm.create_model such as hf-hub:user/name or that of a
            pretrained rs_* model.
        name: Name of an rs_* model, or the plain architecture of a plain checkpoint.
        resolutions: Input sizes in pixels. Of a switchable checkpoint the shared ones are taken and others start from
            the nearest; the authors' checkpoints need as many as they hold.
        num_classes: Number of classes.
        use_ema: Take the moving average of the weights.
        model_kwargs: Further arguments of timm.create_model.
        data_config: Preprocessing that the weights were trained with, where it is not the model's: mean, std,
            interpolation, crop_pct.

    Raises:
        ValueError: The checkpoint cannot be read or does not fit the model.
    """
    data_config = data_config or {}
    is_name = not os.path.exists(source) and (':' in source or (source.startswith(PREFIX) and is_model(source)))
    if os.path.isdir(source) or is_name:
        if name or num_classes is not None or use_ema or model_kwargs:
            raise UserError(f'{source} tells its model itself, leave out all that describes it but the resolutions.')
        model = _create_from_config(source, resolutions)
        model.pretrained_cfg.update(data_config)
        return LoadedModel(model)

    checkpoint = read_checkpoint(source)
    try:
        state_dict = pick_state_dict(checkpoint, use_ema)
    except ValueError as e:
        raise UserError(f'{source}: {e}') from e
    args = checkpoint.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    name = _model_name(source, name or args.get('model'))
    if is_reference(state_dict):
        data = _REFERENCE_DATA
        resolutions = check_resolutions(resolutions or RESOLUTIONS)
        try:
            state_dict = adapt_reference(state_dict, resolutions)
        except ValueError as e:
            raise UserError(f'{source}: {e}') from e
    else:
        data = {k: args[k] for k in ('mean', 'std', 'interpolation', 'crop_pct') if args.get(k)}
        held = state_dict_resolutions(state_dict) or args.get('resolutions') or RESOLUTIONS
        resolutions = check_resolutions(resolutions or held)

    kwargs = dict(model_args(name, args, state_dict, num_classes), **model_kwargs or {})
    model = timm.create_model(name, resolutions=resolutions, **kwargs).eval()
    _load(model, state_dict, source)
    for key in _ORIGIN:
        model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update(data, **data_config)
    return LoadedModel(model, args, checkpoint.get('epoch') if args else None)


def load_weights(model: nn.Module, path: str, use_ema: Optional[bool] = None) -> None:
    """Load all weights of a checkpoint file into a model, plain or switchable ones as the model takes them.

    Args:
        model: A network of timm.
        path: Name of the file.
        use_ema: Take the moving average, or never; None takes it if there is one, as timm does.

    Raises:
        ValueError: The file cannot be read or does not fit the model; the message names the first keys that do not.
    """
    _load(model, read_weights(path, use_ema), path)


def save_model(
        model: nn.Module,
        folder: str,
        label_names: Optional[Sequence[str]] = None,
        packed: bool = False,
) -> None:
    """Write a switchable or a plain network as safetensors and config.json, complete or not at all.

    `timm.create_model('local-dir:<folder>', pretrained=True)` loads it; a plain one needs nothing but timm.

    Args:
        model: A network of timm. A plain one with quantized weights is folded, see timm_rs.quant.fold.
        folder: Folder to make; it must not exist, or be empty.
        label_names: Names of the classes, in their order.
        packed: Write the weights of a quantized network as K bits each, see timm_rs.quant.pack_state_dict.

    Raises:
        ValueError: The folder exists, or the network is not one that timm can build again, or not one to pack.

    Example:
        >>> import tempfile, timm_rs
        >>> folder = os.path.join(tempfile.mkdtemp(), 'model')
        >>> save_model(timm.create_model('rs_resnet10t', resolutions=(64, 32)), folder)
        >>> timm.create_model(f'local-dir:{folder}', pretrained=True).resolutions
        (64, 32)
    """
    check_new_folder(folder)
    if is_quantized(model) and not isinstance(model, SwitchableMixin):
        model = _fold_for_timm(model)
    try:
        with atomic_folder(folder) as partial, ready_to_save(model, packed) as ready:
            save_for_hf(ready, partial, safe_serialization=True, **describe_for_timm(model, label_names))
    except SafetensorError as e:
        raise OSError(f'Cannot write {folder}: {e}') from e


def describe_for_timm(model: nn.Module, label_names: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Return the arguments by which timm.models.save_for_hf and push_to_hf_hub write a config.json that restores it.

    Args:
        model: A network of timm, switchable or plain.
        label_names: Names of the classes, in their order.

    Raises:
        ValueError: It is no network of timm, or there is another number of names.
    """
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    config, args = {}, {}
    if isinstance(model, SwitchableMixin):
        if architecture and not architecture.startswith(PREFIX):  # of make_switchable
            architecture = PREFIX + architecture
        args = dict(resolutions=list(model.resolutions))
        if is_quantized(model):
            args.update(quantization=model._quantization)
    if architecture not in timm.list_models(architecture):  # it leaves those out that are registered to say why not
        raise UserError(f'{type(model).__name__} is no model that timm.create_model could build again.')
    _check_classifier(model)
    config['pretrained_cfg'] = dict(architecture=architecture)
    if label_names is not None:
        if len(label_names) != model.num_classes:
            raise UserError(f'There are {len(label_names)} label names, the model has {model.num_classes} classes.')
        config['label_names'] = list(label_names)
    return dict(model_config=config, model_args=args)


def _check_classifier(model: nn.Module) -> None:
    """Raise ValueError if a classifier was put into a network that another of its num_classes would not have."""
    names = model.pretrained_cfg.get('classifier')
    modules = dict(model.named_modules())
    for name in (names,) if isinstance(names, str) else names or ():
        head = modules.get(name)
        rows = getattr(getattr(head, 'weight', None), 'shape', (model.num_classes,))[0]
        if isinstance(head, nn.Sequential) or model.num_classes and rows != model.num_classes:
            raise UserError(
                f'{name} is a {type(head).__name__} that timm.create_model would not build for num_classes '
                f'{model.num_classes}: change classifiers by reset_classifier.')


def model_args(
        name: str,
        args: Mapping[str, Any],
        state_dict: Mapping[str, torch.Tensor],
        num_classes: Optional[int],
) -> Dict[str, Any]:
    """Return the arguments of timm.create_model for the network of a training run, without its resolutions.

    Args:
        name: Name of the model.
        args: Flags of the run, empty if unknown.
        state_dict: Its weights, which show classes and channels where the flags do not tell them; may be empty.
        num_classes: Number of classes, if it is known.
    """
    kwargs = {k: v for k, v in (args.get('model_kwargs') or {}).items() if k != 'resolutions'}
    kwargs.update(global_pool=args.get('gp'), bn_eps=args.get('bn_eps'), in_chans=args.get('in_chans'))
    kwargs['num_classes'] = args.get('num_classes') if num_classes is None else num_classes
    cfg = None if ':' in name else timm.get_pretrained_cfg(name)
    for key, layer, axis in (('num_classes', 'classifier', 0), ('in_chans', 'first_conv', 1)):
        layer = getattr(cfg, layer, None)
        layer = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
        weight = state_dict.get(f'{layer}.weight') if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            kwargs[key] = weight.shape[axis] if kwargs[key] is None else kwargs[key]
    return {k: v for k, v in kwargs.items() if v is not None}


@contextmanager
def ready_to_save(model: nn.Module, packed: bool = False) -> Iterator[nn.Module]:
    """Give a network as timm can save it: the largest resolution active, whose size goes into config.json, and its
    memory contiguous and each tensor's own, as safetensors asks for. If packed, its state dict is."""
    original, resolution = model, model.resolution if isinstance(model, SwitchableMixin) else None
    hooks = []
    try:
        if resolution is not None:
            model.switch_to(model.resolutions[0])
        if not all(t.is_contiguous() for t in model.state_dict().values()):
            model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        hooks = [model.register_state_dict_post_hook(f) for f in (_separate, *[_pack] * packed)]
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        if resolution is not None:
            original.switch_to(resolution)


def _separate(module: nn.Module, state_dict: Dict[str, torch.Tensor], *_: Any) -> None:
    """Copy what resolutions share (tie_affine): a file holds every tensor on its own."""
    seen = set()
    for key, tensor in state_dict.items():
        if tensor.data_ptr() in seen:
            state_dict[key] = tensor.clone()
        seen.add(tensor.data_ptr())


def _pack(module: nn.Module, state_dict: Dict[str, torch.Tensor], *_: Any) -> None:
    packed = pack_state_dict(state_dict)
    state_dict.clear()
    state_dict.update(packed)


def _fold_for_timm(model: nn.Module) -> nn.Module:
    folded = fold(model)
    if any(isinstance(m, StepFunction) for m in folded.modules()):
        name = type(model).__name__
        raise UserError(f'{name} quantizes its activations, which no network of timm does: save the switchable one.')
    return folded


def _load(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    try:
        state_dict = adapt_bases(model, state_dict)
    except ValueError as e:
        raise UserError(f'{source}: {e}') from e
    if isinstance(model, SwitchableMixin):
        private = [n for n, m in model.named_modules() if isinstance(m, PrivateBN)]
        state_dict = adapt_state_dict(state_dict, private, model.resolutions, model.alpha)
    mismatch = explain_mismatch(state_dict, model.state_dict())
    if mismatch:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise UserError(f'{source} does not fit {name}: {mismatch}.')
    model.load_state_dict(state_dict)


def _create_from_config(source: str, resolutions: Optional[Sequence[int]]) -> nn.Module:
    name = f'local-dir:{source}' if os.path.isdir(source) else source
    try:
        model = timm.create_model(name, pretrained=True)
        if not isinstance(model, SwitchableMixin):
            model = make_switchable(model, resolutions or RESOLUTIONS)
            for key in ('test_input_size', 'test_pool_size', 'test_crop_pct'):
                model.pretrained_cfg.pop(key, None)
        elif resolutions is not None and check_resolutions(resolutions) != model.resolutions:
            model = timm.create_model(name, pretrained=True, resolutions=check_resolutions(resolutions))
    except Exception as e:  # also of the file readers and of the client of the Hub
        raise UserError(f"Cannot load {source}: {' '.join(str(e).split())[:300] or type(e).__name__}") from e
    return model.eval()


def _model_name(source: str, name: Optional[str]) -> str:
    if not name:
        raise UserError(f'{source} does not tell its model, give --model.')
    if ':' in name:  # a run that started from the Hub or a folder
        return name
    architecture = name.split('.')[0]
    if not architecture.startswith(PREFIX) and is_model(PREFIX + architecture):
        return PREFIX + name
    if not architecture.startswith(PREFIX) or not is_model(architecture):
        raise UserError(explain_unknown_model(name))
    return name
