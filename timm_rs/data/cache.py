"""Images decoded once, kept in files that are mapped into memory"""
import hashlib
import json
import logging
import math
import os
import shutil
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_folder, make_folder
from timm_rs_runtime.images import READER

from .crop import crop

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ['CropLoader', 'Decoded', 'DecodedLoader', 'Squash', 'open_decoded']

_logger = logging.getLogger('train')
_META = 'meta.json'  # written last

Layout = Dict[str, Tuple[Tuple[int, ...], np.dtype]]  # shape and dtype by file


class Decoded(NamedTuple):
    """What a transform made of each image of a data set.

    Attributes:
        arrays: One or more arrays for N images [N, ...], mapped into memory.
        targets: Their classes [N].
        unreadable: Why images could not be read, by name.
    """
    arrays: List[np.ndarray]
    targets: np.ndarray
    unreadable: Dict[str, str]


def open_decoded(
        root: str,
        title: str,
        samples: Sequence[Tuple[str, int]],
        shapes: Sequence[Tuple[Tuple[int, ...], str]],
        settings: Dict[str, Any],
        batches: Iterable[Tuple[List[torch.Tensor], torch.Tensor]],
        errors: Any,
        most_gb: float,
) -> Decoded:
    """Open the decoded images of a folder, and decode them first if that was not done yet.

    They have their own folder, named by what they depend on: names, sizes and times of the files, settings, and how
    images are read. It is there complete or not at all, and a damaged one is made again. Processes that want the same
    one wait for the process that makes it.

    Args:
        root: Folder of all decoded images.
        title: Beginning of the name, e.g. of the split.
        samples: File names of the images, and their classes.
        shapes: Shape and dtype of each array for one image.
        settings: What else the arrays depend on; must fit into JSON.
        batches: Gives (a part of each array, targets), all images in order.
        errors: Images that could not be read, see timm_rs_runtime.unreadable.
        most_gb: Size in GB that all decoded images in root may have.

    Raises:
        UserError: They would be larger than that, or than the disk.
    """
    listing = [(name, target, *_stat(name)) for name, target in samples]
    what = json.dumps([listing, shapes, settings, READER, PIL.__version__], sort_keys=True)
    path = os.path.join(root, f'{title}-{hashlib.sha256(what.encode()).hexdigest()[:16]}')
    layout = {f'{i}.npy': ((len(samples), *shape), np.dtype(dtype)) for i, (shape, dtype) in enumerate(shapes)}
    layout['targets.npy'] = (len(samples),), np.dtype('int64')
    make_folder(root)
    with _lock(root):
        if _open(path, layout) is None:
            shutil.rmtree(path, ignore_errors=True)
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
            _check_room(root, size, most_gb)
            with atomic_folder(path) as partial:
                _decode(partial, title, layout, batches, errors)
    found = _open(path, layout)
    for name, reason in found.unreadable.items():
        errors.report(name, reason)
    return found


def _stat(name: str) -> Tuple[int, int]:
    found = os.stat(name)
    return found.st_size, found.st_mtime_ns


@contextmanager
def _lock(root: str) -> Iterator[None]:
    with open(os.path.join(root, '.lock'), 'w') as f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _logger.info(f'Another process fills {root}; waiting for it.')
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _check_room(root: str, size: int, most_gb: float) -> None:
    used = sum(entry.stat().st_size for folder, _, _ in os.walk(root) for entry in os.scandir(folder))
    held = f' beside {used / 1e9:.2f} GB of others' if used > 1e6 else ''
    what = f'--decoded-cache {root}: the decoded images take {size / 1e9:.2f} GB'
    if used + size > most_gb * 1e9:
        raise UserError(
            f'{what}{held}, expected at most {most_gb:g} GB (--decoded-cache-gb); a smaller --decoded-cache-side may '
            'help.')
    free = shutil.disk_usage(root).free
    if size > free:
        raise UserError(f'{what}, but the disk has only {free / 1e9:.2f} GB free.')


def _decode(folder: str, title: str, layout: Layout, batches: Iterable, errors: Any) -> None:
    before = set(errors.names)
    arrays = [np.lib.format.open_memmap(os.path.join(folder, name), 'w+', dtype, shape)
              for name, (shape, dtype) in layout.items()]
    for array in arrays if hasattr(os, 'posix_fallocate') else ():  # a full disk kills who writes into a mapped file
        with open(array.filename, 'r+b') as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(array.filename))
    done = 0
    with tqdm(desc=f'Decode {title}', total=len(arrays[-1]), unit='images', disable=None) as bar:
        for parts, targets in batches:
            errors.check()
            for array, part in zip(arrays, (*parts, targets)):
                array[done:done + len(targets)] = part
            done += len(targets)
            bar.update(len(targets))
    errors.check()
    for array in arrays:
        array.flush()
    unreadable = {name: reason for name, reason in errors.names.items() if name not in before}
    with open(os.path.join(folder, _META), 'w') as f:
        json.dump(unreadable, f)


