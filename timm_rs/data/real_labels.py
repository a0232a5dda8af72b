"""Accuracy by several right classes per image of ImageNet"""
from functools import partial
from typing import Callable, Dict, Sequence, Set

import torch
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.real_labels import RealLabelsImagenet
from timm.task import ClassificationEvaluator
from torch.utils.data import Dataset

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.fields import array, integer, read_json

__all__ = ['RealLabels', 'use_real_labels']


class RealLabels(ClassificationEvaluator):
    """Evaluator of answers to images, which are right if they are among the real labels of the image.

    Args:
        device: Device of the answers.
        labels: Real labels of each image; images without any do not count.
        targets: Label of each image in the data set, for the loss.
    """

    def __init__(self, device: torch.device, labels: Sequence[Set[int]], targets: Sequence[int]):
        super().__init__(device)
        self.labels, self.targets = labels, torch.tensor(targets, device=device)

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take answers [N, C] to the images with the numbers target [N]."""
        real = [self.labels[i] for i in target.tolist()]
        kept = [i for i, labels in enumerate(real) if labels]
        if kept:
            self._accumulate_loss(self.criterion(output[kept], self.targets[target[kept]]), len(kept))
        best = output.topk(min(5, output.shape[1])).indices.tolist()
        for i in kept:
            right = [c in real[i] for c in best[i]]
            self.counts[1] += right[0]
            self.counts[2] += any(right)

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        """Return timm's metrics, and how many images count."""
        return dict(super().compute(distributed), images=int(self.counts[0]))


def use_real_labels(dataset: Dataset, path: str) -> Callable[..., RealLabels]:
    """Let a folder give the numbers of its images as labels, and return what makes an evaluator of real labels.

    Args:
        dataset: Folder of the validation images of ImageNet, as timm reads it.
        path: File of the real labels (Beyer et al., arXiv:2006.07159), a list of classes per image.

    Raises:
        UserError: The folder or the file is of another kind.
    """
    reader = getattr(dataset, 'reader', None)
    if not isinstance(reader, ReaderImageFolder):
        raise UserError('--real-labels needs the folder of the validation images of ImageNet.')
    names = dataset.filenames(basename=True)
    listed = read_json(path, array(array(integer(0, 999)), most=10 ** 6))
    if len(listed) != len(names):
        raise UserError(f'--real-labels {path} has labels of {len(listed)} images, the data set has {len(names)}.')
    try:
        real = RealLabelsImagenet(names, real_json=path).real_labels
        labels = [set(real[name]) for name in names]
    except KeyError as e:
        raise UserError(f'--real-labels is for files named as ILSVRC2012_val_00000001.JPEG, not {e}.') from e
    targets = [target for _, target in reader.samples]
    reader.samples = [(name, i) for i, (name, _) in enumerate(reader.samples)]
    return partial(RealLabels, labels=labels, targets=targets)
