"""The open loop, on a role whose service times are known and a clock that only it moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from one_server import SERVICE, OneServer, waiting_quantile

from deploy import open_loop
from deploy.open_loop import Schedule


def run(schedule, role, drain_seconds=5.0):
    return open_loop.run(schedule, role, began=0.0, drain_seconds=drain_seconds, clock=role.clock, sleep=role.sleep)


def summary(schedule, answers, kind=0):
    return open_loop.summarize([answers], kind, warm_up=schedule.warm_up, seconds=schedule.end - schedule.warm_up)


def test_poisson_arrivals_have_the_rate_and_its_variance():
    schedule = open_loop.poisson(np.random.default_rng(0), [50.0, 200.0], warm_up=10.0, seconds=90.0, max_in_flight=1)
    assert (np.diff(schedule.due) >= 0).all() and schedule.due[0] >= 0 and schedule.due[-1] < 100.0
    for kind, rate in ((0, 50.0), (1, 200.0)):
        gaps = np.diff(schedule.due[schedule.kind == kind])
        assert np.mean(gaps) == pytest.approx(1 / rate, rel=6 / math.sqrt(100 * rate))
        assert np.std(gaps) == pytest.approx(1 / rate, rel=0.1)  # Evenly spaced ones have 0.


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_latencies_of_one_server_are_those_of_the_queue_m_d_1(load):
    """Kills: latency without the waiting (1 service time), and that of exponential service (at 0.7: p99 15, not 7.5)."""
    rng = np.random.default_rng(1)
    schedule = open_loop.poisson(rng, [load / SERVICE], warm_up=5.0, seconds=1_000.0, max_in_flight=10_000)
    found = summary(schedule, run(schedule, OneServer()))
    assert found.carried_per_second == pytest.approx(found.offered_per_second, rel=0.01)
    assert found.p50 / SERVICE == pytest.approx(waiting_quantile(load, 0.50), rel=0.1)
    assert found.p99 / SERVICE == pytest.approx(waiting_quantile(load, 0.99), rel=0.15)


def test_what_is_offered_beyond_the_limit_is_a_shortfall_and_its_waiting_counts():
    schedule = open_loop.poisson(np.random.default_rng(2), [200.0], warm_up=1.0, seconds=10.0, max_in_flight=20)
    role = OneServer()
    answers = run(schedule, role)
    found = summary(schedule, answers)
    assert found.offered_per_second == pytest.approx(200, rel=0.1)
    assert found.carried_per_second == pytest.approx(100, rel=0.02)
    assert role.most_in_flight == 20
    # Half of what is due by then is never sent: it has waited since it was due, and the mean of a backlog that grows evenly is half its end.
    assert found.p50 == pytest.approx(found.p99 / 2, rel=0.2) and found.p99 > 4.0
    assert np.isnan(answers.sent).sum() > 800


@pytest.mark.parametrize("max_in_flight", [1, 1_000])
def test_a_stall_counts_with_all_the_calls_that_were_due_in_it(max_in_flight):
    """The decoy counts from when a call was really sent: with one call under way at a time, a stall of a second costs one of a thousand."""
    schedule = Schedule(np.arange(0.0, 10.0, 0.01), np.zeros(1_000, int), 0.0, 10.0, max_in_flight)
    answers = run(schedule, OneServer(service=0.001, stall=(3.0, 4.0)))
    found = summary(schedule, answers)
    assert found.carried_per_second == pytest.approx(100.0)
    assert found.p50 == pytest.approx(0.001, abs=1e-6)
    # Of 1000 calls a hundred wait 1.0, 0.99, ... seconds, and a little longer for those before them: the tenth longest waits 0.9.
    assert found.p99 == pytest.approx(0.91, abs=0.02)
    from_the_real_sending = np.percentile(answers.answered - answers.sent, 99)
    if max_in_flight == 1:
        assert from_the_real_sending == pytest.approx(0.001, abs=1e-6)
        assert found.late_p99 == pytest.approx(found.p99, abs=0.02)


def test_a_call_that_is_never_answered_is_not_left_out():
    class Deaf(OneServer):
        def collect(self, tokens, timeout_seconds):
            self.now += timeout_seconds
            return []

    schedule = Schedule(np.arange(0.0, 1.0, 0.1), np.zeros(10, int), 0.0, 1.0, 4)
    found = summary(schedule, run(schedule, Deaf(), drain_seconds=0.5))
    assert (found.offered_per_second, found.carried_per_second) == (10.0, 0.0)
    assert found.p50 == pytest.approx(0.55)  # 1.0, 0.9, ... 0.1 by the end.


def test_the_closed_loop_finds_the_limit_and_keeps_the_shares():
    schedule = open_loop.closed_loop([1.0, 3.0], warm_up=1.0, seconds=10.0, max_in_flight=8, most=10_000)
    role = OneServer()
    answers = run(schedule, role)
    rates = [open_loop.summarize([answers], kind, warm_up=1.0, seconds=10.0).carried_per_second for kind in (0, 1)]
    assert sum(rates) == pytest.approx(1 / SERVICE, rel=0.01)
    assert rates[1] / rates[0] == pytest.approx(3.0, rel=0.02)
    assert role.most_in_flight == 8
    kinds = schedule.kind[:400].reshape(-1, 8).sum(axis=1)  # In every 8 calls about 6 are of the second kind.
    assert kinds.min() >= 5 and kinds.max() <= 7


def test_warm_up_is_left_out():
    due = np.concatenate([np.linspace(0, 0.9, 100), np.linspace(2.0, 2.9, 10)])
    schedule = Schedule(due, np.zeros(110, int), 1.9, 3.0, 1_000)
    found = summary(schedule, run(schedule, OneServer()))
    assert found.offered_per_second == pytest.approx(10 / 1.1)
    assert found.p99 == pytest.approx(SERVICE, rel=0.01)
