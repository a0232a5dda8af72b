"""timm_rs: Resolution Switchable Networks for timm

Importing it registers the `rs_*` models with timm. What needs torch is imported when it is first asked for, so that
timm_rs.deploy works without.
"""
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, List

from ._registration import register_with_timm
from .version import __version__

if TYPE_CHECKING:
    from .calibrate import add_resolution
    from .private_bn import PrivateBN, UnknownResolutionError
    from .rs_models import explain_unknown_model
    from .switchable import SwitchableMixin, make_switchable
    from .train.loss import EnsembleDistillationLoss

__all__ = [
    'EnsembleDistillationLoss',
    'PrivateBN',
    'SwitchableMixin',
    'UnknownResolutionError',
    'add_resolution',
    '__version__',
    'explain_unknown_model',
    'make_switchable',
]

_HOMES = {
    'EnsembleDistillationLoss': '.train.loss',
    'PrivateBN': '.private_bn',
    'SwitchableMixin': '.switchable',
    'UnknownResolutionError': '.private_bn',
    'add_resolution': '.calibrate',
    'explain_unknown_model': '.rs_models',
    'make_switchable': '.switchable',
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    if not name.startswith('_') and find_spec(f'{__name__}.{name}'):
        return importlib.import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), *_HOMES})


register_with_timm()
