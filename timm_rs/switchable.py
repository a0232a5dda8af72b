"""Switchable networks

`make_switchable` gives every Batch Normalization of a network a private copy per input resolution (Wang et al., ECCV
2020, section 3.2). As with PyTorch's `fully_shard`, the module stays the same object with the same structure and
parameter names and remains an instance of its own class, so everything that timm does with it keeps working.
"""
import copy
import math
import warnings
import weakref
from collections import OrderedDict
from functools import cache, partial, wraps
from itertools import chain
from types import MethodType
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from timm_rs_runtime.errors import UserError

from ._compat import BatchNorm, WrappedHook, is_inside_ddp, tree_flatten, tree_leaves, tree_unflatten
from .checkpoint import adapt_state_dict
from .private_bn import HOOK_DICTS, PrivateBN
from .resolutions import Switch, UnknownResolutionError, check_resolutions, nearest_resolution, neighbours

__all__ = ['SwitchableMixin', 'make_switchable']


def make_switchable(module: nn.Module, resolutions: Sequence[int] = (224, 192, 160, 128, 96)) -> nn.Module:
    """Make the BN layers of a network private to a resolution, in place; each starts as a copy of the present one.

    Args:
        module: Any network that holds BN layers, from timm or not.
        resolutions: Square input sizes in pixels; kept largest first, the largest is active.

    Returns:
        The same object, now with the methods of SwitchableMixin and the parameter alpha: the weights of the ensemble
        of resolutions before their softmax [S], largest resolution first.

    Raises:
        ValueError: The network holds no BN, is switchable already, or the resolutions are not usable.

    Example:
        >>> import timm
        >>> model = make_switchable(timm.create_model('resnet18'), resolutions=(224, 160))
        >>> type(model.at(160)) is timm.models.ResNet and isinstance(model, timm.models.ResNet)
        True
    """
    resolutions = check_resolutions(resolutions)
    name = type(module).__name__
    if any(isinstance(m, PrivateBN) for m in module.modules()):
        held = getattr(module, 'resolutions', 'in a part of it')
        raise UserError(f'{name} is switchable already ({held}), expected a plain network.')
    if isinstance(module, BatchNorm):
        raise UserError(f'{name} is a single layer, expected a network that holds BatchNorm layers.')
    if not any(isinstance(m, BatchNorm) for m in module.modules()):
        raise UserError(f'{name} holds no BatchNorm layer, so nothing can be private to a resolution.')
    taken = [a for a in ('alpha', 'at', 'switch_to', 'resolution', 'resolutions') if hasattr(module, a)]
    if taken:
        raise UserError(f'{name} has an attribute {taken[0]!r} of its own, which a switchable network needs.')

    reference = next(module.parameters(), torch.empty(0))
    module._switch = Switch(resolutions)
    module._plain_architecture = getattr(module, 'pretrained_cfg', None) and module.pretrained_cfg.get('architecture')
    module.alpha = nn.Parameter(torch.zeros(len(resolutions), device=reference.device, dtype=reference.dtype))
    _make_private(module, module._switch)
    module.__class__ = _switchable_class(type(module))
    for key in ('test_input_size', 'test_crop_pct'):  # timm tests at sizes that have no BN here
        (getattr(module, 'pretrained_cfg', None) or {}).pop(key, None)
    _note_input_size(module, module.resolution)
    return module


