"""timm_rs: Resolution Switchable Networks for timm

Importing it registers the `rs_*` models with timm.
"""
try:
    import timm_rs_runtime  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != 'timm_rs_runtime':
        raise
    raise ImportError('timm_rs needs timm_rs_runtime: pip install ./runtime .') from None

from .calibrate import add_resolution
from .models.rs_models import explain_unknown_model
from .private_bn import PrivateBN
from .resolutions import UnknownResolutionError
from .switchable import SwitchableMixin, make_switchable
from .train.loss import EnsembleDistillationLoss
from .version import __version__

__all__ = [
    'EnsembleDistillationLoss',
    'PrivateBN',
    'SwitchableMixin',
    'UnknownResolutionError',
    '__version__',
    'add_resolution',
    'explain_unknown_model',
    'make_switchable',
]
