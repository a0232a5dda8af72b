"""Quantized Resolution Switchable Networks (Wang et al., ECCV 2020, section 4.3)

`quantize` turns the convolutions of a switchable network into quantized ones. All resolutions share the bases as they
share the weights; only the BatchNorms stay private.
"""
import copy
import fnmatch
from dataclasses import asdict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import Conv2dSame

from timm_rs_runtime.errors import UserError

from .._compat import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from ..switchable import FOLDING, SwitchableMixin, classifiers, refuse_folding
from .config import FLOAT_BITS, QuantConfig
from .packing import unpack_state_dict
from .quantizers import (
    ActivationQuantizer,
    ActivationSite,
    QuantConv2d,
    QuantConv2dSame,
    weight_basis,
)

__all__ = ['StepFunction', 'adapt_bases', 'fold', 'is_quantized', 'load_bases', 'quantize', 'split_bases']

_QUANTIZED = {nn.Conv2d: QuantConv2d, Conv2dSame: QuantConv2dSame}
_KEYS = ('.basis', '.basis_updates')
_FEATURE_WRAPPERS = (FeatureDictNet, FeatureHookNet, FeatureGetterNet)  # they leave out what features do not need
_PLAIN = {quantized: plain for plain, quantized in _QUANTIZED.items()}


def quantize(
        model: nn.Module,
        weight_bits: int = 2,
        activation_bits: int = FLOAT_BITS,
        skip: Union[str, Sequence[str]] = (),
        fixed_activation_basis: bool = False,
        trained: bool = False,
) -> nn.Module:
    """Quantize the convolutions of a switchable network, in place, except the first one and the classifier.

    Activations are quantized at the input of every quantized convolution, or where the architecture has places for it
    (`rs_preresnet18`). They should be positive, as after a ReLU: negative values become 0.

    Args:
        model: A switchable network.
        weight_bits, activation_bits, skip, fixed_activation_basis: See QuantConfig.
        trained: Start each basis at the deviation of its channel's weights, not at that of He's initialization.
            Trained weights can be so much smaller that they never leave the inner levels of the latter.

    Returns:
        The same object. Parameters stay the same ones under the same keys; state dicts gain the bases.

    Raises:
        ValueError: The network is not switchable or quantized already, bits are out of range, a name matches nothing,
            or nothing is left to quantize.

    Example:
        >>> import timm
        >>> model = quantize(timm.create_model('rs_resnet18', resolutions=(64, 32)), weight_bits=2)
        >>> model.layer1[0].conv1.eval().quantized_weight[0].unique().numel()
        4
    """
    name = type(model).__name__
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{name} is a plain network, expected a switchable one (make_switchable).')
    if is_quantized(model):
        raise UserError(f'{name} is quantized already.')
    config = QuantConfig(weight_bits, activation_bits, skip, fixed_activation_basis)
    layers = _select(model, config.skip)

    for layer in layers:
        layer.__class__ = _QUANTIZED[type(layer)]
        layer.setup(config.weight_bits, model._switch)
    if trained:
        bases = _bases_of(model, model.state_dict())
        model.load_state_dict(dict(model.state_dict(), **bases))
    if config.activation_bits != FLOAT_BITS:
        _quantize_activations(model, layers, config)
    for module in model.modules():
        for name in FOLDING:
            if hasattr(type(module), name) and is_quantized(module):
                setattr(module, name, _refuse_reparameterization)
    model._quantization = config
    if hasattr(model, '_model_args'):
        model._model_args['quantization'] = asdict(config)  # as timm writes it into config.json
    return model


def is_quantized(model: nn.Module) -> bool:
    """Return whether a network holds quantized layers."""
    return any(isinstance(m, (QuantConv2d, ActivationQuantizer)) for m in model.modules())


def _refuse_reparameterization(*_: Any, **__: Any) -> None:
    raise UserError(
        'The levels of a quantized layer would be lost: fold the network first, '
        'reparameterize_model(fold(model.at(size))).')


