"""State-dict adapters between plain timm networks and switchable ones

A switchable network names the resolution behind the layer that it belongs to (`bn1.weight` becomes `bn1.224.weight`,
`bn1.192.weight`, ...) and adds its ensemble weights as `alpha`. Everything else keeps timm's key.
"""
import re
import warnings
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Tuple

import torch

__all__ = ['adapt_state_dict', 'extract_resolution', 'nearest_resolution', 'state_dict_resolutions']

_RUNNING_MEAN = re.compile(r'(?:^|\.)(\d+)\.running_mean$')


def nearest_resolution(height: int, width: int, resolutions: Sequence[int]) -> int:
    """Return the resolution nearest to an input size by area, the larger one of two equally near.

    Example:
        >>> nearest_resolution(200, 200, (224, 192, 160))
        192
    """
    return min(resolutions, key=lambda r: (abs(height * width - r * r), -r))


def state_dict_resolutions(state_dict: Mapping[str, Any]) -> Optional[Tuple[int, ...]]:
    """Return the resolutions that a switchable network's state dict holds, largest first, None if it is a plain one.

    Example:
        >>> state_dict_resolutions({'alpha': 0, 'bn1.160.running_mean': 0, 'bn1.224.running_mean': 0})
        (224, 160)
    """
    if 'alpha' not in state_dict:
        return None
    matches = [_RUNNING_MEAN.search(k) for k in state_dict if k.endswith('running_mean')]
    if not matches or not all(matches):
        return None
    return tuple(sorted({int(m.group(1)) for m in matches}, reverse=True))


def extract_resolution(state_dict: Mapping[str, Any], resolution: int) -> Dict[str, Any]:
    """Return the plain timm state dict of one resolution out of a switchable network's.

    Args:
        state_dict: State dict of a switchable network.
        resolution: Input size in pixels.

    Raises:
        ValueError: The state dict is a plain one or does not hold this resolution.
    """
    resolutions = state_dict_resolutions(state_dict)
    if resolutions is None or resolution not in resolutions:
        held = f'the resolutions {resolutions}' if resolutions else 'no private BatchNorm'
        raise ValueError(f'Cannot take resolution {resolution} out of a state dict that holds {held}.')
    private = {k[:m.start()] for k in state_dict if (m := _RUNNING_MEAN.search(k))}
    plain = {}
    for key, value in state_dict.items():
        name, rest = _split_private(key, private)
        if name is not None:
            held, rest = rest.split('.', 1)
            key = _join(name, rest)
            if int(held) != resolution:
                continue
        if key != 'alpha':
            plain[key] = value
    return plain


def adapt_state_dict(
        state_dict: Mapping[str, Any],
        private_names: Iterable[str],
        resolutions: Tuple[int, ...],
        alpha: torch.Tensor,
) -> Mapping[str, Any]:
    """Return the state dict with the keys of a network of these resolutions.

    A plain one is copied to every resolution. Of a switchable network's, the shared resolutions are taken and a new one
    starts from the nearest by area, named in one warning.

    Args:
        state_dict: State dict of a plain or a switchable network.
        private_names: Names of the network's PrivateBN modules.
        resolutions: The network's resolutions, largest first.
        alpha: The network's own ensemble weights [S], kept where the state dict has none.
    """
    found = state_dict_resolutions(state_dict)
    if found == resolutions:
        return state_dict
    private_names = set(private_names)
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
            held, rest = rest.split('.', 1)
            adapted.update({f'{name}.{r}.{rest}': value.clone() for r, s in source.items() if s == int(held)})
    if found is None:
        adapted['alpha'] = alpha.detach().clone()
    else:
        index = {r: i for i, r in enumerate(found)}
        adapted['alpha'] = torch.stack([state_dict['alpha'][index[source[r]]] for r in resolutions])
    return adapted


def _split_private(key: str, private_names: set) -> Tuple[Optional[str], str]:
    """Split a key into the name of the private layer that it belongs to, if any, and the rest."""
    end = key.rfind('.')
    while end >= 0:
        if key[:end] in private_names:
            return key[:end], key[end + 1:]
        end = key.rfind('.', 0, end)
    return None, key


def _join(name: str, rest: str) -> str:
    return f'{name}.{rest}' if name else rest
