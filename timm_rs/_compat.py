"""Private names of timm and torch, each with the reason why there is no public one"""
from typing import Any, Callable, ContextManager, Dict
from unittest import mock

import torch
from timm.models import _registry as registry  # models with tags, and those that are registered to say why not
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet  # wrappers
from timm.models._helpers import _torch_load as torch_load  # refuses code in old and new formats of torch
from timm.models._hub import _parse_model_cfg as parse_model_cfg  # a config.json as timm reads it
from timm.models._hub import download_from_hf
from timm.models._input import get_model_input_config  # the channels and size that a model was built for
from timm.models._pretrained import PretrainedCfg
from torch._subclasses.fake_tensor import FakeTensorMode  # runs a network without its values
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the one class of all BatchNorm layers
from torch.nn.modules.module import (
    _WrappedHook as WrappedHook,  # a hook that refers to its module, which a view changes
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # for any structure that a network returns

__all__ = [
    'NO_GRAPH_TASK',
    'BatchNorm',
    'FakeTensorMode',
    'FeatureDictNet',
    'FeatureGetterNet',
    'FeatureHookNet',
    'PretrainedCfg',
    'WrappedHook',
    'current_graph_task',
    'download_from_hf',
    'get_model_input_config',
    'is_inside_ddp',
    'multiply',
    'parse_model_cfg',
    'registry',
    'torch_load',
    'tree_flatten',
    'tree_leaves',
    'tree_unflatten',
    'wds_decoder',
    'without_onnx_log',
]

NO_GRAPH_TASK = -1
multiply = torch._foreach_mul_  # many tensors in place by few calls


def current_graph_task() -> int:
    """Return the number of the backward pass that this thread is running, which hooks do not get."""
    return torch._C._current_graph_task_id()


def is_inside_ddp() -> bool:
    """Return whether the forward of DistributedDataParallel is running, which will wait for all gradients."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def wds_decoder() -> Callable[..., Dict[str, Any]]:
    """Return timm's decoder of WebDataset samples, which needs webdataset."""
    from timm.data.readers.reader_wds import _decode

    return _decode


def without_onnx_log() -> ContextManager[Any]:
    """Keep torch.onnx from printing the graph of what it cannot trace, which torch 2.14 does even if not `verbose`."""
    return mock.patch.object(torch._C, '_jit_onnx_log')
