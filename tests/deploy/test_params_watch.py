"""The alarm about an actor whose parameters stand still: on scripted reports, by a clock that the test turns."""

import dataclasses

import pytest

from common.metrics import ActorStats, LearnerStats, PushCounts
from deploy import progress as progress_module
from deploy import recipes
from deploy.params_watch import ParamsWatch
from deploy.progress import Progress

NEVER = (-1, 0)


def play(watch, seconds, *, actors, published, start=0):
    """Reports once a second; `actors[i]` and `published` say a version for each second, or None where nothing is reported.

    Returns the sentences with the second in which they came.
    """
    told = []
    for now in range(start, start + seconds):
        if (version := published(now)) is not None:
            watch.on_published(float(now), version)
        for index, reported in enumerate(actors):
            if (version := reported(now)) is not None:
                watch.on_actor(float(now), index, 0, version)
        told += [(now, sentence) for sentence in watch.new_alarms()]
    return told


def every_20_updates(now):
    return (0, 20 * now)


def test_an_actor_that_stands_still_is_named_once():
    watch = ParamsWatch(60.0)
    actors = [lambda now: (0, 20 * max(now - 2, 0)), lambda now: (0, 20 * min(now, 100))]
    told = play(watch, 1000, actors=actors, published=every_20_updates)
    ((now, sentence),) = told
    assert now == 161  # At 100 it had the newest; at 101 there was a newer one.
    assert sentence.startswith(
        "the parameters of actor 1 stand still: it acts for 61 s with version 2000 (epoch 0), while the learner has published "
        "version 3220 (epoch 0); check "
    )
    assert "workers.json" in sentence and "py-spy dump" in sentence


def test_an_actor_that_never_received_parameters_is_named_so():
    ((now, sentence),) = play(ParamsWatch(60.0), 200, actors=[lambda now: NEVER], published=every_20_updates)
    assert now == 60
    assert sentence.startswith("actor 0 has never received parameters and acts for 60 s with those it was built with, while")


def test_the_alarm_comes_again_only_after_the_actor_moved():
    def moves_once(now):
        return (0, 10) if now < 300 else (0, 6000)

    told = play(ParamsWatch(60.0), 1000, actors=[moves_once], published=every_20_updates)
    assert [now for now, _ in told] == [61, 361]


