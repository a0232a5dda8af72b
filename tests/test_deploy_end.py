"""How a session ends, is copied and forked, and what bounds it"""
import copy
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from test_deploy import RESOLUTIONS, expected, file, model, photograph  # noqa: F401

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs_runtime import (  # noqa: E402
    AdaptiveSession,
    CascadeSession,
    ClosedError,
    ImageError,
    Session,
    UserError,
    ort,
)

# How it ends, and where it goes

def test_close(file, photograph):
    with Session(file, threads=1) as opened:
        assert opened.predict(photograph).shape == (1, 10)
    for call in (opened.predict, lambda _: opened.warm_up(), lambda _: pickle.dumps(opened)):
        with pytest.raises(ClosedError, match='all.onnx.* was closed, open another one'):
            call(photograph)
    opened.close()
    assert opened.resolutions == RESOLUTIONS and file in repr(opened)
    for use in (lambda: AdaptiveSession(opened, 1e6), lambda: CascadeSession(opened, {48: 0.})):
        with pytest.raises(ClosedError, match='was closed'):
            use()


def test_sessions_of_other_kinds_are_not_wrapped(file):
    other = CascadeSession(file, {48: 0.}, threads=1)
    for use in (lambda: AdaptiveSession(other, 1e6), lambda: CascadeSession(other, {48: 0.})):
        with pytest.raises(UserError, match='Got CascadeSession, expected the name of a file'):
            use()


def test_what_runs_at_close_is_answered(file, monkeypatch):
    opened = Session(file, threads=1)
    run = ort.run

    def close_and_run(*args):
        opened.close()
        return run(*args)

    monkeypatch.setattr(ort, 'run', close_and_run)
    assert opened.predict(np.zeros((2, 3, 48, 48), np.float32)).shape == (2, 10)


@pytest.mark.parametrize('duplicate', (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))))
def test_copies_are_sessions_of_their_own(file, photograph, duplicate, monkeypatch):
    monkeypatch.chdir(os.path.dirname(file))
    opened = Session('all.onnx', threads=1, mode='low_memory')
    monkeypatch.chdir('/')
    other = duplicate(opened)
    logits = opened.predict(photograph)
    opened.close()
    assert other.mode == 'low_memory'
    np.testing.assert_array_equal(other.predict(photograph), logits)


def test_what_wraps_a_session_is_copied_too(file, photograph):
    for opened in (AdaptiveSession(file, 1e6, max_queue=3, threads=1, patience=2),
                   CascadeSession(file, {48: 0.5, 64: 0.}, threads=1)):
        other = pickle.loads(pickle.dumps(opened))
        np.testing.assert_allclose(other.predict(photograph).logits, opened.predict(photograph).logits, atol=1e-5)
        opened.close()
        with pytest.raises(ClosedError, match='was closed'):
            opened.predict(photograph)
        with pytest.raises(ClosedError):
            opened.session.predict(photograph)
    with CascadeSession(Session(file, threads=1), {64: 0.}) as given:
        pass
    assert given.session.predict(photograph).shape == (1, 10)  # it is closed by its owner


@pytest.mark.parametrize('threads', (1, 2))
def test_forked_processes_answer_and_end(file, photograph, threads):
    """While a thread of the parent is inside a session, and another holds the place in its line."""
    program = f"""
import os, sys, threading, time
from timm_rs_runtime import AdaptiveSession, CascadeSession, Session
session = Session({file!r}, threads={threads})
services = [session, AdaptiveSession(session, 1e6), CascadeSession(session, {{48: 1., 64: 0.}})]
expected = session.predict({photograph!r}).argmax()
def work(service):
    while True:
        service.predict({photograph!r})
for service in services:
    threading.Thread(target=work, args=(service,), daemon=True).start()
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        for service in services:
            answer = service.predict({photograph!r})
            assert getattr(answer, 'logits', answer).argmax() == expected
        assert sum(services[1].stats()['requests'].values()) == 1
        sys.exit(7)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
print(codes, flush=True)
os._exit(0)
"""
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, text=True, timeout=240)
    assert process.stdout == f'{[7] * 8}\n'


def test_a_forked_process_in_another_folder(file, photograph, tmp_path):
    """It answers as its parent, and not at all from a file with other classes that has taken the place since."""
    shutil.copy(file, tmp_path / 'm.onnx')
    program = f"""
import os, shutil
from timm_rs_runtime import Session
from timm_rs_runtime.errors import UserError
session = Session('m.onnx')
expected = session.predict({photograph!r}).argmax()
def child(work):
    pid = os.fork()
    if not pid:
        os.chdir('/')
        try:
            answer = session.predict({photograph!r}).argmax() == expected
        except UserError as e:
            answer = str(e)
        print(answer, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
child('same file')
shutil.copy('m.onnx', 'n.onnx')  # other weights would have the same metadata
os.replace('n.onnx', 'm.onnx')
child('another file')
"""
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, text=True, timeout=240, cwd=tmp_path)
    assert process.stdout.splitlines() == [
        'True', 'm.onnx was replaced or deleted since the session was opened, open it again.']


def test_contacts_nobody():
    """ONNX Runtime from 1.29 on would report its use, from a thread of its own."""
    program = """
import numpy, os
before = len(os.listdir('/proc/self/task'))
import timm_rs_runtime
print(os.environ['ORT_DISABLE_TELEMETRY'], len(os.listdir('/proc/self/task')) - before)
"""
    result = subprocess.run([sys.executable, '-c', program], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout == '1 0\n'


# Bounds

def test_more_threads_than_cores_come_back(file, photograph):
    start = time.monotonic()
    assert Session(file, threads=64).predict(photograph).shape == (1, 10)
    assert time.monotonic() - start < 60


def test_opens_names_only():
    with pytest.raises(UserError, match='Got bytes, expected the name of a file of timm-rs export'):
        Session(b'onnx')


def test_a_cascade_answers_what_runs_when_it_is_closed(file, photograph, monkeypatch):
    opened = CascadeSession(file, {32: 1., 48: 0.}, threads=1)
    run = ort.run

    def close_and_run(*args):
        opened.close()
        return run(*args)

    monkeypatch.setattr(ort, 'run', close_and_run)
    assert opened.predict([photograph] * 20).logits.shape == (20, 10)
    for call in (opened, opened.session):
        with pytest.raises(ClosedError):
            call.predict(photograph)


def test_images_of_a_request_are_bounded(file):
    opened = Session(file, threads=1)
    with pytest.raises(UserError, match='number of images is 4097, expected an integer from 0 to 4096'):
        opened.predict('a.jpg' for _ in itertools.count())
    with pytest.raises(ImageError, match='Got NoneType, expected images'):
        opened.predict(None)


def test_pipes_are_refused_at_once(file, tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    opened = Session(file, threads=1)
    for call in (opened.predict, AdaptiveSession(opened, 1e6).predict, CascadeSession(opened, {48: 0.}).predict):
        with pytest.raises(ImageError, match='pipe.png is not a regular file, expected an image'):
            call(tmp_path / 'pipe.png')


def test_a_file_that_was_opened_as_text(file):
    with open(__file__, encoding='utf-8') as text, Session(file, threads=1) as opened:
        with pytest.raises(ImageError, match='was opened as text, expected a binary file'):
            opened.predict(text)


def test_a_file_that_is_read_in_another_way(file):
    class Upload:  # as FastAPI's
        async def read(self, size):
            return b''

    with Session(file, threads=1) as opened, pytest.raises(ImageError, match='gives coroutine, expected bytes'):
        opened.predict(Upload())
