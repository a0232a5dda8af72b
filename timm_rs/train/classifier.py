"""The first classifier of a pretrained network for new classes"""
import argparse
import logging
from itertools import islice
from typing import Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm import utils
from tqdm import tqdm

from .loaders import Loaders
from .task import MultiResolutionTask

__all__ = ['fit_classifier', 'fit_linear']

_logger = logging.getLogger('train')
_IMAGES = 5_000  # at most; a fifth of them is held out
_PENALTIES = 10. ** torch.arange(-4, 2)
_SCALES = 2. ** torch.arange(0, 9)
_SHRINK = 0.25  # of these logits, so that the layers before the classifier learn more; see docs/findings.md


@torch.no_grad()
def fit_classifier(task: MultiResolutionTask, loaders: Loaders, args: argparse.Namespace) -> None:
    """Fit the classifier to the features of the network as it is, of the first training images at all resolutions.

    Otherwise the classifier takes a good part of a short training to become one. Fitting it first also distorts the
    features less (Kumar et al., ICLR 2022, arXiv:2202.10054). Only for a single linear layer that is trained with cross
    entropy, without flags of its own, and for at most 5000 classes; others stay as they are. With --label-free it is
    fitted to the answers of the teachers. Each process takes its own images, and all go on with that of the first.
    """
    model = utils.unwrap_model(task.trainable_module)
    head = model.get_classifier()
    obstacles = {
        'it is not one linear layer': not isinstance(head, (nn.Linear, nn.Conv2d)),  # of one pixel, as timm writes its
        'the loss is not cross entropy': args.task == 'multilabel' or args.bce_loss or args.loss not in (None, 'ce'),
        'flags set its first weights': args.head_init_scale is not None or args.head_init_bias is not None,
        f'there are more than {_IMAGES} classes': args.num_classes > _IMAGES}
    if any(obstacles.values()):
        if utils.is_primary(args):
            reasons = ', '.join(reason for reason, found in obstacles.items() if found)
            _logger.info(f'The new classifier is not fitted before training: {reasons}.')
        return
    model.eval()
    features, targets, rows = [], [], []
    handle = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(1).float().cpu()))
    loaders.begin_epoch(0)
    count = min(-(-_IMAGES // args.batch_size), len(loaders.train))
    for images, target in tqdm(
            islice(loaders.train, count), desc='Fit the classifier', total=count, leave=False,
            disable=None if args.rank == 0 else True):
        images, target = loaders.prepare(images, target)
        rows.clear()
        model(task.pyramid(images))
        if task.teachers is not None and task.teachers.label_free:
            target = task.teachers.log_mixture(task.teachers(images)).exp()
        features.append(torch.stack(rows))
        targets.append(target.cpu() if target.ndim > 1 else F.one_hot(target.cpu(), args.num_classes))
    handle.remove()
    features, targets = torch.cat(features, 1), torch.cat(targets).float()
    if len(targets) > 1 and features.shape[2] == head.weight[0].numel() and features.isfinite().all():
        weight, bias, accuracy = fit_linear(features, targets)
        head.weight.copy_(_SHRINK * weight.view_as(head.weight))
        if head.bias is not None:
            head.bias.copy_(_SHRINK * bias)
        found = ', '.join(f'{100 * a:.1f} at {r}' for a, r in zip(accuracy.tolist(), args.resolutions))
        if utils.is_primary(args):
            _logger.info(
                f'The new classifier is fitted to the features of {len(targets)} images as they are: top-1 {found} px, '
                'on a fifth of them that was held out.')
    elif utils.is_primary(args):
        _logger.info('The new classifier is not fitted before training: it does not get a finite vector per image.')
    if args.distributed:
        for parameter in head.parameters():
            dist.broadcast(parameter, 0)


def fit_linear(features: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit a linear classifier by least squares, with the penalty and the scale of the logits that suit held-out images.

    Args:
        features: Features [S, N, F] of N images at S resolutions.
        targets: Probabilities of the classes [N, C].

    Returns:
        weight [C, F] and bias [C] fitted to all images, and the accuracy [S] on the last fifth, fitted to the others.
    """
    held = len(targets) // 5 or 1
    fit = _LeastSquares(features[:, :-held], targets[:-held])
    best = None
    for penalty in _PENALTIES.tolist():
        weight, bias = fit.solve(penalty)
        logits = features[:, -held:] @ weight.T + bias
        for scale in _SCALES.tolist():
            loss = sum(F.cross_entropy(scale * z, targets[-held:]).item() for z in logits)
            if best is None or loss < best[0]:
                best = loss, penalty, scale, (logits.argmax(-1) == targets[-held:].argmax(-1)).float().mean(1)
    _, penalty, scale, accuracy = best
    weight, bias = _LeastSquares(features, targets).solve(penalty)
    return scale * weight, scale * bias, accuracy


class _LeastSquares:
    """Ridge regression on all resolutions of the images, for any penalty, which is in units of the mean variance."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor):
        self.means = features.mean((0, 1)), targets.mean(0)
        features, targets = features - self.means[0], targets - self.means[1]
        flat = features.flatten(0, 1)
        values, self.basis = torch.linalg.eigh((flat.T @ flat).double())
        self.values = values.clamp(min=0.)
        self.moment = self.basis.T @ (features.sum(0).T @ targets).double()

    def solve(self, penalty: float) -> Tuple[torch.Tensor, torch.Tensor]:
        added = penalty * self.values.mean().clamp(min=1e-12)
        weight = (self.basis @ (self.moment / (self.values + added)[:, None])).T.float()
        return weight, self.means[1] - weight @ self.means[0]
