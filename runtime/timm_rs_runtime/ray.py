"""Answers for millions of images with Ray Data: what `timm-rs predict --ray` does"""
import hashlib
import json
import logging
import os
import posixpath
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

from .errors import UserError, one_line
from .fields import check_argument, integer
from .images import MAX_BYTES, ImageError, ImageSource, extensions, find_images
from .predict import Predictor, answers
from .replicas import connect

try:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet
    import ray
    import ray.data
    from pyarrow.fs import FileSelector, FileSystem, FileType
except ImportError as e:
    raise ImportError("Batches on Ray need the packages of: pip install './runtime[ray]'.") from e

__all__ = ['Worker', 'predict']

ROWS = 256  # of a file of the output, which is written complete or not at all
REPORT_SECONDS = 10.
_SETTINGS = '_settings.json'  # readers of Parquet skip names that begin with _
_TOP = pa.list_(pa.struct([('class', pa.int32()), ('name', pa.string()), ('probability', pa.float32())]))
_SCHEMA = pa.schema([
    ('path', pa.string()), ('resolution', pa.int32()), ('milliseconds', pa.float32()), ('top', _TOP),
    ('error', pa.string())])


class Worker:
    """Answers images in a process of its own, and writes a file of answers for each table.

    Args:
        model: File of `timm-rs export --format onnx`.
        output: Folder to write to.
        done: Names of images that are not answered again.
        columns: Columns with the name and the bytes of an image; without the second a name is that of a file.
        k: Classes of an answer.
        **options: Arguments of Predictor.
    """

    def __init__(
            self, model: str, output: str, done: Set[str], columns: Tuple[str, Optional[str]], k: int, **options: Any):
        self._predictor = Predictor(model, **options)
        self._output, self._done, self._columns, self._k = output, done, columns, k

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return how many images were answered, and how many of them failed."""
        names, images = self._columns
        rows = [
            dict(row, path=row.pop('image'))
            for row in answers(self._predictor, self._sources(table, names, images), self._k)]
        if rows:
            filesystem, folder = _open(self._output)
            name = hashlib.sha256('\n'.join(row['path'] for row in rows).encode()).hexdigest()[:24]
            part, whole = (posixpath.join(folder, f'{prefix}{name}.parquet') for prefix in ('_', ''))
            with filesystem.open_output_stream(part) as file:
                pa.parquet.write_table(pa.Table.from_pylist(rows, _SCHEMA), file)
            filesystem.move(part, whole)
        return pa.table(dict(images=[len(rows)], failed=[sum('error' in row for row in rows)]))

    def _sources(
            self,
            table: pa.Table,
            names: str,
            images: Optional[str],
    ) -> Iterator[Tuple[str, Union[ImageSource, ImageError]]]:
        for row in table.to_pylist():
            name = posixpath.join(row.get('__url__', ''), str(row[names]))  # keys begin again in each shard
            if name in self._done:
                continue
            if images is None:
                yield name, _read(name)
                continue
            found = row.get(images) if images else next((row[c] for c in row if f'.{c.lower()}' in extensions()), None)
            yield name, found['bytes'] if isinstance(found, dict) else found


def predict(
        source: Union[str, ray.data.Dataset],
        model: str,
        output: str,
        resolution: Optional[int] = None,
        budget_ms: Optional[float] = None,
        cascade: Optional[str] = None,
        k: int = 5,
        workers: Optional[int] = None,
        columns: Tuple[str, str] = ('path', 'bytes'),
        address: Optional[str] = None,
        **options: Any,
) -> Dict[str, Any]:
    """Answer each image once and write Parquet: path, resolution, milliseconds, top classes, or the error.

    It goes on where it stopped: images whose names are in the output are not answered again. The work of a process that
    dies goes to another one.

    Args:
        source: A folder of images, or Parquet files with their bytes, or WebDataset shards (.tar): a file or folder on
            a disk, or the URI of one in a file system of pyarrow; or a Dataset of Ray.
        model: File of `timm-rs export --format onnx`; it has this path on every machine of the cluster.
        output: Folder to write to, or a URI.
        resolution, budget_ms, cascade: See Predictor.
        k: Classes of an answer.
        workers: Processes, each on a core; one less than the cluster has if None, and at least one.
        columns: Columns of Parquet or of a Dataset with names, each there once, and with bytes, or with structs that
            hold `bytes`, as in data sets of Hugging Face.
        address: Address of a Ray cluster, 'auto' for the one that runs here; if None one is started and ended.
        **options: Further arguments of Predictor.

    Returns:
        'images' that were answered in this run, 'failed' among them, 'before', those of earlier runs, and 'seconds'.

    Raises:
        UserError: There are no images, the output is that of other settings, or an argument is not usable.

    Example:
        >>> predict('photographs/', 'model.onnx', 'answers/', resolution=160)    # doctest: +SKIP
        {'images': 1000000, 'failed': 3, 'before': 0, 'seconds': 5210.3}
    """
    start = reported = time.perf_counter()
    if workers is not None:
        check_argument('workers', workers, integer(1, 10 ** 4))
    model, cascade, output = os.path.abspath(model), cascade and os.path.abspath(cascade), _absolute(output)
    options = dict(options, threads=1, resolution=resolution, budget_ms=budget_ms, cascade=cascade)
    Predictor(model, **options)  # says what is wrong with them
    filesystem, folder = _open(output)
    with open(model, 'rb') as file:
        settings = json.dumps(dict(options, k=k, model=hashlib.sha256(file.read()).hexdigest()), sort_keys=True)
    done = _continue(filesystem, folder, settings)
    os.environ.setdefault('RAY_BACKEND_LOG_LEVEL', 'fatal')
    is_own = not ray.is_initialized()
    if is_own:
        connect(address, num_cpus=1 + (workers or 1))
    try:
        logging.getLogger('ray.data').setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
        cores = int(ray.cluster_resources().get('CPU', 0))
        workers = workers or max(cores - 1, 1)
        if workers >= cores:
            raise UserError(f'{workers} workers need {workers + 1} cores, one to read; the cluster has {cores}.')
        dataset, columns = _dataset_of(source, done, columns)
        dataset = dataset.map_batches(
            Worker, batch_format='pyarrow', batch_size=ROWS, compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1, fn_constructor_kwargs=dict(
                options, model=model, output=output, done=done, columns=columns, k=k))
        found = dict(images=0, failed=0)
        for rows in dataset.iter_batches(batch_size=None, batch_format='pyarrow'):
            for key in found:
                found[key] += sum(rows[key].to_pylist())
            now = time.perf_counter()
            if now - reported > REPORT_SECONDS:
                reported, rate = now, found['images'] / (now - start)
                print(f"{found['images']:,} images, {found['failed']:,} failed, {rate:.1f} a second", file=sys.stderr)
    finally:
        if is_own:
            ray.shutdown()
    return dict(found, before=len(done), seconds=time.perf_counter() - start)


def _dataset_of(
        source: Union[str, ray.data.Dataset],
        done: Set[str],
        columns: Tuple[str, str],
) -> Tuple[ray.data.Dataset, Tuple[str, Optional[str]]]:
    """Return a Dataset, and its columns as Worker takes them."""
    if not isinstance(source, str):
        return _with_columns(source, columns, 'The Dataset'), columns
    names = _files(_absolute(source))
    endings = {posixpath.splitext(name)[1].lower() for name in names}
    if endings == {'.parquet'}:
        return _with_columns(ray.data.read_parquet(names), columns, source), columns
    if endings == {'.tar'}:
        return ray.data.read_webdataset(names, decoder=None), ('__key__', '')
    names = [name for name in names if posixpath.splitext(name)[1].lower() in extensions() and name not in done]
    if not names and not done:
        raise UserError(f'{source} holds no images, only Parquet files or only WebDataset shards.')
    tables = [pa.table(dict(path=names[i:i + ROWS])) for i in range(0, max(len(names), 1), ROWS)]
    return ray.data.from_arrow(tables), ('path', None)


def _with_columns(dataset: ray.data.Dataset, columns: Sequence[str], source: str) -> ray.data.Dataset:
    found = dataset.schema().names
    if not set(columns) <= set(found):
        raise UserError(
            f"{source} has the columns {', '.join(found)}, expected {' and '.join(columns)}; predict of "
            'timm_rs_runtime.ray takes others as columns=(names, images).')
    return dataset


def _files(source: str) -> List[str]:
    """Return the names of a file, or of those in a folder: on a disk as they are, otherwise URIs."""
    filesystem, path = _open(source)
    info = filesystem.get_file_info(path)
    if info.type == FileType.NotFound:
        raise UserError(f'{source} does not exist, expected images.')
    scheme = source[:source.index('://') + 3] if '://' in source else ''
    if info.type == FileType.File:
        return [source]
    try:
        found = filesystem.get_file_info(FileSelector(path, recursive=True))
        names = sorted(scheme + f.path for f in found if f.type == FileType.File)
        if not scheme and not {posixpath.splitext(name)[1].lower() for name in names} <= {'.parquet', '.tar'}:
            names = find_images(source)  # which follows links
        for name in names:
            name.encode()
    except UnicodeError as e:
        raise UserError(f'{source} holds a file whose name is not UTF-8, which Parquet needs: {one_line(e)}.') from None
    return names


def _read(name: str) -> Union[ImageSource, ImageError]:
    """Return the name of a file on a disk, or the bytes of another one."""
    if '://' not in name:
        return name
    filesystem, path = _open(name)
    try:
        with filesystem.open_input_stream(path) as file:
            return file.read(MAX_BYTES)
    except OSError as e:
        return ImageError(f'{name} cannot be read: {one_line(e)}.')


def _absolute(name: str) -> str:
    return name if '://' in name else os.path.abspath(name)


def _open(name: str) -> Tuple[FileSystem, str]:
    try:
        return FileSystem.from_uri(_absolute(name))
    except (OSError, ValueError) as e:
        raise UserError(f'{name} is not the name of a folder or a URI of one: {one_line(e, 300)}') from None


def _continue(filesystem: FileSystem, folder: str, settings: str) -> Set[str]:
    """Return the names that the output holds already, which began with the same settings, or begin it."""
    path = posixpath.join(folder, _SETTINGS)
    entries = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    if not entries:
        filesystem.create_dir(folder)
        with filesystem.open_output_stream(path) as file:
            file.write(settings.encode())
    elif filesystem.get_file_info(path).type != FileType.File:
        raise UserError(f'{folder} is not an output of `predict --ray`, and not empty; give another one.')
    with filesystem.open_input_stream(path) as file:
        if file.read().decode() != settings:
            raise UserError(f'{folder} was begun with another model or other options; give another output.')
    return {
        str(name) for entry in entries if entry.path.endswith('.parquet') and not entry.base_name.startswith('_')
        for name in pa.parquet.read_table(entry.path, columns=['path'], filesystem=filesystem)['path'].to_pylist()}
