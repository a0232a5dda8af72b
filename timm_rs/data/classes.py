"""Which classes a data set has, by name and number, and what its labels may be"""
import logging
import operator
import os
from functools import partial
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from timm import data as timm_data
from timm.data import MultiLabelTarget
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line

from .readers import ImageDataset, StreamDataset

__all__ = [
    'check_class_folders', 'check_labels', 'count_classes', 'drop_labels', 'encode_labels', 'explain_classes',
    'explain_labels', 'imagenet_classes', 'name_unmapped', 'number_classes', 'read_class_map']

_logger = logging.getLogger(__name__)


def number_classes(dataset: Dataset) -> Optional[Mapping[Any, int]]:
    """Return the index of each class by its name if a data set records them, else None."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or None


def count_classes(dataset: Dataset) -> Optional[int]:
    """Return the number of classes if a data set records it, else None."""
    if hasattr(dataset, 'num_classes'):
        return dataset.num_classes
    class_to_idx = number_classes(dataset)
    return max(class_to_idx.values()) + 1 if class_to_idx else None


def check_class_folders(dataset: Dataset) -> None:
    """Raise UserError if a folder of class folders holds images beside these, which timm takes for one more class, or a
    folder that cannot be read, which timm leaves out.
    """
    if '' in (number_classes(dataset) or ()):
        raise UserError(
            f'{dataset.source} holds images outside of its class folders: move each into that of its class, or away.')
    if isinstance(getattr(dataset, 'reader', None), ReaderImageFolder):
        folders = sorted(entry.path for entry in os.scandir(dataset.reader.root) if entry.is_dir())
        closed = next((path for path in folders if not os.access(path, os.R_OK | os.X_OK)), None)
        if closed:
            raise UserError(f'{closed} cannot be read, its images would be left out: permission denied.')


def read_class_map(name: str, root: str) -> Mapping[Any, int]:
    """Return the index of each class by its name, from a file that may be in the folder of the data set."""
    path = next(filter(os.path.isfile, (name, os.path.join(root, name))), None)
    if path is None:
        raise UserError(f'--class-map {name} does not exist or is not a regular file.')
    try:
        found = load_class_map(path)
    except Exception as e:  # what a foreign file makes its readers raise is not documented
        raise UserError(f'--class-map {path} cannot be read: {one_line(e)}') from e
    check = fields.table(lambda key: key, fields.integer(0, fields.MAX_CLASSES - 1), fields.MAX_CLASSES)
    found = fields.check_fields(found, check, f'--class-map {path}')
    found = {name.removeprefix('\ufeff') if isinstance(name, str) else name: i for name, i in found.items()}
    if '' in found:
        raise UserError(f'--class-map {path}: a class has no name, as of an empty line.')
    return found


def name_unmapped(root: str, class_map: Mapping[Any, int]) -> None:
    """Warn of class folders that a class map does not name, whose images timm leaves out."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name not in class_map)
    left_out = [name for name in folders if any(entry.is_file() for entry in os.scandir(os.path.join(root, name)))]
    if left_out:
        listed = ', '.join(left_out[:3]) + ', ...' * (len(left_out) > 3)
        _logger.warning(f'{root}: {len(left_out)} folders are not in --class-map and left out: {listed}')


def explain_classes(found: Mapping[Any, int], expected: Mapping[Any, int]) -> Optional[str]:
    """Return in words the first classes that two data sets number differently, None if there are none.

    Example:
        >>> explain_classes({'cat': 0, 'cow': 1}, {'cat': 0, 'dog': 1, 'emu': 2})
        "class 1 is 'cow', expected 'dog'; class 2 is missing, expected 'emu'"
    """
    found, expected = ({i: name for name, i in numbers.items()} for numbers in (found, expected))
    differ = [
        f"class {i} is {repr(found[i]) if i in found else 'missing'}, "
        f"expected {repr(expected[i]) if i in expected else 'none'}"
        for i in sorted(found.keys() | expected.keys()) if found.get(i) != expected.get(i)
    ]
    return '; '.join(differ[:3]) or None


def explain_labels(classes: Optional[Mapping[Any, int]], labels: Optional[Sequence[str]]) -> Optional[str]:
    """Return in words how classes of a data set differ from the names that weights record, None if they do not.

    Only the first name of a class counts, and WordNet ids are looked up. Another number of classes is not compared.

    Args:
        classes: The index of each class by its name, if the data set records them.
        labels: Names in their order, if there are any.
    """
    if not classes or not labels or len(labels) != max(classes.values()) + 1:
        return None
    wordnet = dict(zip(*imagenet_classes(1000)))

    def first_name(label: Any) -> str:
        return wordnet.get(label, str(label)).split(',')[0].replace('_', ' ').lower()

    return explain_classes(
        {first_name(name): i for name, i in classes.items()}, {first_name(name): i for i, name in enumerate(labels)})


def imagenet_classes(num_classes: int) -> Tuple[Optional[List[str]], Optional[List[str]]]:
    """Return the WordNet ids and the names of the classes of ImageNet, None if it has no set of as many.

    Example:
        >>> imagenet_classes(1000)[1][0]
        'tench, Tinca tinca'
    """
    subset = timm_data.infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None:
        return None, None
    info = timm_data.ImageNetInfo(subset)
    return info.label_names(), [info.index_to_description(i) for i in range(num_classes)]


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Let a data set of one label per image raise UserError where this is not one of so many classes.

    Args:
        dataset: Data set of create_dataset.
        num_classes: Number of classes.
    """
    if getattr(dataset, 'target_transform', False) is None:
        dataset.target_transform = partial(_check_label, num_classes=num_classes, source=dataset.source)


def _check_label(target: Any, num_classes: int, source: str) -> int:
    if isinstance(target, (list, tuple)):
        raise UserError(f'{source} has several labels per image, which needs --task multilabel.')
    try:
        found = operator.index(target)
    except TypeError:
        found = -1
    if not 0 <= found < num_classes:
        raise UserError(
            f'{source}: the label of an image is {fields.shown(target)}, expected the index of one of the '
            f'{num_classes} classes, from 0 to {num_classes - 1}.')
    return found


def encode_labels(dataset: Dataset, num_classes: int, target_format: Optional[str] = None) -> None:
    """Let a data set of several labels per image give a vector of one value per label.

    Args:
        dataset: Data set of create_dataset.
        num_classes: Number of labels.
        target_format: What it holds: 'indices' (also if None) or 'multihot'.

    Raises:
        UserError: It holds one label per image.
    """
    if not isinstance(dataset, (ImageDataset, StreamDataset)) or isinstance(dataset.reader, ReaderImageFolder):
        raise UserError(
            f'{dataset.source} has one label per image, expected lists of labels as in a data set hfds/, hfids/, '
            'wds/ or tfds/.')
    dataset.target_transform = MultiLabelTarget(num_classes, dense=target_format == 'multihot')


def drop_labels(dataset: Dataset) -> None:
    """Let a data set give class 0 for every image, for training on the answers of teachers."""
    dataset.target_transform = _no_label


def _no_label(target: Any) -> int:
    return 0
