from __future__ import annotations

import itertools

import pytest

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


def blocked_states(*, min_size, samples_per_insert, buffer_samples, batch, chunk, capacity=12, most_inserted=40):
    """Walks every state that obedient actors and an obedient learner can reach; returns those where both must wait."""
    seen, todo, blocked = {(0, 0)}, [(0, 0)], []
    while todo:
        num_inserted, num_sampled = todo.pop()
        limiter = RateLimiter(min_size, samples_per_insert, buffer_samples, num_inserted, num_sampled)
        size = min(num_inserted, capacity)
        nexts = []
        if limiter.may_insert(size) is None:
            nexts.append((num_inserted + chunk, num_sampled))
        if limiter.may_sample(batch, size) is None:
            nexts.append((num_inserted, num_sampled + batch))
        if not nexts:
            blocked.append((num_inserted, num_sampled))
        for state in nexts:
            if state not in seen and state[0] <= most_inserted:
                seen.add(state)
                todo.append(state)
    assert max(state[1] for state in seen) > 0 or blocked, "the walk never sampled: it shows nothing"
    return blocked


GRID = list(itertools.product([1, 4, 7], [0.3, 0.78, 1.0, 2.5, 8.0], [1, 3, 5], [1, 2, 5]))


@pytest.mark.parametrize("buffer_per_batch", [1.0, 0.5])
def test_no_reachable_state_blocks_both_sides(buffer_per_batch):
    """The buffer of one batch that the configuration demands, and half of it, the limit that the docstring names."""
    for min_size, samples_per_insert, half_batch, chunk in GRID:
        batch = 2 * half_batch
        blocked = blocked_states(
            min_size=min_size,
            samples_per_insert=samples_per_insert,
            buffer_samples=int(batch * buffer_per_batch),
            batch=batch,
            chunk=chunk,
        )
        assert blocked == [], (min_size, samples_per_insert, batch, chunk)


def test_the_walk_has_power():
    """A batch of more than two buffers does block both sides: the test above would see it."""
    blocked = blocked_states(min_size=1, samples_per_insert=1.0, buffer_samples=1, batch=4, chunk=1)
    assert blocked == [(3, 0)]  # due = 2: actors have 0 < 2 - 1, the learner 0 + 4 > 2 + 1.


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
