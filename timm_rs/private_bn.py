"""Private Batch Normalization

The one layer that a Resolution Switchable Network does not share: a Batch Normalization per input resolution, so that
every resolution keeps its own affine parameters and running statistics (Wang et al., "Resolution Switchable Networks
for Runtime Efficient Image Recognition", ECCV 2020, section 3.2).
"""
import copy
import sys
from contextlib import contextmanager
from itertools import chain
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import register_notrace_module

from timm_rs_runtime.errors import UserError

from ._compat import BatchNorm
from .resolutions import Switch, UnknownResolutionError, check_resolutions, is_recomputing

__all__ = [
    'HOOK_DICTS',
    'PrivateBN',
    'interpolate',
    'tie_affine',
]

# Dictionaries of hooks that belong to the place in the network and not to the layer that stands there.
HOOK_DICTS = (
    '_forward_hooks',
    '_forward_hooks_with_kwargs',
    '_forward_hooks_always_called',
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_backward_hooks',
    '_backward_pre_hooks',
)


@register_notrace_module  # a leaf for torch.fx, which would otherwise fix the active branch
class PrivateBN(nn.Module):
    """One BN module per resolution, keyed by resolution; the active one normalizes.

    The modules are deep copies of the given one, so a layer with an activation (timm's BatchNormAct2d) keeps it. The
    container is not itself a BN: converters that look for BN layers (sync, freeze, split) recurse into it and treat
    each private one. It has the attributes of the active BN (weight, eps, act, ...), so that code which looks into a
    BN still works; those that are not tensors are set for all of them. State-dict keys are
    `<name>.<resolution>.<key>`, such as `layer1.0.bn1.224.weight`.

    Args:
        bn: The BN layer to replace, of any subclass, e.g. BatchNorm1d, BatchNorm2d or BatchNormAct2d.
        resolutions: Input sizes in pixels.
        switch: Shared holder of the active resolution, a new one (largest active) if None.

    Raises:
        TypeError: The layer is not a BN.
        ValueError: The resolutions are not usable, see check_resolutions.

    Example:
        >>> bn = PrivateBN(nn.BatchNorm2d(8), (224, 160))
        >>> bn(torch.rand(2, 8, 7, 7)).shape
        torch.Size([2, 8, 7, 7])
        >>> bn[160].num_features
        8
    """

    def __init__(self, bn: nn.Module, resolutions: Sequence[int], switch: Optional[Switch] = None):
        super().__init__()
        if not isinstance(bn, BatchNorm):
            raise TypeError(f'PrivateBN takes a BatchNorm layer, got {type(bn).__name__}.')
        self._switch = switch if switch is not None else Switch(check_resolutions(resolutions))
        hooks = {name: getattr(bn, name) for name in HOOK_DICTS if getattr(bn, name, None)}
        for name, hook in hooks.items():
            setattr(self, name, hook)
            setattr(bn, name, type(hook)())
        self._is_full_backward_hook, bn._is_full_backward_hook = bn._is_full_backward_hook, None
        self._names = frozenset(chain(vars(bn), bn._parameters, bn._buffers, bn._modules))
        for resolution in self._switch.resolutions:
            self.add_module(str(resolution), copy.deepcopy(bn))
        self.training = bn.training

    @property
    def resolutions(self) -> Tuple[int, ...]:
        """Input sizes in pixels, largest first."""
        return self._switch.resolutions

    @property
    def resolution(self) -> int:
        """The active input size in pixels."""
        return self._switch.active

    def switch_to(self, resolution: int) -> None:
        """Make the BN of a resolution the active one, here and in all PrivateBN of the same network.

        Raises:
            UnknownResolutionError: There is no BN for this resolution.
        """
        self._switch.to(resolution, everywhere=True)

    def __getitem__(self, resolution: int) -> nn.Module:
        if resolution not in self._switch.resolutions:
            raise UnknownResolutionError(resolution, self._switch.resolutions)
        return self._modules[str(int(resolution))]

    def __iter__(self) -> Iterator[int]:
        return iter(self._switch.resolutions)

    def __len__(self) -> int:
        return len(self._switch.resolutions)

    def __contains__(self, resolution: Any) -> bool:
        return resolution in self._switch.resolutions

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            active = self._modules.get(self._switch.key) if '_names' in self.__dict__ else None
            if active is None:  # half built or half unpickled
                raise
            if name not in self._names and not hasattr(type(active), name):  # it was given only to that layer
                raise
            return getattr(active, name)

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get('_names', ())
        if name not in names or name == 'training' or name.startswith('_'):
            super().__setattr__(name, value)
            return
        if isinstance(value, torch.Tensor):
            raise AttributeError(f'Each resolution has its own {name}, set that of bn[{self.resolution}].')
        for resolution in self:
            setattr(self[resolution], name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        switch = self._switch
        bn = self._modules[switch.key]
        if switch.between is not None:
            low, high, share = switch.between
            return interpolate(self._modules[low], self._modules[high], share)(x)
        if self.training and (switch.checkpointing or switch.recompute) and is_recomputing():
            with _frozen_statistics(bn):
                return bn(x)
        if self.training and getattr(bn, 'momentum', 0.) is None and not torch.compiler.is_compiling():
            _refuse_update_bn()
        return bn(x)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        first, *others = self
        for name, parameter in self[first].named_parameters(recurse=False):
            source = f'{prefix}{first}.{name}'
            for r in others:
                if getattr(self[r], name) is parameter and source in state_dict:  # tied: whatever is copied last stays
                    state_dict[f'{prefix}{r}.{name}'] = state_dict[source]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f'active={self._switch.active}'


def interpolate(low: nn.Module, high: nn.Module, share: float) -> nn.Module:
    """Return a BN between two others; these stay as they are, for other threads.

    Args:
        low: BN at share 0, whose count of batches is taken.
        high: BN at share 1.
        share: Position between them.
    """
    bn = object.__new__(type(low))
    vars(bn).update(vars(low))
    for name in ('_parameters', '_buffers'):
        tensors = vars(high)[name]
        vars(bn)[name] = {
            k: torch.lerp(v, tensors[k], share) if v is not None and v.is_floating_point() else v
            for k, v in vars(low)[name].items()}
    bn._modules = {k: interpolate(child, high._modules[k], share) for k, child in low._modules.items()}
    return bn


def tie_affine(module: nn.Module, statistics: bool = False) -> None:
    """Let all resolutions train the affine parameters of the largest, in place; their statistics stay private.

    The keys of a state dict stay the same, so a network that was trained in this way is saved, loaded and switched like
    any other. Loading it into a network that is not tied unties it. A tied network that loads a state dict takes the
    parameters of the largest resolution. A moving average has to count tied parameters once; timm's does not.

    Args:
        module: Network that holds PrivateBN.
        statistics: Share the running statistics too, so that nothing is private to a resolution.

    Example:
        >>> bn = PrivateBN(nn.BatchNorm2d(8), (224, 160))
        >>> tie_affine(bn)
        >>> bn[160].weight is bn[224].weight, bn[160].running_mean is bn[224].running_mean
        (True, False)
    """
    for layer in module.modules():
        if isinstance(layer, PrivateBN):
            first, *others = (layer[r] for r in layer)
            for bn in others:
                bn.weight, bn.bias = first.weight, first.bias
                if statistics:
                    bn.running_mean, bn.running_var = first.running_mean, first.running_var


def _refuse_update_bn() -> None:
    """Raise UserError if torch.optim.swa_utils.update_bn is running, which knows one size of images.

    What it changed of the network comes back, except the statistics.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != 'update_bn':
        frame = frame.f_back
    if frame is not None and frame.f_globals.get('__name__') == 'torch.optim.swa_utils':
        held = frame.f_locals
        for layer, momentum in held.get('momenta', {}).items():
            layer.momentum = momentum
        if 'was_training' in held:
            held['model'].train(held['was_training'])
        raise UserError(
            'update_bn resets the statistics of all resolutions and would estimate those of one. They are reset by '
            'now, so load the weights again. Then call update_bn(loader, model.at(size)) for each size, with a loader '
            'of images of that size.')


@contextmanager
def _frozen_statistics(bn: nn.Module) -> Iterator[None]:
    """Normalize with batch statistics as in training, but leave the running ones alone."""
    if not getattr(bn, 'track_running_stats', False):  # a frozen one (timm.utils.freeze) has no such flag
        yield
        return
    before = bn.momentum, bn.num_batches_tracked
    bn.momentum = 0.  # still passes the running statistics on: as many tensors are saved as in the forward
    bn.num_batches_tracked = bn.num_batches_tracked.clone()
    try:
        yield
    finally:
        bn.momentum, bn.num_batches_tracked = before
