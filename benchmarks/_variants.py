"""Variants of the method that paper_table.py compares: other ensembles, and halves of BatchNorm that are shared"""
import torch

from timm_rs.private_bn import PrivateBN, tie_affine
from timm_rs.train import EnsembleDistillationLoss

__all__ = ['ENSEMBLES', 'share_half']


class ClassWiseEnsemble(EnsembleDistillationLoss):
    """The teacher weighs the sizes for each class alone."""

    def __init__(self, mode: str, sizes: int, num_classes: int):
        super().__init__(mode)
        self.offset = torch.nn.Parameter(torch.zeros(sizes, num_classes))

    def ensemble(self, logits, alpha):
        return torch.einsum('sc,snc->nc', (alpha[:, None] + self.offset).softmax(0), logits)


class TemperedEnsemble(EnsembleDistillationLoss):
    """The teacher's logits are scaled as well."""

    def __init__(self, mode: str, sizes: int, num_classes: int):
        super().__init__(mode)
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def ensemble(self, logits, alpha):
        return self.scale.exp() * super().ensemble(logits, alpha)


ENSEMBLES = dict(
    sizes=lambda mode, sizes, num_classes: EnsembleDistillationLoss(mode),
    classes=ClassWiseEnsemble, temperature=TemperedEnsemble)


def share_half(model: torch.nn.Module, private: str) -> None:
    """Let the BatchNorms of all sizes share what is not private: affine parameters, or running statistics."""
    if private == 'statistics':
        return tie_affine(model)
    for layer in model.modules():
        if isinstance(layer, PrivateBN):
            first, *others = (layer[r] for r in layer)
            for bn in others:
                bn.running_mean, bn.running_var = first.running_mean, first.running_var
