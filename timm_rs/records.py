"""What files record about networks and runs beside tensors, checked when it is read

Nothing that a file records makes the reader open another file or contact anybody: arguments that would, such as
`pretrained_cfg_overlay` or `checkpoint_path`, are left out with a warning.
"""
import csv
import glob
import io
import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import yaml

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.files import atomic_write
from timm_rs_runtime.preprocess import PREPROCESSING

from ._compat import parse_model_cfg

__all__ = [
    'ARGS_FILE', 'LABEL_FILE', 'PRETRAINED_CFG', 'SUMMARY_FILE', 'check_model_args', 'check_run', 'find_checkpoint',
    'is_model_folder', 'labels_beside', 'read_config', 'read_csv', 'read_label_names', 'read_summary',
    'read_threshold', 'read_yaml', 'write_label_names']

ARGS_FILE, LABEL_FILE, SUMMARY_FILE = 'args.yaml', 'label_names.txt', 'summary.csv'  # beside the checkpoints of a run
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin', 'model_best.pth.tar', 'last.pth.tar')  # in a folder

_logger = logging.getLogger(__name__)

# Arguments of timm.create_model that say where weights come from or go to, not what the network is.
SOURCE_ARGUMENTS = {
    'cache_dir', 'checkpoint_path', 'device', 'dtype', 'file', 'hf_hub_filename', 'hf_hub_id', 'pretrained',
    'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_custom_load', 'pretrained_filter_fn',
    'pretrained_model_args', 'pretrained_strict', 'pruned', 'state_dict', 'url',
}
_classes = fields.integer(0, fields.MAX_CLASSES)
_image = fields.array(fields.integer(1, fields.MAX_SIZE), 3, 3)
_names = fields.either(
    fields.array(fields.text(), 0, fields.MAX_CLASSES), fields.table(fields.text(), fields.text(), fields.MAX_CLASSES))
_words = fields.either(fields.text(100_000), fields.array(fields.text()))
_arguments = fields.table(fields.text(100), fields.plain())

_RUN = {k: fields.optional(check) for k, check in dict(
    PREPROCESSING,
    interpolation=fields.text(100),  # '' is the default
    model=fields.text(500),
    resolutions=fields.resolutions(),
    num_classes=_classes,
    in_chans=fields.integer(1, fields.MAX_SIZE),
    gp=fields.text(100),
    task=fields.text(100),
    multilabel_threshold=fields.number(0, 1),
    bn_eps=fields.number(0, 1),
    model_kwargs=_arguments,
    input_img_mode=fields.text(100),
).items()}
PRETRAINED_CFG = fields.record({k: fields.optional(check) for k, check in dict(
    PREPROCESSING,
    input_size=_image,
    test_input_size=_image,
    min_input_size=_image,
    fixed_input_size=fields.flag(),
    test_crop_pct=PREPROCESSING['crop_pct'],
    num_classes=_classes,
    label_offset=fields.integer(0, 1),
    label_names=_names,
    label_descriptions=_names,
    pool_size=fields.array(fields.integer(1, fields.MAX_SIZE), 2, 2),
    test_pool_size=fields.array(fields.integer(1, fields.MAX_SIZE), 2, 2),
    **dict.fromkeys(
        ('first_conv', 'classifier', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes'),
        _words),
).items()})
_CONFIG = fields.record(dict(
    architecture=fields.text(100),
    num_classes=_classes,
    label_names=_names,
    label_descriptions=_names,
    model_args=_arguments,
    pretrained_cfg=PRETRAINED_CFG,
), required=('architecture', 'pretrained_cfg'))
_THRESHOLD = fields.record(dict(multilabel_threshold=fields.optional(fields.number(0, 1))))


class _Loader(yaml.SafeLoader):
    """Only plain values: a date stays text, and merged mappings stay short."""
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != 'tag:yaml.org,2002:timestamp']
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 1000:
            raise yaml.YAMLError('a mapping of more than 1000 fields')


def read_yaml(path: str) -> Dict[str, Any]:
    """Return the fields of a YAML file, none if it is empty; the values are plain, and not checked yet.

    Raises:
        UserError: There is no such file, or it is not YAML of fields and their values.
    """
    try:
        values = yaml.load(fields.read_text(path, 2 ** 18), _Loader)  # noqa: S506
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:  # a tag such as !!int before other text
        raise UserError(f'{path} is not valid YAML: {one_line(e)}') from e
    return fields.check_fields({} if values is None else values, fields.table(fields.text(), lambda v: v), path)


def check_run(values: Mapping[str, Any], source: str) -> Dict[str, Any]:
    """Return the flags of a training run: those that describe its network checked, others if they are plain values.

    Raises:
        UserError: A flag that describes the network has an unusable value; the message names the source.
    """
    known = fields.check_fields(values, fields.record(_RUN), f'{source}: flags')
    if known.get('model_kwargs'):
        known['model_kwargs'] = check_model_args(known['model_kwargs'], source)
    for name, value in values.items():
        try:
            known.setdefault(fields.text()(name), fields.plain()(value))
        except fields.Mismatch:
            pass
    return known


