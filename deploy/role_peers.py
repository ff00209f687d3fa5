"""The synthetic peers of one role, and the role with a meter around it: all live in Ray workers, made by their `make_` functions.

A peer sends real messages (chunks that an actor recorded, requests as the learner's) at given times and notes when they were answered.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray

from common import wire
from common.config import EnvSpec, RunConfig
from common.messages import Array, ParamsSnapshot, PriorityUpdate, SampleBatch, TransitionChunk
from common.protocols import InsertReply, ParamsWriter, SampleReply
from deploy import open_loop, roles
from deploy.bench import RUN
from deploy.replay_logs import ShardStart

if TYPE_CHECKING:
    from deploy.bench_live import MeasuredLearner

INSERT, SAMPLE = 0, 1
LOOK = 0
LOOK_SECONDS = 1.0
"""Between two looks of one reader."""
_ANSWER_SECONDS = 60.0


class Spent(NamedTuple):
    """Seconds so far of a metered role."""

    wall: dict[str, float]
    """Inside each method, whether it had a processor or not."""
    cpu: dict[str, float]
    """Inside each method, of the thread that called it."""
    process: float
    """Processor time of the whole process, Ray's threads in it."""
    thread: float
    """Processor time of the thread that does what the worker is asked for."""

    def since(self, before: Spent) -> Spent:
        """Returns what was spent after another reading."""

        def less(now: dict[str, float], then: dict[str, float]) -> dict[str, float]:
            return {name: seconds - then.get(name, 0.0) for name, seconds in now.items()}

        return Spent(
            less(self.wall, before.wall),
            less(self.cpu, before.cpu),
            self.process - before.process,
            self.thread - before.thread,
        )