class StepFunction(nn.Module):
    """What an ActivationQuantizer computes once it has learned, in operations that every runtime has.

    Args:
        levels: Levels in ascending order [L].
        thresholds: Thresholds that a value exceeds to take the next level [L - 1].

    Example:
        >>> StepFunction(torch.tensor([0., 1., 3.]), torch.tensor([0.5, 2.]))(torch.tensor([0.5, 1., 9.])).tolist()
        [0.0, 1.0, 3.0]
    """

    def __init__(self, levels: torch.Tensor, thresholds: torch.Tensor):
        super().__init__()
        self.register_buffer('levels', levels)
        self.register_buffer('thresholds', thresholds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(x.dtype)
        if len(levels) > 16:
            return levels[torch.bucketize(x, self.thresholds)]
        y = torch.where(x > self.thresholds[0], levels[1], levels[0])
        for i in range(1, len(self.thresholds)):
            y = torch.where(x > self.thresholds[i], levels[i + 1], y)
        return y


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of a network for inference, with plain convolutions and step functions for activations.

    It computes what the network computes in eval mode. If only weights are quantized, a folded `model.at(160)` is a
    plain network of timm.

    Args:
        model: Any network, switchable or not.

    Example:
        >>> import timm
        >>> model = timm.create_model('rs_resnet18_w2a32', resolutions=(64, 32)).eval()
        >>> plain = fold(model.at(32))
        >>> type(plain.layer1[0].conv1).__name__, plain.layer1[0].conv1.weight[0].unique().numel()
        ('Conv2d', 4)
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ActivationQuantizer):
                parent._modules[name] = StepFunction(*child.steps())
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            _fold_conv(layer)
    for module in model.modules():
        for name in [n for n in FOLDING if vars(module).get(n) is _refuse_reparameterization]:
            delattr(module, name)
            if isinstance(model, SwitchableMixin):
                setattr(module, name, refuse_folding)
    getattr(model, '_model_args', {}).pop('quantization', None)
    vars(model).pop('_quantization', None)
    return model


