"""The session that keeps a budget, on a clock that only moves when the network runs"""
import io
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import rs_model
from PIL import Image
from simulated import LATENCY, PHOTOGRAPH, SimulatedSession, adaptive, encoded, queue_up, slow_reading  # noqa: F401

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import (  # noqa: E402
    AdaptiveSession,
    ClosedError,
    ImageError,
    InferenceError,
    NotFiniteError,
    QueueFullError,
    Session,
    UserError,
)
from timm_rs_runtime.adaptive import READ_AHEAD, measure_latency  # noqa: E402


def test_latency_is_measured_at_the_start():
    session, simulated = adaptive(20)
    assert session.latency == pytest.approx(LATENCY)
    assert session.feasible and session.stats()['requests'] == {224: 0, 160: 0, 96: 0}
    latency, overhead = measure_latency(simulated, rounds=2, clock=simulated.clock)
    assert latency == pytest.approx(LATENCY) and overhead == 0


def test_takes_the_largest_size_of_the_budget():
    for budget, resolution in ((17, 224), (15, 160), (5, 96)):
        session, _ = adaptive(budget)
        answer = session.predict(PHOTOGRAPH)
        assert answer.resolution == resolution and answer.in_time and answer.logits.shape == (1, 2)
        assert answer.milliseconds == pytest.approx(1e3 * LATENCY[resolution])
    session, _ = adaptive(1000)
    assert session.predict(PHOTOGRAPH, budget_ms=10).resolution == 160
    assert session.predict([PHOTOGRAPH] * 3).logits.shape == (3, 2)


def test_a_budget_below_the_fastest_size():
    with pytest.warns(RuntimeWarning, match='A budget of 2 ms is below the 4.0 ms that 96 px takes here'):
        session, _ = adaptive(2)
    assert not session.feasible
    answer = session.predict(PHOTOGRAPH)
    assert answer.resolution == 96 and not answer.in_time and session.stats()['misses'] == 1


# 2560 x 2560 pixels have twice the pixels of 224 px at 1/4, a side of 640, of 160 and 96 px at 1/8, a side of 320:
# 40.96 and 10.24 ms.

@pytest.mark.usefixtures('slow_reading')
@pytest.mark.parametrize('budget_ms, resolution, milliseconds', [
    (58, 224, 56.96),
    (55, 160, 18.24),
    (18, 96, 14.24),
])
def test_the_size_is_chosen_for_decoding_and_network(budget_ms, resolution, milliseconds):
    session, _ = adaptive(budget_ms)
    answer = session.predict(encoded(2560, 2560))
    assert (answer.resolution, answer.in_time) == (resolution, True)
    assert answer.milliseconds == pytest.approx(milliseconds)
    stats = session.stats()
    assert stats['reading_ms'] == pytest.approx(milliseconds - 1e3 * LATENCY[resolution])
    assert stats['network_ms'] == pytest.approx(1e3 * LATENCY[resolution])
    assert stats['expected_reading_ms'] == pytest.approx({224: 40.96, 160: 10.24, 96: 10.24})
    assert stats['resolution'] == resolution


@pytest.mark.usefixtures('slow_reading')
def test_a_large_photograph_does_not_hold_the_others_down():
    session, _ = adaptive(25)
    assert [session.predict(image).resolution for image in (PHOTOGRAPH, encoded(2560, 2560), PHOTOGRAPH)] == [
        224, 160, 224]


@pytest.mark.usefixtures('slow_reading')
def test_images_with_nothing_to_decode_and_those_that_cannot_be_decoded():
    session, _ = adaptive(25)
    given = Image.new('RGB', (2560, 2560))
    assert session.predict(given).milliseconds == pytest.approx(16)
    assert session.stats()['reading_ms'] == 0
    for content in (b'nothing', encoded(2560, 2560)[:1000]):
        with pytest.raises(ImageError):
            session.predict(content)
    assert session.stats()['failed'] == 2 and session.predict(given).in_time


def test_slow_decoding_is_learned(slow_reading):
    """Three times as slow as at the start; PNGs of 200 x 200, which take 4 ms then 12."""
    session, simulated = adaptive(25)
    assert session.predict(encoded(200, 200, 'png')).resolution == 224
    simulated.per_pixel = 3e-7
    answers = [session.predict(encoded(200, 200, 'png')) for _ in range(40)]
    assert answers[-1].resolution == 160 and all(answer.in_time for answer in answers)
    assert session.stats()['expected_reading_ms'][224] == pytest.approx(12, rel=0.1)
    assert session.predict(encoded(200, 200)).resolution == 160  # it still waits for several


