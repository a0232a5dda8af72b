"""Files that are there complete or not at all"""
import os
import re
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import IO, Any, ContextManager, Iterator, Optional, Union

from .errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = [
    'STDIO', 'atomic_folder', 'atomic_path', 'atomic_write', 'check_new_file', 'check_new_folder', 'make_folder',
    'report_beside']

STDIO = '-'
_PREFIX = '.part-'
_Path = Union[str, os.PathLike]


def check_new_file(path: _Path, overwrite: bool = False) -> None:
    """Check that a file can be written.

    Raises:
        UserError: Its folder does not exist, or a file of this name exists and must not be overwritten. Pipes, devices
            and `-` (standard output) can be written to.
    """
    path = os.fspath(path)
    if _is_special(path):
        return
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if not os.path.isdir(folder):
        raise UserError(f'{folder} does not exist, expected a folder for {os.path.basename(path)}.')
    if os.path.isdir(real):
        raise UserError(f'{path} is a folder, expected the name of a file.')
    if os.path.islink(real):
        raise UserError(f'{path} is a link to itself, expected the name of a file.')
    if not os.access(folder, os.W_OK):
        raise UserError(f'{folder} is not writable, expected a folder for {os.path.basename(path)}.')
    if os.path.exists(real) and not overwrite:
        raise UserError(f'{path} exists and is not overwritten, give another output or --overwrite.')


def check_new_folder(path: _Path) -> None:
    """Raise UserError if the name belongs to something other than an empty folder."""
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{path} exists and is not overwritten, give another output.')
    if os.path.ismount(path):
        raise UserError(f'{path} is the root of a file system and cannot be replaced, give a folder in it.')


def make_folder(path: _Path) -> None:
    """Make a folder that does not exist yet, with those that it lies in.

    Raises:
        UserError: It, or one that it lies in, is a file.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(f'{path} is a file or lies in one, expected a folder.') from e


@contextmanager
def atomic_path(path: _Path, overwrite: bool = False) -> Iterator[str]:
    """Give a name to write a file to, which is renamed to its own name at the end, or deleted after an error.

    The file is written under the same name in a fresh folder beside it, synced and renamed. A link is followed. A
    pipe, a device and `-` get the bytes at the end and are never replaced. The next process that writes the same file
    deletes what a killed one left behind.

    Args:
        path: File to write.
        overwrite: Replace a file of this name.

    Raises:
        UserError: See check_new_file.
    """
    check_new_file(path, overwrite)
    path = os.fspath(path)
    if _is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = os.path.join(folder, os.path.basename(path))
            yield partial
            sys.stdout.flush()
            opened = nullcontext(sys.stdout.buffer) if path == STDIO else open(path, 'wb')
            with open(partial, 'rb') as source, opened as target:
                shutil.copyfileobj(source, target)
                target.flush()
        return
    path = os.path.realpath(path)
    with _partial(path) as partial:
        open(partial, 'wb').close()
        mode = os.stat(path if os.path.exists(path) else partial).st_mode
        os.remove(partial)
        yield partial
        os.chmod(partial, stat.S_IMODE(mode))  # safetensors 0.8 writes files that only their owner can read
        _sync(partial)
        if overwrite:
            os.replace(partial, path)
            return
        try:
            os.link(partial, path)  # unlike a rename it fails if another process was faster
        except OSError:  # another one was faster, or the file system has no links
            check_new_file(path)
            os.replace(partial, path)


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


def report_beside(path: _Path) -> ContextManager:
    """Return a context in which print writes to stderr if the file may be standard output."""
    return redirect_stdout(sys.stderr) if _is_special(os.fspath(path)) else nullcontext()


@contextmanager
def atomic_folder(path: _Path) -> Iterator[str]:
    """Give an empty folder to fill, which is renamed to its own name at the end, or deleted after an error.

    Raises:
        UserError: The name belongs to something other than an empty folder, or lies in a file.
    """
    check_new_folder(path)
    path = os.path.realpath(path)
    make_folder(os.path.dirname(path))
    with _partial(path) as partial:
        os.mkdir(partial)
        mode = stat.S_IMODE(os.stat(partial).st_mode) & 0o666
        yield partial
        for folder, _, names in os.walk(partial):
            for file in (os.path.join(folder, name) for name in names):
                os.chmod(file, mode)
                _sync(file)
        os.replace(partial, path)


def _is_special(path: str) -> bool:
    """Return whether it is standard output, a pipe, a device or a socket."""
    return path == STDIO or os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


@contextmanager
def _partial(path: str) -> Iterator[str]:
    """Give the same name in a fresh folder beside it, which is deleted at the end.

    The folder is locked until then; the leftovers of a killed process are not.
    """
    parent, name = os.path.split(path)
    leftover = re.compile(rf'{re.escape(_PREFIX)}\w{{8}}-{re.escape(name)}')
    for entry in os.scandir(parent):
        if leftover.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            lock = _lock(entry.path, exclusive=True)
            if lock is not None:  # nobody is writing there
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(lock)
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX, suffix=f'-{name}', dir=parent)
        lock = _lock(folder)
        if os.path.exists(folder):  # otherwise another process took it for leftovers before it was locked
            break
    try:
        yield os.path.join(folder, name)
        _sync(parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sync(path: str) -> None:
    """Wait until a file or folder has reached the disk."""
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(path):  # not every file system syncs folders
            raise
    finally:
        os.close(descriptor)


def _lock(path: str, exclusive: bool = False) -> Optional[int]:
    """Return a descriptor that holds a lock; None if others hold it and it is exclusive, or if there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
