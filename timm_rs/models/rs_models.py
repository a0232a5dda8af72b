"""Resolution Switchable Networks in timm's registry

zoo.csv lists timm's architectures, with the reason where one cannot be made switchable. For the others, RS_MODELS,
`rs_<name>` builds the network with timm's own entrypoint, keywords and pretrained tags, then makes its BN layers
private to the resolutions. timm's weights are a start for training: every BN layer is copied to every resolution.
OTHER_MODELS are the pre-activation ResNets and the quantized networks of section 4.3, without weights. The folder
weights holds trained networks that come with the package, each with the configuration of its pretrained tag.
"""
import csv
import difflib
import logging
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch.nn as nn
from timm.models import (
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    load_pretrained,
    load_state_dict_from_hf,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line

from .._compat import PretrainedCfg, registry
from ..checkpoint import check_tensors, extract_resolution, has_taken, read_checkpoint, state_dict_resolutions
from ..private_bn import PrivateBN
from ..quant.config import QuantConfig
from ..quant.quantize import load_bases, quantize, split_bases
from ..records import PRETRAINED_CFG
from ..switchable import make_switchable
from . import preresnet  # noqa: F401  registers the plain networks

PREFIX = 'rs_'
RESOLUTIONS = (224, 192, 160, 128, 96)  # section 4.1
__all__ = ['OTHER_MODELS', 'PREFIX', 'RESOLUTIONS', 'RS_MODELS', 'explain_unknown_model']

_logger = logging.getLogger(__name__)

# Plain architecture, its arguments, and how it is quantized.
OTHER_MODELS = {
    'preresnet18': ('preresnet18', {}, None),
    'preresnet50': ('preresnet50', {}, None),
    'resnet18_w2a32': ('resnet18', dict(zero_init_last=True), QuantConfig(weight_bits=2, activation_bits=32)),
    'resnet50_w2a32': ('resnet50', dict(zero_init_last=True), QuantConfig(weight_bits=2, activation_bits=32)),
    'preresnet18_w2a2': ('preresnet18', {}, QuantConfig(weight_bits=2, activation_bits=2)),
    'preresnet50_w2a2': ('preresnet50', {}, QuantConfig(weight_bits=2, activation_bits=2)),
}

_SOURCES = ('state_dict', 'source', 'file', 'url', 'hf_hub_id', 'hf_hub_filename')  # where a cfg has its weights


def explain_unknown_model(name: str) -> str:
    """Return one line on why there is no Resolution Switchable Network of this name, with the nearest names.

    Example:
        >>> explain_unknown_model('rs_resnet55')
        "Unknown model 'rs_resnet55', did you mean rs_resnet50, rs_resnet51q, rs_resnet50t?"
        >>> explain_unknown_model('rs_convnext_tiny')
        'There is no rs_convnext_tiny: convnext_tiny holds no BatchNorm. The nearest that works is rs_...'
    """
    name = name.split('.')[0]
    base = name[len(PREFIX):] if name.startswith(PREFIX) else name
    if base in _REFUSED:
        family = model_entrypoint(base).__module__
        candidates = [b for b in RS_MODELS if model_entrypoint(b).__module__ == family] or [
            b for b in RS_MODELS if get_pretrained_cfg(b).has_weights]
        nearest = min(candidates, key=lambda b: abs(math.log(_params[b] / _params[base])))
        return f'There is no {PREFIX}{base}: {base} {_REFUSED[base]}. The nearest that works is {PREFIX}{nearest}.'
    if is_model(PREFIX + name):
        near = [PREFIX + name]
    else:
        near = difflib.get_close_matches(name, [PREFIX + b for b in (*RS_MODELS, *OTHER_MODELS)], n=3, cutoff=0.5)
    what = f'{name!r} is not a Resolution Switchable Network' if is_model(name) else f'Unknown model {name!r}'
    return f"{what}, did you mean {', '.join(near)}?" if near else f"{what}, see timm.list_models('{PREFIX}*')."


def _create_rs(
        base: str,
        name: str,
        pretrained: bool = False,
        resolutions: Optional[Sequence[int]] = None,
        quantization: Optional[Union[QuantConfig, Mapping[str, Any]]] = None,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build timm's network `base` and make it switchable, and quantized if there are arguments for that."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = pretrained_cfg.to_dict()
    cfg = resolve_pretrained_cfg(PREFIX + name, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise UserError(f'There are no pretrained weights for {PREFIX}{name}, create it with pretrained=False.')
    if resolutions is None:
        resolutions = _packaged.get(f'{PREFIX}{name}.{cfg.tag}', {}).get('resolutions', RESOLUTIONS)
    weights, bases = split_bases(_foreign_weights(cfg, cache_dir) if pretrained else None)
    cfg = replace(cfg, state_dict=None, architecture=base).to_dict()
    sources = {k: cfg.get(k) for k in _SOURCES}
    if weights:  # pass on what was read, not where it came from
        cfg.update(dict.fromkeys(_SOURCES, None), state_dict=weights)
    native = get_pretrained_cfg(base)
    if native is not None and native.fixed_input_size:  # position embeddings have the size of timm's network
        kwargs.setdefault('img_size', native.input_size[-2:])
    build = partial(model_entrypoint(base), cache_dir=cache_dir, **kwargs)

    try:
        if weights and state_dict_resolutions(weights):
            model = _build_from_switchable(build, weights, resolutions, cfg)
        else:
            model = make_switchable(build(pretrained=pretrained, pretrained_cfg=cfg), resolutions)
    except RuntimeError as e:  # what loading raises for tensors of other shapes
        if not weights:
            raise
        raise UserError(f'The checkpoint does not fit {PREFIX}{name}: {one_line(e, 300)}') from e
    if weights:
        _check_taken(weights, model, PREFIX + name)
    model.pretrained_cfg.update(sources, architecture=PREFIX + name)
    model._model_args = dict(resolutions=model.resolutions)  # timm does not store defaults, config.json needs them
    if quantization is not None:
        quantize(model, **asdict(QuantConfig.of(quantization)), trained=pretrained)
    load_bases(model, bases)
    return model


def _check_taken(weights: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Refuse weights of which the network has taken none, and warn of layers that they leave as they began."""
    state_dict, held = model.state_dict(), state_dict_resolutions(weights)
    if not has_taken(weights, state_dict):
        raise UserError(f"No weights of the checkpoint fit {name}; its keys are {', '.join(list(weights)[:3])}, ...")
    held = extract_resolution(weights, held[0]) if held else weights
    expected = extract_resolution(state_dict, model.resolutions[0])
    heads = model.pretrained_cfg.get('classifier') or ()
    heads = (heads,) if isinstance(heads, str) else heads
    missing = [
        k for k in expected
        if k not in held and not k.endswith('num_batches_tracked') and k.rpartition('.')[0] not in heads]
    if missing and 2 * len(missing) < len(expected):  # otherwise its keys are of another kind, which timm adapts
        _logger.warning(
            f"The checkpoint lacks {len(missing)} of the {len(expected)} tensors of {name}, which begin as those of a "
            f"new network: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.")


def _foreign_weights(cfg: PretrainedCfg, cache_dir: Optional[str]) -> Optional[Mapping[str, Any]]:
    """Return weights that may be those of a switchable network; None for timm's own, which its entrypoint reads."""
    if cfg.state_dict:
        return cfg.state_dict
    if cfg.file and (cfg.source == 'local-dir' or not cfg.custom_load):
        return read_checkpoint(cfg.file, name=cfg.architecture).state_dict
    if cfg.hf_hub_id and not cfg.hf_hub_id.startswith('timm/') and not cfg.custom_load:
        filename = {'filename': cfg.hf_hub_filename} if cfg.hf_hub_filename else {}
        weights = load_state_dict_from_hf(cfg.hf_hub_id, cache_dir=cache_dir, **filename)
        check_tensors(weights, cfg.hf_hub_id)
        return weights
    return None


def _build_from_switchable(
        build: Callable,
        weights: Mapping[str, Any],
        resolutions: Sequence[int],
        cfg: Dict[str, Any],
) -> nn.Module:
    """Build a network from the weights of a switchable one, which may have other resolutions, classes or channels."""
    model = make_switchable(build(pretrained=False, pretrained_cfg=cfg), resolutions)
    if not build.keywords.get('features_only', False):
        load_pretrained(
            model,
            pretrained_cfg=cfg,
            num_classes=model.num_classes,
            in_chans=build.keywords.get('in_chans', 3),
            strict=build.keywords.get('pretrained_strict', True),
        )
        return model
    # A feature wrapper has other keys: timm loads a plain network per resolution, whose BN layers we take.
    found = state_dict_resolutions(weights)
    plain = {
        r: build(pretrained=True, pretrained_cfg=dict(cfg, state_dict=extract_resolution(weights, r))) for r in found
    }
    trained = make_switchable(plain[found[0]], found)
    trained.alpha.data.copy_(weights['alpha'])
    for name, module in trained.named_modules():
        if isinstance(module, PrivateBN):
            for r in found[1:]:
                module[r].load_state_dict(plain[r].get_submodule(name).state_dict())
    model.load_state_dict(trained.state_dict())
    return model


def _pretrained_cfgs(base: str) -> Dict[str, PretrainedCfg]:
    """Return timm's configurations for the rs_* model, with the size that it is trained and tested at."""
    cfgs = {}
    for name in registry._model_with_tags.get(base, ()):  # the getters of timm make deep copies, half of our import
        cfg = registry._model_pretrained_cfgs[name]
        input_size = (cfg.input_size[0], RESOLUTIONS[0], RESOLUTIONS[0])
        cfgs[PREFIX + name] = replace(
            cfg, input_size=input_size, fixed_input_size=False, test_input_size=None, test_crop_pct=None,
            pool_size=_pool_size(cfg))
    return cfgs


def _pool_size(cfg: PretrainedCfg) -> Optional[Tuple[int, int]]:
    """Return the size of the last feature maps at the largest size, if timm's own is that of a network that pads."""
    for stride in (2 ** n for n in range(8)):
        if cfg.pool_size and math.ceil(cfg.input_size[-1] / stride) == cfg.pool_size[-1]:
            return (math.ceil(RESOLUTIONS[0] / stride),) * 2
    return cfg.pool_size


def _read_packaged() -> Dict[str, Dict[str, Any]]:
    """Return sizes and configuration of the networks that come with the package, by `<model>.<tag>`."""
    check = fields.record(dict(resolutions=fields.resolutions(), pretrained_cfg=PRETRAINED_CFG))
    found = {path: fields.read_json(path, check) for path in sorted(Path(__file__).with_name('weights').glob('*.json'))}
    for path, entry in found.items():
        entry['pretrained_cfg'].update(file=str(path.with_suffix('.safetensors')))
    return {path.stem: entry for path, entry in found.items()}


def _entrypoint(base: str, name: str, **defaults: Any) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_rs(base, name, pretrained, **dict(defaults, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + name
    entrypoint.__doc__ = (
        f'Resolution Switchable {name}: takes `resolutions`, `quantization` (timm_rs.quant.QuantConfig or its fields) '
        f'and every argument of timm for {base}.')
    return entrypoint


def _refuse(base: str) -> Callable[..., nn.Module]:
    def entrypoint(*_: Any, **__: Any) -> nn.Module:
        raise UserError(explain_unknown_model(PREFIX + base))

    return entrypoint


def _read_zoo() -> List[Dict[str, str]]:
    """Return the rows of zoo.csv for the architectures that the installed timm has."""
    with open(Path(__file__).with_name('zoo.csv'), newline='', encoding='utf-8') as f:
        rows = csv.DictReader(line for line in f if not line.startswith('#'))
        return [row for row in rows if is_model(row['name'])]


_zoo = _read_zoo()
RS_MODELS = tuple(row['name'] for row in _zoo if not row['reason'])
_REFUSED = {row['name']: row['reason'] for row in _zoo if row['reason']}
_params = {row['name']: float(row['params'] or 'nan') for row in _zoo}  # millions

_packaged = _read_packaged()

default_cfgs = generate_default_cfgs({
    **{k: v for base in RS_MODELS for k, v in _pretrained_cfgs(base).items()},
    **{name: entry['pretrained_cfg'] for name, entry in _packaged.items()},
    **{PREFIX + name: get_pretrained_cfg('preresnet18') for name in OTHER_MODELS},
})
for _base in RS_MODELS:
    globals()[PREFIX + _base] = register_model(_entrypoint(_base, _base))
for _name, (_base, _kwargs, _quantization) in OTHER_MODELS.items():
    globals()[PREFIX + _name] = register_model(_entrypoint(_base, _name, quantization=_quantization, **_kwargs))
for _base in _REFUSED:  # an entrypoint that says why, hidden from timm's listings like a name that timm removed
    registry._model_entrypoints[PREFIX + _base] = _refuse(_base)
    registry._deprecated_models[PREFIX + _base] = None