class SwitchableMixin:
    """What make_switchable adds to a network.

    Attributes:
        alpha: Ensemble weights before the softmax [S], largest resolution first (section 3.3).
    """

    @property
    def resolutions(self) -> Tuple[int, ...]:
        """Input sizes in pixels that have their own BN, largest first."""
        return self._switch.resolutions

    @property
    def resolution(self) -> int:
        """The active input size in pixels: last switched to, or last seen by a call on one tensor."""
        return self._switch.active

    def switch_to(self, resolution: int) -> None:
        """Make the BN layers of a resolution the active ones, in this thread and in those that have not chosen.

        Raises:
            UnknownResolutionError: A KeyError; this network has no such resolution.
        """
        self._choose(resolution, everywhere=True)

    def _choose(self, resolution: int, everywhere: bool = False) -> None:
        self._switch.to(resolution, everywhere)  # without reading the active one, which torch.compile would guard
        if not torch.compiler.is_compiling():  # nor the configuration
            _note_input_size(self, int(resolution))

    def at(self, resolution: int) -> nn.Module:
        """Take out the plain network of one resolution.

        It has the backbone's own class and holds the very parameters and buffers of this network, not copies: train
        one and the other follows, until this network is cast, or loads weights with assign=True: take it out again
        then. Hooks run in it too; what they belong to is not copied. To move or cast it separately, copy it first:
        `copy.deepcopy(model.at(160)).half()`.

        Args:
            resolution: Input size in pixels.

        Returns:
            A module without PrivateBN, as cheap as the network that timm builds.

        Raises:
            UnknownResolutionError: This network has no such resolution.
        """
        if resolution not in self.resolutions:
            raise UnknownResolutionError(resolution, self.resolutions)
        resolution = int(resolution)
        plain = view(self, Switch(self.resolutions, resolution), resolution)
        plain.__class__ = self._plain_class
        del plain.alpha, plain._switch
        architecture = plain.__dict__.pop('_plain_architecture')
        if plain.__dict__.get('pretrained_cfg'):
            plain.pretrained_cfg.update(architecture=architecture)
        _note_input_size(plain, resolution)
        plain.__dict__.get('_model_args', {}).pop('resolutions', None)
        return plain

    def forward(self, x: Union[torch.Tensor, Sequence[torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Run at the resolution of the input, which becomes the active one.

        Threads can run the same network at different resolutions; each has its own active resolution. Train a network
        with gradient checkpointing in one thread at a time.

        Args:
            x: Images [N, C, H, W], or a list of batches, each of one of the resolutions, in any order. A size without
                its own BN gets one warning and, in eval mode, BN interpolated by area between the two neighbouring
                sizes; beyond these, in training and with gradient checkpointing it gets the BN of the nearest size.

        Returns:
            What the plain network returns, e.g. logits [N, num_classes]; for a list the list of these in the order
            given, and the active resolution stays as it was.

        Raises:
            ValueError: The list is empty or holds another size or one size twice; the images are too small for the
                network.
        """
        run = self._forward_pyramid if isinstance(x, (list, tuple)) else self._forward_one
        output = run(x, *args, **kwargs)
        if self.training and self.alpha.requires_grad and is_inside_ddp():
            # A loss need not use alpha, but DistributedDataParallel waits for its gradient.
            leaves, spec = tree_flatten(output)
            index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
            leaves[index] = leaves[index] + 0. * self.alpha.sum()
            output = tree_unflatten(leaves, spec)
        return output

    def _forward_one(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        height, width = x.shape[-2:]
        for resolution in self._switch.resolutions:
            if height == resolution and width == resolution:
                self._choose(resolution)
                return self._prepare_recompute(super().forward(x, *args, **kwargs))
        return self._forward_untrained_size(x, *args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load the weights of a plain network (to every resolution) or of a switchable one, even of other resolutions.

        A resolution that the state dict lacks starts from the nearest one; one warning says so.
        """
        private = (name for name, m in self.named_modules() if isinstance(m, PrivateBN))
        state_dict = adapt_state_dict(state_dict, private, self.resolutions, self.alpha)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Reset the head as timm does; BN layers that come with a new head are private too."""
        super().reset_classifier(*args, **kwargs)
        _make_private(self, self._switch)

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters that never decay, the ensemble weights among them."""
        plain = getattr(super(), 'no_weight_decay', set)
        return set(plain()) | {'alpha'}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory as timm does; each resolution is recomputed with its own BN.

        The running statistics of BN are updated once, by the forward pass.
        """
        super().set_grad_checkpointing(enable)
        self._switch.checkpointing = enable

    def set_resolution_checkpointing(self, enable: bool = True) -> None:
        """For a list of resolutions, drop activations and recompute each in turn in the backward pass.

        The peak of memory is then that of one resolution instead of all, for one more forward pass. Gradients stay the
        same, and the running statistics of BN are updated once.
        """
        self._switch.recompute = enable

    def _forward_pyramid(self, pyramid: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> List[Any]:
        sizes = [tuple(x.shape[-2:]) for x in pyramid]  # dynamic ones, which do not sort, under a compiler
        if not sizes or len(sizes) != sum((r, r) in sizes for r in self.resolutions):
            got = ', '.join(f'{h}x{w}' for h, w in sizes) or 'none'
            raise UserError(
                f'Got a list of {len(sizes)} sizes ({got}), expected each of {self.resolutions} at most once.')
        before = self.resolution
        forward = self._forward_one
        if self._switch.recompute and self.training and torch.is_grad_enabled():
            forward = partial(checkpoint, self._forward_and_back, use_reentrant=False)
        outputs = [forward(x, *args, **kwargs) for x in pyramid]
        self._choose(before)  # after a failure the active resolution is the one that failed
        return outputs

    def _forward_and_back(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run once more in the backward pass, whose thread has chosen no resolution afterwards if it had not before."""
        before = self._switch.chosen
        output = self._forward_one(x, *args, **kwargs)
        self._switch.chosen = before
        return output

    def _forward_untrained_size(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        height, width = (int(s) for s in x.shape[-2:])
        resolution = nearest_resolution(height, width, self.resolutions)
        below, above, share = neighbours(height, width, self.resolutions)
        between = 0 < share < 1 and not self.training and not self._switch.checkpointing
        if (height, width) not in self._switch.warned:
            self._switch.warned.add((height, width))
            what = (f'one between those of {above} and {below} serves' if between
                    else f'the nearest of {self.resolutions} serves: {resolution}')
            warnings.warn(f'{type(self).__name__} has no BatchNorm for {height}x{width}, {what}.', stacklevel=6)
        self._choose(resolution)
        self._switch.between = (str(below), str(above), share) if between else None
        try:
            return self._prepare_recompute(super().forward(x, *args, **kwargs))
        except RuntimeError as e:
            if min(height, width) >= self.resolutions[-1]:
                raise
            raise UserError(
                f'{type(self).__name__} cannot take an input of {height}x{width}, '
                f'expected one of {self.resolutions}: {e}'
            ) from e
        finally:
            self._switch.between = None

    def _prepare_recompute(self, output: Any) -> Any:
        """Let checkpointed layers recompute with the BN of this forward, whatever is active by then."""
        if self._switch.checkpointing and not torch.compiler.is_compiling():
            resolution = self.resolution
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._switch.recompute_at(resolution))
        return output

    def __copy__(self) -> nn.Module:
        return view(self, copy.copy(self._switch))

    @property
    def _plain_class(self) -> type:
        return type(self).__bases__[1]

    def __reduce_ex__(self, protocol: int) -> Tuple[Callable, Tuple, dict]:
        return _new_switchable, (self._plain_class,), _attributes(self)


def _attributes(module: nn.Module) -> Dict[str, Any]:
    """Return what a copy of a module takes over: not what model.compile() made, which runs the module itself."""
    return {k: v for k, v in vars(module).items() if k != '_compiled_call_impl'}


FOLDING = ('fuse', 'reparameterize', 'switch_to_deploy')  # as timm names what makes one layer of several


def view(network: nn.Module, switch: Switch, resolution: Optional[int] = None) -> nn.Module:
    """Return new modules that hold the tensors of a switchable network themselves, not copies.

    Hooks run in it too; an owner of hooks that is not a part of the network is shared, not copied.

    Args:
        network: A switchable network.
        switch: Replaces the network's own.
        resolution: Replace each PrivateBN by its BN of this resolution.
    """
    def stand_in(module: nn.Module) -> nn.Module:
        return module[resolution] if isinstance(module, PrivateBN) and resolution is not None else module

    memo: Dict[int, Any] = {id(t): t for t in chain(network.parameters(), network.buffers())}
    memo[id(network._switch)] = switch
    sources, hooks = [], []
    for module in network.modules():
        if id(module) in memo:  # a BN whose PrivateBN was met before
            continue
        source = stand_in(module)
        attributes = _attributes(source)
        if source is not module:
            for name in HOOK_DICTS:
                attributes[name] = type(attributes[name])({**attributes[name], **vars(module)[name]})
            attributes['_is_full_backward_hook'] = module._is_full_backward_hook
        if not isinstance(module, GraphModule):
            memo[id(module)] = memo[id(source)] = object.__new__(type(source))
        sources.append((module, attributes))
    for module, attributes in reversed(sources):  # a graph is copied with its parts, which are there by then
        if isinstance(module, GraphModule):
            memo[id(module)] = copy.deepcopy(module, memo)
            for name, part in memo[id(module)].named_modules():  # which torch makes in train mode
                part.training = stand_in(module.get_submodule(name)).training
            continue
        copied = vars(memo[id(module)])
        for name, value in attributes.items():
            if name.endswith('_hooks') and isinstance(value, dict):
                copied[name] = value
                hooks.append((memo[id(module)], name))
            elif value is not refuse_folding or resolution is None:
                copied[name] = _counterpart(value, memo)
    for module, name in hooks:  # an owner that is a part of the network is there by then
        vars(module)[name] = _counterpart(vars(module)[name], memo, module)
    return memo[id(network)]


def classifiers(model: nn.Module) -> nn.ModuleList:
    """Return the classifier of a network of timm; two where one more is for distillation."""
    found = model.get_classifier()
    found = found if isinstance(found, (list, tuple)) else [found]
    return nn.ModuleList(m for m in found if isinstance(m, nn.Module))


def refuse_folding(*_: Any, **__: Any) -> None:
    raise UserError(
        'A switchable network has a BatchNorm for each resolution, which cannot all be folded into one layer: take a '
        'resolution out, reparameterize_model(model.at(size)).')


def _counterpart(value: Any, memo: Dict[int, Any], module: Optional[nn.Module] = None) -> Any:
    """Return what stands in a view for an attribute of a module, or for a hook that this module of the view gets."""
    if module is None and id(value) in memo:  # as timm's default_cfg, another name of pretrained_cfg
        return memo[id(value)]
    if type(value) in (dict, OrderedDict):
        items = ((k, _counterpart(v, memo, module)) for k, v in value.items())
        return memo.setdefault(id(value), type(value)(items)) if module is None else type(value)(items)
    if type(value) in (list, tuple, set):
        return type(value)(_counterpart(v, memo, module) for v in value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, partial):
        func, args = _counterpart(value.func, memo, module), (memo.get(id(a), a) for a in value.args)
        return partial(func, *args, **value.keywords)
    if isinstance(value, WrappedHook):
        hook = copy.copy(value)
        hook.hook = _counterpart(value.hook, memo, module)
        if hook.with_module:
            hook.module = weakref.ref(module)
        return hook
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        return value.detach()  # kept with its graph, e.g. the attention biases of LeViT: it could not be copied later
    if isinstance(value, torch.Tensor) or module is not None:
        return memo.get(id(value), value)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # it holds a lock or the like
        return value


def _note_input_size(module: nn.Module, resolution: int) -> None:
    """Let timm's data configuration follow the resolution."""
    cfg = module.__dict__.get('pretrained_cfg')
    if cfg and cfg.get('input_size'):
        channels, before, _ = cfg['input_size']
        cfg['input_size'] = (channels, resolution, resolution)
        info = getattr(module, 'feature_info', None)
        if info and tuple(cfg.get('pool_size') or ()) == _last_map(before, info):  # others do not pad
            cfg['pool_size'] = _last_map(resolution, info)
    traits = module.__dict__.get('_traits')
    if traits and traits.get('img_size'):  # position embeddings have one size, but work for others too
        traits.update(img_size=(resolution, resolution), fixed_input_size=False)


def _last_map(resolution: int, info: Sequence[Dict[str, Any]]) -> Tuple[int, int]:
    return (math.ceil(resolution / info[-1]['reduction']),) * 2


@cache
def _switchable_class(plain: type) -> type:
    features = {name: _name_other_size(getattr(plain, name))
                for name in ('forward_features', 'forward_intermediates') if hasattr(plain, name)}
    missing = {name: property(partial(_raise_missing, name))
               for name in ('reset_classifier', 'set_grad_checkpointing') if not hasattr(plain, name)}
    return type(f'RS{plain.__name__}', (SwitchableMixin, plain), dict(features, **missing, __module__=plain.__module__))


def _raise_missing(name: str, module: nn.Module) -> None:
    raise AttributeError(f'{type(module).__name__} has no {name}')  # it is timm's


def _name_other_size(method: Callable) -> Callable:
    """Return a method that runs at the active resolution, and warns once of images of another one."""
    @wraps(method)
    def features(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling():
            height, width = x.shape[-2:]
            key = method.__name__, height, self.resolution
            if height == width != self.resolution and height in self.resolutions and key not in self._switch.warned:
                self._switch.warned.add(key)
                warnings.warn(
                    f'{method.__name__} takes the BatchNorm of the active resolution, {self.resolution}, for images of '
                    f'{height}x{width}: switch_to({height}) before, or at({height}).{method.__name__}.', stacklevel=2)
        return method(self, x, *args, **kwargs)

    return features


def _new_switchable(plain: type) -> nn.Module:
    """Return an empty object for copy and pickle to fill."""
    cls = _switchable_class(plain)
    return cls.__new__(cls)


def _make_private(module: nn.Module, switch: Switch) -> None:
    """Replace the BN layers below a module; a layer in several places stays one layer."""
    private = {}
    for parent in list(module.modules()):
        if isinstance(parent, PrivateBN):
            continue
        for name, child in parent._modules.items():
            if isinstance(child, BatchNorm):
                if id(child) not in private:
                    private[id(child)] = (child, PrivateBN(child, switch.resolutions, switch))
                parent._modules[name] = private[id(child)][1]
    for parent in module.modules():
        for name in FOLDING:  # for the active one only
            if hasattr(type(parent), name) and any(isinstance(m, PrivateBN) for m in parent.modules()):
                setattr(parent, name, refuse_folding)
