"""Files that are there complete or not at all"""
import os
import secrets
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator, Union

from .errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ['STDIO', 'atomic_folder', 'atomic_path', 'atomic_write', 'check_new_file', 'check_new_folder']

STDIO = '-'
_PREFIX = '.part-'
_Path = Union[str, os.PathLike]


def check_new_file(path: _Path, overwrite: bool = False) -> None:
    """Check that a file can be written.

    Raises:
        UserError: There is no folder for it, or there is a file of this name and it is not to be overwritten. Pipes,
            devices and `-` (standard output) can be written to.
    """
    path = os.fspath(path)
    if path == STDIO:
        return
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if not os.path.isdir(folder):
        raise UserError(f'{folder} does not exist, expected a folder for {os.path.basename(path)}.')
    if os.path.isdir(real):
        raise UserError(f'{path} is a folder, expected the name of a file.')
    if os.path.exists(real) and not _is_special(real) and not overwrite:
        raise UserError(f'{path} exists and is not overwritten, give another output.')


def check_new_folder(path: _Path) -> None:
    """Raise UserError if there is something of this name other than an empty folder."""
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{path} exists and is not overwritten, give another output.')


@contextmanager
def atomic_path(path: _Path, overwrite: bool = False) -> Iterator[str]:
    """Give a name to write a file to, which gets its own name when all went well, and is deleted otherwise.

    The file is written in the same folder under a fresh name with the same ending, synced and renamed. A link is
    followed. A pipe, a device and `-` get the bytes at the end and are never replaced. What a killed process left
    behind is deleted by the next that writes the same file.

    Args:
        path: File to write.
        overwrite: Replace a file of this name.

    Raises:
        UserError: See check_new_file.
    """
    check_new_file(path, overwrite)
    path = os.fspath(path)
    if path == STDIO or _is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = os.path.join(folder, os.path.basename(path))
            yield partial
            with open(partial, 'rb') as source:
                if path == STDIO:
                    sys.stdout.flush()
                    shutil.copyfileobj(source, sys.stdout.buffer)
                    sys.stdout.buffer.flush()
                else:
                    with open(path, 'wb') as target:
                        shutil.copyfileobj(source, target)
        return
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    _delete_leftovers(folder, name)
    partial = os.path.join(folder, f'{_PREFIX}{secrets.token_hex(8)}-{name}')
    with _locked(partial):
        try:
            yield partial
            if os.path.exists(path):
                os.chmod(partial, stat.S_IMODE(os.stat(path).st_mode))
            _sync(partial)
            check_new_file(path, overwrite)  # another process may have been faster
            os.replace(partial, path)
            _sync(folder)
        finally:
            Path(partial).unlink(missing_ok=True)


@contextmanager
def atomic_write(path: _Path, mode: str = 'w', overwrite: bool = False, **kwargs: Any) -> Iterator[IO]:
    """Open a file for writing that is there complete or not at all, see atomic_path.

    Args:
        path: File to write, or `-`.
        mode: 'w' (UTF-8) or 'wb'.
        overwrite: Replace a file of this name.
        kwargs: Further arguments of open.
    """
    if 'b' not in mode:
        kwargs.setdefault('encoding', 'utf-8')
    with atomic_path(path, overwrite) as partial, open(partial, mode, **kwargs) as file:
        yield file


@contextmanager
def atomic_folder(path: _Path) -> Iterator[str]:
    """Give an empty folder to fill, which gets its name when all went well, and is deleted otherwise.

    Raises:
        UserError: There is something of this name other than an empty folder.
    """
    check_new_folder(path)
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    _delete_leftovers(parent, name)
    partial = os.path.join(parent, f'{_PREFIX}{secrets.token_hex(8)}-{name}')
    os.mkdir(partial)
    with _locked(partial):
        try:
            yield partial
            os.replace(partial, path)
            _sync(parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_special(path: str) -> bool:
    """Return whether it is a pipe, a device or a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _sync(path: str) -> None:
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock on a file or folder, made if need be, which says that a living process writes it."""
    if fcntl is None:
        yield
        return
    if not os.path.isdir(path):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _delete_leftovers(folder: str, name: str) -> None:
    """Delete what killed processes have left of a file or folder."""
    if fcntl is None:
        return
    for entry in os.scandir(folder):
        hexadecimal, _, rest = entry.name[len(_PREFIX):].partition('-')
        if not entry.name.startswith(_PREFIX) or rest != name or len(hexadecimal) != 16 or entry.is_symlink():
            continue
        try:
            descriptor = os.open(entry.path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir() else Path(entry.path).unlink()
        except OSError:  # it is being written, or gone
            pass
        finally:
            os.close(descriptor)
