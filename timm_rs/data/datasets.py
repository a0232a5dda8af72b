"""Data sets by name, and evaluation loaders that decode an image once for all resolutions"""
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageMode
from timm import data as timm_data
from timm.data.loader import fast_collate
from timm.data.readers import img_extensions
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.images import extensions, split_folder

from ..resolutions import check_resolutions
from .classes import name_unmapped, read_class_map
from .lazy import read_image
from .readers import ImageDataset, StreamDataset

_PACKAGES = dict(wds='webdataset', hfds='datasets', hfids='datasets', tfds='tensorflow_datasets')
_IMG_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}

INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)  # as timm names them

__all__ = [
    'INTERPOLATIONS',
    'DigitsDataset',
    'PyramidNormalizer',
    'choose_img_mode',
    'create_dataset',
    'create_eval_loader',
    'describe',
    'share_shards',
]


class DigitsDataset(Dataset):
    """Handwritten digits bundled with scikit-learn: 1,797 images of 8x8 pixels, 10 classes.

    Every fourth image is for validation (450), the others are for training (1,347).

    Args:
        split: Name of a training or validation split.
        transform: Applied to the PIL image.
        input_img_mode: PIL mode of the images.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    num_classes = 10

    def __init__(self, split: str = 'train', transform: Optional[Callable] = None, input_img_mode: str = 'RGB'):
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise ImportError("--dataset digits needs scikit-learn: pip install ./runtime '.[demo]'.") from e
        digits = load_digits()
        is_validation = np.arange(len(digits.target)) % 4 == 0
        chosen = ~is_validation if split.startswith('train') else is_validation
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target[chosen].tolist()
        self.transform = transform
        self.input_img_mode = input_img_mode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        return (self.transform(image) if self.transform is not None else image), self.targets[index]


def describe(dataset: Dataset) -> str:
    """Return in words how many images a data set of create_dataset holds, and where they are."""
    if isinstance(dataset, IterableDataset):
        return f'the images of {dataset.source}'
    return f'{len(dataset):,} images of {dataset.source}'


def create_dataset(name: str, root: Optional[str], split: str, decode: str = 'exact', **kwargs: Any) -> Dataset:
    """Return a data set of timm, or the digits.

    Args:
        name: 'digits', or a name of timm: '' for a folder or tar of class folders, 'hfds/...' and so on.
        root: Folder of the data set.
        split: Name of the split.
        decode: How images are decoded: exact, scaled or fast, see timm_rs.data.lazy.
        **kwargs: Further arguments of timm.data.create_dataset.

    Returns:
        A data set that reads its images by timm_rs_runtime.images; its attribute `source` says where they are.

    Raises:
        ValueError: The folder is missing, or holds no images of this split.
        ImportError: The package that reads the data set is not installed.
    """
    source, mode = f'split {split!r} of {name}', kwargs.get('input_img_mode') or 'RGB'
    if name.lower().partition('/')[0] not in _PACKAGES:
        for key in ('input_key', 'target_key', 'target_format'):
            if kwargs.get(key):
                flag = f"--{key.replace('_', '-')} {kwargs[key]}"
                raise UserError(
                    f'{flag} is for data sets hfds/, hfids/, wds/ and tfds/: {name or root} has no fields, and one '
                    'label per image.')
    if name == 'digits':
        if root:
            raise UserError(f'--dataset digits comes with scikit-learn, leave out the folder {root}.')
        dataset = DigitsDataset(split, input_img_mode=mode)
        dataset.source = source
        return dataset
    kind, slash, _ = name.lower().partition('/')
    if slash and kind not in ('folder', 'torch', *_PACKAGES):  # timm would read the folder
        raise UserError(f'Unknown data set {name}, expected torch/, hfds/, hfids/, tfds/ or wds/ before the name.')
    if kind in _PACKAGES and find_spec(_PACKAGES[kind]) is None:
        how = 'tensorflow tensorflow_datasets' if kind == 'tfds' else "./runtime '.[stream]'"
        raise ImportError(f'--dataset {name} needs the package {_PACKAGES[kind]}: pip install {how}.')
    if kind == 'wds' and not root:
        raise UserError(f'No data: --dataset {name} needs the folder of the shards as DIR or --data-dir.')
    if not name or name.startswith(('folder', 'torch/image_folder')):
        if not root:
            raise UserError('No data: give the folder of the data set as DIR or --data-dir, or --dataset digits.')
        if not os.path.isfile(root):  # a tar
            root = split_folder(root, split)
        source, kwargs['search_split'] = root, False
    if kwargs.get('class_map'):
        kwargs['class_map'] = read_class_map(kwargs['class_map'], root or '')
        if source == root and os.path.isdir(root):
            name_unmapped(root, kwargs['class_map'])
    try:
        with _all_extensions():
            dataset = timm_data.create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, FileNotFoundError, NotADirectoryError, RuntimeError, ValueError) as e:
        raise UserError(f'Cannot read split {split!r} of data set {name or root}: {e}') from e
    if kind == 'hfds':
        _check_columns(dataset.reader, source)
    read = partial(read_image, mode=mode, decode=decode)
    if isinstance(dataset, timm_data.IterableImageDataset):
        dataset = StreamDataset(dataset.reader, kind)
    elif isinstance(dataset, timm_data.ImageDataset):
        dataset = ImageDataset(None, dataset.reader)
    elif hasattr(dataset, 'loader'):  # torchvision's folders of images
        dataset.loader = read
    dataset.read, dataset.input_img_mode, dataset.source = read, mode, source
    return dataset


def _check_columns(reader: Any, source: str) -> None:
    """Raise UserError if a data set hfds/ lacks the fields of the image and of the label."""
    rows, image, label = reader.dataset.data, reader.image_key, reader.label_key.split('/')[0]
    held = set(rows.column_names)
    if len(rows) and rows.column(image).null_count == len(rows):  # timm's reader adds it, empty, if there is none
        held.remove(image)
    for flag, name in (('--input-key', image), ('--target-key', label)):
        if name not in held and not (name == label and reader.target_keys):
            raise UserError(f"{source} has nothing in a field {name!r}, give {flag}: it has {', '.join(sorted(held))}.")


@contextmanager
def _all_extensions() -> Iterator[None]:
    """Let timm's folders and tars hold images of all formats that are read."""
    before = img_extensions.get_img_extensions()
    img_extensions.set_img_extensions(extensions())
    try:
        yield
    finally:
        img_extensions.set_img_extensions(before)


