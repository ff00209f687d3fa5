"""What a sweep says in words: by numbers computed by hand, and beside them what would have been said of other figures."""

import math
from dataclasses import replace

import numpy as np
import pytest

from deploy.scaling_advice import (
    Usage,
    actors_advice,
    counted,
    efficiencies,
    law_text,
    limit_text,
    needed,
    others_text,
    shards_needed,
    unsettled_text,
)
from deploy.scaling_law import fit

RATE, SIGMA, KAPPA = 250.0, 0.04, 0.0


def usages(*, n=(1, 2, 4, 8), **last):
    """Points at the throughputs of a law, and what is said of the last one."""
    found = [
        Usage(
            n=value,
            throughput=RATE * value / (1 + SIGMA * (value - 1)),
            num_shards=1,
            num_devices=1,
            samples_per_insert=8.0,
            shard_busy=0.2,
            shard_busy_max=0.2,
            learner_busy=0.3,
            host_cpu=0.4,
            actors_held_back=0.0,
        )
        for value in n
    ]
    return [*found[:-1], replace(found[-1], **last)]


def law_of(points):
    return fit([one.n for one in points], [one.throughput for one in points], np.random.default_rng(0))


def test_shards_needed_by_hand():
    """8 actors make 1,600 env steps/s and the two shards are busy 0.6 and 0.4, so a step takes 1.0 / 1600 = 0.625 ms of a shard. 24 actors at
    250/s are 6,000 steps/s: 3.75 shards busy all the time, 5.36 busy 70 %. Kills: the busiest taken for the mean (6.43), one shard's
    part taken for both (2.68), the throughput measured in place of what actors make alone (3 times 1,600: 4.29), rounding down.
    """
    usage = Usage(
        n=8, throughput=1_600, num_shards=2, num_devices=1, samples_per_insert=8.0, shard_busy=0.5, shard_busy_max=0.6
    )
    assert needed(6_000, 2 * 0.5, 1_600, most_busy=0.7) == pytest.approx(3.75 / 0.7)
    assert shards_needed(usage, 250.0, 24) == 6
    assert shards_needed(usage, 250.0, 1) == 2  # Never fewer than there are.
    exact = replace(usage, num_shards=1, shard_busy=0.7, shard_busy_max=0.7)
    assert shards_needed(exact, 200.0, 24) == 3  # 4,800 * 0.7 / 1,600 / 0.7, and not 4 by a rounding error.


def test_a_full_shard_serializes_and_the_sentence_says_how_many_carry_twice_as_many():
    """X(8) = 2000 / 1.28 = 1562.5; D = 0.93 / 1562.5; 16 actors make 4,000/s: 2.38 shards, 3.4 at 70 %."""
    points = usages(shard_busy=0.93, shard_busy_max=0.93)
    assert limit_text(points, "actors", num_cpus=16) == "the shard serializes: busy 93 % at 8 actors"
    assert actors_advice(points, law_of(points), num_cpus=16) == "4 shards would carry 16 actors"


def test_of_a_full_shard_and_a_full_learner_the_fuller_one_is_named():
    points = usages(shard_busy=0.95, shard_busy_max=0.95, learner_busy=0.92)
    assert limit_text(points, "actors", num_cpus=16).startswith("the shard serializes")
    points = usages(shard_busy=0.75, shard_busy_max=0.75, learner_busy=0.97, actors_held_back=0.4)
    assert (
        limit_text(points, "actors", num_cpus=16)
        == "the learner is full: busy 97 % at 8 actors, which wait for it 40 % of the time"
    )


def test_a_full_learner_is_to_be_faster_or_to_be_asked_for_less():
    """8 actors would make 2,000 steps/s alone; the learner does 800 at 96 %, so it must be 2.4 times as fast, or do 8 / 2.4 samples a step."""
    points = usages(throughput=800.0, learner_busy=0.96, actors_held_back=0.5)
    text = actors_advice(points, None, num_cpus=16)
    assert (
        text
        == "8 actors at full speed would take a learner 2.4 times as fast, or --replay.samples-per-insert 3.3 in place of 8"
    )


def test_a_full_learner_that_nobody_is_tied_to_limits_no_actor():
    points = [replace(one, samples_per_insert=None, learner_busy=1.0) for one in usages()]
    assert limit_text(points, "actors", num_cpus=16) == (
        "without a ratio the learner is full by itself (busy 100 %, at 8 actors), which does not hold actors back: busiest shard 20 %, cores 40 %"
    )
    assert "learner would be" not in actors_advice(points, law_of(points), num_cpus=16)


def test_no_ratio_is_a_setting_and_no_place():
    def said(**last):
        points = usages(n=(4, 8, math.inf), throughput=900.0, samples_per_insert=None, **last)
        return limit_text(points, "samples an insert", num_cpus=2)

    assert said(learner_busy=0.99).startswith("without a ratio the learner is full by itself (busy 99 %), which does not")
    assert said(learner_busy=0.5).startswith("no role is full without a ratio: learner 50 %")
    assert said(shard_busy_max=0.8) == "the shard serializes: busy 80 % without a ratio"
    assert said(host_cpu=0.99).startswith("2 cores are full without a ratio (99 % at the last")
    assert counted(1, "samples an insert") == "1 sample an insert"


