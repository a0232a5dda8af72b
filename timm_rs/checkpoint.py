"""Checkpoint files, and state-dict adapters between plain timm networks, switchable ones and the authors' code

In the keys of a switchable network the resolution follows the layer (`bn1.weight` becomes `bn1.224.weight`,
`bn1.192.weight`, ...), and the ensemble weights are `alpha`. Everything else keeps timm's key.

The authors' code wraps shared layers in a `module` and numbers the BN layers, the largest size first: `conv1.weight`
is `conv1.module.weight`, `bn1.224.weight` is `bn1.bn_0.weight`. EfficientNet-PyTorch numbers blocks throughout,
`blocks.1.0.conv_pw.weight` is `_blocks.1._expand_conv.weight`.
"""
import argparse
import logging
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Set, Tuple

import safetensors.torch
import torch
from timm.models import clean_state_dict

from timm_rs_runtime.errors import UserError

from ._compat import torch_load
from .records import check_run, find_checkpoint
from .resolutions import nearest_resolution

__all__ = [
    'Checkpoint', 'adapt_reference', 'adapt_state_dict', 'check_archive', 'check_finite', 'check_tensors',
    'explain_mismatch', 'extract_resolution', 'has_taken', 'is_reference', 'read_checkpoint', 'state_dict_resolutions']

_logger = logging.getLogger(__name__)
_SIZE = re.compile(r'[1-9]\d{0,3}')
_RUNNING_MEAN = re.compile(rf'(?:^|\.)({_SIZE.pattern})\.running_mean$')
_REFERENCE_KEY = re.compile(r'(?P<layer>.+)\.(?:module|bn_(?P<index>\d{1,3}))\.(?P<rest>\w+)')
_MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)  # blocks per stage
_MOBILENETV2_LAYERS = {
    4: ('conv_dw', 'bn1', 'conv_pw', 'bn2'),
    6: ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3'),
}
_EFFICIENTNET_KEY = re.compile(r'(?:_blocks\.(?P<block>\d{1,4})\.)?_(?P<layer>\w+)\.(?P<rest>\w+)')
_EFFICIENTNET_LAYERS = dict(conv_stem='conv_stem', bn0='bn1', conv_head='conv_head', bn1='bn2', fc='classifier')
_SEPARABLE_LAYERS = dict(
    depthwise_conv='conv_dw', bn1='bn1', se_reduce='se.conv_reduce', se_expand='se.conv_expand',
    project_conv='conv_pw', bn2='bn2')
_INVERTED_LAYERS = dict(
    _SEPARABLE_LAYERS, expand_conv='conv_pw', bn0='bn1', bn1='bn2', project_conv='conv_pwl', bn2='bn3')


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file that was read.
        state_dict: Weights under clean keys, all finite.
        args: Flags of the training run, see timm_rs.records.check_run; empty if unknown.
        epoch: Epoch, None if unknown.
    """
    path: str
    state_dict: Dict[str, torch.Tensor]
    args: Dict[str, Any] = field(default_factory=dict)
    epoch: Optional[int] = None


def read_checkpoint(path: str, use_ema: Optional[bool] = None, name: Optional[str] = None) -> Checkpoint:
    """Read a checkpoint: safetensors, or a pickle of tensors and plain values. No other file is opened.

    Args:
        path: Name of the file, which ends in .safetensors if it is one, or the output folder of a run.
        use_ema: Take the moving average (True) or not (False); None takes it if there is one, as timm does.
        name: Model to load it into, if it is known.

    Raises:
        UserError: There is no such file, it is damaged or not a checkpoint, reading it would run code that it holds,
            it holds no weights or no moving average, a weight is not finite, or the model pads images in another way.
    """
    path = find_checkpoint(path)
    content = _read(path)
    try:
        state_dict = _pick_state_dict(content, use_ema)
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    if '_conv_stem.weight' in state_dict:
        if name and 'tf_' not in name:
            raise UserError(
                f'{path} holds weights of EfficientNet-PyTorch, whose convolutions pad as those of TensorFlow do. '
                f'{name} does not: give a tf_efficientnet_* model.')
        state_dict = _adapt_efficientnet(state_dict)
    check_tensors(state_dict, path)
    args = content.get('args')
    args = check_run(vars(args), path) if isinstance(args, argparse.Namespace) else {}
    epoch = content.get('epoch') if args else None
    return Checkpoint(path, state_dict, args, epoch if isinstance(epoch, int) else None)


def check_finite(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise UserError if a weight is not finite or a running variance is negative; the message names where.

    Example:
        >>> check_finite({'fc.weight': torch.tensor([1., float('nan')])}, 'a.pth')
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: a.pth: fc.weight holds 1 of 2 values that are not finite.
    """
    for key, value in state_dict.items():
        value = torch.view_as_real(value) if value.is_complex() else value
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = torch.aminmax(value.detach().float() if value.itemsize == 1 else value.detach())  # float8 has none
        if not low.isfinite() or not high.isfinite():
            bad = int((~value.float().isfinite()).sum())
            raise UserError(f'{source}: {key} holds {bad} of {value.numel()} values that are not finite.')
        if key.endswith('running_var') and low < 0:
            raise UserError(f'{source}: {key} holds {low:g}, expected variances of at least 0.')


