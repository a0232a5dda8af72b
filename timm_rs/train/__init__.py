"""Training at all resolutions at once"""
from .loss import EnsembleDistillationLoss
from .pyramid import ResolutionPyramid
from .task import MultiResolutionTask

__all__ = ['EnsembleDistillationLoss', 'MultiResolutionTask', 'ResolutionPyramid']
