"""What a file of timm-rs export is made of, for those who write and those who read it"""
import mmap
import os
import re
from typing import Any, Dict, Mapping

from . import fields
from .errors import UserError
from .ort import open_onnx
from .preprocess import PREPROCESSING, Preprocessing

__all__ = ['INDEX', 'parse_metadata', 'preprocessing_of', 'read_metadata']

INDEX = 'resolution_index'  # in the graph: int64 scalar, the row of the tables, 0 for the largest size

_REQUIRED = ('resolutions', 'num_classes', *PREPROCESSING)
_FIELDS = dict(
    PREPROCESSING,
    timm_rs=fields.text(),
    resolutions=fields.resolutions(),
    num_classes=fields.integer(0, fields.MAX_CLASSES),
    class_names=fields.optional(fields.array(fields.text(), 0, fields.MAX_CLASSES)),
    class_ids=fields.optional(fields.array(fields.text(), 0, fields.MAX_CLASSES)),  # WordNet ids of ImageNet's classes
    madds=fields.table(fields.size_text, fields.integer(0, 10 ** 18)),
    architecture=fields.text(),
    precision=fields.text(choices=('float32', 'fp16', 'int8')),
    multilabel_threshold=fields.optional(fields.number(0, 1)),  # None: one label per image
)


def parse_metadata(texts: Mapping[str, str], path: str) -> Dict[str, Any]:
    """Return what a file of timm-rs export records about itself, checked, without what other tools have added.

    Args:
        texts: Its metadata; ours have values in JSON.
        path: Name of the file.

    Raises:
        UserError: It is of another kind, or a value in it is not usable.
    """
    missing = [name for name in _REQUIRED if name not in texts]
    if missing:
        raise UserError(f"{path} is not a file of timm-rs export: its metadata lack {', '.join(missing)}.")
    values = {name: fields.parse_json(texts[name], f'{path}: {name}') for name in _FIELDS if name in texts}
    found = fields.check_fields(values, fields.record(_FIELDS), path)
    if len(found['mean']) != len(found['std']):
        raise UserError(f"{path}: mean has {len(found['mean'])} channels, but std has {len(found['std'])}.")
    for name in ('class_names', 'class_ids'):
        if found.get(name) is not None and len(found[name]) != found['num_classes']:
            raise UserError(f"{path}: there are {len(found[name])} {name}, but num_classes is {found['num_classes']}.")
    return found


def preprocessing_of(metadata: Dict[str, Any], decode: str = 'exact') -> Preprocessing:
    """Return the preprocessing in the metadata of a file."""
    return Preprocessing(**{name: metadata[name] for name in PREPROCESSING}, decode=decode)


def read_metadata(path: str) -> Dict[str, Any]:
    """Return what a file of timm-rs export records about itself, see parse_metadata.

    Its resolutions are those that the graph takes: one if a tool has fixed height and width.
    """
    if not os.path.isfile(path):
        found = 'is a folder' if os.path.isdir(path) else 'does not exist'
        raise UserError(f'{path} {found}, expected a file of timm-rs export.')
    if _refers_to_files(path):
        raise UserError(f'{path} keeps tensors in other files, expected one file of timm-rs export.')
    session = open_onnx(path, threads=1, optimize=False)
    metadata = parse_metadata(session.get_modelmeta().custom_metadata_map, path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not outputs or len(outputs[0].shape) != 2:
        raise UserError(f'{path} is not a file of timm-rs export, expected one input of 4 axes and logits of 2.')
    channels, *sides = inputs[0].shape[1:]
    for name, found, expected in (
        ('mean', channels, [len(metadata['mean'])]),
        ('num_classes', outputs[0].shape[1], [metadata['num_classes'] or outputs[0].shape[1]]),
        *(('resolutions', side, metadata['resolutions']) for side in sides),
    ):
        if isinstance(found, int) and found not in expected:
            raise UserError(f'{path}: the graph has {found}, but {name} records {expected[0]}.')
    fixed = {side for side in sides if isinstance(side, int)}
    if len(fixed) > 1:
        raise UserError(f'{path} takes images of {sides[0]}x{sides[1]}, expected squares.')
    return dict(metadata, resolutions=tuple(fixed) or metadata['resolutions'])


def _refers_to_files(path: str) -> bool:
    """Return whether a model names a file of external data: an entry of the key `location`, of 8 characters."""
    if not os.path.getsize(path):
        return False
    with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return re.search(rb'\n(\x08|\x88\x80*\x00)location', content) is not None
