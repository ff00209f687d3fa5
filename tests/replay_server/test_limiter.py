from __future__ import annotations

import itertools

import pytest

from common.errors import UserError
from common.metrics import WaitStatus
from replay_server.limiter import RateLimiter


@pytest.mark.parametrize(
    ("num_inserted", "num_sampled", "may_insert", "may_sample_8"),
    [
        (99, 0, True, False),  # Below the minimum size: only actors, whatever the ratio says.
        (100, 0, True, True),  # due = 0: a batch fits in the buffer.
        (100, 12, True, True),  # 12 + 8 = 0 + 20.
        (100, 13, True, False),  # 13 + 8 > 0 + 20.
        (105, 0, True, True),  # due = 5 * 4 = 20, and 0 >= 20 - 20.
        (106, 0, False, True),  # due = 24, 0 < 24 - 20.
        (106, 4, True, True),  # 4 >= 24 - 20.
        (106, 36, True, True),  # 36 + 8 = 24 + 20.
        (106, 37, True, False),
    ],
)
def test_limiter_follows_its_law(num_inserted, num_sampled, may_insert, may_sample_8):
    """Kills: <= for <; the minimum size not subtracted; the buffer on one side only; n left out."""
    limiter = RateLimiter(100, 4.0, 20, num_inserted=num_inserted, num_sampled=num_sampled)
    assert limiter.due() == (num_inserted - 100) * 4
    assert (limiter.may_insert(num_inserted) is None) == may_insert
    assert (limiter.may_sample(8, num_inserted) is None) == may_sample_8


def test_limiter_uses_size_for_the_minimum_and_inserts_for_the_ratio():
    limiter = RateLimiter(100, 4.0, 20, num_inserted=1000, num_sampled=3600 - 20)
    assert limiter.may_sample(8, 100) is None
    assert limiter.may_sample(8, 99) == "the learner waits for actors: 99 of 100 transitions to start"
    limiter.num_sampled = 0
    assert limiter.may_insert(100) is not None
    assert limiter.may_insert(99) is None  # A shard that lost items fills again, though samples are due.


def test_limiter_says_how_many_are_missing():
    limiter = RateLimiter(10, 4.0, 20, num_inserted=20, num_sampled=15)
    assert limiter.may_insert(20) == "actors wait for the learner: 5 more samples due"  # 10 * 4 - 20 - 15
    limiter.num_sampled = 55
    assert limiter.may_sample(8, 20) == "the learner waits for actors: 1 more transitions due"  # ceil((63 - 60) / 4)
    assert limiter.may_sample(12, 20) == "the learner waits for actors: 2 more transitions due"  # ceil((67 - 60) / 4)


@pytest.mark.parametrize("samples_per_insert", [0.3, 0.78, 1.0, 4.0, 32.0])
def test_limiter_opens_after_exactly_the_missing_ones(samples_per_insert):
    for num_inserted, num_sampled in itertools.product(range(5, 60, 3), range(0, 300, 7)):
        limiter = RateLimiter(5, samples_per_insert, 10, num_inserted=num_inserted, num_sampled=num_sampled)
        if text := limiter.may_insert(num_inserted):
            missing = int(text.split(": ")[1].split()[0])
            limiter.num_sampled += missing - 1
            assert limiter.may_insert(num_inserted) is not None
            limiter.num_sampled += 1
            assert limiter.may_insert(num_inserted) is None


def test_limiter_without_a_ratio_knows_only_the_minimum_size():
    limiter = RateLimiter(3, None, 0, num_inserted=1_000_000)
    assert limiter.may_insert(3) is None
    assert limiter.may_sample(512, 3) is None
    assert limiter.may_sample(512, 2) is not None
    limiter = RateLimiter(3, None, 0, num_inserted=3, num_sampled=1_000_000)
    assert limiter.may_sample(512, 3) is None


@pytest.mark.parametrize(("samples_per_insert", "chunk", "batch"), [(8.0, 3, 6), (0.78, 2, 4), (1.0, 1, 2)])
def test_obedient_sides_stay_within_the_buffer_and_one_message(samples_per_insert, chunk, batch):
    limiter = RateLimiter(5, samples_per_insert, batch)
    size = 0
    for turn in range(2000):
        if turn % 3 and limiter.may_insert(size) is None:  # One side is always faster; the limiter holds it.
            limiter.num_inserted += chunk
            size = min(size + chunk, 30)
        if limiter.may_sample(batch, size) is None:
            limiter.num_sampled += batch
        if size >= 5:
            assert limiter.due() - batch - chunk * samples_per_insert <= limiter.num_sampled <= limiter.due() + batch
    assert limiter.num_sampled >= 500


