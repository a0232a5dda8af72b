"""Photographs in memory: decoded once, cropped at random on any device"""
import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from timm_rs_runtime.files import atomic_path

__all__ = [
    'Boxes', 'Photographs', 'crop', 'list_photographs', 'load_photographs', 'normalize', 'random_boxes',
    'resize_matrices',
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = ('train', 'val')
_UNREADABLE, _DEEP = -1, -2  # labels of images that cannot be taken


class Photographs(NamedTuple):
    """Decoded images.

    Attributes:
        train: Squares [N, 3, side, side], uint8, the centre of each image.
        train_labels: Classes [N].
        val: Images [M, 3, s, s], uint8, for every size s, preprocessed as timm does for that size.
        val_labels: Classes [M].
        held_out: The same as val, of the last tenth of the training images.
        classes: Their names.
    """
    train: torch.Tensor
    train_labels: torch.Tensor
    val: Dict[int, torch.Tensor]
    val_labels: torch.Tensor
    held_out: Dict[int, torch.Tensor]
    classes: List[str]

    @property
    def num_fit(self) -> int:
        """Training images that are not held out."""
        return len(self.train) - len(next(iter(self.held_out.values())))


def load_photographs(root: str, sizes: Sequence[int], side: int, crop_pct: float, cache: Path) -> Photographs:
    """Decode a folder of train/ and val/ with a folder per class each, once: what was decoded is kept in a file.

    Args:
        root: The folder.
        sizes: Sizes to evaluate at, in pixels.
        side: Training images are kept at this size, in pixels.
        crop_pct: Share of the shorter side that evaluation crops.
        cache: File to keep, for the same arguments and files.

    Raises:
        ValueError: See list_photographs; or an image cannot be read, or has more than 8 bits a channel.
    """
    samples, classes = list_photographs(root)
    key = dict(
        root=str(Path(root).resolve()), sizes=list(sizes), side=side, crop_pct=crop_pct, files=_digest(samples))
    if cache.exists():
        found = torch.load(cache)
        if found.pop('key') == key:
            return Photographs(**found)
    _tell_what_is_left_out(root)
    order = torch.randperm(len(samples['train']), generator=torch.Generator().manual_seed(0)).tolist()
    train = [samples['train'][i] for i in order]
    held_out = train[-max(1, len(order) // 10):]
    squares = transforms.Compose([
        transforms.Resize(side, transforms.InterpolationMode.BILINEAR), transforms.CenterCrop(side),
        transforms.PILToTensor()])
    per_size = [
        create_transform(s, is_training=False, use_prefetcher=True, interpolation='bilinear', crop_pct=crop_pct)
        for s in sizes]

    def every_size(image):
        return [torch.as_tensor(transform(image)) for transform in per_size]

    (train,), train_labels = _decode(train, lambda image: [squares(image)])
    val, val_labels = _decode(samples['val'], every_size)
    held, _ = _decode(held_out, every_size)
    found = dict(
        train=train, train_labels=train_labels, val=dict(zip(sizes, val)), val_labels=val_labels,
        held_out=dict(zip(sizes, held)), classes=classes)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(cache, overwrite=True) as partial:
        torch.save(dict(found, key=key), partial)
    return Photographs(**found)


def list_photographs(root: str) -> Tuple[Dict[str, List[Tuple[str, int]]], List[str]]:
    """Return names and classes of the images that timm finds in train/ and val/, and the names of the classes.

    Raises:
        ValueError: The folders of both are not the same classes, or images are not directly in them.
    """
    samples, found = {}, {}
    for split in SPLITS:
        folder = Path(root, split)
        try:
            reader = create_dataset('', str(folder)).reader
        except RuntimeError as e:
            raise ValueError(str(e)) from e
        samples[split], found[split] = reader.samples, reader.class_to_idx
        strange = [name for name, _ in reader.samples if Path(name).parent.parent != folder]
        if strange:
            raise ValueError(f'{strange[0]}: expected images in the folder of a class, {folder}/CLASS/.')
    folders = {p.name for split in SPLITS for p in Path(root, split).glob('[!.]*') if p.is_dir()}
    for split in SPLITS:
        empty = sorted(folders - found[split].keys())
        if empty:
            raise ValueError(f'{Path(root, split)} has no image of {empty[0]}, expected all classes in both splits.')
    return samples, sorted(found['train'], key=found['train'].get)


def _tell_what_is_left_out(root: str) -> None:
    known = Image.registered_extensions().keys() - {'.png', '.jpg', '.jpeg'}
    others = sorted(str(p) for split in SPLITS for p in Path(root, split).glob('*/*') if p.suffix.lower() in known)
    if others:
        print(f'{len(others)} images are left out, as timm leaves them, which reads .png, .jpg and .jpeg: {others[0]}'
              f"{', ...' if others[1:] else '.'}", file=sys.stderr)


def _digest(samples: Dict[str, List[Tuple[str, int]]]) -> str:
    listing = [(name, os.path.getsize(name), label) for split in SPLITS for name, label in samples[split]]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


class _Images(Dataset):
    """What a transform makes of images, and their classes; a negative class tells why there is none."""

    def __init__(self, samples: Sequence[Tuple[str, int]], transform: Callable[[Image.Image], List[torch.Tensor]]):
        self.samples, self.transform = samples, transform
        self.empty = [torch.zeros_like(x) for x in transform(Image.new('RGB', (64, 64)))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[List[torch.Tensor], int]:
        name, label = self.samples[index]
        try:
            with Image.open(name) as image:
                if image.mode[0] in 'IF':
                    return self.empty, _DEEP
                return self.transform(image.convert('RGB')), label
        except Exception:  # Pillow's readers have no common class of what damaged files make them raise
            return self.empty, _UNREADABLE


def _decode(samples: Sequence[Tuple[str, int]], transform: Any) -> Tuple[List[torch.Tensor], torch.Tensor]:
    """Return stacks of what a transform makes of each image, and the labels."""
    images = _Images(samples, transform)
    loader = DataLoader(images, batch_size=64, num_workers=os.cpu_count() or 0)
    stacks = [x.new_empty((len(samples), *x.shape)) for x in images.empty]
    labels, done = torch.empty(len(samples), dtype=torch.int64), 0
    for parts, found in tqdm(loader, desc='decode', disable=None):
        for stack, part in zip(stacks, parts):
            stack[done:done + len(found)] = part
        labels[done:done + len(found)] = found
        done += len(found)
    for why, text in ((_UNREADABLE, 'cannot be read'), (_DEEP, 'have more than 8 bits a channel')):
        names = [name for (name, _), label in zip(samples, labels.tolist()) if label == why]
        if names:
            raise ValueError(f"{len(names)} images {text}, remove or convert them: {', '.join(names[:3])}"
                             f"{', ...' if names[3:] else '.'}")
    return stacks, labels


class Boxes(NamedTuple):
    """Crops to take of a batch of images, still on the CPU or on their device.

    Attributes:
        indices: The images [N].
        ranges: Start and length of rows and of columns in pixels, and 1 to flip or 0 [5, N].
    """
    indices: torch.Tensor
    ranges: torch.Tensor


def random_boxes(
        indices: torch.Tensor, side: int, scale: Tuple[float, float], generator: torch.Generator, hflip: float = 0.5,
) -> Boxes:
    """Draw random resized crops and random flips.

    Args:
        indices: The images [N].
        side: Of the images, in pixels.
        scale: Range of the share of the area that is cropped; aspect ratios are between 3/4 and 4/3.
        generator: Of the CPU.
        hflip: Probability of a horizontal flip.
    """
    n = len(indices)
    area = torch.empty(n).uniform_(*scale, generator=generator)
    ratio = torch.empty(n).uniform_(-0.2877, 0.2877, generator=generator).exp()  # log of 4/3
    lengths = [(area * r).sqrt().clamp(max=1) * side for r in (ratio, 1 / ratio)]
    starts = [torch.rand(n, generator=generator) * (side - length) for length in lengths]
    flip = torch.rand(n, generator=generator) < hflip
    return Boxes(indices, torch.stack([starts[0], lengths[0], starts[1], lengths[1], flip.float()]))


def crop(images: torch.Tensor, boxes: Boxes, size: int) -> torch.Tensor:
    """Crop and flip a batch on the images' device, and normalize.

    The resize is antialiased bilinear interpolation of the crop, written as a product with one matrix per side and
    image, so that a whole batch with its different boxes is two batched matrix products.

    Args:
        images: Squares [M, 3, side, side], uint8.
        boxes: Of N of them, on their device.
        size: Output size in pixels.

    Returns:
        Crops [N, 3, size, size].
    """
    side = images.shape[-1]
    top, height, left, width, flip = boxes.ranges
    rows, columns = resize_matrices(top, height, side, size), resize_matrices(left, width, side, size)
    columns = torch.where(flip.view(-1, 1, 1) > 0, columns.flip(1), columns)
    pixels = normalize(images[boxes.indices])
    return rows[:, None] @ pixels @ columns[:, None].transpose(-1, -2)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images [N, 3, H, W] as floats of ImageNet's mean 0 and standard deviation 1."""
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@lru_cache
def _statistics(device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return mean, std


def resize_matrices(starts: torch.Tensor, lengths: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Return the weights [N, size, side] of antialiased bilinear interpolation of the range that begins at starts [N].

    Example:
        >>> resize_matrices(torch.tensor([0.]), torch.tensor([4.]), 4, 2)
        tensor([[[0.4286, 0.4286, 0.1429, 0.0000],
                 [0.0000, 0.1429, 0.4286, 0.4286]]])
    """
    scale = (lengths / size).view(-1, 1, 1)
    centers = starts.view(-1, 1, 1) + (torch.arange(size, device=starts.device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(side, device=starts.device).view(1, 1, -1) + 0.5
    weights = (1 - (pixels - centers).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)