def check_tensors(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise UserError if weights that were read are not finite, or are more than the file can hold."""
    for key, value in state_dict.items():
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized:
            raise UserError(f'{source}: {key} is a {value.layout} tensor on {value.device}, expected a dense one.')
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UserError(f'{source}: {key} is {tuple(value.shape)}, but the file holds fewer values for it.')
    sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state_dict.values()}
    if sum(v.numel() * v.itemsize for v in state_dict.values()) > 16 * sum(sizes.values()):
        raise UserError(f'{source}: the weights share their memory more than 16 times.')
    check_finite(state_dict, source)


def _read(path: str) -> Any:
    """Return the content of a checkpoint file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the pickle protocol of foreign files
            if path.endswith('.safetensors'):
                return safetensors.torch.load_file(path)
            is_zip = zipfile.is_zipfile(path)
            if is_zip:
                check_archive(path)
            return torch_load(path, mmap=is_zip)
    except Exception as e:  # what a foreign file makes the readers raise is not documented
        if isinstance(e, OSError) and e.filename:
            raise
        reason = ' '.join(f'{e} {e.__cause__ or ""}'.split())
        code = re.search(r'[Uu]nsupported (?:global: )?GLOBAL (\S+)', reason)
        if code:
            raise UserError(
                f'{path} is refused: reading it would run code ({code.group(1)}). Only tensors and plain values are '
                'read; save only its state dict.') from e
        raise UserError(f'{path} is damaged or not a checkpoint, expected safetensors or a file of torch.save.') from e


def check_archive(path: str) -> None:
    """Raise an exception if a file of torch.save has changed since it was written: torch does not check checksums."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f'{info.filename} is compressed')
            if info.CRC:  # torch can leave the checksums out
                with archive.open(info) as f:
                    while f.read(2 ** 22):
                        pass


def _pick_state_dict(checkpoint: Any, use_ema: Optional[bool] = None) -> Dict[str, torch.Tensor]:
    """Return the weights under clean keys, from a state dict or from the state of a training run."""
    names = () if use_ema is False else ('state_dict_ema', 'model_ema')
    names += () if use_ema else ('state_dict', 'model')
    state_dict = None
    if isinstance(checkpoint, Mapping):
        held = [checkpoint[name] for name in names if isinstance(checkpoint.get(name), Mapping)]
        if use_ema and not held:
            raise UserError('There is no moving average of the weights in it, leave --use-ema out.')
        if use_ema is False and isinstance(checkpoint.get('state_dict_ema'), Mapping):
            _logger.warning('Taking the weights of the last step, not their moving average, which is --use-ema.')
        state_dict = held[0] if held else checkpoint
    if not state_dict or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state_dict.items()):
        raise UserError('There are no weights in it, expected a state dict or a training checkpoint.')
    return clean_state_dict(state_dict)


def state_dict_resolutions(
        state_dict: Mapping[str, Any],
        private_names: Optional[Set[str]] = None,
) -> Optional[Tuple[int, ...]]:
    """Return the resolutions that a switchable network's state dict holds, largest first, None if it is a plain one.

    Args:
        state_dict: Weights.
        private_names: Names of the PrivateBN modules of their network, if known. Otherwise all layers that hold running
            statistics have to be named by a resolution.

    Raises:
        ValueError: It is from the authors' code, needs images of another normalization and must be converted first.

    Example:
        >>> state_dict_resolutions({'alpha': 0, 'bn1.160.running_mean': 0, 'bn1.224.running_mean': 0})
        (224, 160)
    """
    if is_reference(state_dict):
        raise UserError(
            "These are weights of the authors' code, which need images of mean 0 and std 1: "
            'convert them first by timm-rs convert FILE --model MODEL --output DIR.')
    if 'alpha' not in state_dict:
        return None
    if private_names is None:
        matches = [_RUNNING_MEAN.search(k) for k in state_dict if k.endswith('running_mean')]
        held = {m and m.group(1) for m in matches}
    else:
        split = (_split_private(k, private_names) for k in state_dict)
        held = {rest.partition('.')[0] for name, rest in split if name is not None}
    if not held or not all(r and _SIZE.fullmatch(r) for r in held):
        return None
    return tuple(sorted(map(int, held), reverse=True))


def extract_resolution(state_dict: Mapping[str, Any], resolution: int) -> Dict[str, Any]:
    """Return the plain timm state dict of one resolution of a switchable network.

    Raises:
        UserError: The state dict is a plain one or does not hold this resolution.
    """
    resolutions = state_dict_resolutions(state_dict)
    if resolutions is None or resolution not in resolutions:
        held = f'the resolutions {resolutions}' if resolutions else 'no private BatchNorm'
        raise UserError(f'Cannot take resolution {resolution} from a state dict that holds {held}.')
    private = {k[:m.start()] for k in state_dict if (m := _RUNNING_MEAN.search(k))}
    plain = {}
    for key, value in state_dict.items():
        name, rest = _split_private(key, private)
        if name is not None:
            held, _, rest = rest.partition('.')
            key = f'{name}.{rest}' if name else rest
            if held != str(resolution):
                continue
        if key != 'alpha':
            plain[key] = value
    return plain


def is_reference(state_dict: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of the authors' code.

    Example:
        >>> is_reference({'conv1.module.weight': 0, 'bn1.bn_0.weight': 0})
        True
    """
    return any(match['index'] for _, match in _match_reference(state_dict))


def adapt_reference(state_dict: Mapping[str, torch.Tensor], resolutions: Tuple[int, ...]) -> Dict[str, torch.Tensor]:
    """Return the state dict of the authors' code with the keys of a switchable network.

    All of their networks are supported: ResNet and ResNeXt name their layers as timm does, MobileNetV2 is renamed.
    Unknown keys stay as they are.

    Args:
        state_dict: Weights, without the `module.` that DataParallel puts before each key.
        resolutions: The sizes that they were trained at, largest first.

    Raises:
        ValueError: The state dict has another number of sizes.
    """
    matches = list(_match_reference(state_dict))
    indices = {int(match['index']) for _, match in matches if match['index']}
    if indices != set(range(len(resolutions))):
        raise UserError(
            f'It holds {len(indices)} sizes, but --resolutions are {len(resolutions)} '
            f"({' '.join(map(str, resolutions))}): give the {len(indices)} that it was trained at.")
    names = _mobilenetv2_names(match['layer'] for _, match in matches)
    adapted = {k: v for k, v in state_dict.items() if k not in {key for key, _ in matches}}
    adapted['alpha'] = state_dict.get('alpha', torch.zeros(len(resolutions))).flatten()
    for key, match in matches:
        parts = [names.get(match['layer'], match['layer']), match['rest']]
        if match['index']:
            parts.insert(1, str(resolutions[int(match['index'])]))
        adapted['.'.join(parts)] = state_dict[key]
    return adapted


def explain_mismatch(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Optional[str]:
    """Return in words the first keys by which a state dict does not fit a network, None if it does.

    Example:
        >>> explain_mismatch({'a': torch.zeros(2), 'b': torch.zeros(2)}, {'a': torch.zeros(3), 'c': torch.zeros(3)})
        'c is missing; b is unexpected; a is (2,), expected (3,)'
    """
    both = [k for k in expected if k in state_dict]
    differ = [k for k in both if state_dict[k].shape != expected[k].shape]
    found = [
        ([k for k in expected if k not in state_dict and not k.endswith('num_batches_tracked')], 'missing'),
        ([k for k in state_dict if k not in expected], 'unexpected'),
    ]
    parts = [
        f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''} "
        f"{'are' if len(keys) > 1 else 'is'} {what}"
        for keys, what in found if keys
    ]
    parts += [f'{k} is {tuple(state_dict[k].shape)}, expected {tuple(expected[k].shape)}' for k in differ[:3]]
    return '; '.join(parts) or None


def has_taken(state_dict: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a network holds any weights of a state dict, whatever their names.

    timm adapts keys as well as weights, and loads what fits if the classifier differs: that can be nothing.

    Example:
        >>> has_taken({'a': torch.ones(1, 2)}, {'b': torch.zeros(1, 2), 'c': torch.ones(1, 2)})
        True
    """
    matrices = [w for w in state_dict.values() if w.ndim > 1]  # scales and biases are often alike
    return any(torch.equal(w.to(v), v) for v in loaded.values() for w in matrices if w.shape == v.shape)


def adapt_state_dict(
        state_dict: Mapping[str, Any],
        private_names: Iterable[str],
        resolutions: Tuple[int, ...],
        alpha: torch.Tensor,
) -> Mapping[str, Any]:
    """Return the state dict with the keys of a network of these resolutions.

    A plain one is copied to every resolution. From that of a switchable network the resolutions in common are taken; a
    new one starts from the nearest by area, and one warning says so.

    Args:
        state_dict: State dict of a plain or a switchable network.
        private_names: Names of the network's PrivateBN modules.
        resolutions: The network's resolutions, largest first.
        alpha: The network's own ensemble weights [S], kept if the state dict has none.
    """
    private_names = set(private_names)
    found = state_dict_resolutions(state_dict, private_names)
    if found == resolutions:
        return state_dict
    source = {r: r for r in resolutions}
    if found is not None:
        source = {r: nearest_resolution(r, r, found) for r in resolutions}
        new = {r: s for r, s in source.items() if r != s}
        if new:
            started = ', '.join(f'{r} from {s}' for r, s in new.items())
            warnings.warn(
                f'The checkpoint holds the resolutions {found}. New ones start from the nearest BatchNorm: {started}.',
                stacklevel=4,
            )

    adapted = {}
    for key, value in state_dict.items():
        name, rest = _split_private(key, private_names)
        if name is None:
            adapted[key] = value
        elif found is None:
            adapted.update({f'{name}.{r}.{rest}': value.clone() for r in resolutions})
        else:
            held, _, rest = rest.partition('.')
            adapted.update({f'{name}.{r}.{rest}': value.clone() for r, s in source.items() if str(s) == held})
            if held not in map(str, found):
                adapted[key] = value
    if found is None:
        adapted['alpha'] = alpha.detach().clone()
    else:
        if state_dict['alpha'].shape != (len(found),):
            raise UserError(f"alpha is {tuple(state_dict['alpha'].shape)}, expected {(len(found),)}.")
        index = {r: i for i, r in enumerate(found)}
        adapted['alpha'] = torch.stack([state_dict['alpha'][index[source[r]]] for r in resolutions])
    return adapted


def _adapt_efficientnet(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return weights of EfficientNet-PyTorch under timm's keys; unknown keys stay as they are."""
    widths = {int(m['block']): len(v) for k, v in state_dict.items()
              if (m := _EFFICIENTNET_KEY.fullmatch(k)) and m['layer'] == 'project_conv'}
    places, stage, first = {}, -1, 0
    for block in sorted(widths):
        if widths[block] != widths.get(block - 1):  # all blocks of a stage are equally wide, each stage is wider
            stage, first = stage + 1, block
        places[block] = f'blocks.{stage}.{block - first}.'
    adapted = {}
    for key, value in state_dict.items():
        match = _EFFICIENTNET_KEY.fullmatch(key)
        place, layers = '', _EFFICIENTNET_LAYERS
        if match and match['block']:
            place = places.get(int(match['block']))
            expands = f"_blocks.{match['block']}._expand_conv.weight" in state_dict
            layers = _INVERTED_LAYERS if expands else _SEPARABLE_LAYERS
        if match and place is not None and match['layer'] in layers:
            key = f"{place}{layers[match['layer']]}.{match['rest']}"
        adapted[key] = value
    return adapted


def _split_private(key: str, private_names: Set[str]) -> Tuple[Optional[str], str]:
    """Split a key into the name of the private layer that it belongs to, if any, and the rest."""
    end = key.rfind('.')
    while end >= 0:
        if key[:end] in private_names:
            return key[:end], key[end + 1:]
        end = key.rfind('.', 0, end)
    return None, key


def _match_reference(state_dict: Mapping[str, Any]) -> Iterator[Tuple[str, 're.Match']]:
    for key in state_dict:
        match = _REFERENCE_KEY.fullmatch(key)
        if match:
            yield key, match


def _mobilenetv2_names(layers: Iterable[str]) -> Dict[str, str]:
    """Return timm's names for the layers of torchvision's first MobileNetV2, nothing for another network."""
    layers = set(layers)
    if not {'features.0.0', 'features.0.1', 'conv.0', 'conv.1'} <= layers:
        return {}
    names = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'conv.0': 'conv_head', 'conv.1': 'bn2'}
    places = [(stage, i) for stage, depth in enumerate(_MOBILENETV2_DEPTHS) for i in range(depth)]
    for block, (stage, i) in enumerate(places, start=1):
        prefix = f'features.{block}.conv.'
        inner = sorted(int(m[1]) for n in layers if (m := re.fullmatch(rf'{re.escape(prefix)}(\d{{1,3}})', n)))
        places_of = (f'blocks.{stage}.{i}.{n}' for n in _MOBILENETV2_LAYERS.get(len(inner), ()))
        names.update(zip((f'{prefix}{n}' for n in inner), places_of))
    return names