# Settings that would stop a run


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_size": 0}, r"min_size of 0 .*: raise --replay\.min-size$"),
        (
            {"min_size": 51, "capacity": 50},
            r"50 transitions never reaches its min_size of 51: raise --replay\.capacity or lower",
        ),
        ({"buffer_samples": 19}, r"40 samples at a time need a buffer of at least 20 on each shard, not 19"),
        ({"samples_per_insert": 0.0}, r"0\.0 samples per insert nothing moves: --replay\.samples-per-insert must be positive"),
        ({"samples_per_insert": float("nan")}, r"nan samples per insert nothing moves"),
        (
            {"buffer_samples": 0, "batch_items": None},
            r"1 samples at a time need a buffer of at least 1 on each shard, not 0: raise --replay\.limiter",
        ),
        (
            {"batch_items": 41},
            r"41 samples at a time need a buffer of at least 21 on each shard, not 20: raise .* or lower --learner",
        ),
    ],
    ids=["no_minimum", "capacity", "buffer", "zero", "nan", "no_buffer", "batch"],
)
def test_settings_that_would_stop_a_side_are_refused(settings, text):
    good = {"min_size": 10, "samples_per_insert": 4.0, "buffer_samples": 20, "capacity": 50, "batch_items": 40}
    limiter = RateLimiter(**good)
    with pytest.raises(UserError, match=text):
        RateLimiter(**good | settings)
    if settings.keys() <= {"min_size", "samples_per_insert", "buffer_samples"}:
        with pytest.raises(UserError, match=text):
            limiter.set(size=0, **settings)
        assert limiter == RateLimiter(**good)  # Nothing was changed.


def test_a_buffer_is_not_set_below_half_of_what_the_learner_asked_for():
    limiter = RateLimiter(10, 4.0, 20)
    limiter.ask_to_sample(32, 0)
    limiter.set(size=0, buffer_samples=16)
    with pytest.raises(UserError, match=r"32 samples at a time need a buffer of at least 16 on each shard, not 15"):
        limiter.set(size=0, buffer_samples=15)


def test_a_batch_that_may_never_fit_is_said_so():
    """The shard learns of the batch size only when it is asked."""
    limiter = RateLimiter(10, 4.0, 20, num_inserted=20, num_sampled=20)
    assert limiter.may_sample(40, 20) is None
    sentence = limiter.may_sample(50, 20)
    assert sentence == (
        "the learner waits for actors: 3 more transitions due, and they for it: 50 samples at a time need a buffer of at least 25 "
        "on each shard, not 20: raise --replay.limiter-buffer-samples or lower --learner.batch-size"
    )  # ceil((20 + 50 - 20 - 40) / 4)


# While the run goes on


def test_set_counts_the_new_ratio_from_now_on():
    limiter = RateLimiter(100, 4.0, 20, num_inserted=1_100, num_sampled=4_005)
    assert limiter.due() == 1_000 * 4
    limiter.set(size=500, samples_per_insert=8.0)
    assert limiter.due() == 4_000  # Kills: 1,000 * 8, a debt of 4,000 samples.
    limiter.num_inserted += 10
    assert limiter.due() == 4_000 + 10 * 8
    limiter.set(size=500, samples_per_insert=0.5, buffer_samples=90)
    limiter.num_inserted += 10
    assert limiter.due() == 4_000 + 10 * 8 + 10 * 0.5
    assert (limiter.min_size, limiter.samples_per_insert, limiter.buffer_samples) == (100, 0.5, 90)


@pytest.mark.parametrize(("num_sampled", "balance"), [(3_000, -20), (3_985, -15), (4_000, 0), (4_010, 10), (5_000, 20)])
def test_set_keeps_the_balance_within_the_new_buffer(num_sampled, balance):
    limiter = RateLimiter(100, 4.0, 2_000, num_inserted=1_100, num_sampled=num_sampled)
    limiter.set(size=500, buffer_samples=20)
    assert limiter.num_sampled - limiter.due() == balance


def test_set_forgets_what_was_sampled_without_a_ratio():
    limiter = RateLimiter(100, None, 20, num_inserted=1_000, num_sampled=900_000)
    limiter.set(size=500, samples_per_insert=4.0)
    assert limiter.due() == 900_000
    limiter.set(size=500, samples_per_insert=None)
    limiter.num_sampled += 1_000
    assert limiter.may_insert(500) is None and limiter.may_sample(512, 500) is None
    limiter.set(size=500, samples_per_insert=1.0)
    assert limiter.due() == 901_000