def split_bases(
        state_dict: Optional[Mapping[str, torch.Tensor]],
) -> Tuple[Optional[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]:
    """Return the weights of a state dict, unpacked, and what quantizers have learned, each under its key.

    Raises:
        UserError: It is packed and damaged.
    """
    if state_dict is None:
        return None, {}
    state_dict = unpack_state_dict(state_dict)
    bases = {k: v for k, v in state_dict.items() if k.endswith(_KEYS)}
    return {k: v for k, v in state_dict.items() if k not in bases}, bases


def load_bases(model: nn.Module, bases: Mapping[str, torch.Tensor]) -> None:
    """Load what quantizers have learned into a network, which may be timm's feature wrapper of the one that learned.

    If there are none it keeps its own.

    Raises:
        UserError: The network is not quantized, has other bits, or a layer has no basis.
    """
    if not bases:
        return
    _check_bases(model, bases)
    given = {_flat(k): v for k, v in bases.items()}
    for key, value in model.state_dict().items():
        if key.endswith(_KEYS):
            found = given.get(_flat(key))
            if found is None or found.shape != value.shape:
                raise UserError(f'The weights are quantized, but without a fitting {key}.')
            value.copy_(found)


def adapt_bases(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return a state dict unpacked, and with initial bases for its weights if a quantized network needs them.

    Raises:
        UserError: It is packed and damaged, or has other bits than the network.
    """
    weights, bases = split_bases(state_dict)
    if bases:
        _check_bases(model, bases)
    else:
        bases = _bases_of(model, weights)
    return dict(weights, **bases)


def _bases_of(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return the initial state of quantizers for trained weights."""
    bases = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(_KEYS)}
    for name, layer in model.named_modules():
        weight = weights.get(f'{name}.weight')
        if isinstance(layer, QuantConv2d) and weight is not None:
            deviation = weight.to(layer.basis).flatten(1).square().mean(1).sqrt()
            bases[f'{name}.basis'] = weight_basis(deviation, layer.bits)
    return bases


def _check_bases(model: nn.Module, bases: Mapping[str, torch.Tensor]) -> None:
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
    own = {_flat(k): v for k, v in model.state_dict().items() if k.endswith(_KEYS)}
    if not own:
        raise UserError(f'The weights are quantized, but {name} is not.')
    for key, value in bases.items():
        expected = own.get(_flat(key), value)
        if value.ndim == expected.ndim == 2 and value.shape[1] != expected.shape[1]:
            layer = key.removesuffix('.basis')
            raise UserError(
                f'{layer} is quantized at {value.shape[1]} bits, expected the {expected.shape[1]} bits of {name}.')


def _fold_conv(layer: QuantConv2d) -> None:
    quantizer, training = layer.input_quantizer, layer.training
    with torch.no_grad():
        layer.weight.copy_(layer.eval().quantized_weight)
    for name in ('basis', 'basis_updates', 'input_quantizer', 'bits', '_switch', '_first_pass'):
        delattr(layer, name)
    layer.__class__ = _PLAIN[type(layer)]
    layer.train(training)
    if quantizer is not None:
        layer.input_steps = quantizer
        layer.register_forward_pre_hook(_apply_steps)


def _apply_steps(layer: nn.Conv2d, args: Tuple[torch.Tensor]) -> torch.Tensor:
    return layer.input_steps(*args)


def _select(model: nn.Module, skip: Sequence[str]) -> List[nn.Conv2d]:
    """Return the convolutions to quantize."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    skipped = {p: [m for n, m in convs.items() if fnmatch.fnmatchcase(_flat(n), _flat(p))] for p in skip}
    unmatched = [p for p, layers in skipped.items() if not layers]
    is_part = isinstance(model, _FEATURE_WRAPPERS)
    if unmatched and not is_part:
        raise UserError(f'skip names {unmatched[0]!r}, which matches no convolution of {type(model).__name__}.')
    kept = {m for layers in skipped.values() for m in layers}
    kept.update(_named_in_cfg(model, 'first_conv') or list(convs.values())[:1], _classifiers(model))
    selected = {n: m for n, m in convs.items() if m not in kept}
    for name, layer in selected.items():
        if type(layer) not in _QUANTIZED:
            raise UserError(f'{name} is a {type(layer).__name__}, which cannot be quantized: name it in skip.')
    if not selected and not is_part:
        raise UserError(f'{type(model).__name__} has no convolution to quantize except its first one.')
    return list(selected.values())


def _classifiers(model: nn.Module) -> Set[nn.Module]:
    """Return all modules of the classifier."""
    heads = _named_in_cfg(model, 'classifier')
    if hasattr(model, 'get_classifier'):
        heads += classifiers(model)
    return {m for head in heads for m in head.modules()}


def _named_in_cfg(model: nn.Module, key: str) -> List[nn.Module]:
    names = (getattr(model, 'pretrained_cfg', None) or {}).get(key) or ()
    names = [_flat(n) for n in ((names,) if isinstance(names, str) else names)]
    return [m for n, m in model.named_modules() if _flat(n) in names]


def _flat(name: str) -> str:
    """Return a name as timm's feature wrappers change it."""
    return name.removeprefix('model.').replace('.', '_')


def _quantize_activations(model: nn.Module, layers: Sequence[QuantConv2d], config: QuantConfig) -> None:
    def create(weight: torch.Tensor) -> ActivationQuantizer:
        quantizer = ActivationQuantizer(
            config.activation_bits, model._switch, config.fixed_activation_basis, device=weight.device,
            dtype=weight.dtype)
        return quantizer.train(model.training)

    places = [(p, n) for p in model.modules() for n, m in p._modules.items() if isinstance(m, ActivationSite)]
    for parent, name in places:
        parent._modules[name] = create(model.alpha)
    for layer in layers if not places else ():
        layer.input_quantizer = create(layer.weight)
