"""From files to networks: a checkpoint of any kind, a folder with config.json, a name of timm"""
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.models import is_model, load_state_dict_from_hf, parse_model_name
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.preprocess import PREPROCESSING

from ._compat import download_from_hf, get_model_input_config
from .checkpoint import (
    adapt_reference,
    adapt_state_dict,
    check_tensors,
    explain_mismatch,
    is_reference,
    read_checkpoint,
    state_dict_resolutions,
)
from .models.rs_models import PREFIX, RESOLUTIONS, explain_unknown_model
from .private_bn import PrivateBN
from .quant.packing import unpack_state_dict
from .quant.quantize import adapt_bases
from .records import is_model_folder, read_config, read_threshold
from .resolutions import check_resolutions
from .switchable import SwitchableMixin, make_switchable

__all__ = [
    'LoadedModel', 'create', 'load_model', 'load_weights', 'model_args', 'read_preprocessing', 'read_source',
    'shapes_only']

# The authors' code feeds images in [0, 1] and validates on the central crop of images resized to size / 0.875.
_REFERENCE_DATA = dict(mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='bilinear', crop_pct=0.875)
# What timm records about its own weights of an architecture, which are not those that are loaded here.
_ORIGIN = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
           'label_descriptions')


@dataclass
class LoadedModel:
    """A model and what its checkpoint records of the training.

    Attributes:
        model: Network in eval mode; its pretrained_cfg holds the preprocessing that it was trained with, and its
            multilabel_threshold the probability from which on a label counts, None with one label per image.
        source: The file that was read, or the name of the network.
        args: Flags of the training run, empty if unknown.
        epoch: Epoch of the checkpoint, None if unknown.
    """
    model: nn.Module
    source: str
    args: Dict[str, Any] = field(default_factory=dict)
    epoch: Optional[int] = None


def load_model(
        source: str,
        name: Optional[str] = None,
        resolutions: Optional[Sequence[int]] = None,
        num_classes: Optional[int] = None,
        use_ema: Optional[bool] = False,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        keep_plain: bool = False,
) -> LoadedModel:
    """Build a network from a checkpoint; what the arguments leave open is taken from the file, if it records it.

    What a file records is checked, and bounded by the weights that it holds. No other file is opened.

    Args:
        source: A file of train_rs.py, of timm (weights or training checkpoint, plain or switchable), of the authors'
            code or of EfficientNet-PyTorch; the output folder of a run or a folder with config.json, also as
            local-dir:<folder>; or a name for timm.create_model such as hf-hub:user/name or that of a pretrained model.
        name: Name of an rs_* model, or the plain architecture of a plain checkpoint.
        resolutions: Input sizes in pixels. Those of a switchable checkpoint are taken from it, others start from the
            nearest; the authors' checkpoints need as many as they hold.
        num_classes: Number of classes.
        use_ema: Take the moving average of the weights (True) or not (False); None takes it if there is one.
        model_kwargs: Further arguments of timm.create_model.
        data_config: Preprocessing that the weights were trained with, if not that of the model: mean, std,
            interpolation, crop_pct.
        keep_plain: Leave a plain architecture as it is; otherwise it is made switchable.

    Raises:
        UserError: The checkpoint cannot be read or does not fit the model.
    """
    data_config, kwargs = data_config or {}, dict(model_kwargs or {})
    source = os.fspath(source).removeprefix('local-dir:')
    is_folder = is_model_folder(source)
    is_known = ':' in source or is_model(source.split('.')[0]) and (keep_plain or source.startswith(PREFIX))
    if is_folder or is_known and not os.path.exists(source):
        if name or use_ema or is_folder and (kwargs or num_classes is not None):
            given = [*(['a name'] if name else []), *(['the moving average'] if use_ema else []), *kwargs]
            given += ['num_classes'] if num_classes is not None else []
            raise UserError(
                f"{source} records its model, leave out what describes it except the resolutions: {', '.join(given)}.")
        kwargs.update(num_classes=num_classes)
        model = _create_named(f'local-dir:{source}' if is_folder else source, resolutions, keep_plain, kwargs)
        _set_preprocessing(model, data_config, source)
        return LoadedModel(model.eval(), source)

    checkpoint = read_checkpoint(source, use_ema, name)
    _note_config(source)
    state_dict, args, path = checkpoint.state_dict, checkpoint.args, checkpoint.path
    saved = args.get('model') or ''
    is_same = name is None or ':' in saved or _plain_name(name) == _plain_name(saved)
    name = _model_name(path, name or saved, keep_plain)
    if is_reference(state_dict):
        data = _REFERENCE_DATA
        resolutions = check_resolutions(resolutions or RESOLUTIONS)
        try:
            state_dict = adapt_reference(state_dict, resolutions)
        except UserError as e:
            raise UserError(f'{path}: {e}') from e
    else:
        data = {k: args[k] for k in PREPROCESSING if args.get(k)}
        held = state_dict_resolutions(state_dict) or is_same and args.get('resolutions') or RESOLUTIONS
        resolutions = check_resolutions(resolutions or held)
    kwargs = dict(model_args(name, args if is_same else {}, state_dict, num_classes), **kwargs)
    if name.startswith(PREFIX):
        kwargs.update(resolutions=resolutions)

    build = partial(create, path, name, **kwargs)
    with shapes_only(path, len(state_dict)), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # they come again below
        _adapt(build(), {k: v.to('meta') for k, v in state_dict.items()}, path)
    model = build().eval()
    model.load_state_dict(_adapt(model, state_dict, path))
    for key in _ORIGIN:
        model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update(data)
    _set_preprocessing(model, data_config, path)
    model.multilabel_threshold = args.get('multilabel_threshold') if args.get('task') == 'multilabel' else None
    return LoadedModel(model, path, args, checkpoint.epoch)


