"""Multi-resolution ensemble distillation (Wang et al., ECCV 2020, section 3.3)"""
from contextlib import nullcontext
from typing import Dict, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_rs_runtime.errors import UserError

__all__ = ['EnsembleDistillationLoss']


class EnsembleDistillationLoss(nn.Module):
    """Classification at every resolution, and distillation from the ensemble of resolutions and from larger ones.

    With logits z_s [N, C] of resolution s = 1..S, largest first, alpha = softmax(a) and the ensemble
    z_ens = sum_s alpha_s z_s (equation 3), the loss is the sum of

    - classification: sum_s L(z_s, y), the base criterion L summed over resolutions (equation 1),
    - ensemble: L(z_ens, y), whose gradient reaches only a (equation 4),
    - distillation: sum_s KL(ens -> s) in mode 'ens' (equation 5); in mode 'ens_topdown' the sum of KL(ens -> s) over
      all s and KL(t -> s) over all t < s, times 2 / (S + 1) (equations 6 and 7). KL(t -> s) is the mean over images of
      sum_c p_t log(p_t / p_s) at temperature 1; no gradient reaches the teacher t.

    With several independent labels per image, p is the sigmoid of each logit, and KL(t -> s) is between the two answers
    to each label (arXiv:2308.06453): the mean over images of the mean or sum over labels of
    p_t log(p_t / p_s) + (1 - p_t) log((1 - p_t) / (1 - p_s)).

    It holds no state: the ensemble weights a belong to the model, which checkpoints and averages them.

    Args:
        mode: 'none' (the paper's Parallel: classification only), 'ens', or 'ens_topdown'.
        criterion: Base criterion on logits [N, C] and the target, cross entropy if None.
        reduction: 'sum' of the terms, or 'mean', the sum divided by S. With SGD, 'mean' takes the learning rate and
            weight decay of a network of one size, for what is private to a resolution too if
            MultiResolutionTask.adjust_gradients precedes each step; 'sum' takes 1 / S of that rate and S times that
            decay.
        labels: 'one' per image; or several, over whose divergences the 'mean' or 'sum' is taken, as the base criterion
            takes it over their losses.

    Raises:
        ValueError: The mode, the reduction or the labels are unknown.

    Example:
        >>> criterion = EnsembleDistillationLoss(mode='ens')
        >>> logits = [torch.zeros(2, 10), torch.zeros(2, 10)]
        >>> losses = criterion(logits, torch.tensor([1, 2]), torch.zeros(2))
        >>> [round(v.item(), 3) for v in losses.values()]
        [6.908, 4.605, 2.303, 0.0]
    """

    MODES = ('none', 'ens', 'ens_topdown')
    REDUCTIONS = ('sum', 'mean')
    LABELS = ('one', 'mean', 'sum')

    def __init__(
            self,
            mode: str = 'ens_topdown',
            criterion: Optional[nn.Module] = None,
            reduction: str = 'sum',
            labels: str = 'one',
    ):
        super().__init__()
        for value, known, title in (
            (mode, self.MODES, 'distillation mode'), (reduction, self.REDUCTIONS, 'reduction'),
            (labels, self.LABELS, 'kind of labels'),
        ):
            if value not in known:
                raise UserError(f'Unknown {title} {value!r}, expected one of {", ".join(known)}.')
        self.mode = mode
        self.reduction = reduction
        self.labels = labels
        default = nn.CrossEntropyLoss if labels == 'one' else nn.BCEWithLogitsLoss
        self.criterion = criterion if criterion is not None else default()

    def forward(self, logits: List[torch.Tensor], target: torch.Tensor, alpha: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Compute the loss in float32, under autocast too.

        Args:
            logits: Logits of each resolution [N, C], largest first.
            target: Class indices [N], or whatever else the base criterion takes, such as soft targets [N, C].
            alpha: Ensemble weights a before the softmax [S], largest resolution first.

        Returns:
            'loss' and its terms 'classification', 'ensemble', 'distillation', which are sums over resolutions.

        Raises:
            ValueError: The number of ensemble weights is not that of the logits.
        """
        if len(logits) != len(alpha):
            raise UserError(f'Got logits of {len(logits)} resolutions and {len(alpha)} ensemble weights.')
        device_type = logits[0].device.type
        autocasts = torch.amp.is_autocast_available(device_type)  # not on the meta device, where models are tried
        with torch.autocast(device_type, enabled=False) if autocasts else nullcontext():
            logits = [z.float() for z in logits]
            classification = sum(self.criterion(z, target) for z in logits)
            ensemble = distillation = torch.zeros_like(classification)
            if self.mode != 'none':
                stacked = torch.stack([z.detach() for z in logits])
                z_ens = self.ensemble(stacked, alpha.float())
                ensemble = self.criterion(z_ens, target)
                distillation = self._distillation(logits, z_ens.detach())
        loss = classification + ensemble + distillation
        return dict(
            loss=loss / len(logits) if self.reduction == 'mean' else loss,
            classification=classification,
            ensemble=ensemble,
            distillation=distillation,
        )

    def ensemble(self, logits: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits [N, C], given those of all resolutions [S, N, C] and a [S] (equation 3)."""
        return torch.einsum('s,snc->nc', alpha.softmax(0), logits)

    def _distillation(self, logits: List[torch.Tensor], z_ens: torch.Tensor) -> torch.Tensor:
        log_p = [self._log_probabilities(z) for z in logits]
        teachers = [self._log_probabilities(z_ens)]
        divergence = 0.
        for student in log_p:
            for teacher in teachers:
                divergence = divergence + F.kl_div(student, teacher, reduction='batchmean', log_target=True)
            if self.mode == 'ens_topdown':
                teachers.append(student.detach())
        if self.labels == 'mean':
            divergence = divergence / z_ens[0].numel()
        return divergence * 2 / (len(logits) + 1) if self.mode == 'ens_topdown' else divergence

    def _log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return log probabilities of what sums to one: the classes [N, C], or both answers to each label [N, C, 2]."""
        if self.labels == 'one':
            return F.log_softmax(logits, dim=-1)
        return F.logsigmoid(torch.stack([logits, -logits], dim=-1))
