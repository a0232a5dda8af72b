"""Files that are there complete or not at all, whatever lies at their name and whenever a process ends"""
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_new_file,
    check_new_folder,
    make_folder,
)

CONTEXT = multiprocessing.get_context('fork')


def write(path, text='new', **kwargs):
    with atomic_write(path, **kwargs) as f:
        f.write(text)


class Writer:
    """A process that makes a file or folder, half of which is there when this returns, and waits."""

    def __init__(self, make, path, text='x'):
        self.go, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=self._run, args=(theirs, make, path, text), daemon=True)
        self.process.start()
        theirs.close()
        assert self.go.recv() == 'half'

    @staticmethod
    def _run(pipe, make, path, text):
        error = ''
        try:
            with make(path) as partial:
                write(os.path.join(partial, 'file') if os.path.isdir(partial) else partial, text, overwrite=True)
                pipe.send('half')
                pipe.recv()
        except (OSError, UserError) as e:
            error = str(e)
        pipe.send(error)

    def kill(self):
        self.process.kill()
        self.process.join()

    def finish(self):
        """Let it go on, and return what it failed with."""
        self.go.send('on')
        return self.go.recv()


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_there_once_it_is_complete(tmp_path):
    path = tmp_path / 'a.txt'
    with atomic_write(path) as f:
        f.write('é')
        assert not path.exists()
    assert path.read_bytes() == 'é'.encode() and names(tmp_path) == ['a.txt']
    with atomic_write(tmp_path / 'b', 'wb') as f:
        f.write(b'\0')
    assert (tmp_path / 'b').read_bytes() == b'\0'


def test_the_unfinished_file_has_the_same_name_and_file_system(tmp_path):
    """Some formats record the name, and a rename is atomic within a file system only."""
    with pytest.raises(KeyError), atomic_path(tmp_path / 'a.txt') as partial:
        assert os.path.basename(partial) == 'a.txt'
        assert os.path.dirname(os.path.dirname(partial)) == str(tmp_path)
        raise KeyError


@pytest.mark.parametrize('before', [None, 'old'])
def test_an_error_leaves_what_was_there(tmp_path, before):
    path = tmp_path / 'a.txt'
    if before:
        path.write_text(before)
    with pytest.raises(KeyError), atomic_write(path, overwrite=True) as f:
        f.write('new')
        raise KeyError
    assert names(tmp_path) == (['a.txt'] if before else [])
    assert not before or path.read_text() == before


def test_an_existing_file_is_refused(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with pytest.raises(UserError, match='a.txt exists and is not overwritten'):
        write(path)
    assert path.read_text() == 'old' and names(tmp_path) == ['a.txt']
    write(path, overwrite=True)
    assert path.read_text() == 'new' and names(tmp_path) == ['a.txt']


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / 'a.txt'
    with pytest.raises(UserError, match='exists'), atomic_write(path) as f:
        f.write('mine')
        path.write_text('theirs')
    assert path.read_text() == 'theirs' and names(tmp_path) == ['a.txt']


def test_where_links_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(PermissionError))
    write(tmp_path / 'a.txt')
    assert (tmp_path / 'a.txt').read_text() == 'new' and names(tmp_path) == ['a.txt']


@pytest.mark.parametrize('make, message', [
    (lambda path: path / 'b' / 'a.txt', 'b does not exist, expected a folder for a.txt'),
    (lambda path: path, 'is a folder, expected the name of a file'),
    (lambda path: path / 'loop', 'loop is a link to itself'),
])
def test_a_name_that_cannot_be_written(tmp_path, make, message):
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    for attempt in (check_new_file, write):
        with pytest.raises(UserError, match=message):
            attempt(make(tmp_path))
    assert names(tmp_path) == ['loop']


@pytest.mark.parametrize('there', [True, False])
def test_a_link_is_followed(tmp_path, there):
    folder, link = tmp_path / 'real', tmp_path / 'link'
    folder.mkdir()
    link.symlink_to(folder / 'a.txt')
    if there:
        (folder / 'a.txt').write_text('old')
        with pytest.raises(UserError, match='link exists'):
            write(link)
    write(link, overwrite=there)
    assert link.is_symlink() and (folder / 'a.txt').read_text() == 'new'
    assert names(folder) == ['a.txt'] and names(tmp_path) == ['link', 'real']


def test_links_at_guessable_names_are_not_followed(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('old')
    links = ['a.txt.part', '.part-a.txt', 'a.txt.tmp', '.part-00000000-a.txt']
    for name in links:
        (tmp_path / name).symlink_to(victim)
    write(tmp_path / 'a.txt')
    assert victim.read_text() == 'old' and names(tmp_path) == sorted([*links, 'a.txt', 'victim'])


def test_a_pipe_is_written_to(tmp_path):
    path, read = tmp_path / 'pipe', []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    write(path)
    reader.join(10)
    assert read == ['new'] and stat.S_ISFIFO(path.stat().st_mode) and names(tmp_path) == ['pipe']


def test_a_terminal_is_written_to():
    """Which is a device, as /dev/full is."""
    ours, theirs = os.openpty()
    path = os.ttyname(theirs)
    write(path)
    assert os.read(ours, 100) == b'new' and stat.S_ISCHR(os.stat(path).st_mode)
    os.close(ours)
    os.close(theirs)


def test_a_full_device_is_an_error_and_stays(tmp_path):
    device = tmp_path / 'full'
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.stat('/dev/full').st_rdev)
        device.open('wb').close()
    except OSError:
        pytest.skip('devices cannot be made here')
    with pytest.raises(OSError, match='No space left'):
        write(device)
    assert stat.S_ISCHR(device.stat().st_mode) and names(tmp_path) == ['full']