def share_shards(dataset: IterableDataset, is_training: bool, rank: int, world_size: int, num_workers: int) -> None:
    """Let a process read its part of WebDataset shards: equal parts for training, each image once for evaluation.

    timm's reader deals the shards of training out, which needs one for every worker. In an evaluation with several
    processes it would give each the same number of images, so that some are missed and others seen twice. Here each
    process reads all of its own shards, and the numbers differ.

    Args:
        dataset: Data set whose reader is timm's for shards.
        is_training: The shards are read for training.
        rank: Number of the process.
        world_size: Number of processes.
        num_workers: Loader processes of each.

    Raises:
        ValueError: There are fewer shards than readers.
    """
    reader = dataset.reader
    shards = reader.split_info.filenames
    if is_training:
        if len(shards) < world_size * max(num_workers, 1):
            raise UserError(
                f'{len(shards)} training shards for {world_size} processes with {num_workers} --workers each, '
                f'expected at least {world_size * max(num_workers, 1)} shards.')
    elif rank >= len(shards):
        dataset.reader = []  # a reader cannot be empty
    elif world_size > 1:
        reader.split_info = replace(reader.split_info, filenames=tuple(shards[rank::world_size]))
        reader.dist_rank, reader.dist_num_replicas = 0, 1


def choose_img_mode(in_chans: int, mode: Optional[str] = None) -> str:
    """Return the PIL mode of images for a network.

    Args:
        in_chans: Image channels of the network.
        mode: Mode of --input-img-mode, if given.

    Raises:
        ValueError: There is no usual mode for this number of channels, or the given one has another number.

    Example:
        >>> choose_img_mode(4)
        'RGBA'
    """
    if not mode and in_chans not in _IMG_MODES:
        raise UserError(f'Images of {in_chans} channels need a PIL mode, give it by --input-img-mode.')
    mode = mode or _IMG_MODES[in_chans]
    try:
        known = ImageMode.getmode(mode)
    except KeyError:
        known = None
    if known is None or not known.typestr.endswith('u1'):
        raise UserError(f'--input-img-mode {mode}: expected an 8-bit mode of PIL, such as RGB or L.')
    bands = len(known.bands)
    if bands != in_chans:
        raise UserError(
            f'--input-img-mode {mode} gives images of {bands} channels, expected {in_chans} as the model (--in-chans).')
    return mode


