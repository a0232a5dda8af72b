"""The multi-resolution step as a timm training task"""
import copy
from collections import Counter
from dataclasses import asdict
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from timm_rs_runtime.errors import UserError

from .._compat import BatchNorm, multiply
from ..private_bn import PrivateBN
from ..switchable import SwitchableMixin
from .loss import EnsembleDistillationLoss
from .pyramid import ResolutionPyramid
from .saver import Progress
from .teacher import FixedTeachers

__all__ = ['TERMS', 'MultiResolutionTask']

TERMS = ('loss', 'classification', 'ensemble', 'distillation')  # that a step returns


class MultiResolutionTask(ClassificationTask):
    """Train a switchable network on every batch at all its resolutions, their ensemble teaching each (algorithm 1).

    One forward of the model per step, so that DistributedDataParallel reduces the gradients of all resolutions once.
    EMA, compilation, distribution and checkpoint state are those of timm's ClassificationTask.

    Args:
        model: A switchable network.
        criterion: An EnsembleDistillationLoss; if None one of the default mode, around cross entropy.
        pyramid: A ResolutionPyramid; if None one for the model's resolutions, with shared flips.
        teachers: Networks that are trained already, whose answers all resolutions learn from too.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: Log what is trained.

    Attributes:
        levels: Indices of the resolutions that the next steps train, largest first; None for all of them.
        keep_statistics: Normalize with the running statistics in training too, and leave them as they are.

    Raises:
        ValueError: The model is plain, the criterion is another one, or the pyramid has other resolutions.

    Example:
        >>> import timm, timm_rs
        >>> model = timm.create_model('rs_resnet18', resolutions=(64, 32), num_classes=10)
        >>> task = MultiResolutionTask(model, verbose=False)
        >>> task(torch.rand(2, 3, 64, 64), torch.tensor([3, 7]))['loss'].backward()
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[EnsembleDistillationLoss] = None,
            pyramid: Optional[ResolutionPyramid] = None,
            teachers: Optional[FixedTeachers] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        if not isinstance(model, SwitchableMixin):
            raise UserError(f'{type(model).__name__} is a plain network, expected a switchable one (make_switchable).')
        criterion = criterion if criterion is not None else EnsembleDistillationLoss()
        if not isinstance(criterion, EnsembleDistillationLoss):
            raise UserError(f'Got criterion {type(criterion).__name__}, expected EnsembleDistillationLoss around it.')
        pyramid = pyramid if pyramid is not None else ResolutionPyramid(model.resolutions)
        if pyramid.resolutions != model.resolutions:
            raise UserError(f'Got a pyramid of {pyramid.resolutions}, expected the resolutions {model.resolutions}.')
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self.pyramid = pyramid.to(device)
        self.teachers = teachers
        self.progress = Progress()
        self.levels: Optional[Tuple[int, ...]] = None
        self.keep_statistics = False
        self._adjusted = False
        if self.criterion.mode == 'none':
            model.alpha.requires_grad_(False)  # DistributedDataParallel would wait for its gradient

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return how far training has come, for the checkpoint."""
        return {} if ema else asdict(self.progress)

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restore how far training has come."""
        if state and not ema:
            self.progress = Progress(**state)

    def train(self, mode: bool = True) -> 'MultiResolutionTask':
        """Set the mode; where statistics are kept, BN stays in eval mode."""
        super().train(mode)
        if mode and self.keep_statistics:
            _use_batch_statistics(self.trainable_module, False)
        return self

    @torch.no_grad()
    def measure_statistics(self, input: torch.Tensor) -> List[float]:
        """Return how well the network bears batch statistics, at each resolution, largest first.

        That is the mean cosine over images between the features with running and with batch statistics, each without
        its mean: 1 if it makes no difference, 0 if nothing is left of what distinguishes the images.

        Args:
            input: Augmented images [N, C, H, W] at the largest resolution, of which 32 are enough.
        """
        model, found = copy.deepcopy(unwrap_model(self.trainable_module)).eval(), []
        for x in self.pyramid(input[:32]):
            model.switch_to(x.shape[-1])
            features = []
            for mode in (False, True):
                _use_batch_statistics(model, mode)
                pooled = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1).float()
                features.append(pooled - pooled.mean(0))
            found.append(torch.cosine_similarity(*features).mean().item())
        return found

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Run one step.

        Args:
            input: Augmented images [N, C, H, W] at the largest resolution.
            target: Class indices [N] or soft targets [N, num_classes].

        Returns:
            'loss', its terms as EnsembleDistillationLoss gives them, and 'output': logits [N, num_classes] of each
            resolution that is trained, largest first.
        """
        model, pyramid = unwrap_model(self.trainable_module), self.pyramid(input)
        levels = list(range(len(pyramid))) if self.levels is None else list(self.levels)
        answers = self.teachers(input) if self.teachers is not None else []
        if answers and self.teachers.label_free:
            target = self.teachers.log_mixture(answers).exp()
        logits = self.trainable_module([pyramid[i] for i in levels])
        losses = self.criterion(logits, target, model.alpha if self.levels is None else model.alpha[levels])
        if answers:
            losses = self.teachers.combine(losses, logits, answers, self.criterion.reduction)
        # DistributedDataParallel waits for the gradients of all parameters.
        if self.levels is not None and isinstance(self.trainable_module, DistributedDataParallel):
            idle = self._private_parameters()[1]
            losses['loss'] = losses['loss'] + sum(0. * p.sum() for p in idle)
        self._adjusted = False
        return dict(losses, output=logits)

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Give the parameters whose gradients are clipped, after these have been adjusted.

        Args:
            exclude_head: Leave out the classifier and the weights of the ensemble. These begin at zero, and adaptive
                clipping bounds a gradient by the size of its parameter.
        """
        parameters = super().get_clip_parameters(exclude_head)
        alpha = unwrap_model(self.trainable_module).alpha if exclude_head else None
        self.adjust_gradients()
        yield from (p for p in parameters if p is not alpha)

    def adjust_gradients(self) -> None:
        """Give the private parameters of each resolution the gradient of the loss of that resolution, in place.

        Call it before each step of an optimizer. A mean over resolutions suits what they share; what is private would
        learn at a rate divided by their number. The gradients of resolutions that the step did not train are dropped,
        as momentum would move their parameters. A second call before the next forward does nothing.
        """
        count = len(self.pyramid.resolutions if self.levels is None else self.levels)
        is_mean = self.criterion.reduction == 'mean' and count > 1
        if self._adjusted or self.levels is None and not is_mean:
            return
        self._adjusted = True
        trained, idle = self._private_parameters()
        for parameter in idle:
            parameter.grad = None
        gradients = [p.grad for p in trained if p.grad is not None]
        if is_mean and gradients:
            multiply(gradients, count)

    def _private_parameters(self) -> Tuple[List[nn.Parameter], List[nn.Parameter]]:
        """Return the BN parameters that belong to one resolution, of those that the step trains and of the others."""
        model = unwrap_model(self.trainable_module)
        levels = range(len(model.resolutions)) if self.levels is None else self.levels
        layers = [bn for bn in model.modules() if isinstance(bn, PrivateBN)]
        owned = [[p for bn in layers for p in bn[r].parameters()] for r in model.resolutions]
        owners = Counter(id(p) for parameters in owned for p in parameters)
        trained, idle = [], []
        for i, parameters in enumerate(owned):
            (trained if i in levels else idle).extend(p for p in parameters if owners[id(p)] == 1)
        return trained, idle


def _use_batch_statistics(module: nn.Module, mode: bool) -> None:
    """Set what BN normalizes with; its activation and dropout keep their mode."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.training = mode
