"""What ends a training run"""
from timm_rs_runtime.errors import UserError

__all__ = ['CheckpointError', 'TrainingFault']


class TrainingFault(UserError, RuntimeError):
    """Training cannot go on; the message says why and what may help."""


class CheckpointError(TrainingFault):
    """A checkpoint could not be written."""