def load_weights(model: nn.Module, path: str, use_ema: Optional[bool] = None) -> None:
    """Load all weights of a checkpoint file, plain or switchable, into a model.

    Args:
        model: A network of timm.
        path: Name of the file, or the output folder of a run.
        use_ema: Take the moving average (True) or not (False); None takes it if there is one, as timm does.

    Raises:
        UserError: The file cannot be read or does not fit the model; the message names the first keys that do not fit.
    """
    checkpoint = read_checkpoint(path, use_ema, (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'))
    model.load_state_dict(_adapt(model, checkpoint.state_dict, checkpoint.path))


def read_preprocessing(source: str) -> Dict[str, Any]:
    """Return the preprocessing that weights were trained with, as far as their config.json or their run records it.

    Args:
        source: Name of a checkpoint file, the output folder of a run, or a folder with config.json.

    Raises:
        UserError: It cannot be read.
    """
    if is_model_folder(source):
        found = read_config(os.path.join(source, 'config.json'), source)[1]
    else:
        args = read_checkpoint(source).args
        _note_config(source)
        named = timm.get_pretrained_cfg(args.get('model') or '')
        found = {**(named.to_dict() if named else {}), **{k: v for k, v in args.items() if v}}
    return {k: found[k] for k in PREPROCESSING if found.get(k)}


def _note_config(path: str) -> None:
    """Warn of a config.json beside a file of weights, which is read with its folder only."""
    folder = os.path.dirname(path) or '.'
    if is_model_folder(folder):
        warnings.warn(
            f'{path}: the config.json beside it, which records model and preprocessing, is not read; give its folder, '
            f'{folder}, to use it.', stacklevel=3)


def model_args(
        name: str,
        args: Mapping[str, Any],
        state_dict: Mapping[str, torch.Tensor],
        num_classes: Optional[int] = None,
) -> Dict[str, Any]:
    """Return the arguments of timm.create_model for the network of a training run, without its resolutions.

    Args:
        name: Name of the model.
        args: Flags of the run, see timm_rs.records.check_run; empty if unknown.
        state_dict: Its weights, which show classes and channels if the flags do not record them; may be empty.
        num_classes: Number of classes, if it is known.
    """
    flags = dict(
        global_pool=args.get('gp'), bn_eps=args.get('bn_eps'), in_chans=args.get('in_chans'),
        num_classes=args.get('num_classes') if num_classes is None else num_classes)
    kwargs = {**(args.get('model_kwargs') or {}), **{k: v for k, v in flags.items() if v is not None}}
    kwargs.pop('resolutions', None)
    cfg = timm.get_pretrained_cfg(name)
    for key, layer, axis in (('num_classes', 'classifier', 0), ('in_chans', 'first_conv', 1)):
        layer = getattr(cfg, layer, None)
        layer = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
        weight = state_dict.get(f'{layer}.weight') if isinstance(layer, str) else None
        if weight is not None and weight.ndim > axis:
            kwargs.setdefault(key, weight.shape[axis])
    return kwargs


def read_source(name: str, pretrained: bool = True) -> Tuple[str, Dict[str, Any]]:
    """Return the architecture and the arguments for timm.create_model of a folder or repository with config.json.

    Args:
        name: 'local-dir:<folder>' or 'hf-hub:<user>/<name>'; any other name is returned as it is.
        pretrained: Read the weights too.

    Raises:
        UserError: It cannot be read, or config.json holds unusable values or describes a network beyond the weights.
    """
    if ':' not in name:
        return name, {}
    try:
        kind, place = parse_model_name(name)
        config, is_hub = _find_config(kind, place), kind == 'hf-hub'
        weights = load_state_dict_from_hf(place) if is_hub and pretrained else None
    except Exception as e:  # the client of the Hub raises others in other versions
        raise UserError(f'Cannot load {name}: {one_line(e, 300)}') from e
    architecture, cfg, args = read_config(config, name)
    if not pretrained:
        return architecture, dict(args, pretrained_cfg=cfg)
    if weights is None:
        weights = read_checkpoint(place).state_dict
    else:
        check_tensors(weights, name)
    weights = unpack_state_dict(weights)
    with shapes_only(name, len(weights)):
        expected = sum(v.numel() for v in create(name, architecture, pretrained_cfg=cfg, **args).state_dict().values())
    held = sum(v.numel() for v in weights.values())
    if expected > 2 * held + 10 ** 6:
        raise UserError(
            f'{name}: config.json describes a network of {expected:,} values, but its weights have {held:,}.')
    return architecture, dict(args, pretrained_cfg=dict(cfg, state_dict=weights), pretrained_model_args=args)


def _find_config(kind: str, place: str) -> str:
    """Return the file config.json of a folder ('local-dir') or repository ('hf-hub')."""
    if kind == 'local-dir' and not is_model_folder(place):
        raise UserError(
            f'{place} holds no config.json: timm-rs convert makes a folder with one, and --initial-checkpoint takes '
            'the weights of a run.')
    return download_from_hf(place, 'config.json') if kind == 'hf-hub' else os.path.join(place, 'config.json')


def _create_named(
        source: str,
        resolutions: Optional[Sequence[int]],
        keep_plain: bool,
        kwargs: Dict[str, Any],
) -> nn.Module:
    """Return a network with the weights of its folder, its repository or timm."""
    name, found = read_source(source)
    kwargs = {**found, **{k: v for k, v in kwargs.items() if v is not None}}
    if resolutions is not None and name.startswith(PREFIX):
        kwargs['resolutions'] = check_resolutions(resolutions)
    model = create(source, name, pretrained=True, **kwargs)
    model.pretrained_cfg.pop('state_dict', None)
    model.multilabel_threshold = read_threshold(_find_config(*parse_model_name(source))) if ':' in source else None
    if not isinstance(model, SwitchableMixin) and not keep_plain:
        model = make_switchable(model, resolutions or RESOLUTIONS)
        for key in ('test_input_size', 'test_pool_size', 'test_crop_pct'):
            model.pretrained_cfg.pop(key, None)
    return model


def create(source: str, name: str, **kwargs: Any) -> nn.Module:
    """Return a network of timm; its arguments come from a file and can be wrong in many ways."""
    try:
        return timm.create_model(name, **kwargs)
    except Exception as e:
        what = f'{source} as {name}' if name not in source else source
        raise UserError(f'Cannot load {what}: {one_line(e, 300)}') from e


@contextmanager
def shapes_only(source: str, held: int = 1000) -> Iterator[None]:
    """Build networks without memory for their weights, and with few more tensors than a file holds.

    Args:
        source: The file that describes the network, for the message.
        held: Tensors that it holds.
    """
    most, count = 8 * held + 10_000, 0

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f'{source} describes a network of more than {most} tensors.')

    hooks = [register_module_buffer_registration_hook(check), register_module_parameter_registration_hook(check)]
    try:
        with torch.device('meta'):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _adapt(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> Mapping[str, torch.Tensor]:
    """Return weights under the names of a network, which they must fit."""
    try:
        state_dict = adapt_bases(model, state_dict)
        if isinstance(model, SwitchableMixin):
            private = [n for n, m in model.named_modules() if isinstance(m, PrivateBN)]
            state_dict = adapt_state_dict(state_dict, private, model.resolutions, model.alpha)
    except UserError as e:
        raise UserError(f'{source}: {e}') from e
    mismatch = explain_mismatch(state_dict, model.state_dict())
    if mismatch:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
        raise UserError(f'{source} does not fit {name}: {mismatch}.')
    return state_dict


def _set_preprocessing(model: nn.Module, data: Mapping[str, Any], source: str) -> None:
    channels = get_model_input_config(model)['input_size'][0]
    for name in ('mean', 'std'):
        if len(data.get(name, [0])) not in (1, channels):
            raise UserError(f'{source}: {name} is {data[name]}, expected one value or {channels}.')
    model.pretrained_cfg.update(data)


def _plain_name(name: str) -> str:
    return name.partition('.')[0].removeprefix(PREFIX)


def _model_name(source: str, name: str, keep_plain: bool) -> str:
    if not name:
        raise UserError(f'{source} does not record its model, give --model.')
    if ':' in name:  # a run that started from the Hub or a folder
        raise UserError(f'{source} records the model {name}, which is not opened: give --model, an rs_* model.')
    architecture = name.split('.')[0]
    if not architecture.startswith(PREFIX) and is_model(PREFIX + architecture) and not keep_plain:
        return PREFIX + name
    if not is_model(architecture) or not keep_plain and not architecture.startswith(PREFIX):
        raise UserError(explain_unknown_model(name))
    return name
