"""The clock of phases: exclusive, complete, and true to a clock of its own."""

import contextlib
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from common.timing import Latencies, PhaseClock, usage


class Now:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_a_phase_within_a_phase_interrupts_it():
    now = Now()
    clock = PhaseClock(now)
    now.seconds += 7.0  # In no phase.
    with clock("env"):
        now.seconds += 1.0
        with clock("compress"):
            now.seconds += 0.25
            with clock("env"):
                now.seconds += 0.5
        now.seconds += 2.0
    now.seconds += 11.0
    with clock("env"):
        now.seconds += 4.0
    assert clock.seconds() == {"env": 7.5, "compress": 0.25}


def test_an_exception_ends_its_phase_and_goes_on_in_the_one_before():
    now = Now()
    clock = PhaseClock(now)
    with clock("outer"):
        with contextlib.suppress(KeyError), clock("inner"):
            now.seconds += 1.0
            raise KeyError
        now.seconds += 2.0
    assert clock.seconds() == {"inner": 1.0, "outer": 2.0}


def test_what_is_read_is_a_copy_and_without_the_phase_under_way():
    now = Now()
    clock = PhaseClock(now)
    with clock("a"):
        now.seconds += 1.0
        assert clock.seconds() == {}
    read = clock.seconds()
    read["a"] = 9.0
    assert clock.seconds() == {"a": 1.0}


def test_usage_sums_threads_and_tells_the_processor_time_of_the_process():
    one, other = PhaseClock(Now()), PhaseClock(Now())
    for clock, seconds in ((one, 1.0), (other, 2.0)):
        with clock("unpack"):
            clock._now.seconds += seconds
    before = usage([one, other])
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        pass
    after = usage([one, other])
    assert before.phases == {"unpack": 3.0}
    assert before.num_threads == 2
    assert 0.05 <= after.cpu_seconds - before.cpu_seconds < 0.1 + 2 * (after.at - before.at)
    assert after.at > before.at


def test_delay_is_of_the_thread_that_had_no_processor():
    if usage([]).delay_seconds is None:
        pytest.skip("this system does not tell the delay of a thread")
    before = usage([]).delay_seconds
    time.sleep(0.2)  # It sleeps, and is not ready.
    asleep = usage([]).delay_seconds - before
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]  # They inherit the processor.
    try:
        time.sleep(0.2)
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            pass
        assert usage([]).delay_seconds - before - asleep > 0.3
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
        os.sched_setaffinity(0, mine)
    assert asleep < 0.1


def test_latencies_are_handed_out_once():
    latencies = Latencies()
    for milliseconds in range(1, 101):
        latencies.add(milliseconds / 1000)
    expected = np.percentile(np.arange(1, 101) / 1000, 95)
    assert latencies.take_p95() == pytest.approx(expected)
    assert math.isnan(latencies.take_p95())