HEALTHY = {
    "a pull takes two seconds": (lambda now: (0, 20 * max(now - 2, 0)), every_20_updates),
    "a learner that publishes every 200 s": (lambda now: (0, max(now - 3, 0) // 200), lambda now: (0, now // 200)),
    "a learner that has stopped": (lambda now: (0, 100), lambda now: (0, 100)),
    "no learner yet": (lambda now: NEVER, lambda now: None),
    "an actor that starts for 100 s": (lambda now: None if now < 100 else (0, 20 * (now - 2)), every_20_updates),
    # Its report of second 99 is read at 200, when the driver comes back from an evaluation; then it goes on.
    "a driver that was away": (
        lambda now: (0, 20 * now) if now < 99 else None if now < 200 else (0, 20 * 98) if now < 203 else (0, 20 * now),
        lambda now: (0, 20 * now) if now < 100 or now > 200 else None,
    ),
    "a learner that goes on from a checkpoint": (
        lambda now: (0, 20 * now) if now < 102 else (1, 20 * (now - 52)),
        lambda now: (0, 20 * now) if now < 100 else (1, 20 * (now - 50)),
    ),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_no_false_alarm(case):
    actor, published = HEALTHY[case]
    assert play(ParamsWatch(60.0), 500, actors=[actor], published=published) == []


def test_versions_are_compared_with_their_epochs():
    """The learner goes on with a smaller version: an actor that keeps the greater one of the old epoch stands still."""
    ((now, sentence),) = play(
        ParamsWatch(60.0), 300, actors=[lambda now: (0, 900)], published=lambda now: (0, 900) if now < 100 else (1, 850)
    )
    assert now == 160
    assert "version 900 (epoch 0), while the learner has published version 850 (epoch 1)" in sentence


def test_a_new_incarnation_and_a_dead_actor_begin_anew():
    watch = ParamsWatch(60.0)
    play(watch, 50, actors=[lambda now: NEVER], published=every_20_updates)
    watch.forget(0)
    assert play(watch, 50, actors=[lambda now: NEVER], published=every_20_updates, start=50) == []
    watch.on_actor(100.0, 0, 1, NEVER)
    watch.on_actor(159.0, 0, 1, NEVER)
    assert watch.new_alarms() == []


def test_many_alarms_at_once_are_cut_and_none_is_off():
    told = play(ParamsWatch(60.0), 100, actors=[lambda now: NEVER] * 200, published=every_20_updates)
    assert len(told) == 4 and told[-1] == (60, "so do the parameters of 197 more actors")
    assert play(ParamsWatch(None), 100, actors=[lambda now: NEVER], published=every_20_updates) == []


# In the driver's record of a run


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def make_progress(*, serial=False, **actors):
    config = recipes.cartpole()
    actors = dataclasses.replace(config.actors, num_actors=3, **actors)
    return Progress(dataclasses.replace(config, actors=actors, serial=serial), {})


def actor_stats(slot, version, **fields):
    epoch, version = version
    return ActorStats(
        slot=slot,
        incarnation=0,
        env_steps=10,
        sent=0,
        pushed=PushCounts(),
        params_epoch=epoch,
        params_version=version,
        epsilon=0.1,
        **fields,
    )


def learner_stats(updates, published):
    values = dict.fromkeys(LearnerStats.__slots__, 0) | {"waits_for": None, "last_fault": None, "checkpoint_fault": None}
    values |= {"answer_p95_seconds": {}, "usage": None, "prefetch_usage": None}
    return LearnerStats(**values | {"updates": updates, "published_version": published})


@pytest.mark.parametrize(("serial", "expected"), [(False, [1]), (True, [])])
def test_progress_tells_of_the_actor(clock, serial, expected):
    progress = make_progress(serial=serial, params_alarm_seconds=30.0)
    sentences = []
    for second in range(100):
        clock[0] += 1.0
        progress.on_learner(learner_stats(20 * second, 20 * second))
        for slot in range(3):
            progress.on_actor(actor_stats(slot, (0, 0) if slot == 1 else (0, 20 * second)))
        sentences += progress.new_faults()
    assert [1 for s in sentences if s.startswith("the parameters of actor 1 stand still: it acts for 31 s")] == expected
    assert len(sentences) == len(expected)


def test_rows_have_the_mean_and_the_worst_actor(clock):
    progress = make_progress()
    row = progress.row()
    assert not any(name.startswith("actor/params") for name in row)
    progress.on_learner(learner_stats(100, 80))
    progress.on_actor(actor_stats(0, (0, 80), params_age_seconds=1.0))
    progress.on_actor(actor_stats(1, NEVER))  # As if at version 0, which it was built with; its age nobody knows.
    progress.on_actor(actor_stats(2, (0, 60), params_age_seconds=4.0))
    progress.on_learner(learner_stats(150, 140))  # After their reports: their lag is told as of then.
    row = progress.row()
    assert (row["actor/params_lag_updates"], row["actor/params_lag_updates_max"]) == ((20 + 100 + 40) / 3, 100)
    assert (row["actor/params_age_seconds"], row["actor/params_age_seconds_max"]) == (2.5, 4.0)
    progress.on_actor_died(1)
    assert progress.row()["actor/params_lag_updates_max"] == 40


def test_the_lag_is_told_within_an_epoch_only(clock):
    """A version of another epoch is not so many updates away; its age is told, and the alarm tells where it stays."""
    progress = make_progress()
    progress.on_learner(learner_stats(900, 900))
    progress.on_actor(actor_stats(0, (0, 900), params_age_seconds=2.0))
    progress.epoch = 1
    progress.on_learner(learner_stats(850, 850))
    progress.on_actor(actor_stats(0, (0, 900), params_age_seconds=3.0))
    row = progress.row()
    assert "actor/params_lag_updates" not in row and row["actor/params_age_seconds_max"] == 3.0
    progress.on_actor(actor_stats(0, (1, 840), params_age_seconds=1.0))
    assert progress.row()["actor/params_lag_updates_max"] == 10