def _open(path: str, layout: Layout) -> Optional[Decoded]:
    """Return the decoded images, None where they are missing or damaged."""
    try:
        arrays = [np.load(os.path.join(path, name), mmap_mode='r') for name in layout]
        with open(os.path.join(path, _META)) as f:
            unreadable = json.load(f)
    except (OSError, ValueError):
        return None
    if [(a.shape, a.dtype) for a in arrays] != list(layout.values()):
        return None
    *arrays, targets = arrays
    return Decoded(arrays, np.array(targets), unreadable)


class Squash:
    """Resize an image to a square, whatever its shape, and return it with its width over its height.

    The shape comes back when a crop is resized, see random_boxes: nothing of the image is cut off.

    Args:
        side: Height and width in pixels.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Tuple[np.ndarray, np.float32]:
        pixels = np.array(image.resize((self.side, self.side), Image.Resampling.BILINEAR))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return pixels, np.float32(image.width / image.height)


class CropLoader:
    """Batches of random crops of decoded images, made on the device; like those of timm's loader for training.

    The crop of an image follows from (seed, epoch, index). The images are kept in the memory of a GPU if they take at
    most half of what is free there.

    Args:
        decoded: Images decoded with the transform Squash.
        order: Gives (epoch, index, repeat) for the images of this process, see EpochSampler of timm_rs.train.
        batch_size: Images per batch; an incomplete last batch is left out.
        size: Height and width of the crops in pixels.
        normalize: Brings uint8 or float images to their device and normalizes them.
        draw: Draws boxes, see random_boxes; takes the uniform numbers [N, 5] and the shapes [N].
        seed_epoch: Returns the seed of an epoch.
    """

    def __init__(
            self,
            decoded: Decoded,
            order: Any,
            batch_size: int,
            size: int,
            normalize: Callable[[torch.Tensor], torch.Tensor],
            draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
            seed_epoch: Callable[[int], int],
    ):
        self.images, self.aspects = decoded.arrays[0], torch.from_numpy(np.array(decoded.arrays[1]))
        self.targets = torch.from_numpy(decoded.targets)
        self.order = order
        self.batch_size = batch_size
        self.size = size
        self.normalize = normalize
        self.draw = draw
        self.seed_epoch = seed_epoch
        self.device = normalize.mean.device
        if self.device.type == 'cuda' and 2 * self.images.nbytes <= torch.cuda.mem_get_info(self.device)[0]:
            self.images = torch.from_numpy(np.array(self.images)).to(self.device)
            self.targets = self.targets.to(self.device)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def boxes(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Give the indices [N] of each batch of the epoch and their boxes [5, N]."""
        generator = torch.Generator().manual_seed(self.seed_epoch(self.order.epoch))
        numbers = torch.rand(len(self.targets), 5, generator=generator)
        for indices in torch.tensor([index for _, index, _ in self.order]).split(self.batch_size):
            if len(indices) == self.batch_size:
                yield indices, self.draw(numbers[indices], self.aspects[indices])

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for indices, boxes in self.boxes():
            if isinstance(self.images, torch.Tensor):
                indices = indices.to(self.device, non_blocking=True)
                images = self.images[indices]
            else:
                images = torch.from_numpy(self.images[indices.numpy()]).to(self.device, non_blocking=True)
            crops = crop(images, boxes.to(self.device, non_blocking=True), self.size)
            yield self.normalize(crops), self.targets[indices].to(self.device, non_blocking=True)


class DecodedLoader:
    """Batches of decoded images at every size, like those of create_eval_loader.

    Args:
        decoded: Decoded images with one array per size.
        batch_size: Images per batch.
        rank: Number of the process, which reads each world_size-th image.
        world_size: Number of processes.
    """

    def __init__(self, decoded: Decoded, batch_size: int, rank: int = 0, world_size: int = 1):
        self.decoded = decoded
        self.batch_size = batch_size
        self.indices = range(rank, len(decoded.targets), world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Tuple[List[torch.Tensor], torch.Tensor]]:
        for first in range(0, len(self.indices), self.batch_size):
            part = self.indices[first:first + self.batch_size]
            chosen = slice(part.start, part[-1] + 1, part.step)
            yield (
                [torch.from_numpy(np.array(array[chosen])) for array in self.decoded.arrays],
                torch.from_numpy(self.decoded.targets[chosen].copy()))
