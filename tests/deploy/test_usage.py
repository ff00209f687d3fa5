"""Rows of what each role's time went into, by numbers worked out by hand."""

import pytest

from common.timing import Usage
from deploy.usage import UsageRates


def told(at, cpu=0.0, delay=None, threads=1, **phases):
    return Usage(at=at, phases=phases, num_threads=threads, cpu_seconds=cpu, delay_seconds=delay)


def test_fractions_are_of_the_time_between_two_rows_and_a_mean_over_processes():
    rates = UsageRates()
    assert rates.of_role("actor", {(0, 0): told(100.0, 50.0, env=40.0), (1, 0): told(7.0, 3.0, env=1.0)}) == {}
    row = rates.of_role("actor", {(0, 0): told(110.0, 58.0, env=46.0, push=1.0), (1, 0): told(11.0, 5.0, env=2.0)})
    assert row == {
        "actor/env_fraction": pytest.approx((6 / 10 + 1 / 4) / 2),
        "actor/push_fraction": pytest.approx((1 / 10 + 0) / 2),
        "actor/cpu_cores": pytest.approx(8 / 10 + 2 / 4),
    }


def test_a_process_that_comes_anew_counts_from_its_second_row_on():
    rates = UsageRates()
    rates.of_role("shard", {(0, 0): told(100.0, 90.0, insert=80.0)})
    assert rates.of_role("shard", {(0, 1): told(1.0, 0.5, insert=0.5)}) == {}
    assert rates.of_role("shard", {(0, 1): told(3.0, 1.5, insert=1.0)})["shard/insert_fraction"] == pytest.approx(0.25)


def test_threads_share_the_time_and_processors_do_not():
    rates = UsageRates()
    rates.of_role("prefetch", {(0,): told(0.0, threads=2, unpack=0.0)})
    row = rates.of_role("prefetch", {(0,): told(10.0, 14.0, threads=2, unpack=10.0)})
    assert row == {"prefetch/unpack_fraction": pytest.approx(0.5), "prefetch/cpu_cores": pytest.approx(1.4)}


def test_who_has_told_nothing_new_is_left_out():
    rates = UsageRates()
    rates.of_role("actor", {(0, 0): told(1.0, env=0.0), (1, 0): told(1.0, env=0.0), (2, 0): None})
    row = rates.of_role("actor", {(0, 0): told(1.0, env=0.0), (1, 0): told(2.0, 0.7, 0.1, env=0.5), (2, 0): None})
    assert row["actor/env_fraction"] == pytest.approx(0.5)


def test_delay_is_the_mean_of_those_that_tell_it():
    rates = UsageRates()
    rates.of_role("learner", {(0,): told(0.0, delay=1.0)})
    assert rates.of_role("learner", {(0,): told(10.0, delay=4.0)})["learner/delay_fraction"] == pytest.approx(0.3)