def _transform_pyramid(image: Image.Image, transforms: Sequence[Callable], border: int = 0) -> List[Any]:
    if min(image.size) <= 2 * border:
        width, height = image.size
        raise UserError(f'--crop-border-pixels {border} leaves nothing of an image of {width}x{height} pixels.')
    return [transform(image) for transform in transforms]


def _collate_pyramid(batch: Sequence[Tuple[List[Any], Any]]) -> Tuple[List[torch.Tensor], torch.Tensor]:
    images, targets = zip(*batch)
    return [fast_collate([(image, 0) for image in level])[0] for level in zip(*images)], default_collate(targets)


class PyramidNormalizer:
    """Brings uint8 images of every resolution to a device and normalizes them there, as timm's prefetch loader does.

    Args:
        mean: Pixel mean per channel, for pixels in [0, 1].
        std: Pixel standard deviation per channel.
        device: Device of the images.
        dtype: Dtype of the images.
        channels_last: Give images in channels_last layout.
    """

    def __init__(
            self,
            mean: Sequence[float],
            std: Sequence[float],
            device: torch.device,
            dtype: torch.dtype = torch.float32,
            channels_last: bool = False,
    ):
        self.mean = torch.tensor([m * 255 for m in mean], device=device, dtype=dtype).view(1, -1, 1, 1)
        self.std = torch.tensor([s * 255 for s in std], device=device, dtype=dtype).view(1, -1, 1, 1)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(device=self.mean.device, dtype=self.mean.dtype, non_blocking=True)
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=self.layout)


def create_eval_loader(
        dataset: Dataset,
        resolutions: Sequence[int],
        batch_size: int,
        data_config: dict,
        num_workers: int = 0,
        distributed: bool = False,
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader that reads and decodes every image once and gives it at every resolution.

    At each size the preprocessing is timm's for that size (resize to size / crop_pct, centre crop), so the batches are
    those of timm's loader for that size, pixel for pixel.

    Args:
        dataset: Data set of PIL images whose transform can be set.
        resolutions: Square sizes in pixels.
        batch_size: Images per batch.
        data_config: Preprocessing as timm.data.resolve_model_data_config returns it; its input size is not used.
        num_workers: Loader processes.
        distributed: Give each process its share.
        pin_memory: Pin the memory of batches.

    Returns:
        A loader of (list of uint8 images [N, C, s, s] per resolution, largest first, targets [N]).
    """
    resolutions = check_resolutions(resolutions)
    config = dict(data_config)
    channels = config.pop('input_size')[0]
    loader = timm_data.create_loader(
        dataset,
        input_size=(channels, resolutions[0], resolutions[0]),
        batch_size=batch_size,
        is_training=False,
        use_prefetcher=False,
        collate_fn=_collate_pyramid,
        num_workers=num_workers,
        distributed=distributed,
        pin_memory=pin_memory,
        **config,
    )
    dataset.transform = partial(_transform_pyramid, transforms=[
        timm_data.create_transform((channels, r, r), is_training=False, use_prefetcher=True, **config)
        for r in resolutions
    ], border=config.get('crop_border_pixels') or 0)
    return loader