class Meter:
    """Stands before a role and counts the seconds that are spent inside each of its methods. Called by one thread."""

    def __init__(self, role: Any) -> None:
        self._role = role
        self._wall: dict[str, float] = {}
        self._cpu: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._role, name)

        def timed(*args: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return method(*args, **named)
            finally:
                self._wall[name] = self._wall.get(name, 0.0) + time.perf_counter() - wall
                self._cpu[name] = self._cpu.get(name, 0.0) + time.thread_time() - cpu

        return timed

    def spent(self) -> Spent:
        return Spent(dict(self._wall), dict(self._cpu), time.process_time(), time.thread_time())


def make_filled_shard(
    config: RunConfig, spec: EnvSpec, log: str | None, messages: Sequence[Array], num_transitions: int
) -> Meter:
    """Makes shard 0 of a run, with a durable log in a directory where one is named, and inserts so many transitions."""
    start = None if log is None else ShardStart(directory=log, state=None, keeps_samples=False)
    shard = roles.make_shard(config, spec, RUN, 0, 0, start)
    held = index = 0
    while held < num_transitions:
        reply = shard.insert(messages[index % len(messages)])
        assert reply.refusal is None, reply.refusal
        held, index = held + reply.num_inserted, index + 1
    return Meter(shard)


def make_metered_store() -> Meter:
    return Meter(roles.make_params_store())


class RayCaller(ABC):
    """Calls of one Ray worker, whose tokens are Ray's references."""

    def collect(self, tokens: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
        ready, _ = ray.wait(list(tokens), num_returns=len(tokens), timeout=0)
        if not ready and timeout_seconds > 0:
            ready, _ = ray.wait(list(tokens), num_returns=1, timeout=timeout_seconds)
        for reference in ready:
            self._take(reference, ray.get(reference, timeout=_ANSWER_SECONDS))
        return ready

    @abstractmethod
    def _take(self, reference: Any, answer: Any) -> None:
        """Takes in the answer to a call."""


class ShardCaller(RayCaller):
    """Inserts recorded chunks and samples batches; priorities of what came go back, as the learner's do, where there are any."""

    def __init__(self, shard: Any, messages: Sequence[Array], batch_size: int, *, is_prioritized: bool, seed: int) -> None:
        self._shard, self._messages, self._batch_size = shard, messages, batch_size
        self._is_prioritized = is_prioritized
        self._rng = np.random.default_rng(seed)
        self._index = int(self._rng.integers(len(messages)))

    def send(self, kind: int) -> Any:
        if kind == SAMPLE:
            return self._shard.call.remote("sample", self._batch_size)
        self._index = (self._index + 1) % len(self._messages)
        return self._shard.call.remote("insert", self._messages[self._index])

    def _take(self, reference: Any, answer: InsertReply | SampleReply) -> None:
        if isinstance(answer, InsertReply):
            assert answer.refusal is None, answer.refusal
            return
        assert answer.batch is not None, answer.waits_for
        if self._is_prioritized:
            batch = wire.unpack(answer.batch, SampleBatch)
            update = PriorityUpdate(
                shard_index=batch.shard_index,
                shard_epoch=batch.shard_epoch,
                item_id=batch.item_id,
                priority=random_priorities(self._rng, len(batch.item_id)),
            )
            self._shard.call.remote("update_priorities", wire.pack(update))


class StoreCaller(RayCaller):
    """Looks for newer parameters and maps those that it is told of. Each look is one of a reader that looked a second ago, as actors
    do: it has what was the newest then."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._learned = deque([(-np.inf, (-1, -1))])  # When, and which version; the first is what readers that look now have.
        self._asked: dict[Any, float] = {}  # By reference.
        self._known: tuple[Any, tuple[int, int]] | None = None  # The newest object, by its name, and its version.
        self.ages: list[float] = []
        """Seconds since its publication of each version that a reader had in hand; at most an answer's way too many."""

    def send(self, kind: int) -> Any:
        now = time.monotonic()
        while len(self._learned) > 1 and self._learned[1][0] <= now - LOOK_SECONDS:
            self._learned.popleft()
        reference = self._store.call.remote("latest", *self._learned[0][1])
        self._asked[reference] = now
        return reference

    def _take(self, reference: Any, answer: Any) -> None:
        asked = self._asked.pop(reference)
        if answer is None:
            return
        named = answer.message
        message = ray.get(named, timeout=_ANSWER_SECONDS) if isinstance(named, ray.ObjectRef) else named
        version = self._version_of(named, message)
        if version > self._learned[-1][1]:
            self._learned.append((time.monotonic(), version))
        self.ages.append(answer.age_seconds + time.monotonic() - asked)

    def _version_of(self, named: Any, message: Array) -> tuple[int, int]:
        """Reads an object once, however many readers are told of it: in a fleet that is the actors' work, on their cores."""
        name = named.hex() if isinstance(named, ray.ObjectRef) else None
        if name is None or self._known is None or self._known[0] != name:
            snapshot = wire.unpack(message, ParamsSnapshot)
            self._known = name, (snapshot.epoch, snapshot.version)
        return self._known[1]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one peer tells of one schedule."""

    answers: open_loop.Answers
    ages: list[float]
    """Of parameters, see `StoreCaller.ages`; empty for other callers."""


class Peer:
    """Sends what schedules say. Lives in a worker of its own."""

    def __init__(self, caller: ShardCaller | StoreCaller) -> None:
        self._caller = caller

    def run(self, schedule: open_loop.Schedule, began: float, drain_seconds: float) -> Seen:
        """Runs one schedule, from a time of this host's monotonic clock on."""
        if isinstance(self._caller, StoreCaller):
            self._caller.ages.clear()
        answers = open_loop.run(schedule, self._caller, began=began, drain_seconds=drain_seconds)
        return Seen(answers, list(getattr(self._caller, "ages", ())))


def make_shard_peer(shard: Any, messages: Sequence[Array], batch_size: int, is_prioritized: bool, seed: int) -> Peer:
    return Peer(ShardCaller(shard, messages, batch_size, is_prioritized=is_prioritized, seed=seed))


def make_store_peer(store: Any) -> Peer:
    return Peer(StoreCaller(store))


def random_priorities(rng: np.random.Generator, num: int) -> Array:
    """Returns f64[num], spread as TD errors of a network that learns are: a few large, none zero."""
    return rng.gamma(2.0, 0.5, num) + 0.01


def with_random_priorities(messages: Sequence[Array], seed: int) -> list[Array]:
    """Returns chunks whose transitions do not all have the priority that random play without values gives them."""
    from dataclasses import replace

    rng = np.random.default_rng(seed)
    chunks = [wire.unpack(message, TransitionChunk) for message in messages]
    return [wire.pack(replace(chunk, priority=random_priorities(rng, chunk.num_transitions))) for chunk in chunks]


class Answering(NamedTuple):
    """How a synthetic shard answers."""

    batches_per_second: float | None
    """At most so many, evenly spaced. None: as many as it is asked for."""
    latency_seconds: float
    """From a request to its answer, at the least."""


class SyntheticShard:
    """A replay reader that answers with batches that lie ready, at a given rate and with a given latency.

    Requests are answered in their order. A request that is collected is one answer; what its rate would have given while nobody asked
    is lost, as a shard's time is. Called by the learner's prefetch threads, one at a time.
    """

    def __init__(
        self,
        messages: Sequence[Array],
        answering: Answering,
        clock: Any = time.monotonic,
        sleep: Any = time.sleep,
    ) -> None:
        self._messages, self._answering = messages, answering
        self._clock, self._sleep = clock, sleep
        self._ready_at: deque[float] = deque()
        self._last_ready = -np.inf
        self._index = 0
        self.num_priority_updates = 0

    def request(self, num_items: int) -> None:
        rate = self._answering.batches_per_second
        ready = self._clock() + self._answering.latency_seconds
        if rate is not None:
            ready = max(ready, self._last_ready + 1.0 / rate)
        self._last_ready = ready
        self._ready_at.append(ready)

    def num_requested(self) -> int:
        return len(self._ready_at)

    def collect(self, timeout_seconds: float) -> SampleReply | None:
        wait = self._ready_at[0] - self._clock()
        if wait > 0:
            self._sleep(min(wait, timeout_seconds))
        if wait > timeout_seconds:
            return None
        self._ready_at.popleft()
        self._index = (self._index + 1) % len(self._messages)
        return SampleReply(batch=self._messages[self._index], waits_for=None)

    def update_priorities(self, message: Array) -> None:
        self.num_priority_updates += 1


def make_loaded_learner(
    config: RunConfig,
    spec: EnvSpec,
    directory: str,
    num_threads: int,
    batches: Mapping[int, Sequence[Array]],
    answering: Answering,
    params: ParamsWriter,
) -> MeasuredLearner:
    """Makes the learner of a run, with synthetic shards.

    Args:
      batches: packed SampleBatches, by their number of items.
      answering: of each shard.
    """
    from deploy.bench_live import make_measured_learner
    from learner.batches import shares

    readers = [
        SyntheticShard(batches[share], answering) for share in shares(config.learner.batch_size, config.replay.num_shards)
    ]
    return make_measured_learner(config, spec, RUN, directory, 0, None, num_threads, readers, params)


def record_batches(config: RunConfig, spec: EnvSpec, messages: Sequence[Array], num_batches: int) -> dict[int, list[Array]]:
    """Returns packed SampleBatches as a shard of this run draws them, for each number of items that one is asked for."""
    from learner.batches import shares

    shard = roles.make_shard(config, spec, RUN, 0, 0)
    for message in messages:
        assert shard.insert(message).refusal is None
    drawn: dict[int, list[Array]] = {}
    for share in set(shares(config.learner.batch_size, config.replay.num_shards)):
        replies = [shard.sample(share) for _ in range(num_batches)]
        drawn[share] = [reply.batch for reply in replies if reply.batch is not None]
        assert len(drawn[share]) == num_batches, replies[0].waits_for
    return drawn
