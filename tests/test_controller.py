"""What chooses the size of a request: latency, reading, slowdowns and the line behind it"""
import numpy as np
import pytest

from timm_rs_runtime import Controller
from timm_rs_runtime.adaptive import measure_reading
from timm_rs_runtime.controller import Estimate, ReadingTime

LATENCY = {224: 0.016, 160: 0.008, 96: 0.004}


def test_the_estimate_is_that_of_tcp():
    estimate = Estimate(1.)
    assert estimate.upper(4) == 1
    for value, mean, deviation in ((3., 1.25, 0.5), (1.25, 1.25, 0.375)):
        estimate.update(value)
        assert (estimate.mean, estimate.deviation) == (mean, deviation)
    assert estimate.upper(2) == 2.


@pytest.mark.parametrize('left, counts, resolution', [
    ([0.017], None, 224),
    ([0.015], None, 160),
    ([0.005], None, 96),
    ([0.001], None, 96),  # late anyway
    ([0.1, 0.031], None, 160),  # the second would be late at 224
    ([0.1, 0.033], None, 224),
    ([0.1] * 6, None, 224),
    ([0.1] * 7, None, 160),
    ([0.1] * 13, None, 96),
    ([0.017], [2], 160),  # two images
    ([-0.1, 1.], None, 96),
])
def test_largest_size_at_which_the_whole_line_is_in_time(left, counts, resolution):
    assert Controller(LATENCY).choose(left, counts) == resolution


@pytest.mark.parametrize('left, counts, reading, seconds', [
    ([0.005], None, None, -0.001),
    ([0.1, 0.005], None, None, 0.003),  # 4 ms each
    ([-1., 0.1], None, None, -0.092),  # only the last counts
    ([0.1, 0.02], [1, 3], [[0.5, 0.5, 0.001], [0.5, 0.5, 0.007]], 0.004),  # 5 ms, then 7 and 3 times 4
])
def test_how_late_the_last_in_line_is_at_the_floor(left, counts, reading, seconds):
    assert Controller(LATENCY).lateness(left, counts, reading) == pytest.approx(seconds)


def test_down_at_once_up_after_several():
    controller = Controller(LATENCY, headroom=0.25, patience=3)
    assert controller.choose([0.005]) == 96
    # 224 fits in 19 ms, but not with a quarter to spare; 160 does.
    assert [controller.choose([0.019]) for _ in range(4)] == [96, 96, 160, 160]
    assert [controller.choose([1.]) for _ in range(2)] == [160, 160]
    assert controller.choose([0.009]) == 160  # starts counting again
    assert [controller.choose([1.]) for _ in range(3)] == [160, 160, 224]


def test_a_slowdown_at_one_size_counts_for_all():
    controller = Controller(LATENCY, margin=0)
    assert controller.choose([0.03]) == 224
    for _ in range(100):
        controller.observe(224, 0.032, overhead=0.)
    assert controller.slowdown == pytest.approx(2, rel=1e-3)
    assert controller.expected(96) == pytest.approx(0.008, rel=1e-3)
    assert controller.choose([0.03]) == 160
    for _ in range(100):
        controller.observe(160, 0.016, overhead=0., count=2)
    assert controller.slowdown == pytest.approx(1, rel=1e-3)


def test_reading_images_counts():
    controller = Controller(LATENCY, overhead=0.01, margin=0)
    assert controller.expected(224) == pytest.approx(0.026)
    for _ in range(200):
        controller.observe(224, 0.032, overhead=0.06, count=2)
    assert controller.expected(224) == pytest.approx(0.046)


def test_decoding_counts():
    """24 ms in all: decoding at 96 and 160 px takes a third of what it takes at 224."""
    reading = [[0.012, 0.004, 0.004]]
    for left, resolution in ((0.029, 224), (0.027, 160), (0.011, 96), (0.001, 96)):
        assert Controller(LATENCY).choose([left], [1], reading) == resolution
    both = reading * 2  # 2 * (12 + 16), 2 * (4 + 8) and 2 * (4 + 4) ms
    for left, resolution in ((0.057, 224), (0.055, 160), (0.023, 96)):
        assert Controller(LATENCY).choose([1., left], [1, 1], both) == resolution


def test_each_format_has_a_slowdown_of_its_own():
    reading = ReadingTime(per_byte=2e-9, per_pixel=1e-9)
    prices = reading.prices(1000, [4000, 1000])
    assert prices == pytest.approx([6e-6, 3e-6])
    assert reading.expected('WEBP', prices) == pytest.approx([21e-6, 10.5e-6])  # nothing of it was seen yet
    for _ in range(200):
        reading.observe('PNG', 3e-6, 9e-6)
    assert reading.expected('PNG', prices) == pytest.approx([18e-6, 9e-6])
    assert reading.expected('JPEG', prices) == pytest.approx(prices)
    reading.observe('', 0., 1.)  # an image that was decoded already
    assert reading.expected('', prices) == pytest.approx(prices)


def test_prices_are_measured_at_the_start():
    """From 307,200 pixels that take 4 ms, and 1 of 64 of them that take 1 ms."""
    times = iter(np.cumsum([0., 0.004, 0.001] * 5))
    per_byte, per_pixel = measure_reading(clock=lambda: next(times))
    assert per_pixel * 307200 == pytest.approx(0.003 * 64 / 63)
    assert 5000 < (0.004 - 0.003 * 64 / 63) / per_byte < 307200  # bytes of the file
    assert measure_reading(rounds=1, clock=lambda: 0.) == (0., 0.)


def test_jitter_is_allowed_for():
    controller = Controller(LATENCY, margin=2)
    controller.observe(224, 0.032, overhead=0.)
    assert controller.expected(224) == pytest.approx(0.016 * (1 + 1 / 8 + 2 * 1 / 4))


def test_one_huge_image_does_not_make_the_next_ones_late():
    """Its resizing took a second; small ones take 2 ms, of a budget of 100."""
    controller = Controller({224: 0.02, 96: 0.004}, overhead=0.002)
    controller.observe(96, 0.004, 1.)
    assert controller.lateness([0.1]) < 0
    for _ in range(30):  # but if all take so long, that is learned
        controller.observe(96, 0.004, 1.)
    assert controller.lateness([0.9]) > 0


def test_floor():
    controller = Controller(LATENCY, floor=160)
    assert controller.resolutions == (224, 160) and controller.choose([0.001]) == 160


@pytest.mark.parametrize('options, message', [
    (dict(floor=100), 'Unknown floor 100, expected one of 224, 160, 96'),
    (dict(patience=0), 'patience is 0, expected an integer from 1'),
    (dict(headroom=-1), 'headroom is -1, expected a finite number of at least 0'),
    (dict(margin=float('nan')), 'margin is nan'),
])
def test_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        Controller(LATENCY, **options)
