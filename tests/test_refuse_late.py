"""The session that refuses what would be late, on a simulated clock"""
from concurrent.futures import ThreadPoolExecutor

import pytest
from simulated import PHOTOGRAPH, SimulatedSession, adaptive, encoded, queue_up, slow_reading  # noqa: F401

from timm_rs_runtime import AdaptiveSession, BudgetError, QueueFullError, UserError


def patient(budget_ms=22000., **kwargs):
    """Return a session that refuses, and its clock, on which the sizes take 16, 8 and 4 s: nobody waits so long."""
    session = SimulatedSession()
    session.slowdown = 1000
    return AdaptiveSession(session, budget_ms, refuse_late=True, clock=session.clock, **kwargs), session


def test_what_even_the_floor_cannot_carry_is_refused_at_once():
    """16 s until the first is served, 4 for the next: a third would be done after 24 of its 22 s."""
    session, simulated = patient()
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH] * 2)
        error = futures[2].exception(10)
        assert isinstance(error, QueueFullError) and error.retry_after == pytest.approx(2)
        assert str(error) == '2 requests are being served or waiting, one more would be late; try again later.'
        go_on.set()
        answers = [f.result(10) for f in futures[:2]]
    assert [(a.resolution, a.in_time) for a in answers] == [(224, True), (96, True)]
    stats = session.stats()
    assert (stats['rejected'], stats['failed'], stats['misses']) == (1, 0, 0)


def test_what_has_become_too_late_is_not_served():
    session, simulated = patient()
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [PHOTOGRAPH])
        simulated.now += 10
        go_on.set()
        assert not futures[0].result(10).in_time
        with pytest.raises(QueueFullError, match='The requests before took too long') as e:
            futures[1].result(10)
    assert e.value.retry_after > 0 and session.stats()['rejected'] == 1


def test_a_request_does_not_wait_beyond_its_deadline():
    session, simulated = patient(budget_ms=16050.)  # so 50 ms are to spare, and pass on the real clock
    with ThreadPoolExecutor(8) as pool:
        futures, go_on = queue_up(session, simulated, pool, [])
        simulated.now += 15.99  # 10 ms until it should be served
        with pytest.raises(QueueFullError, match='took too long'):
            session.predict(PHOTOGRAPH, budget_ms=4050.)
        go_on.set()
        futures[0].result(10)


@pytest.mark.filterwarnings('ignore:A budget of')
def test_a_machine_that_was_slow_at_the_start_is_found_out():
    """Requests that seem to be late are tried for a tenth of the time, while nobody waits."""
    session = SimulatedSession()
    session.slowdown = 10000
    adaptive, session.slowdown = AdaptiveSession(session, 22000., refuse_late=True, clock=session.clock), 1000
    late = []
    for _ in range(1000):
        try:
            late.append(not adaptive.predict(PHOTOGRAPH).in_time)
        except UserError as e:
            assert 'take 40000.0 ms even at 96 px, the budget is 22000 ms' in str(e)
        session.now += 1
    assert len(late) > 100 and not any(late) and adaptive.predict(PHOTOGRAPH).resolution == 224


def test_images_that_take_longer_than_the_budget(slow_reading):
    """2560 x 2560 pixels of a PNG take 655 ms; the first is tried."""
    session, _ = adaptive(100, refuse_late=True)
    assert not session.predict(encoded(2560, 2560, 'png')).in_time
    with pytest.raises(BudgetError, match='The images take 659.4 ms even at 96 px, the budget is 100 ms') as e:
        session.predict(encoded(2560, 2560, 'png'))
    assert e.value.least_ms == pytest.approx(659.4, abs=0.1)
    with pytest.raises(BudgetError, match='the budget is 1 ms'):
        session.predict(PHOTOGRAPH, budget_ms=1)
    assert session.predict(PHOTOGRAPH).in_time