def test_full_cores_come_before_all_roles_and_nothing_is_advised():
    """Busy times hold the waiting for a core then. The cores are full from the first N on from which they stay so, not from a single one."""
    points = usages(shard_busy=0.95, shard_busy_max=0.95, learner_busy=0.99)
    points = [replace(one, host_cpu=cpu) for one, cpu in zip(points, (0.95, 0.85, 0.97, 1.0), strict=True)]
    text = limit_text(points, "actors", num_cpus=2)
    assert text == (
        "2 cores are full from 4 actors on (100 % at the last; busy, waiting for a core included: learner 99 %, busiest shard 95 %): the curve "
        "and its \N{GREEK SMALL LETTER SIGMA} are theirs, not the design's"
    )
    points = [*points[:-1], replace(points[-1], run_cpu_cores=1.8, throughput=150.0)]
    assert (
        limit_text(points, "actors", num_cpus=2) == f"{text}; one env step takes 12 ms of a core"
    )  # 1.8 / 150, and not 2 / 150.
    assert actors_advice(points, law_of(points), num_cpus=2) == ""
    assert limit_text(points, "actors", num_cpus=None).startswith("the learner is full")  # On a cluster it is one node's.
    assert limit_text(usages(host_cpu=0.9), "actors", num_cpus=2).startswith("no role is full")


def test_one_full_core_point_is_said_in_the_singular():
    assert "full from 1 actor on" in limit_text(usages(n=(1,), host_cpu=1.0), "actors", num_cpus=2)


def test_actors_held_back_by_a_learner_that_waits_itself():
    text = limit_text(usages(actors_held_back=0.3, learner_busy=0.5), "actors", num_cpus=16)
    assert text.startswith("actors are held back 30 % of the time, and the learner is busy 50 % only") and "prefetch" in text


def test_where_nothing_is_full_the_next_is_named():
    """The learner is busy 30 % at 1562.5/s: full at 5,208, which 20.8 actors of 250/s make. The shard would be full (70 %) at 5,469."""
    points = usages()
    assert (
        limit_text(points, "actors", num_cpus=16) == "no role is full at 8 actors: learner 30 %, busiest shard 20 %, cores 40 %"
    )
    expected = "the learner would be the first to be full, at 5,208 env steps/s: about 21 actors"
    assert actors_advice(points, law_of(points), num_cpus=16) == expected
    assert actors_advice(usages(n=(1,), learner_busy=0.87), None, num_cpus=16).endswith(": about 1 actor")


def test_absent_columns_are_not_taken_for_idle_roles():
    bare = [Usage(n=1, throughput=100, num_shards=1, num_devices=1, samples_per_insert=8.0)]
    assert limit_text(bare, "actors", num_cpus=2) == "no role is full at 1 actor"
    assert actors_advice(bare, None, num_cpus=2) == ""
    assert others_text(bare, 2) is None


def test_other_processes_are_told_where_they_took_a_tenth_of_the_machine():
    """Kills: the fraction taken for cores, and the run's own part counted as others'."""
    points = usages(host_cpu=0.9, run_cpu_cores=1.0)
    assert others_text(points, 2).startswith("other processes took up to 0.8 of 2 cores")
    assert others_text(usages(host_cpu=0.9, run_cpu_cores=1.7), 2) is None
    assert others_text(points, None) is None


def test_windows_in_which_one_side_caught_up_are_told():
    """Off either way is off alike: half as many samples a step is as far as twice as many."""
    settled = [("1 actors", 8.9, 8.0), ("2 actors", 7.1, 8.0)]
    assert unsettled_text(settled, 10.0) is None and unsettled_text([], 10.0) is None
    text = unsettled_text([*settled, ("3 actors", 10.0, 8.0), ("4 actors", 4.0, 8.0)], 10.0)
    assert text.startswith(
        "2 of 4 runs had not settled: 4 samples a step in place of 8 at 4 actors; give more than 10 --warm-up-seconds"
    )


def test_efficiency_is_of_rounds_and_in_proportion_to_n():
    """A round that is slow altogether has the same efficiency. Kills: throughput over throughput (1.8), medians over medians."""
    rounds = [{1: 100.0, 2: 180.0}, {1: 50.0, 2: 95.0}, {1: 100.0, 2: 170.0}, {2: 900.0}]
    first, second = efficiencies(rounds)
    assert (first.n, first.median, first.low, first.high) == (1, 1.0, 1.0, 1.0)
    assert (second.n, second.median, second.low, second.high) == (2, 0.9, 0.85, 0.95)
    (_, later) = efficiencies([{2: 100.0, 8: 300.0}])
    assert later.median == 0.75  # Over the least N that there is.


def test_law_text_says_what_there_is():
    points = usages()
    sigma, kappa = "\N{GREEK SMALL LETTER SIGMA}", "\N{GREEK SMALL LETTER KAPPA}"
    assert law_text(None, 2, "actors") == f"no law from 2 points: {sigma} takes 3, {kappa} 4"
    assert law_text(None, 1, "actors").startswith("no law from 1 point:")
    assert law_of(points[:2]) is None and law_of(points[:3]).kappa is None and law_of(points).kappa is not None  # As it says.
    assert law_text(law_of(points), 4, "actors").startswith(f"{sigma} 0.04 [0.04, 0.04], {kappa} 0 [0, 0]")
    assert law_text(law_of(points[:3]), 3, "actors").endswith(f"({kappa} takes 4 points)")
    law = fit([1, 2, 4, 8, 16], [n * 100 / (1 + 0.009 * n * (n - 1)) for n in (1, 2, 4, 8, 16)], np.random.default_rng(0))
    assert law_text(law, 5, "actors").endswith(", most at 11 actors") and math.isfinite(law.peak.value)