def test_a_slow_spell_is_noticed_and_gone():
    session, simulated = adaptive(20, patience=2)
    assert session.predict(PHOTOGRAPH).resolution == 224
    simulated.slowdown = 2
    answers = [session.predict(PHOTOGRAPH) for _ in range(40)]
    assert [a.in_time for a in answers].count(False) <= 1 and answers[-1].resolution == 160
    simulated.slowdown = 1
    assert [session.predict(PHOTOGRAPH) for _ in range(60)][-1].resolution == 224


def test_a_queue_makes_it_go_down():
    """Six come while one is served at 224: 84 ms for all six are 14 ms each, 160 px."""
    session, simulated = adaptive(100, patience=100)
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 6)
        go_on.set()
        answers = [f.result(10) for f in futures]
    assert [a.resolution for a in answers] == [224] + [160] * 6
    assert [round(a.milliseconds) for a in answers] == [16, 24, 32, 40, 48, 56, 64]
    stats = session.stats()
    assert stats['requests'] == {224: 1, 160: 6, 96: 0} and stats['misses'] == stats['queue'] == 0


def test_a_burst_misses_nothing_that_the_floor_could_serve():
    session, simulated = adaptive(100)
    with ThreadPoolExecutor(24) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 20)  # 84 ms left: 4.2 ms each
        go_on.set()
        assert all(f.result(10).in_time for f in futures)


def test_a_full_queue_refuses_some_and_serves_the_others():
    session, simulated = adaptive(100, max_queue=2)
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 4)
        go_on.set()
        errors = [f.exception(10) for f in futures]
    assert [type(e) for e in errors] == [type(None)] * 3 + [QueueFullError] * 2
    assert str(errors[3]).startswith('2 requests are waiting')
    stats = session.stats()
    assert (stats['rejected'], stats['failed'], stats['queue']) == (2, 0, 0)
    assert sum(stats['requests'].values()) == 3
    assert session.predict(PHOTOGRAPH).logits.shape == (1, 2)


def test_a_refused_file_may_come_again():
    session, simulated = adaptive(100, max_queue=0)
    file = io.BytesIO()
    PHOTOGRAPH.save(file, 'png')
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [])
        with pytest.raises(QueueFullError):
            session.predict(file)
        go_on.set()
        assert all(f.result(10).in_time for f in futures)
    assert session.predict(file).logits.shape == session.predict(file).logits.shape == (1, 2)


def test_only_files_of_whole_batches():
    """One image takes as long as four; so do two, and five take twice as long."""
    class Batches(SimulatedSession):
        batch_size = 4

        def predict(self, batch):
            runs = -(-len(batch) // self.batch_size)
            super().predict(np.zeros((runs * self.batch_size, *batch.shape[1:]), np.float32))
            return np.zeros((len(batch), 2), np.float32)

    simulated = Batches()
    session = AdaptiveSession(simulated, 40, clock=simulated.clock)
    assert session.latency == pytest.approx({r: 4 * t for r, t in LATENCY.items()})
    for count, resolution in ((1, 160), (4, 160), (5, 96), (1, 96)):
        answer = session.predict([PHOTOGRAPH] * count)
        assert (answer.resolution, answer.in_time) == (resolution, True)
    assert session.stats()['slowdown'] == pytest.approx(1)
    with pytest.warns(RuntimeWarning, match='A budget of 15 ms is below the 16.0 ms that 96 px takes'):
        AdaptiveSession(simulated, 15, clock=simulated.clock)


def test_a_bad_image_leaves_the_line_before_its_turn(tmp_path):
    session, simulated = adaptive(100)
    (tmp_path / 'bad.jpg').write_text('nothing')
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH, PHOTOGRAPH])
        with pytest.raises(ImageError, match='bad.jpg is not an image'):
            session.predict(tmp_path / 'bad.jpg')
        assert session.stats()['queue'] == 2
        go_on.set()
        assert all(f.result(10).in_time for f in futures)
    assert session.stats()['failed'] == 1


def test_a_slow_client_holds_up_nobody():
    session, simulated = adaptive(100)
    reading, sent = threading.Event(), threading.Event()
    data = io.BytesIO()
    PHOTOGRAPH.save(data, 'png')

    class Upload:
        def read(self, size):
            reading.set()
            assert sent.wait(10)
            return data.getvalue()

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(session.predict, Upload())
        assert reading.wait(10)
        assert session.predict(PHOTOGRAPH).in_time
        assert not slow.done()
        sent.set()
        assert slow.result(10).in_time


