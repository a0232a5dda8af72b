"""timm's data sets, with images read as everywhere in timm_rs, and what happens if one cannot be read"""
import io
import tarfile
from functools import partial
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import torch
from PIL import Image
from timm import data as timm_data
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.images import ImageError, name_of, open_image
from timm_rs_runtime.unreadable import ReadErrors

from .._compat import wds_decoder

__all__ = ['UNREADABLE', 'CheckedLoader', 'ImageDataset', 'ReadableDataset', 'StreamDataset', 'skip_unreadable']

UNREADABLE = -100  # label of an image that cannot be read; the losses of torch ignore it
_PIXEL = b'P4 1 1 \0'  # an image, PPM


class ImageDataset(timm_data.ImageDataset):
    """Images and labels of a folder, tar or table.

    Attributes:
        read: Returns an image from what it is in.

    Raises:
        ImageError: An image cannot be read; timm would give the next one.
    """
    read = staticmethod(open_image)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        try:
            # A name, not a file that timm opened: it would wait for a pipe.
            is_folder = isinstance(self.reader, ReaderImageFolder)
            file, target = self.reader.samples[index] if is_folder else self.reader[index][:2]
        except (AssertionError, OSError, TypeError, tarfile.TarError) as e:  # timm's, of rows without an image
            raise ImageError(f'Image number {index} cannot be read: {one_line(e)}.') from e
        image = self.read(file)
        if self.transform is not None:
            image = self.transform(image)
        return image, _encoded(self, target)


class ReadableDataset(Dataset):
    """A data set without the images that cannot be read.

    Args:
        dataset: Images with labels, which raises ImageError.
        errors: Where unreadable images are reported.
        stand_in: Give the next image instead of an unreadable one; otherwise a black one with the label UNREADABLE. If
            no image is left to stand in, the next check of errors ends the program.
    """

    def __init__(self, dataset: Dataset, errors: ReadErrors, stand_in: bool):
        self.dataset = dataset
        self.errors = errors
        self.stand_in = stand_in

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        tries = min(len(self), self.errors.limit + 10) if self.stand_in else 1
        for left in reversed(range(tries)):
            try:
                return self.dataset[index]
            except ImageError as e:
                self.errors.report(self._name(index), e, is_last=self.stand_in and not left)
            index = (index + 1) % len(self)
        return _black(self.dataset, 0 if self.stand_in else UNREADABLE)

    def _name(self, index: int) -> str:
        if hasattr(self.dataset, 'samples'):  # torchvision's
            return self.dataset.samples[index][0]
        try:
            return self.dataset.filename(index, absolute=True) or f'number {index}'
        except (AttributeError, NotImplementedError, TypeError):  # timm's, of rows without an image
            return f'number {index}'


class CheckedLoader(DataLoader):
    """Batches of images that end with an error as soon as more cannot be read than errors allows.

    Args:
        dataset: Images, with a ReadableDataset below.
        errors: Where it reports unreadable images.
        kwargs: Arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset, errors: ReadErrors, **kwargs: Any):
        super().__init__(dataset, **kwargs)
        self.errors = errors

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.errors.check()
            yield batch


class StreamDataset(timm_data.IterableImageDataset):
    """Images and labels one after the other, as timm's class; unreadable images are treated as by ReadableDataset.

    Args:
        reader: timm's.
        kind: wds, hfids or tfds, whose images TensorFlow decodes.

    Attributes:
        read: Returns an image from what it is in.
    """
    read = staticmethod(open_image)

    def __init__(self, reader: Reader, kind: str):
        super().__init__(None, reader=reader)
        self.kind = kind
        self.errors: Optional[ReadErrors] = None
        self.stand_in = False

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        waiting, last = 0, None
        for number, (source, target) in enumerate(self._sources()):
            try:
                if isinstance(source, ImageError):
                    raise source
                image = self.read(source)
                images = [self._transformed(image) for _ in range(1 + waiting)]
            except ImageError as e:
                if self.errors is None:
                    raise
                name = name_of(source)
                self.errors.report(f'number {number}' if name == name_of(None) else name, e)
                if self.stand_in:
                    waiting += 1
                else:
                    yield _black(self, UNREADABLE)
                continue
            target = _encoded(self, target)
            for each in images:
                yield each, target
            waiting, last = 0, (image, target)
        for _ in range(waiting if last else 0):
            yield self._transformed(last[0]), last[1]

    def _transformed(self, image: Image.Image) -> Any:
        return image if self.transform is None else self.transform(image)

    def _sources(self) -> Iterator[Tuple[Any, Any]]:
        """Give what open_image takes, and labels; timm's readers would open the images themselves."""
        reader = self.reader
        if self.kind != 'tfds' and isinstance(reader, Reader):
            reader.input_img_mode = ''
            if reader.ds is None:
                reader._lazy_init()
                (_leave_encoded_wds if self.kind == 'wds' else _leave_encoded_hfids)(reader)
        for source, target in reader:
            yield _open_cell(source) if isinstance(source, dict) else source, target