def test_set_before_the_start_leaves_the_first_items_free():
    limiter = RateLimiter(1_000, 8.0, 20, num_inserted=300)
    limiter.set(size=300, samples_per_insert=2.0)
    limiter.num_inserted = 1_000
    assert limiter.due() == 0  # Kills: 300 * 8 - 1000 * 8 carried over, which would block the learner for 3,000 inserts.
    limiter = RateLimiter(1_000, 8.0, 20, num_inserted=300)
    limiter.set(size=300, min_size=100)
    assert limiter.due() == 0
    assert limiter.may_sample(20, 300) is None and limiter.may_insert(300) is None


def test_set_a_larger_minimum_size_leaves_the_items_up_to_it_free():
    limiter = RateLimiter(100, 8.0, 20, num_inserted=500, num_sampled=3_200)
    limiter.set(size=500, min_size=2_000)
    assert limiter.may_sample(20, 500) == "the learner waits for actors: 500 of 2000 transitions to start"
    limiter.num_inserted = 2_000
    assert limiter.due() == 3_200  # Kills: 1,500 * 8 samples due at once.


# Who waits, and for how long


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def statuses(limiter, size):
    actors, learner = limiter.waits(size)
    assert (actors.who, learner.who) == ("actors", "learner")
    return [(status.reason, status.seconds, status.total_seconds) for status in (actors, learner)]


def test_waits_says_since_when_a_side_is_refused():
    clock = Clock()
    limiter = RateLimiter(10, 4.0, 8, clock=clock)
    assert statuses(limiter, 0) == [(None, 0, 0), (None, 0, 0)]
    start = "the learner waits for actors: {} of 10 transitions to start"
    assert limiter.ask_to_sample(8, 0) == start.format(0)
    clock.now += 2
    limiter.num_inserted = 9
    assert limiter.ask_to_sample(8, 9) == start.format(9)  # Asked again: still the same waiting.
    clock.now += 3
    learner = WaitStatus(who="learner", reason=start.format(9), seconds=5, total_seconds=5)
    assert limiter.waits(9) == [WaitStatus(who="actors", reason=None, seconds=0, total_seconds=0), learner]
    limiter.num_inserted = 14
    clock.now += 1
    assert limiter.ask_to_insert(14) is not None  # due = 16, 0 < 16 - 8: now actors wait, and the learner may go on.
    clock.now += 10
    assert statuses(limiter, 14) == [("actors wait for the learner: 8 more samples due", 10, 10), (None, 0, 6)]
    assert limiter.ask_to_sample(8, 14) is None
    limiter.num_sampled = 8
    clock.now += 1
    assert limiter.ask_to_sample(8, 14) is None  # Its question shows that actors may go on: theirs ends without asking.
    clock.now += 100
    assert statuses(limiter, 14) == [(None, 0, 11), (None, 0, 6)]


def test_looking_is_not_asking():
    """A question of one item for the statistics must not end, or begin, the waiting of a learner that needs eight."""
    clock = Clock()
    limiter = RateLimiter(10, 4.0, 8, num_inserted=10, num_sampled=3, clock=clock)
    assert limiter.may_sample(8, 10) is not None
    clock.now += 1
    assert statuses(limiter, 10)[1] == (None, 0, 0)
    assert limiter.ask_to_sample(8, 10) is not None
    clock.now += 2
    assert limiter.may_sample(1, 10) is None
    assert statuses(limiter, 10)[1] == ("the learner waits for actors: 1 more transitions due", 2, 2)


def test_a_smaller_question_that_is_granted_ends_the_waiting():
    clock = Clock()
    limiter = RateLimiter(10, 4.0, 8, num_inserted=10, num_sampled=3, clock=clock)
    limiter.ask_to_sample(8, 10)
    clock.now += 2
    assert limiter.ask_to_sample(5, 10) is None
    clock.now += 2
    assert statuses(limiter, 10)[1] == (None, 0, 2)


def test_a_change_of_settings_ends_a_waiting():
    clock = Clock()
    limiter = RateLimiter(10, 4.0, 8, num_inserted=20, clock=clock)
    assert limiter.ask_to_insert(20) is not None
    clock.now += 7
    limiter.set(size=20, samples_per_insert=1.0)
    assert statuses(limiter, 20)[0] == (None, 0, 7)