def test_a_client_that_breaks_off():
    class Upload:
        name = 'photo.jpg'

        def read(self, size):
            raise ConnectionResetError('gone')

    session, _ = adaptive(100)
    with pytest.raises(ImageError, match='photo.jpg cannot be read: gone'):
        session.predict(Upload())
    assert session.stats()['failed'] == 1 and session.predict(PHOTOGRAPH).in_time


def test_few_images_are_read_ahead(monkeypatch):
    read = []
    session, simulated = adaptive(100)
    monkeypatch.setattr(simulated, 'read', lambda image, resolution: read.append(image) or image)
    with ThreadPoolExecutor(24) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 10)
        while len(read) < 1 + READ_AHEAD:
            pass
        assert read == [PHOTOGRAPH] * (1 + READ_AHEAD)
        go_on.set()
        assert [f.result(10).logits.shape for f in futures] == [(1, 2)] * 11
    assert len(read) == 11


def test_a_failure_of_the_runtime_leaves_the_line():
    session, simulated = adaptive(100)

    def fail():
        simulated.before = lambda: None
        raise RuntimeError('Cannot run a batch')

    simulated.before = fail
    with pytest.raises(RuntimeError, match='Cannot run'):
        session.predict(PHOTOGRAPH)
    assert session.predict(PHOTOGRAPH).in_time and session.stats()['failed'] == 1


@pytest.mark.parametrize('budget, kwargs, message', [
    (0, {}, 'budget_ms is 0, expected a finite number above 0'),
    (float('nan'), {}, 'budget_ms is nan'),
    (float('inf'), {}, 'budget_ms is inf'),
    ('10', {}, "budget_ms is '10'"),
    (10, dict(max_queue=-1), 'max_queue is -1, expected an integer from 0 to 1000000'),
    (10, dict(max_queue=1.5), 'max_queue is 1.5'),
    (10, dict(read_timeout=0), 'read_timeout is 0'),
    (10, dict(floor=64), 'Unknown floor 64'),
    (10, dict(floor=[64]), r'Unknown floor \[64\]'),
    (10, dict(refuse_late='yes'), "refuse_late is 'yes', expected true or false"),
    (10, dict(threads=1), 'are for a file, a session that is given has its own'),
    (10, dict(decode='exact'), 'are for a file, a session that is given has its own'),
])
def test_unusable_arguments(budget, kwargs, message):
    with pytest.raises(ValueError, match=message):
        adaptive(budget, **kwargs)


def test_every_request_counts_once(tmp_path):
    """Whatever is wrong with it: served, failed and refused are all that came."""
    session, simulated = adaptive(20)
    (tmp_path / 'text.png').write_text('nothing')
    os.mkfifo(tmp_path / 'pipe.png')
    for images, budget_ms, message in (
        ([], None, 'Got no images'),
        (np.zeros((1, 3, 96, 96), np.float32), None, 'Got ndarray, expected images .Session.predict takes arrays too'),
        (None, None, 'Got NoneType, expected images'),
        (3, None, 'Got int, expected images'),
        ([None], None, 'Got NoneType, expected the name of an image'),
        ([PHOTOGRAPH, 'nowhere.jpg'], None, 'nowhere.jpg does not exist'),
        ('a\0b.jpg', None, 'cannot be read'),
        (tmp_path, None, 'is not a regular file'),
        (tmp_path / 'text.png', None, 'is not an image'),
        (tmp_path / 'pipe.png', None, 'is not a regular file'),
        (b'', None, 'is not an image'),
        ([PHOTOGRAPH] * 4097, None, 'number of images is 4097'),
        (PHOTOGRAPH, -1, 'budget_ms is -1'),
        (PHOTOGRAPH, float('nan'), 'budget_ms is nan'),
    ):
        before = session.stats()['failed']
        with pytest.raises(UserError, match=message):
            session.predict(images, budget_ms)
        assert session.stats()['failed'] == before + 1
    for error in (NotFiniteError('m.onnx', 96, np.full((1, 2), np.nan), ['x']), InferenceError('x'),
                  ZeroDivisionError(), KeyboardInterrupt()):

        def fail(error=error):
            raise error

        simulated.before = fail
        with pytest.raises(type(error)):
            session.predict(PHOTOGRAPH)
    simulated.before = lambda: None
    assert [session.predict(PHOTOGRAPH).in_time for _ in range(3)] == [True] * 3
    stats = session.stats()
    assert (stats['failed'], stats['rejected'], sum(stats['requests'].values())) == (18, 0, 3)
    assert stats['queue'] == 0


