"""A session on a clock that only moves when the network runs, and requests that stand in line for it"""
import io
import threading

import numpy as np
import pytest
from PIL import Image

from timm_rs_runtime import AdaptiveSession, Preprocessing

LATENCY = {224: 0.016, 160: 0.008, 96: 0.004}
PHOTOGRAPH = Image.new('RGB', (8, 8))


class SimulatedSession:
    """Takes the time of LATENCY on its own clock; decoding takes `per_pixel` for each decoded pixel."""
    resolutions = (224, 160, 96)
    mean = (0.5, 0.5, 0.5)
    batch_size = None
    num_classes = 2

    def __init__(self):
        self.now = 0.
        self.slowdown = 1.
        self.before = lambda: None
        self.per_pixel = 0.
        self.preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, crop_pct=1.0, decode='scaled')

    def clock(self):
        return self.now

    def read(self, image, resolution):
        opened = self.preprocessing.open(image, resolution)
        self.now += self.per_pixel * opened.width * opened.height * (opened is not image)
        return opened

    def preprocess(self, image, resolution):
        return self.preprocessing(image, resolution)

    def predict(self, batch):
        self.before()
        self.now += LATENCY[batch.shape[-1]] * len(batch) * self.slowdown
        return np.zeros((len(batch), 2), np.float32)


def adaptive(budget_ms, **kwargs):
    session = SimulatedSession()
    return AdaptiveSession(session, budget_ms, clock=session.clock, **kwargs), session


@pytest.fixture
def slow_reading(monkeypatch):
    """Sessions expect 0.1 us for a decoded pixel, and that is what it takes."""
    monkeypatch.setattr('timm_rs_runtime.adaptive.measure_reading', lambda clock: (0., 1e-7))
    monkeypatch.setattr(SimulatedSession, 'read', lambda self, image, resolution, read=SimulatedSession.read: (
        setattr(self, 'per_pixel', self.per_pixel or 1e-7), read(self, image, resolution))[1])


def encoded(width, height, form='jpeg'):
    file = io.BytesIO()
    Image.new('RGB', (width, height)).save(file, form)
    return file.getvalue()


def queue_up(session, simulated, pool, requests):
    """Let requests stand in line behind one that is served, in this order; return the answers' futures."""
    inside, go_on = threading.Event(), threading.Event()

    def wait_once():
        simulated.before = lambda: None
        inside.set()
        go_on.wait(10)

    simulated.before = wait_once
    futures = [pool.submit(session.predict, PHOTOGRAPH)]
    assert inside.wait(10)
    for n, image in enumerate(requests, 1):
        futures.append(pool.submit(session.predict, image))
        while session.stats()['queue'] < n and not futures[-1].done():
            pass
    return futures, go_on
