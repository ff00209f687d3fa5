"""Who begins again, and when, by a table of deaths worked out by hand."""

import pytest

from deploy.restart_policy import RestartPolicy


def deaths(policy, *times, slot=0):
    """Deaths, each after a report."""
    answers = []
    for now in times:
        policy.on_report(slot)
        answers.append(policy.on_death(slot, now))
    return answers


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((0.0, 100.0, 200.0, 300.0, 400.0, 500.0), [0.0] * 6),
        ((0.0, 1.0, 3.0, 6.0), [0.0, 1.0, 2.0, 4.0]),
        ((0.0, 1.0, 3.0, 6.0, 59.0), [0.0, 1.0, 2.0, 4.0, None]),
        ((0.0, 1.0, 3.0, 6.0, 60.0), [0.0, 1.0, 2.0, 4.0, 4.0]),
        ((0.0, 30.0, 61.0), [0.0, 1.0, 1.0]),
    ],
    ids=["rare", "often", "five within a minute", "five in just over a minute", "two at a time"],
)
def test_one_slot(times, expected):
    assert deaths(RestartPolicy(), *times) == expected


def test_a_slot_that_crash_loops_is_tried_each_minute_while_the_others_go_on():
    policy = RestartPolicy(num_slots=4)
    assert deaths(policy, 0.0, 1.0, 3.0, 6.0, 11.0, slot=2) == [0.0, 1.0, 2.0, 4.0, 60.0]
    assert policy.quarantined(11.0) == {2} and deaths(policy, 12.0, slot=1) == [0.0]
    assert deaths(policy, 72.0, 133.0, slot=2) == [60.0, 60.0], "it died at its first try, and at the next"
    assert policy.quarantined(252.0) == {2} and policy.quarantined(253.1) == set()
    assert deaths(policy, 300.0, slot=2) == [0.0]


def test_where_half_of_all_slots_crash_loop_the_run_ends():
    policy = RestartPolicy(num_slots=4)
    assert deaths(policy, 0.0, 1.0, 3.0, 6.0, 11.0, slot=2)[-1] == 60.0
    assert deaths(policy, 0.0, 1.0, 3.0, 6.0, 11.0, slot=3)[-1] is None


def test_a_slot_that_never_reports_is_given_up_however_slowly_it_starts():
    """Kills: a circuit that looks at the clock alone, which a start of half a minute never opens."""
    policy = RestartPolicy()
    policy.on_report(0)
    assert [policy.on_death(0, now) for now in (0.0, 90.0, 180.0, 270.0, 360.0)] == [0.0, 0.0, 0.0, 0.0, None]
    policy = RestartPolicy()
    assert [policy.on_death(0, now) for now in (0.0, 90.0, 180.0, 270.0)] == [0.0] * 4
    policy.on_report(0)
    assert policy.on_death(0, 360.0) == 0.0