def test_not_finite_logits_name_the_image():
    session, simulated = adaptive(100)

    def fail():
        raise NotFiniteError('m.onnx', 224, np.array([[1., 0.], [np.nan, 0.]]), ['image 0', 'image 1'])

    simulated.before = fail
    named = [PHOTOGRAPH.copy(), PHOTOGRAPH.copy()]
    named[1].filename = 'bad.jpg'
    with pytest.raises(NotFiniteError, match='m.onnx at 224 px answers .*: bad.jpg.$'):
        session.predict(named)


def test_starts_though_a_size_is_broken():
    """A request for it fails; other sizes answer."""
    class Broken(SimulatedSession):
        def predict(self, batch):
            logits = super().predict(batch)
            if batch.shape[-1] == 96:
                raise NotFiniteError('m.onnx', 96, logits * np.nan, ['a'] * len(batch))
            return logits

    simulated = Broken()
    session = AdaptiveSession(simulated, 20, clock=simulated.clock)
    assert session.latency == pytest.approx(LATENCY)
    assert session.predict(PHOTOGRAPH).resolution == 224
    with pytest.raises(NotFiniteError, match='96 px'):
        session.predict(PHOTOGRAPH, budget_ms=5)


# What stalls, and the end

@pytest.mark.parametrize('kind', ('name', 'binary file', 'image'))
def test_what_stalls_fails_and_holds_up_nobody(kind, tmp_path, monkeypatch):
    session, simulated = adaptive(100, read_timeout=0.3)
    PHOTOGRAPH.save(tmp_path / 'a.png')
    reading, go_on = threading.Event(), threading.Event()

    class Stalled(io.FileIO):
        def read(self, *size):
            reading.set()
            go_on.wait(10)
            return super().read(*size)

    stalled = tmp_path / 'a.png'
    if kind == 'name':
        monkeypatch.setattr('builtins.open', lambda path, *args, **kwargs: Stalled(path))
    elif kind == 'binary file':
        stalled = Stalled(tmp_path / 'a.png')
    else:
        stalled = Image.open(tmp_path / 'a.png')
        stalled.fp = Stalled(tmp_path / 'a.png')
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(session.predict, stalled)
        assert reading.wait(10)
        monkeypatch.undo()
        assert session.predict(PHOTOGRAPH).in_time and not slow.done()
        assert 'was not read within 0.3 s' in str(slow.exception(10))
        go_on.set()
    stats = session.stats()
    assert (stats['failed'], sum(stats['requests'].values())) == (1, 1)


def test_what_waits_at_close_fails_and_what_is_served_is_answered():
    session, simulated = adaptive(100)
    with ThreadPoolExecutor(24) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 10)
        session.close()
        errors = [f.exception(10) for f in futures[1:]]
        assert {type(e) for e in errors} == {ClosedError} and not futures[0].done()
        with pytest.raises(ClosedError, match='AdaptiveSession.* was closed, open another one'):
            session.predict(PHOTOGRAPH)
        go_on.set()
        assert futures[0].result(10).in_time
    stats = session.stats()
    assert (stats['failed'], sum(stats['requests'].values()), stats['queue']) == (11, 1, 0)


def test_a_signal_handler_may_close_what_it_interrupts():
    session, _ = adaptive(100)

    class Interrupted(deque):
        def append(self, request):  # under the lock
            session.close()
            super().append(request)

    session._line = Interrupted()
    with pytest.raises(ClosedError):
        session.predict(PHOTOGRAPH)
    assert session.stats()['queue'] == 0


def test_the_last_request_closes_the_file(tmp_path, monkeypatch):
    path = str(tmp_path / 'all.onnx')
    export_switchable(rs_model(), path)
    with AdaptiveSession(path, budget_ms=1e6, threads=1) as session:
        predict = Session.predict

        def close_and_predict(self, batch):
            session.close()
            return predict(self, batch)

        monkeypatch.setattr(Session, 'predict', close_and_predict)
        assert session.predict(PHOTOGRAPH).resolution == 64
    with pytest.raises(ClosedError):
        predict(session.session, np.zeros((1, 3, 64, 64), np.float32))


def test_an_exported_file_served_to_many_threads(tmp_path):
    """With enough time every answer is that of the largest size, whatever other threads ask."""
    path = str(tmp_path / 'all.onnx')
    export_switchable(rs_model('resnet10t', channels=[8, 8, 16, 16], stem_width=8), path)
    session = AdaptiveSession(path, budget_ms=1e6, threads=1)
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (70, 80, 3), np.uint8)) for _ in range(8)]
    expected = Session(path, threads=1)
    with ThreadPoolExecutor(8) as pool:
        for picture, answer in zip(pictures, pool.map(session.predict, pictures)):
            np.testing.assert_array_equal(answer.logits, expected.predict(picture))
    assert session.stats()['requests'][64] == 8 and path in repr(session)
