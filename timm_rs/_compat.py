"""Private names of timm and torch, each with the reason why there is no public one"""
import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the one class of all BatchNorm layers
from torch.nn.modules.module import (
    _WrappedHook as WrappedHook,  # a hook that refers to its module, which a view changes
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # of whatever a network returns

__all__ = [
    'NO_GRAPH_TASK',
    'BatchNorm',
    'WrappedHook',
    'current_graph_task',
    'is_inside_ddp',
    'tree_flatten',
    'tree_leaves',
    'tree_unflatten',
]

NO_GRAPH_TASK = -1


def current_graph_task() -> int:
    """Return the number of the backward pass that this thread is running, which no hook is told."""
    return torch._C._current_graph_task_id()


def is_inside_ddp() -> bool:
    """Return whether the forward of DistributedDataParallel is running, which will wait for all gradients."""
    return DistributedDataParallel._get_active_ddp_module() is not None
