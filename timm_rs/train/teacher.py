"""Fixed teachers: networks that are trained already, as timm's logit distillation uses them"""
import math
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task.distillation import DistillationTeacher

from timm_rs_runtime.errors import UserError

__all__ = ['FixedTeachers']


class FixedTeachers(nn.Module):
    """Let all resolutions learn from networks that stay as they are, with the images of the largest resolution.

    Their mixture is the mean of their probabilities. The loss is timm's: task_weight times the task's loss, and
    distill_weight times KL(mixture -> s), with both sides at a temperature T and times T^2. It is reduced over
    resolutions as the task's loss is. Without labels, the mixture's probabilities at temperature 1 are the targets.

    Args:
        networks: Plain networks of timm with the classes of the student. Each gets images normalized as it needs them.
        mean: Pixel mean of the student's images.
        std: Pixel standard deviation of the student's images.
        temperature: The temperature T.
        task_weight: Weight of the task's loss, 1 if None.
        distill_weight: Weight of the divergence; if None 1 - task_weight, or 1 without that, as in timm.
        label_free: Take the targets from the teachers.

    Raises:
        UserError: The networks have different numbers of classes.
    """

    def __init__(
            self,
            networks: Sequence[nn.Module],
            mean: Sequence[float],
            std: Sequence[float],
            temperature: float = 4.,
            task_weight: Optional[float] = None,
            distill_weight: Optional[float] = None,
            label_free: bool = False,
    ):
        super().__init__()
        if len({network.num_classes for network in networks}) > 1:
            raise UserError(f'The teachers have {" and ".join(str(n.num_classes) for n in networks)} classes.')
        device = next(networks[0].parameters()).device
        self.teachers = nn.ModuleList(DistillationTeacher(network, device=device) for network in networks)
        self.requires_grad_(False)
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1), persistent=False)
        self.temperature = temperature
        self.task_weight = 1. if task_weight is None else task_weight
        self.distill_weight = distill_weight if distill_weight is not None else 1. - (task_weight or 0.)
        self.label_free = label_free

    def train(self, mode: bool = True) -> 'FixedTeachers':
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> List[torch.Tensor]:
        """Return the logits [N, C] of each teacher for the student's images."""
        return [
            t(t.normalize_input(input.float(), self.mean, self.std).to(next(t.parameters()).dtype))
            for t in self.teachers]

    def log_mixture(self, logits: Sequence[torch.Tensor], temperature: float = 1.) -> torch.Tensor:
        """Return the logarithm [N, C] of the teachers' mean probabilities."""
        log_p = torch.stack([F.log_softmax(z.float() / temperature, dim=-1) for z in logits])
        return log_p.logsumexp(0) - math.log(len(log_p))

    def combine(
            self,
            losses: Dict[str, torch.Tensor],
            student: Sequence[torch.Tensor],
            teacher: Sequence[torch.Tensor],
            reduction: str,
    ) -> Dict[str, torch.Tensor]:
        """Return the task's losses with that of the teachers in 'loss' and, over all resolutions, in 'distillation'.

        Args:
            losses: Losses of EnsembleDistillationLoss.
            student: Logits [N, C] of each resolution.
            teacher: Logits [N, C] of each teacher.
            reduction: 'sum' or 'mean' over resolutions.
        """
        target = self.log_mixture(teacher, self.temperature)
        log_p = [F.log_softmax(z.float() / self.temperature, dim=-1) for z in student]
        divergence = sum(F.kl_div(p, target, reduction='batchmean', log_target=True) for p in log_p)
        divergence = divergence * self.temperature ** 2
        scale = 1 / len(student) if reduction == 'mean' else 1.
        return dict(
            losses,
            loss=self.task_weight * losses['loss'] + self.distill_weight * scale * divergence,
            distillation=losses['distillation'] + divergence.detach())