def check_model_args(values: Mapping[str, Any], source: str) -> Dict[str, Any]:
    """Return arguments of timm.create_model that a file may choose, each a plain value.

    Raises:
        UserError: A value is unusable; the message names the source.

    Example:
        >>> check_model_args(dict(stem_width=8, pretrained_cfg_overlay=dict(url='http://example.org')), 'a.pth')
        {'stem_width': 8}
    """
    left_out = sorted(SOURCE_ARGUMENTS & values.keys())
    if left_out:
        _logger.warning(f'{source}: the model arguments {", ".join(left_out)} are left out, a file may not set them.')
    values = fields.check_fields(values, _arguments, f'{source}: model arguments')
    return {k: v for k, v in values.items() if k not in left_out}


def read_config(path: str, source: str) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Return what a config.json of timm records: the architecture, its pretrained_cfg and its arguments.

    Raises:
        UserError: It is another file, or a value in it is unusable; the message names the source.
    """
    values = fields.parse_json(fields.read_text(path), path)
    if isinstance(values, Mapping) and 'pretrained_cfg' not in values:  # as timm wrote it before 0.9
        values = dict(values, pretrained_cfg=values)
    config = fields.check_fields(values, _CONFIG, path)
    config['model_args'] = check_model_args(config.get('model_args', {}), source)
    config['pretrained_cfg'] = {k: v for k, v in config['pretrained_cfg'].items() if v is not None}
    pretrained_cfg, architecture, args = parse_model_cfg(config, {})
    return architecture, pretrained_cfg, args


def read_threshold(path: str) -> Optional[float]:
    """Return the probability from which on a label counts, None if a config.json is of one label per image.

    Raises:
        UserError: It is another file, or the value is unusable.
    """
    return fields.read_json(path, _THRESHOLD).get('multilabel_threshold')


def is_model_folder(path: str) -> bool:
    """Return whether it is a folder that timm.create_model('local-dir:...') loads."""
    return os.path.isfile(os.path.join(path, 'config.json'))


def find_checkpoint(path: str) -> str:
    """Return the file to read weights from: that of a model folder, or the best, else the last checkpoint of a run.

    Raises:
        UserError: There is no such file or folder, or the folder does not hold one.
    """
    found = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in _WEIGHTS]
    found += sorted(glob.glob(os.path.join(glob.escape(path), '*.safetensors')))
    for name in filter(os.path.isfile, found):
        return name
    what = f"holds no weights ({', '.join(_WEIGHTS)})" if os.path.isdir(path) else 'does not exist'
    raise UserError(f'{path} {what}, expected a checkpoint, the output folder of a run or a folder with config.json.')


def read_label_names(path: str) -> List[str]:
    """Return the names of classes in their order, one a line.

    Raises:
        UserError: There is no such file, or a line is empty or too long.
    """
    names = [line.rstrip('\r') for line in fields.read_text(path).rstrip('\r\n').split('\n')]
    for i, name in enumerate(names, start=1):
        if not 0 < len(name) <= 1000:
            raise UserError(f'{path}: line {i} has {len(name)} characters, expected the name of a class.')
    return names


def labels_beside(checkpoint: str) -> Optional[str]:
    """Return the file of class names that training left beside a checkpoint or in a run's folder, if there is one."""
    folder = checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint)
    path = os.path.join(folder, LABEL_FILE)
    return path if os.path.exists(checkpoint) and os.path.isfile(path) else None


def write_label_names(folder: str, numbers: Optional[Mapping[str, int]], num_classes: int) -> None:
    """Write the names of the classes beside the checkpoints of a run, if every class has a name of one line.

    Args:
        folder: Output folder of the run.
        numbers: Indices of the classes by name, if the data set records them.
        num_classes: Number of classes.
    """
    names = sorted(numbers or {}, key=(numbers or {}).get)
    if [numbers[name] for name in names] != list(range(num_classes)):
        return
    unusable = next((name for name in names if not _is_line(str(name))), None)
    if unusable is not None:
        _logger.warning(f'{unusable!r} cannot be a line of {LABEL_FILE}, so the names of the classes are not kept.')
    else:
        with atomic_write(os.path.join(folder, LABEL_FILE), overwrite=True) as f:
            f.writelines(f'{name}\n' for name in names)


def _is_line(name: str) -> bool:
    """Return whether read_label_names would read it again as it is."""
    return 0 < len(name) <= 1000 and not {'\n', '\r'} & {*name} and name.encode(errors='replace').decode() == name


def read_csv(path: str) -> List[Dict[str, str]]:
    """Return the rows of a CSV file with a header.

    Raises:
        UserError: There is no such file, or it is not such a table.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(fields.read_text(path), newline=''), strict=True))
    except csv.Error as e:
        raise UserError(f'{path} is not valid CSV: {e}.') from e
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f'{path}: a row and the header have different numbers of values.')
    return rows


def read_summary(path: str) -> List[Dict[str, Union[int, float]]]:
    """Return the rows of a summary.csv of train_rs.py, an epoch each, without empty cells; none if there is no file.

    Raises:
        UserError: It is another file.
    """
    if not os.path.exists(path):
        return []
    rows = [{name: to_number(value, f'{path}: line {i}: {name}') for name, value in row.items() if value}
            for i, row in enumerate(read_csv(path), start=2)]
    if not all('epoch' in row for row in rows):
        raise UserError(f'{path} is not a summary of train_rs.py: a row has no epoch.')
    return rows


def to_number(value: Any, source: str) -> Union[int, float]:
    """Return the number that a cell holds."""
    try:
        return int(value) if isinstance(value, str) and value.isdecimal() else float(value)
    except (TypeError, ValueError):
        raise UserError(f'{source} is {fields.shown(value)}, expected a number.') from None
