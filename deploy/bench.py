"""`qfleet bench replay`: how fast shards take in and give out real Atari transitions, at which latency, and what they weigh.

The transitions come from the real path: emulator, `Actor` with random actions, n-step, chunks. The shards, handles and the
learner's `BatchSource` are those of a run; a batch counts when its stacks lie unpacked in tensors and its priorities are sent back.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from common import wire
from common.config import (
    MAX_PREFETCH_THREADS,
    ActorsConfig,
    ByteSize,
    EnvConfig,
    EnvSpec,
    ExplorationConfig,
    ReplayConfig,
    RunConfig,
)
from common.errors import UserError
from common.messages import Array, TransitionChunk
from common.metrics import PushCounts, ShardStats
from common.protocols import InsertReply, ReplayReader, SampleReply
from deploy import roles
from deploy.cpu_usage import cpu_seconds
from deploy.run_dir import hardware, versions

if TYPE_CHECKING:
    from replay_server.shard import ReplayShard

_NUM_ENVS = 8
_CHUNKS_IN_FLIGHT = 4
_PREFETCH_BATCHES = 2
_TIMEOUT_SECONDS = 300.0
RUN = "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReplayFlags:
    """Measures the replay shards alone, on transitions of a real game played at random."""

    game: str = "pong"
    """ALE game as its ROM is named."""
    transitions: int = 60_000
    """Transitions played, inserted and then sampled from."""
    n_step: int = 3
    """Steps of each transition."""
    chunk_transitions: int = 64
    """Transitions of one environment sent together."""
    batch_size: int = 512
    """Transitions of one batch, over all shards."""
    num_shards: int = 1
    """Shards, each a process where it is `--topology ray`."""
    seconds: float = 10.0
    """Of each timed phase of sampling."""
    topology: Literal["process", "ray"] = "process"
    """process: shards and learner's side in this process. ray: shards, a producer and a consumer as Ray workers."""
    unpack: bool = True
    """Whether the consumer unpacks the stacks. False: it drops the batches, so that the shards are the limit."""
    prefetch_threads: int | None = None
    """Threads that collect and unpack batches. None: one for each CPU, at most 4; 0: none, every call in turn."""
    seed: int = 0
    """Of the games, the draws and the priorities."""
    json: Path | None = None
    """Where to write the figures as JSON."""

    def __post_init__(self) -> None:
        for name in ("transitions", "n_step", "chunk_transitions", "batch_size", "num_shards", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.prefetch_threads is not None and self.prefetch_threads < 0:
            raise ValueError(f"--prefetch-threads must not be negative, got {self.prefetch_threads}")
        if self.batch_size < self.num_shards:
            raise ValueError(f"--batch-size {self.batch_size} is less than --num-shards {self.num_shards}")


@dataclass(frozen=True, slots=True)
class Timing:
    """Calls of one phase."""

    transitions_per_second: float
    p50_ms: float
    p99_ms: float


def bench_replay(flags: BenchReplayFlags) -> int:
    """Runs the benchmark, prints its figures and writes them as JSON; returns the exit status."""
    from actors.environments import check_atari_game, probe

    check_atari_game(flags.game)
    check_json(flags.json)
    spec = probe(run_config(flags).env)
    started = time.monotonic()
    messages = record_chunks(flags)
    print(
        f"{flags.transitions:,} transitions of {flags.game} played in {time.monotonic() - started:.0f} s, {len(messages)} chunks"
    )
    figures = measure(messages, spec, flags)
    for name, value in figures.items():
        print(f"{name:32} {value:,.1f}" if isinstance(value, float) else f"{name:32} {value}")
    if flags.json is not None:
        write_json(flags.json, figures)
    return 0


def check_json(path: Path | None) -> None:
    """Raises UserError where a benchmark could not write its figures."""
    if path is not None and not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: no directory that can be written to")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Writes the figures of a benchmark, with the versions and the machine."""
    path.write_text(json.dumps(figures | {"versions": versions(), "hardware": hardware()}, indent=2) + "\n")


def measure(messages: Sequence[Array], spec: EnvSpec, flags: BenchReplayFlags) -> dict[str, Any]:
    """Returns the figures of `--json`, without the machine's."""
    num_bytes = sum(len(message) for message in messages)
    about = {key: value for key, value in asdict(flags).items() if key != "json"}
    phases = _measure_in_process if flags.topology == "process" else _measure_on_ray
    figures = phases(messages, spec, flags)
    each = num_bytes / figures["inserted_transitions"]
    return figures | about | {"chunks": len(messages), "message_bytes_per_transition": each}


def record_chunks(flags: BenchReplayFlags) -> list[Array]:
    """Returns packed TransitionChunks of at least `flags.transitions`, played at random."""
    return play_chunks(run_config(flags), flags.transitions)


def play_chunks(config: RunConfig, num_transitions: int) -> list[Array]:
    """Returns packed TransitionChunks of at least so many transitions, as an actor of this run makes them; its network values all
    actions alike, so it is the exploration that says how it plays."""
    from actors.actor import Actor
    from actors.environments import make_environment

    environment = make_environment(config.env, config.actors.num_envs, num_threads=os.cpu_count() or 1)
    writer = _Recorder()
    network: Any = _ZeroNetwork(environment.spec.num_actions)
    actor = Actor(
        config=config.actors,
        environment=environment,
        network=network,
        replay=writer,
        params=NoParams(),
        run=RUN,
        slot=0,
        incarnation=0,
        seed=config.seed,
        env_steps=0,
        priority_floor=1e-3,
    )
    while writer.num_transitions < num_transitions:
        actor.step()
        actor.send_waiting(0.0)
    environment.close()
    return writer.messages


def prefetch_threads(flags: BenchReplayFlags) -> int:
    return min(os.cpu_count() or 1, MAX_PREFETCH_THREADS) if flags.prefetch_threads is None else flags.prefetch_threads


class _Recorder:
    """A replay writer that keeps what is pushed."""

    def __init__(self) -> None:
        self.messages: list[Array] = []
        self.num_transitions = 0

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        return None

    def asks_for_pause(self) -> bool:
        return False

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        self.messages += [wire.pack(chunk) for chunk in chunks]
        self.num_transitions += sum(chunk.num_transitions for chunk in chunks)
        return len(chunks)

    def counts(self) -> PushCounts:
        return PushCounts()

    def drain(self, timeout_seconds: float) -> None:
        pass


class NoParams:
    """A way to parameters that never come."""

    def poll(self, epoch: int, version: int) -> Array | None:
        return None

    def fetch(self, epoch: int, version: int, timeout_seconds: float) -> Array | None:
        return None

    def age_seconds(self) -> float | None:
        return None


class _ZeroNetwork:
    """Values all actions alike: priorities are then the rewards and the floor."""

    num_noise = 0
    value_rescaling = False

    def __init__(self, num_actions: int) -> None:
        self._num_actions = num_actions

    def __call__(self, stacks: Any, noise: Any = None) -> Any:
        return stacks.new_zeros((len(stacks), self._num_actions)).float()


class LockedShard:
    """A shard that the threads of one process may call."""

    def __init__(self, shard: ReplayShard) -> None:
        self._shard, self._lock = shard, threading.Lock()

    def insert(self, message: Array) -> InsertReply:
        with self._lock:
            return self._shard.insert(message)

    def ask_to_insert(self) -> str | None:
        with self._lock:
            return self._shard.ask_to_insert()

    def sample(self, num_items: int) -> SampleReply:
        with self._lock:
            return self._shard.sample(num_items)

    def update_priorities(self, message: Array) -> int:
        with self._lock:
            return self._shard.update_priorities(message)

    def stats(self) -> ShardStats:
        with self._lock:
            return self._shard.stats()


class Producer:
    """An actor's side: pushes chunks again and again, a few in flight."""

    def __init__(self, shards: Sequence[Any], messages: Sequence[Array]) -> None:
        self._shards, self._messages = shards, messages

    def run(self, seconds: float | None) -> tuple[float, list[float]]:
        """Pushes for so long, or None: every chunk once. Returns (seconds, seconds from push to answer of each chunk)."""
        import ray

        latencies: list[float] = []
        in_flight: dict[Any, float] = {}
        started, index = time.perf_counter(), 0
        while index < len(self._messages) if seconds is None else time.perf_counter() - started < seconds:
            while len(in_flight) < _CHUNKS_IN_FLIGHT:
                shard = self._shards[index % len(self._shards)]
                in_flight[shard.call.remote("insert", self._messages[index % len(self._messages)])] = time.perf_counter()
                index += 1
            latencies += self._collect(in_flight)
        while in_flight:
            latencies += self._collect(in_flight)
        ray.get([shard.call.remote("ask_to_insert") for shard in self._shards], timeout=_TIMEOUT_SECONDS)
        return time.perf_counter() - started, latencies

    def _collect(self, in_flight: dict[Any, float]) -> Iterator[float]:
        import ray

        ready, _ = ray.wait(list(in_flight), num_returns=1, timeout=_TIMEOUT_SECONDS)
        for reference in ready:
            reply: InsertReply = ray.get(reference, timeout=_TIMEOUT_SECONDS)
            assert reply.refusal is None, reply.refusal
            yield time.perf_counter() - in_flight.pop(reference)


class Consumer:
    """The learner's side: draws batches as fast as it can and sends new priorities back."""

    def __init__(self, readers: Sequence[ReplayReader], flags: BenchReplayFlags) -> None:
        import torch

        from learner.batches import BatchSource, shares
        from learner.inputs import Transfer

        self._shares = shares(flags.batch_size, len(readers))
        self._readers = [_TimedReader(reader) for reader in readers]
        self._flags = flags
        self._rng = np.random.default_rng(flags.seed)
        self._source = BatchSource(
            self._readers,
            num_items=self._shares,
            importance_exponent=0.4,
            prefetch_batches=_PREFETCH_BATCHES,
            prefetch_threads=prefetch_threads(flags),
            transfer=Transfer(torch.device("cpu"), lambda stacks: stacks),
        )

    def start(self) -> None:
        """Begins to prefetch, where there are threads for it."""
        self._source.start()

    def close(self) -> None:
        """Ends the threads."""
        self._source.close()

    def run(self, seconds: float) -> tuple[float, list[float], list[float]]:
        """Returns (seconds, seconds between two batches, seconds from each request until its answer is collected)."""
        self._draw()
        for reader in self._readers:
            reader.latencies.clear()
        batches: list[float] = []
        started = last = time.perf_counter()
        while last - started < seconds:
            self._draw()
            now = time.perf_counter()
            batches.append(now - last)
            last = now
        return last - started, batches, [latency for reader in self._readers for latency in list(reader.latencies)]

    def _draw(self) -> None:
        batch = self._source.next_batch(_TIMEOUT_SECONDS)
        assert batch is not None, self._source.waits_for
        self._source.update_priorities(batch, self._rng.random(self._flags.batch_size) + 1e-3)


class DroppingConsumer(Consumer):
    """Draws without unpacking: what the shards can give, not what one learner can take."""

    def start(self) -> None:
        for reader, num_items in zip(self._readers, self._shares, strict=True):
            for _ in range(_PREFETCH_BATCHES):
                reader.request(num_items)

    def _draw(self) -> None:
        from common.messages import PriorityUpdate, SampleBatch

        for reader, num_items in zip(self._readers, self._shares, strict=True):
            reply = reader.collect(_TIMEOUT_SECONDS)
            assert reply is not None and reply.batch is not None, reply and reply.waits_for
            reader.request(num_items)
            batch = wire.unpack(reply.batch, SampleBatch)
            priority = self._rng.random(len(batch.item_id)) + 1e-3
            update = PriorityUpdate(
                shard_index=batch.shard_index, shard_epoch=batch.shard_epoch, item_id=batch.item_id, priority=priority
            )
            reader.update_priorities(wire.pack(update))


class _TimedReader:
    """A replay reader that notes how long each answer took."""

    def __init__(self, reader: ReplayReader) -> None:
        self._reader = reader
        self._asked: list[float] = []
        self.latencies: list[float] = []

    def request(self, num_items: int) -> None:
        self._asked.append(time.perf_counter())
        self._reader.request(num_items)

    def num_requested(self) -> int:
        return self._reader.num_requested()

    def collect(self, timeout_seconds: float) -> SampleReply | None:
        reply = self._reader.collect(timeout_seconds)
        if reply is not None:
            self.latencies.append(time.perf_counter() - self._asked.pop(0))
        return reply

    def update_priorities(self, message: Array) -> None:
        self._reader.update_priorities(message)


def make_producer(shards: Sequence[Any], messages: Sequence[Array]) -> Producer:
    return Producer(shards, messages)


def make_consumer(readers: Sequence[ReplayReader], flags: BenchReplayFlags) -> Consumer:
    roles.limit_threads(1)
    return Consumer(readers, flags) if flags.unpack else DroppingConsumer(readers, flags)


def _measure_in_process(messages: Sequence[Array], spec: EnvSpec, flags: BenchReplayFlags) -> dict[str, Any]:
    from deploy.local_handles import LocalReplayReader

    config = run_config(flags, messages)
    shards = [LockedShard(roles.make_shard(config, spec, RUN, i, 0)) for i in range(flags.num_shards)]
    before = psutil.Process().memory_info().rss
    inserts, num_inserted = _insert_all(shards, messages)
    grown = psutil.Process().memory_info().rss - before
    consumer = make_consumer([LocalReplayReader(shard) for shard in shards], flags)
    try:
        consumer.start()
        seconds, batches, _ = consumer.run(flags.seconds)
    finally:
        consumer.close()
    return _figures(
        flags,
        num_inserted=num_inserted,
        grown=grown,
        insert=_timing(inserts, sum(inserts), num_inserted),
        sample=_timing(batches, seconds, len(batches) * flags.batch_size),
    )


def _insert_all(shards: Sequence[LockedShard], messages: Sequence[Array]) -> tuple[list[float], int]:
    """Inserts every chunk once, shard by shard in turn; returns the seconds of each, and the transitions of all."""
    seconds, num_inserted = [], 0
    for index, message in enumerate(messages):
        started = time.perf_counter()
        reply = shards[index % len(shards)].insert(message)
        seconds.append(time.perf_counter() - started)
        assert reply.refusal is None, reply.refusal
        num_inserted += reply.num_inserted
    return seconds, num_inserted


def _measure_on_ray(messages: Sequence[Array], spec: EnvSpec, flags: BenchReplayFlags) -> dict[str, Any]:
    """Inserts alone, samples alone, then both at once."""
    config = run_config(flags, messages)
    with local_ray(config) as ray:
        from deploy.ray_handles import RayReplayReader, Worker

        def answer(reference: Any) -> Any:
            return ray.get(reference, timeout=_TIMEOUT_SECONDS)

        make_worker = ray.remote(Worker).options(num_cpus=0).remote
        shards = [make_worker() for _ in range(flags.num_shards)]
        addresses = answer([shard.build.remote(roles.make_shard, config, spec, RUN, i, 0) for i, shard in enumerate(shards)])
        processes = [psutil.Process(address.pid) for address in addresses]
        producer, consumer = make_worker(), make_worker()
        answer(producer.build.remote(make_producer, shards, list(messages)))
        readers = [RayReplayReader(shard, i) for i, shard in enumerate(shards)]
        answer(consumer.build.remote(make_consumer, readers, flags))

        before = sum(process.memory_info().rss for process in processes)
        insert_seconds, inserts = answer(producer.call.remote("run", None))
        grown = sum(process.memory_info().rss for process in processes) - before
        num_inserted = sum(stats.num_inserted for stats in answer([shard.call.remote("stats") for shard in shards]))
        answer(consumer.call.remote("start"))
        cpu_before = sum(map(cpu_seconds, processes))
        seconds, batches, latencies = answer(consumer.call.remote("run", flags.seconds))
        taken = sum(map(cpu_seconds, processes)) - cpu_before
        pushing = producer.call.remote("run", flags.seconds)
        both_seconds, both_batches, both_latencies = answer(consumer.call.remote("run", flags.seconds))
        push_seconds, pushes = answer(pushing)
        per_chunk = num_inserted / len(messages)
        sample = _timing(latencies, seconds, len(batches) * flags.batch_size)
        return _figures(
            flags,
            num_inserted=num_inserted,
            grown=grown,
            insert=_timing(inserts, insert_seconds, num_inserted),
            sample=sample,
        ) | {
            "shard_cpu_per_second": taken / seconds,
            "both_insert": asdict(_timing(pushes, push_seconds, len(pushes) * per_chunk)),
            "both_sample": asdict(_timing(both_latencies, both_seconds, len(both_batches) * flags.batch_size)),
        }


@contextmanager
def local_ray(config: RunConfig) -> Iterator[Any]:
    """A Ray of its own for a benchmark, gone with its files at the end."""
    from deploy import ray_environment

    ray_environment.prepare()
    import ray

    from deploy.outcome import RunFault
    from deploy.ray_session import make_temp_dir, start_ray

    temp_dir = make_temp_dir()
    try:
        start_ray(config, temp_dir)
        yield ray
    except RunFault as error:
        raise UserError(str(error)) from error
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def _figures(flags: BenchReplayFlags, *, num_inserted: int, grown: int, insert: Timing, sample: Timing) -> dict[str, Any]:
    return {
        "inserted_transitions": num_inserted,
        "insert_transitions_per_second": insert.transitions_per_second,
        "sample_transitions_per_second": sample.transitions_per_second,
        "bytes_per_transition": grown / num_inserted,
        "insert_p50_ms": insert.p50_ms,
        "insert_p99_ms": insert.p99_ms,
        "sample_p50_ms": sample.p50_ms,
        "sample_p99_ms": sample.p99_ms,
    }


def _timing(calls: Sequence[float], seconds: float, num_transitions: float) -> Timing:
    p50, p99 = np.percentile(calls, [50, 99]) * 1e3
    return Timing(num_transitions / seconds, float(p50), float(p99))


def run_config(flags: BenchReplayFlags, messages: Sequence[Array] = ()) -> RunConfig:
    """The settings of a run that the benchmark uses: prioritized, no ratio, room for every transition."""
    num_bytes = sum(len(message) for message in messages)
    return RunConfig(
        recipe="bench",
        env=EnvConfig(game=flags.game, frame_stack=4, life_loss_terminates=False),
        actors=ActorsConfig(
            num_envs=_NUM_ENVS,
            n_step=flags.n_step,
            reward_clip=1.0,
            chunk_transitions=flags.chunk_transitions,
            exploration=ExplorationConfig(initial=1.0, final=1.0),
        ),
        replay=ReplayConfig(
            num_shards=flags.num_shards,
            capacity=max(2 * flags.transitions, flags.num_shards * 2 * flags.chunk_transitions),
            memory=ByteSize(2 * num_bytes + flags.num_shards * (16 << 20) + 128 * flags.transitions),
            min_size=1,
            samples_per_insert=None,
            priority_exponent=0.6,
        ),
        seed=flags.seed,
    )
