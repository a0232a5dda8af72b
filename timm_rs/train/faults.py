"""What ends a training run"""
from timm_rs_runtime.errors import UserError

__all__ = ['TrainingFault']


class TrainingFault(UserError, RuntimeError):
    """Training cannot continue; the message says why and what may help."""