def test_standard_output(capfdbinary):
    write('-')
    assert capfdbinary.readouterr().out == b'new' and not os.path.exists('-')


def test_a_process_substitution_of_the_shell(tmp_path):
    command = f'{sys.executable} -c "from timm_rs_runtime.files import *; import sys\nwith atomic_write(sys.argv[1]) ' \
              'as f: f.write(\'new\')" >(cat > out); wait $!'
    subprocess.run(['bash', '-c', command], cwd=tmp_path, check=True)
    assert (tmp_path / 'out').read_text() == 'new'


@pytest.mark.parametrize('umask, expected', [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_is_that_of_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        write(tmp_path / 'a.txt')
        with atomic_folder(tmp_path / 'b'):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'a.txt').stat().st_mode) == expected
    assert stat.S_IMODE((tmp_path / 'b').stat().st_mode) == 0o777 & ~umask


def test_an_overwritten_file_keeps_its_mode(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    path.chmod(0o640)
    write(path, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize('before', [None, 'old'])
def test_a_full_disk_leaves_what_was_there(tmp_path, before):
    path = tmp_path / 'a.bin'
    if before:
        path.write_text(before)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            write(path, 'x' * 10000, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == (['a.bin'] if before else [])
    assert not before or path.read_text() == before


@pytest.mark.parametrize('make', [atomic_path, atomic_folder])
def test_the_next_run_deletes_what_a_killed_one_left(tmp_path, make):
    path = tmp_path / 'a'
    writer = Writer(make, path)
    (left,) = names(tmp_path)
    writer.kill()
    write(tmp_path / 'b')  # another file leaves it alone
    assert names(tmp_path) == [left, 'b']
    with pytest.raises(KeyError), make(path):
        raise KeyError
    assert names(tmp_path) == ['b']


@pytest.mark.parametrize('make', [atomic_path, atomic_folder])
def test_what_a_living_process_writes_is_left_alone(tmp_path, make):
    path = tmp_path / 'a'
    writer = Writer(make, path)
    (left,) = names(tmp_path)
    with pytest.raises(KeyError), make(path):
        raise KeyError
    assert names(tmp_path) == [left]
    assert writer.finish() == '' and names(tmp_path) == ['a']


@pytest.mark.parametrize('make', [atomic_path, atomic_folder])
def test_of_two_writers_at_once_one_wins(tmp_path, make):
    path = tmp_path / 'a'
    writers = [Writer(make, path, text=text) for text in ('first', 'second')]
    errors = [writer.finish() for writer in writers]
    assert errors[0] == '' and ('exists and is not overwritten' in errors[1] or 'not empty' in errors[1])
    assert names(tmp_path) == ['a']
    assert (path / 'file' if path.is_dir() else path).read_text() == 'first'


def test_writers_that_overwrite_leave_one_whole_file(tmp_path):
    path = tmp_path / 'a'

    def write_often(text):
        for _ in range(50):
            write(path, text * 10000, overwrite=True)

    processes = [CONTEXT.Process(target=write_often, args=(text,)) for text in 'xyz']
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    text = path.read_text()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert names(tmp_path) == ['a'] and len(text) == 10000 and len(set(text)) == 1


def test_a_folder_is_there_once_it_is_complete(tmp_path):
    path = tmp_path / 'a' / 'b'
    with atomic_folder(path) as partial:
        os.mkdir(os.path.join(partial, 'c'))
        write(os.path.join(partial, 'c', 'd'))
        assert not path.exists()
    assert (path / 'c' / 'd').read_text() == 'new' and names(path.parent) == ['b']
    with pytest.raises(UserError, match='b exists and is not overwritten'), atomic_folder(path):
        pass
    assert (path / 'c' / 'd').exists()


def test_an_empty_folder_is_filled(tmp_path):
    path, link = tmp_path / 'a', tmp_path / 'link'
    path.mkdir()
    link.symlink_to(path)
    with atomic_folder(link) as partial:
        write(os.path.join(partial, 'b'))
    assert link.is_symlink() and names(path) == ['b']


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / 'a') as partial:
        write(os.path.join(partial, 'b'))
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize('name', ['a', 'a/b', 'a/b/c'])
def test_a_file_where_a_folder_is_expected(tmp_path, name):
    (tmp_path / 'a').write_text('old')
    with pytest.raises(UserError, match=f'{name} is a file or lies in one, expected a folder'):
        make_folder(tmp_path / name)
    assert (tmp_path / 'a').read_text() == 'old'


def test_the_root_of_a_file_system_is_not_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, 'ismount', lambda path: True)
    with pytest.raises(UserError, match='root of a file system'):
        check_new_folder(tmp_path)


def test_files_are_as_readable_as_any_other(tmp_path):
    """Whatever the library that wrote them decides."""
    def write_for_the_owner(path):
        write(path)
        os.chmod(path, 0o600)

    write(tmp_path / 'any')
    mode = (tmp_path / 'any').stat().st_mode
    with atomic_folder(tmp_path / 'a') as partial:
        write_for_the_owner(os.path.join(partial, 'b'))
    with atomic_path(tmp_path / 'c') as partial:
        write_for_the_owner(partial)
    assert (tmp_path / 'a' / 'b').stat().st_mode == (tmp_path / 'c').stat().st_mode == mode
    os.chmod(tmp_path / 'c', 0o640)
    with atomic_path(tmp_path / 'c', overwrite=True) as partial:
        write_for_the_owner(partial)
    assert (tmp_path / 'c').stat().st_mode & 0o777 == 0o640