def skip_unreadable(dataset: Dataset, errors: ReadErrors, stand_in: bool) -> Dataset:
    """Return a data set of create_dataset without the images that cannot be read, see ReadableDataset."""
    if isinstance(dataset, StreamDataset):
        dataset.errors, dataset.stand_in = errors, stand_in
        return dataset
    return ReadableDataset(dataset, errors, stand_in)


def _black(dataset: Dataset, target: int) -> Tuple[Any, Any]:
    image = Image.new(getattr(dataset, 'input_img_mode', 'RGB'), (64, 64))
    encode = getattr(dataset, 'target_transform', None)
    if hasattr(encode, 'num_classes'):  # of several labels
        target = torch.full((encode.num_classes,), float(target))
    return image if dataset.transform is None else dataset.transform(image), target


def _encoded(dataset: Dataset, target: Any) -> Any:
    """Return the label or labels of an image as the loss takes them; unchecked ones as they are, -1 for none."""
    if dataset.target_transform is None:
        return -1 if target is None else target
    try:
        return dataset.target_transform(target)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{dataset.source}: the labels {fields.shown(target)} of an image: {one_line(e)}') from e


def _leave_encoded_hfids(reader: Reader) -> None:
    """Let a reader give images as bytes; `datasets` would turn them by their EXIF orientation."""
    from datasets import Image as ImageFeature

    if reader.ds.features is None:
        reader.ds = reader.ds._resolve_features()
    reader.ds = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))


def _open_cell(cell: Dict[str, Any]) -> Union[str, io.BytesIO]:
    """Return the image in a cell of a Hugging Face data set."""
    content, path = cell['bytes'], cell['path'] or ''
    if content is None and '://' not in path:
        return path
    if content is None:
        import fsspec  # which `datasets` reads with too

        with fsspec.open(path, 'rb') as f:
            content = f.read()
    file = io.BytesIO(content)
    file.name = path
    return file


def _leave_encoded_wds(reader: Reader) -> None:
    """Let a reader give images as files, or the error instead; timm would leave out what it cannot read."""
    import webdataset

    decode = partial(
        wds_decoder(), image_key=reader.input_key, target_key=reader.target_keys or reader.target_key,
        alt_label=reader.split_info.alt_label, image_mode='')

    def leave_encoded(sample: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        keys, name = reader.input_key.split(';'), f"{sample['__url__']}: {sample['__key__']}"
        key = next((key for key in keys if key in sample), None)
        if key is None:
            held = ', '.join(key for key in sample if not key.startswith('_'))
            return _no_sample(keys[0], name, f"it holds {held}, expected an image, {' or '.join(keys)} (--input-key)")
        try:
            decoded = decode({**sample, key: _PIXEL})  # for the label
        except (KeyError, TypeError, ValueError) as e:
            return _no_sample(key, name, f'its label cannot be read: {type(e).__name__}: {one_line(e)}')
        if decoded is None:
            return None
        file = io.BytesIO(sample[key])
        file.name = f'{name}.{key}'
        return {key: file, 'target': decoded['target']}

    reader.ds.pipeline[-2] = webdataset.map(leave_encoded)


def _no_sample(key: str, name: str, reason: str) -> Dict[str, Any]:
    """Return a sample of a WebDataset with the error instead of its image."""
    error = ImageError(reason)
    error.name = name
    return {key: error, 'target': None}
