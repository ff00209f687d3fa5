"""Every state that obedient actors and an obedient learner can reach, for every small configuration: nobody waits for ever.

The limiter's answers depend on the shard's size and on the balance `num_sampled - due` alone, so the endless walk over
counters folds into finitely many states, and the search is complete. The ratios are sums of powers of two: balances are
exact, and two states are one where they are equal.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest

from common.errors import UserError
from replay_server.limiter import RateLimiter

MAX_BALANCE = 100.0  # Far beyond every buffer, chunk and batch here: a state there is on its way to infinity.


class Case(NamedTuple):
    """A small configuration. Chunks have 1 to `chunk` transitions; an actor has `in_flight` of them on their way at most."""

    min_size: int
    capacity: int
    ratio: float | None
    buffer: int
    batch: int
    chunk: int
    in_flight: int


class State(NamedTuple):
    """One representative of all states of equal size, balance and chunks on their way."""

    limiter: int
    """Which of the limiters that the walk started from."""
    size: int
    num_inserted: int
    num_sampled: int
    on_their_way: tuple[int, ...]


class Walk(NamedTuple):
    num_states: int
    num_sampling: int
    """States in which the learner may sample."""
    blocked: list[State]
    """States in which nobody may go on."""
    starved: list[State]
    """States from which the learner can wait for ever while actors insert, with a loop or without an end."""
    reached: list[State]


def forced(case: Case, **counters: int) -> RateLimiter:
    """A limiter of any settings, also of those that it refuses when it is built."""
    limiter = RateLimiter(case.min_size, None, 0, **counters)
    limiter.samples_per_insert, limiter.buffer_samples = case.ratio, case.buffer
    return limiter


def walk(
    limiters: list[RateLimiter], starts: Iterable[State], case: Case, *, loses_items: bool = False, keeps_all: bool = False
) -> Walk:
    """Breadth first over all that can happen next: a chunk leaves, a chunk arrives, a batch is drawn.

    `loses_items`: every insert may also evict any number of items more (a shard whose memory is full before its capacity).
    """
    ratio = case.ratio

    def key(state: State) -> Any:
        limiter = limiters[state.limiter]
        limiter.num_inserted, limiter.num_sampled = state.num_inserted, state.num_sampled
        balance = None if ratio is None else state.num_sampled - limiter.due()
        return state.size, balance, state.on_their_way

    seen: dict[Any, State] = {}
    todo: list[State] = []
    inserts_of_starving: dict[Any, list[Any]] = {}
    blocked, starved, num_sampling = [], [], 0

    def meet(state: State) -> Any:
        name = key(state)
        if name not in seen:
            seen[name] = state
            todo.append(state)
        return name

    for start in starts:
        meet(start)
    for state in todo:  # It grows as it is walked.
        limiter = limiters[state.limiter]
        name = key(state)
        if name[1] is not None and abs(name[1]) > MAX_BALANCE:
            starved.append(state)
            continue
        may_insert, may_sample = limiter.may_insert(state.size) is None, limiter.may_sample(case.batch, state.size) is None
        nexts: list[tuple[int, tuple[int, ...]]] = []  # Transitions that arrive now, and chunks on their way after that.
        if may_insert:
            for num in range(1, case.chunk + 1):
                if case.in_flight == 0:
                    nexts.append((num, ()))
                elif len(state.on_their_way) < case.in_flight:
                    meet(state._replace(on_their_way=tuple(sorted((*state.on_their_way, num)))))
        for index, num in enumerate(state.on_their_way):
            nexts.append((num, state.on_their_way[:index] + state.on_their_way[index + 1 :]))
        arrived = []
        for num, rest in nexts:
            most = min(state.size + num, case.capacity)
            for size in range(num if loses_items else most, most + 1):
                arrived.append(meet(State(state.limiter, size, state.num_inserted + num, state.num_sampled, rest)))
        if may_sample:
            num_sampling += 1
            meet(state._replace(num_sampled=state.num_sampled + case.batch))
        else:
            inserts_of_starving[name] = arrived
        if not (may_insert or may_sample or state.on_their_way):
            blocked.append(state)
    # A state where the learner waits is harmless once every insert leads to harmless ones: what remains has loops.
    waiting = {} if starved or blocked or loses_items else dict(inserts_of_starving)
    while harmless := [name for name, arrived in waiting.items() if not any(after in waiting for after in arrived)]:
        for name in harmless:
            del waiting[name]
    starved += [seen[name] for name in waiting]
    return Walk(len(seen), num_sampling, blocked, starved, list(seen.values()) if keeps_all else [])


def walk_from_empty(case: Case, limiter: RateLimiter | None = None, **options: bool) -> Walk:
    return walk([limiter or forced(case)], [State(0, 0, 0, 0, ())], case, **options)


def cases(**values: Any) -> list[Case]:
    return [Case(*row) for row in itertools.product(*(values[name] for name in Case._fields))]


RATIOS = [0.125, 0.25, 0.75, 1.0, 1.5, 2.5, 8.0]
GRID = cases(
    min_size=[1, 2, 4, 5], capacity=[5, 7], ratio=RATIOS, buffer=[1, 2, 3, 4], batch=range(1, 9), chunk=[1, 2, 5], in_flight=[0]
)
GRID += cases(min_size=[1, 3], capacity=[3, 4], ratio=RATIOS, buffer=[1, 2], batch=range(1, 5), chunk=[1, 2], in_flight=[1, 2])
GRID += cases(min_size=[1, 3], capacity=[3, 4], ratio=[None], buffer=[0, 1], batch=[1, 5], chunk=[1, 3], in_flight=[0, 2])
LIVE = [case for case in GRID if case.ratio is None or case.batch <= 2 * case.buffer]


def accepted(case: Case) -> RateLimiter:
    return RateLimiter(case.min_size, case.ratio, case.buffer, capacity=case.capacity, batch_items=case.batch)


def test_no_reachable_state_of_an_accepted_configuration_blocks_anybody():
    """A chunk may pay for more samples than the buffer holds, and chunks may be on their way: neither can block."""
    num_states = 0
    for case in LIVE:
        found = walk_from_empty(case, accepted(case))
        assert (found.blocked, found.starved) == ([], []), case
        assert found.num_sampling > 0, case
        num_states += found.num_states
    assert len(LIVE) > 4_000 and num_states > 100_000
    assert any(case.ratio is not None and case.ratio * case.chunk > 10 * case.buffer for case in LIVE)


class StrictSampler(RateLimiter):
    """Refuses the sample that would just fit."""

    def may_sample(self, num_items, size):
        return RateLimiter.may_sample(self, num_items + 1, size)


class OneSidedBuffer(RateLimiter):
    """Gives the buffer to the learner alone."""

    def may_insert(self, size):
        may = size < self.min_size or self.num_sampled >= self.due()
        return None if may else "actors wait"


class LateStarter(RateLimiter):
    """Lets actors fill a shard to its minimum size less one."""

    def may_insert(self, size):
        return "actors wait" if size == self.min_size - 1 else RateLimiter.may_insert(self, size)


@pytest.mark.parametrize("limiter_class", [StrictSampler, OneSidedBuffer, LateStarter])
def test_the_walk_finds_a_limiter_that_blocks(limiter_class):
    found = [walk_from_empty(case, limiter_class(*case[:1], *case[2:4])) for case in LIVE[::4] if case.ratio is not None]
    assert sum(bool(one.blocked) for one in found) > 20


def test_items_lost_to_memory_block_nobody():
    """A shard may lose items at any insert and fall below its minimum size again."""
    for case in LIVE:
        if case.in_flight == 0 and case.capacity == 5 and case.ratio in (0.75, 2.5) and case.buffer == 2:
            assert walk_from_empty(case, accepted(case), loses_items=True).blocked == [], case


def test_batches_above_two_buffers_are_refused_and_block():
    """Both wait where buffer < -balance and -balance < batch - buffer. Balances are multiples of a grain, so such a state is
    there if and only if a multiple of the grain lies between; every one is reached.

    So the refusal is exact but for ratios so coarse that no balance fits between: there it is overcautious.
    """
    num_blocking = num_overcautious = 0
    for case in cases(
        min_size=[1, 2], capacity=[4], ratio=RATIOS, buffer=[-1, 0, 1, 2, 3], batch=range(1, 13), chunk=[1, 3], in_flight=[0]
    ):
        if case.batch <= 2 * case.buffer:
            continue
        with pytest.raises(UserError, match=r"raise --replay\.limiter-buffer-samples or lower --learner\.batch-size"):
            accepted(case)
        ratio = Fraction(str(case.ratio))
        grain = Fraction(math.gcd(case.batch * ratio.denominator, ratio.numerator), ratio.denominator)
        next_balance = (math.floor(case.buffer / grain) + 1) * grain
        has_state_between = next_balance < case.batch - case.buffer
        assert bool(walk_from_empty(case).blocked) == has_state_between, case
        num_blocking += has_state_between
        num_overcautious += not has_state_between
        assert has_state_between or case.batch - 2 * case.buffer <= grain
    assert num_blocking > 5 * num_overcautious > 0


def test_a_minimum_size_above_capacity_is_refused_and_starves_the_learner():
    for case in LIVE:
        case = case._replace(min_size=case.capacity + 1)
        with pytest.raises(UserError, match=r"raise --replay\.capacity or lower --replay\.min-size"):
            accepted(case)
        if case.in_flight == 0 and case.batch == 1 and case.buffer == 1:
            found = walk_from_empty(case)
            assert found.starved and found.num_sampling == 0, case


@pytest.mark.parametrize("min_size", [0, -3])
def test_a_minimum_size_below_one_is_refused_and_samples_nothing(min_size):
    """Not a deadlock: the learner could draw from an empty shard."""
    with pytest.raises(UserError, match=r"raise --replay\.min-size"):
        RateLimiter(min_size, None, 0)
    limiter = RateLimiter(1, None, 0)
    limiter.min_size = min_size
    assert limiter.may_sample(1, 0) is None


@pytest.mark.parametrize("ratio", [0.0, -0.25, -8.0, math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_not_positive_and_finite_is_refused_and_stops_a_side(ratio):
    """The learner comes to an end, or the actors do where the ratio is infinite, or both where it is no number."""
    for case in LIVE:
        if case.ratio != 1.0 or case.in_flight:
            continue
        case = case._replace(ratio=ratio)
        with pytest.raises(UserError, match=r"--replay\.samples-per-insert must be positive"):
            accepted(case)
        size = num_inserted = num_sampled = last_insert = last_sample = 0
        for turn in range(100):
            due = (num_inserted - case.min_size) * ratio  # The law, written anew: its sentences expect a ratio that works.
            may_sample = size >= case.min_size and num_sampled + case.batch <= due + case.buffer
            may_insert = size < case.min_size or num_sampled >= due - case.buffer
            if may_sample:
                num_sampled, last_sample = num_sampled + case.batch, turn
            if may_insert:
                num_inserted, last_insert = num_inserted + case.chunk, turn
                size = min(size + case.chunk, case.capacity)
        assert min(last_insert, last_sample) < 50, case


def test_an_accepted_configuration_needs_no_larger_buffer_for_chunks():
    """One chunk pays for 40 samples, the buffer is 1: still neither side waits for ever, they only take longer turns."""
    case = Case(min_size=1, capacity=5, ratio=8.0, buffer=1, batch=2, chunk=5, in_flight=2)
    found = walk_from_empty(case, accepted(case))
    assert (found.blocked, found.starved) == ([], [])


def test_rounding_never_blocks_both_sides():
    """Ratios that are no sums of powers of two, after up to 10**12 inserts, at the edges where a sum is rounded."""
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        ratio = float(pick_ratio(rng))
        buffer = int(rng.integers(1, 50))
        num_inserted = int(10 ** rng.uniform(0, 12)) + 1
        limiter = RateLimiter(1, ratio, buffer, num_inserted=num_inserted, batch_items=2 * buffer)
        limiter.num_sampled = max(round(limiter.due()) - buffer + int(rng.integers(-1, 2)), 0)
        assert limiter.may_insert(1) is None or limiter.may_sample(2 * buffer, 1) is None, limiter


def pick_ratio(rng):
    return rng.choice([0.1, 0.3, 0.78, 1 / 3, 2.1, rng.uniform(0.01, 64)])


# While the run goes on

SETTINGS = cases(
    min_size=[1, 4], capacity=[4], ratio=[None, 0.25, 1.0, 8.0], buffer=[1, 3], batch=[2], chunk=[3], in_flight=[0]
)


def changed_in_every_state(before: Case, after: Case) -> tuple[list[RateLimiter], list[State]]:
    """Walks `before` and changes to `after` in every state; returns the limiters and the states they start from."""
    reached = walk_from_empty(before, accepted(before), keeps_all=True).reached
    limiters, starts = [], []
    for state in reached:
        limiter = accepted(before)
        limiter.num_inserted, limiter.num_sampled = state.num_inserted, state.num_sampled
        limiter.set(size=state.size, min_size=after.min_size, samples_per_insert=after.ratio, buffer_samples=after.buffer)
        starts.append(state._replace(limiter=len(limiters)))
        limiters.append(limiter)
    return limiters, starts


def test_no_change_in_any_reachable_state_blocks_anybody():
    for before, after in itertools.product(SETTINGS, SETTINGS):
        limiters, starts = changed_in_every_state(before, after)
        found = walk(limiters, starts, after)
        assert (found.blocked, found.starved) == ([], []), (before, after)


def burst(limiter: RateLimiter, size: int, case: Case, *, of_samples: bool) -> int:
    """Samples, or inserts beyond those that fill the shard to its minimum size, that are allowed in a row, up to 1,000."""
    limiter = copy.copy(limiter)
    num = 0
    while num < 1_000:
        if of_samples:
            if limiter.may_sample(case.batch, size) is not None:
                return num
            limiter.num_sampled += case.batch
            num += case.batch
        else:
            if limiter.may_insert(size) is not None:
                return num
            limiter.num_inserted += 1
            num += size >= case.min_size
            size = min(size + 1, case.capacity)
    return num


def test_a_change_makes_no_burst():
    """Right after it neither side gets more in a row than the new buffer holds, whatever had been before it."""
    for before, after in itertools.product(SETTINGS, SETTINGS):
        if after.ratio is None:
            continue
        limiters, starts = changed_in_every_state(before, after)
        for limiter, start in zip(limiters, starts, strict=True):
            assert limiter.may_insert(start.size) is None
            assert burst(limiter, start.size, after, of_samples=True) <= 2 * after.buffer
            assert burst(limiter, start.size, after, of_samples=False) <= 2 * after.buffer / after.ratio + 1


def test_a_change_without_closing_the_past_would_make_one():
    """The test above has power: with the new numbers put in the old account a side gets a thousand in a row."""
    case = Case(min_size=1, capacity=4, ratio=1.0, buffer=3, batch=2, chunk=1, in_flight=0)
    limiter = RateLimiter(1, 1.0, 3, num_inserted=5_001, num_sampled=5_000)
    limiter.samples_per_insert = 0.25
    assert burst(limiter, 4, case, of_samples=False) == 1_000
    limiter.samples_per_insert = 8.0
    assert burst(limiter, 4, case, of_samples=True) == 1_000


@pytest.mark.parametrize("ratio", [0.25, 1.0, 8.0])
def test_the_new_ratio_holds_from_the_change_on(ratio):
    """A run of ratio 4 with 5,000 inserts behind it; the sides then alternate, each as far as it may."""
    limiter = RateLimiter(10, 4.0, 20, num_inserted=5_010, num_sampled=20_000)
    limiter.set(size=100, samples_per_insert=ratio)
    for turn in range(3_000):
        if turn % 3 and limiter.may_insert(100) is None:
            limiter.num_inserted += 3
        if limiter.may_sample(10, 100) is None:
            limiter.num_sampled += 10
    inserted, sampled = limiter.num_inserted - 5_010, limiter.num_sampled - 20_000
    assert inserted > 500 and sampled > 500
    assert abs(sampled - ratio * inserted) <= 20 + 3 * ratio


# Several shards, and a learner that needs a part of each


def blocked_pairs(ratio, buffer, batch, chunk, *, depth, takes_turns):
    """Walks two shards, chunks of 1 to `chunk`; returns the states where nobody may go on.

    The learner holds up to `depth` parts of each and uses one of each together; actors push to any shard that lets them or,
    with `takes_turns`, to one after the other and wait for the one whose turn it is.
    """
    limiters = [RateLimiter(1, ratio, buffer) for _ in range(2)]
    seen, todo, blocked = set(), [], []

    def meet(shards, held, turn):
        while min(held):
            held = (held[0] - 1, held[1] - 1)
        name = (tuple((size, sampled - (inserted - 1) * ratio) for size, inserted, sampled in shards), held, turn)
        if name not in seen:
            seen.add(name)
            todo.append((shards, held, turn))

    meet(((0, 0, 0), (0, 0, 0)), (0, 0), 0)
    for shards, held, turn in todo:
        num_nexts = 0
        for index, (size, inserted, sampled) in enumerate(shards):
            limiter = limiters[index]
            limiter.num_inserted, limiter.num_sampled = inserted, sampled

            def with_shard(shard, index=index, shards=shards):
                return (shard, shards[1]) if index == 0 else (shards[0], shard)

            if limiter.may_insert(size) is None and (not takes_turns or turn == index):
                num_nexts += 1
                for num in range(1, chunk + 1):
                    meet(with_shard((min(size + num, 2), inserted + num, sampled)), held, 1 - turn if takes_turns else 0)
            if held[index] < depth and limiter.may_sample(batch, size) is None:
                num_nexts += 1
                more = (held[0] + 1, held[1]) if index == 0 else (held[0], held[1] + 1)
                meet(with_shard((size, inserted, sampled + batch)), more, turn)
        if not num_nexts:
            blocked.append((shards, held, turn))
    return blocked


PAIRS = [
    (ratio, buffer, batch, chunk) for ratio in (0.5, 1.0, 2.5) for buffer, batch in ((1, 1), (1, 2), (2, 3)) for chunk in (1, 2)
]


@pytest.mark.parametrize("depth", [1, 2])
def test_two_shards_and_one_learner_never_wait_for_each_other(depth):
    for pair in PAIRS:
        assert blocked_pairs(*pair, depth=depth, takes_turns=False) == [], pair


def test_actors_that_wait_for_their_turn_would_block_two_shards():
    """Why actors go past a shard that asks for a pause; and the proof that the walk above sees a deadlock."""
    assert sum(bool(blocked_pairs(*pair, depth=1, takes_turns=True)) for pair in PAIRS) > 0
