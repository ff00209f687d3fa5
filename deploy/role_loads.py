"""One role of a run in a Ray worker, as a run has it, with synthetic peers that load it: what `deploy/scale_role.py` measures.

The units of rates: a shard's are transitions a second, the store's looks a second (an actor looks about once a second, so a look is an
actor), the learner's updates a second.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray

from common import wire
from common.config import EnvSpec, ExplorationConfig, RunConfig
from common.messages import Array, ParamsSnapshot, TransitionChunk
from deploy import cpu_usage, open_loop, roles
from deploy.bench import RUN, play_chunks
from deploy.plan import network_size, plan_cpus
from deploy.ray_handles import Worker
from deploy.ray_params import RayParamsWriter
from deploy.role_peers import (
    INSERT,
    LOOK,
    SAMPLE,
    Answering,
    Seen,
    Spent,
    make_filled_shard,
    make_loaded_learner,
    make_metered_store,
    make_shard_peer,
    make_store_peer,
    record_batches,
    with_random_priorities,
)
from deploy.run_dir import num_cpus

_PLAYED = 10_000  # Transitions that are played, and sent again and again.
_HELD = 100_000  # Transitions in the shard, as far as its share has room for them.
_RECORDED_BATCHES = 8
_MAX_IN_FLIGHT = 256
_CLOSED_IN_FLIGHT = 64
_LEAST_IN_FLIGHT = 16
_MOST_CALLS_PER_SECOND = 20_000
_STORE_PEERS = 4
_VERSION_SECONDS = 1.0
_DRAIN_SECONDS = 2.0
_LEAD_SECONDS = 0.3  # For a schedule to reach the peers.
_TIMEOUT_SECONDS = 300.0
_BUSY = 0.9  # Of a processor, from which on a thread counts as all that it can do.
_FULL = 0.95  # Of the host, from which on its processors do.
_SHORT = 0.03  # Of what was offered, from which on a point counts as not carried,
_FEWEST_MISSING = 8  # where so many calls are missing at least: fewer are on their way when the time is over.


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What is offered once in a round."""

    axis: str
    offered: float | None
    """Per second, in the role's unit. None: as fast as it is answered."""
    prefetch_batches: int | None = None
    """Learner: in place of the recipe's."""
    answer_seconds: float = 0.0
    """Learner: from a request to a shard's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of call at one point in one round: a line of the CSV. NaN: does not apply."""

    role: str
    axis: str
    call: str
    unit: str
    round: int = 0
    loop: str
    """closed: a few calls under way at all times; open: at the offered rate, whatever is answered."""
    offered_per_second: float
    carried_per_second: float
    shortfall: float
    """Part of what was offered that was not answered in its time; 0 below 3 %, or where fewer than 8 calls are missing."""
    p50_ms: float = math.nan
    """From when a call was due to its answer; learner: from the end of an update to the end of the next."""
    p95_ms: float = math.nan
    p99_ms: float = math.nan
    sent_late_p99_ms: float = math.nan
    role_cpu_cores: float
    """Processors that the role's process took, with Ray's threads in it."""
    role_thread_cores: float
    """Its thread that does the work: at 1 it can do no more."""
    role_busy_fraction: float
    """Part of the wall-clock time that it was inside the role's methods, whether it had a processor or not."""
    role_cpu_us_each: float
    """Processor time of the process for each transition, look or update; NaN where calls of two kinds share it."""
    role_thread_us_each: float
    """The same, of its thread that does the work."""
    method_cpu_us_each: float
    """The same, inside the role's methods: what is left is Ray's way there and back. A sample has its priorities in it."""
    peers_cpu_cores: float
    busiest_peer_thread_cores: float
    host_cpu_fraction: float
    limited_by: str
    """role, peers, cores or transport (Ray between them): what a shortfall came from; cores also where they were full without one."""
    wait_fraction: float = math.nan
    """Learner: part of the time without a batch."""
    prefetch_batches: float = math.nan
    answer_ms: float = math.nan
    params_age_p50_seconds: float = math.nan
    params_age_p99_seconds: float = math.nan


def limited_by(*, is_short: bool, role_thread: float, busiest_peer: float, host: float) -> str:
    """Returns what held a point back: see `Row.limited_by`; empty where everything was carried with processors to spare."""
    if is_short and role_thread >= _BUSY:
        return "role"
    if is_short and busiest_peer >= _BUSY:
        return "peers"
    if host >= _FULL:
        return "cores"
    return "transport" if is_short else ""


def shortfall_of(offered: float, carried: float, num_missing: float) -> float:
    """Returns the part of what was offered that was not carried, see `Row.shortfall`; rates in any unit."""
    part = 1.0 - carried / offered if offered > 0 else 0.0
    return part if part > _SHORT and num_missing >= _FEWEST_MISSING else 0.0


class Measured(NamedTuple):
    """One schedule of all peers."""

    seen: list[Seen]
    role: cpu_usage.Usage
    """Of the role's process, and of the host."""
    peers: cpu_usage.Usage
    spent: Spent
    """By the role, over all of the schedule."""


class Peered:
    """A role's worker and its peers' workers."""

    def __init__(self, role: Any, pid: int, peers: Sequence[Any], peer_pids: Sequence[int]) -> None:
        self._role, self._peers = role, peers
        self._process = psutil.Process(pid)
        self._peer_processes = [psutil.Process(peer_pid) for peer_pid in peer_pids]
        self.every_second: Callable[[], None] = lambda: None
        """Called about so often while peers send."""

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    def measure(self, schedules: Sequence[open_loop.Schedule]) -> Measured:
        """Has each peer run its schedule, all from the same moment on."""
        spent_before: Spent = ask(self._role, "spent")
        began = time.monotonic() + _LEAD_SECONDS
        runs = [
            peer.call.remote("run", schedule, began, _DRAIN_SECONDS)
            for peer, schedule in zip(self._peers, schedules, strict=True)
        ]
        everyone = [self._process, *self._peer_processes]
        self._sleep_until(began + schedules[0].warm_up)
        before = cpu_usage.read(everyone)
        self._sleep_until(began + schedules[0].end)
        usage = cpu_usage.between(before, cpu_usage.read(everyone))
        seen: list[Seen] = ray.get(runs, timeout=_TIMEOUT_SECONDS)
        spent: Spent = ask(self._role, "spent")
        return Measured(
            seen,
            replace(usage, processes=usage.processes[:1], main_threads=usage.main_threads[:1]),
            replace(usage, processes=usage.processes[1:], main_threads=usage.main_threads[1:]),
            spent.since(spent_before),
        )

    def _sleep_until(self, when: float) -> None:
        while (left := when - time.monotonic()) > 0:
            self.every_second()
            time.sleep(min(left, _VERSION_SECONDS / 4))


class PeeredLoad(ABC):
    """A shard or a store under load: makes schedules of points, and rows of what was measured."""

    role: str
    kinds: Mapping[int, str]
    """What is called."""
    methods: Mapping[int, Sequence[str]]
    """The role's methods that a call of each kind, and what follows from it, is served by."""
    unit: str
    per_call: Sequence[float]
    """Of each kind, the transitions or looks that a call stands for."""

    def __init__(self, peered: Peered, max_in_flight: int, seed: int) -> None:
        self._peered, self._max_in_flight = peered, max_in_flight
        self._rng = np.random.default_rng(seed)

    @abstractmethod
    def calls_per_second(self, point: Point) -> list[float]:
        """Returns the rate of each kind for an offered rate of one unit a second."""

    def measure(self, point: Point, seconds: float) -> list[Row]:
        """Measures one point, a row for each kind of call."""
        warm_up, num_peers = seconds / 4, self._peered.num_peers
        shares = self.calls_per_second(point)
        schedules = [
            open_loop.closed_loop(
                shares,
                warm_up=warm_up,
                seconds=seconds,
                max_in_flight=-(-min(_CLOSED_IN_FLIGHT, self._max_in_flight) // num_peers),
                most=int(_MOST_CALLS_PER_SECOND * 1.25 * seconds / num_peers),
            )
            if point.offered is None
            else open_loop.poisson(
                self._rng,
                [point.offered * share / num_peers for share in shares],
                warm_up=warm_up,
                seconds=seconds,
                max_in_flight=-(-self._max_in_flight // num_peers),
            )
            for _ in range(num_peers)
        ]
        measured = self._peered.measure(schedules)
        return [self._row(point, measured, kind, warm_up, seconds) for kind in self.kinds if shares[kind] > 0]

    def _row(self, point: Point, measured: Measured, kind: int, warm_up: float, seconds: float) -> Row:
        answers, is_open = [seen.answers for seen in measured.seen], point.offered is not None
        each = self.per_call[kind]
        summary = open_loop.summarize(answers, kind, warm_up=warm_up, seconds=seconds)
        carried = each * summary.carried_per_second
        offered = each * summary.offered_per_second if is_open else math.nan
        missing = (summary.offered_per_second - summary.carried_per_second) * seconds
        shortfall = shortfall_of(offered, carried, missing) if is_open else math.nan
        num_answered = sum(int((~np.isnan(part.answered[part.kind == kind])).sum()) for part in answers)
        spent = measured.spent
        in_methods = sum(spent.cpu.get(method, 0.0) for method in self.methods[kind])
        us_each = 1e6 / max(num_answered * each, 1.0)
        is_alone = sum(share > 0 for share in self.calls_per_second(point)) == 1
        ages = [age for seen in measured.seen for age in seen.ages]
        ages_p50, ages_p99 = np.percentile(ages, (50, 99)).tolist() if ages else (math.nan, math.nan)
        return Row(
            role=self.role,
            axis=point.axis,
            call=self.kinds[kind],
            unit=self.unit,
            loop="open" if is_open else "closed",
            offered_per_second=offered,
            carried_per_second=carried,
            shortfall=shortfall,
            p50_ms=1e3 * summary.p50 if is_open else math.nan,
            p95_ms=1e3 * summary.p95 if is_open else math.nan,
            p99_ms=1e3 * summary.p99 if is_open else math.nan,
            sent_late_p99_ms=1e3 * summary.late_p99 if is_open else math.nan,
            role_cpu_cores=measured.role.processes[0],
            role_thread_cores=measured.role.main_threads[0],
            role_busy_fraction=sum(spent.wall.values()) / (warm_up + seconds),
            role_cpu_us_each=us_each * spent.process if is_alone else math.nan,
            role_thread_us_each=us_each * spent.thread if is_alone else math.nan,
            method_cpu_us_each=us_each * in_methods,
            peers_cpu_cores=sum(measured.peers.processes),
            busiest_peer_thread_cores=max(measured.peers.main_threads),
            host_cpu_fraction=measured.role.machine,
            limited_by=limited_by(
                is_short=not is_open or shortfall > 0.0,
                role_thread=measured.role.main_threads[0],
                busiest_peer=max(measured.peers.main_threads),
                host=measured.role.machine,
            ),
            params_age_p50_seconds=ages_p50,
            params_age_p99_seconds=ages_p99,
        )


class ShardLoad(PeeredLoad):
    """Inserts, samples, and both at the recipe's ratio."""

    role, unit = "shard", "transitions"
    kinds = {INSERT: "insert", SAMPLE: "sample"}
    methods = {INSERT: ("insert",), SAMPLE: ("sample", "update_priorities")}

    def __init__(
        self, peered: Peered, max_in_flight: Mapping[str, int], seed: int, per_call: Sequence[float], ratio: float | None
    ) -> None:
        """`max_in_flight` is of each axis; `ratio` the samples of an insert, None where the recipe holds none."""
        super().__init__(peered, 0, seed)
        self.per_call, self._ratio, self._bounds = per_call, ratio, max_in_flight
        self.axes = ("insert", "sample") if ratio is None else ("insert", "sample", "both")

    def calls_per_second(self, point: Point) -> list[float]:
        per_insert, per_sample = self.per_call
        ratio = self._ratio or 0.0
        return {
            "insert": [1.0 / per_insert, 0.0],
            "sample": [0.0, 1.0 / per_sample],
            "both": [1.0 / per_insert, ratio / per_sample],
        }[point.axis]

    def points(self, axis: str, limit: float, rates: Sequence[float]) -> list[Point]:
        return [Point(axis=axis, offered=rate) for rate in rates]

    def measure(self, point: Point, seconds: float) -> list[Row]:
        self._max_in_flight = self._bounds[point.axis]
        return super().measure(point, seconds)


class StoreLoad(PeeredLoad):
    """Looks for newer parameters, while a version is published each second."""

    role, unit = "store", "looks"
    kinds = {LOOK: "look"}
    methods = {LOOK: ("latest",)}
    per_call = (1.0,)
    axes = ("look",)

    def __init__(self, peered: Peered, seed: int, store: Any, num_params: int) -> None:
        super().__init__(peered, _MAX_IN_FLIGHT, seed)
        self._writer, self._version, self._published = RayParamsWriter(store), 0, -math.inf
        self._params = self._rng.standard_normal(num_params).astype(np.float32)
        peered.every_second = self._publish

    def calls_per_second(self, point: Point) -> list[float]:
        return [1.0]

    def points(self, axis: str, limit: float, rates: Sequence[float]) -> list[Point]:
        return [Point(axis=axis, offered=rate) for rate in rates]

    def _publish(self) -> None:
        """Publishes, where the last version is a second old."""
        now = time.monotonic()
        if now - self._published < _VERSION_SECONDS:
            return
        self._published, self._version = now, self._version + 1
        snapshot = ParamsSnapshot(run=RUN, epoch=0, version=self._version, layout="", params=self._params)
        self._writer.publish(wire.pack(snapshot))


class LearnerLoad:
    """Updates on batches that synthetic shards answer with: at a rate, and late by so much at several depths of prefetching."""

    role, unit = "learner", "updates"
    axes = ("updates", "answers")

    def __init__(
        self, config: RunConfig, spec: EnvSpec, worker: Any, store: Any, batches: Mapping[int, Sequence[Array]], directory: str
    ) -> None:
        self._config, self._spec, self._worker, self._directory = config, spec, worker, directory
        self._writer, self._batches = RayParamsWriter(store), ray.put(batches)
        self._threads = config.learner.num_threads or plan_cpus(config, num_cpus()).learner_threads

    def points(self, axis: str, limit: float, rates: Sequence[float]) -> list[Point]:
        """Returns the offered rates; on the other axis the latencies with which shards keep up, and do not, at three depths."""
        if axis == "updates":
            return [Point(axis=axis, offered=rate) for rate in rates]
        depth = self._config.learner.prefetch_batches
        depths = sorted({max(depth // 2, 1), depth, 2 * depth})
        latencies = [factor * depth / limit for factor in (0.25, 0.5, 1.0, 2.0)]
        return [Point(axis=axis, offered=None, prefetch_batches=d, answer_seconds=s) for d in depths for s in latencies]

    def measure(self, point: Point, seconds: float) -> list[Row]:
        """Makes a learner for the point and measures it; one row."""
        depth = point.prefetch_batches or self._config.learner.prefetch_batches
        config = replace(self._config, learner=replace(self._config.learner, prefetch_batches=depth))
        answering = Answering(point.offered, point.answer_seconds)
        building = self._worker.build.remote(
            make_loaded_learner, config, self._spec, self._directory, self._threads, self._batches, answering, self._writer
        )
        process = psutil.Process(ray.get(building, timeout=_TIMEOUT_SECONDS).pid)
        ask(self._worker, "start")
        try:
            first = ask(self._worker, "run", max(seconds / 4, 0.2))
            before = cpu_usage.read([process])
            last = ask(self._worker, "run", seconds)
            usage = cpu_usage.between(before, cpu_usage.read([process]))
        finally:
            ask(self._worker, "close")
        elapsed = last.seconds - first.seconds
        updates = (last.stats.updates - first.stats.updates) / elapsed
        busy = (last.stats.busy_seconds - first.stats.busy_seconds) / elapsed
        is_open = point.offered is not None
        missing = elapsed * (point.offered - updates) if point.offered is not None else 0.0
        shortfall = shortfall_of(point.offered, updates, missing) if point.offered is not None else math.nan
        return [
            Row(
                role=self.role,
                axis=point.axis,
                call="update",
                unit=self.unit,
                loop="open" if is_open else "closed",
                offered_per_second=math.nan if point.offered is None else point.offered,
                carried_per_second=updates,
                shortfall=shortfall,
                p50_ms=1e3 * last.stats.update_interval_p50_seconds,
                p99_ms=1e3 * last.stats.update_interval_p99_seconds,
                role_cpu_cores=usage.processes[0],
                role_thread_cores=usage.main_threads[0],
                role_busy_fraction=busy,
                role_cpu_us_each=1e6 * usage.processes[0] / max(updates, 1e-9),
                role_thread_us_each=1e6 * usage.main_threads[0] / max(updates, 1e-9),
                method_cpu_us_each=1e6 * usage.main_threads[0] / max(updates, 1e-9),
                peers_cpu_cores=0.0,
                busiest_peer_thread_cores=0.0,
                host_cpu_fraction=usage.machine,
                limited_by=self._limited_by(point, shortfall, busy, usage),
                wait_fraction=(last.stats.waiting_seconds - first.stats.waiting_seconds) / elapsed,
                prefetch_batches=depth,
                answer_ms=1e3 * point.answer_seconds,
            )
        ]

    def _limited_by(self, point: Point, shortfall: float, busy: float, usage: cpu_usage.Usage) -> str:
        """On a GPU the thread waits for the device in its methods: busy says what its processor time does not."""
        is_short = shortfall > 0.0 if point.offered is not None else point.answer_seconds == 0.0
        thread = max(busy if usage.machine < _FULL else 0.0, usage.main_threads[0])
        found = limited_by(is_short=is_short, role_thread=thread, busiest_peer=0.0, host=usage.machine)
        return "peers" if point.answer_seconds > 0.0 and busy < _BUSY and usage.machine < _FULL else found


RoleLoad = ShardLoad | StoreLoad | LearnerLoad


def ask(worker: Any, method: str, *args: Any) -> Any:
    """Calls a method of a worker's role and waits for its answer."""
    return ray.get(worker.call.remote(method, *args), timeout=_TIMEOUT_SECONDS)


@contextmanager
def load_of(role: str, config: RunConfig, spec: EnvSpec, directory: Path) -> Iterator[tuple[RoleLoad, dict[str, Any]]]:
    """Makes a role of a run and its peers, on a Ray that is up; gives the load, and what the card should say of it."""
    workers: list[Any] = []

    def make_worker() -> Any:
        workers.append(ray.remote(Worker).options(num_cpus=0, max_restarts=0).remote())
        return workers[-1]

    def make_gpu_worker() -> Any:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_gpus = min(there.get("GPU", 0.0), 1.0) if config.learner.device != "cpu" else 0.0
        workers.append(ray.remote(Worker).options(num_cpus=0, num_gpus=num_gpus, max_restarts=0).remote())
        return workers[-1]

    try:
        if role == "shard":
            yield _make_shard_load(config, spec, directory, make_worker)
        elif role == "store":
            yield _make_store_load(config, spec, make_worker)
        else:
            yield _make_learner_load(config, spec, directory, make_worker, make_gpu_worker)
    finally:
        for worker in reversed(workers):  # Who calls goes before who answers, and tells of no death.
            ray.kill(worker)


def loading_config(config: RunConfig) -> RunConfig:
    """Returns the run as a role is loaded: its peers keep the ratio, a shard holds what a long run of it would, at most 100,000."""
    shards = config.replay.num_shards
    capacity = min(config.replay.capacity, max(_HELD, config.actors.chunk_transitions + config.actors.n_step) * shards)
    return replace(
        config,
        serial=False,
        actors=replace(
            config.actors,
            num_actors=1,
            max_workers=None,
            num_envs=8,
            exploration=ExplorationConfig(kind="linear", initial=1.0, final=1.0),
        ),
        replay=replace(config.replay, samples_per_insert=None, limiter_buffer_samples=None, min_size=1, capacity=capacity),
        learner=replace(config.learner, num_devices=1),
    )


def _recorded(config: RunConfig) -> list[Array]:
    """Returns chunks of random play, with priorities as a learner gives them where the run has any."""
    loading = loading_config(config)
    messages = play_chunks(loading, min(_PLAYED, loading.replay.capacity))
    return with_random_priorities(messages, config.seed) if config.replay.priority_exponent > 0 else messages


def _build(worker: Any, function: Any, *args: Any) -> int:
    """Makes a role in a worker; returns the number of its process."""
    address = ray.get(worker.build.remote(function, *args), timeout=_TIMEOUT_SECONDS)
    return int(address.pid)


def _make_shard_load(
    config: RunConfig, spec: EnvSpec, directory: Path, make_worker: Callable[[], Any]
) -> tuple[RoleLoad, dict[str, Any]]:
    from learner.batches import shares

    loading, messages = loading_config(config), _recorded(config)
    held = loading.replay.capacity // loading.replay.num_shards
    log = None if loading.replay.sync_seconds is None else str(directory / "log")
    shard, stored = make_worker(), ray.put(messages)
    pid = _build(shard, make_filled_shard, loading, spec, log, stored, held)
    batch_size = shares(loading.learner.batch_size, loading.replay.num_shards)[0]
    peers = [make_worker() for _ in range(max(1, min(4, num_cpus() - 1)))]
    is_prioritized = config.replay.priority_exponent > 0
    seeds = [config.seed + index for index in range(len(peers))]
    pids = [
        _build(peer, make_shard_peer, shard, stored, batch_size, is_prioritized, seed)
        for peer, seed in zip(peers, seeds, strict=True)
    ]
    per_insert = sum(wire.unpack(message, TransitionChunk).num_transitions for message in messages) / len(messages)
    reply_bytes = len(ask(shard, "sample", batch_size).batch)
    bound = int(min(max(int(config.object_store_memory) / 4 / reply_bytes, _LEAST_IN_FLIGHT), _MAX_IN_FLIGHT))
    load = ShardLoad(
        Peered(shard, pid, peers, pids),
        {"insert": _MAX_IN_FLIGHT, "sample": bound, "both": bound},
        config.seed,
        (per_insert, float(batch_size)),
        config.replay.samples_per_insert,
    )
    return load, {
        "transitions_held": ask(shard, "stats").size,
        "transitions_per_chunk": per_insert,
        "bytes_per_inserted_transition": sum(map(len, messages)) / len(messages) / per_insert,
        "bytes_per_sampled_transition": reply_bytes / batch_size,
        "batch_size": batch_size,
        "samples_per_insert": config.replay.samples_per_insert,
        "durable_log": log is not None,
        "peers": len(peers),
        "max_in_flight": {"insert": _MAX_IN_FLIGHT, "sample": bound, "both": bound},
    }


def _make_store_load(config: RunConfig, spec: EnvSpec, make_worker: Callable[[], Any]) -> tuple[RoleLoad, dict[str, Any]]:
    num_params = network_size(config, spec)[0]
    store = make_worker()
    pid = _build(store, make_metered_store)
    peers = [make_worker() for _ in range(_STORE_PEERS)]
    pids = [_build(peer, make_store_peer, store) for peer in peers]
    load = StoreLoad(Peered(store, pid, peers, pids), config.seed, store, num_params)
    return load, {
        "params": num_params,
        "version_bytes": 4 * num_params,
        "versions_per_second": 1.0 / _VERSION_SECONDS,
        "peers": len(peers),
        "max_in_flight": {"look": _MAX_IN_FLIGHT},
    }


def _make_learner_load(
    config: RunConfig, spec: EnvSpec, directory: Path, make_worker: Callable[[], Any], make_gpu_worker: Callable[[], Any]
) -> tuple[RoleLoad, dict[str, Any]]:
    loading = loading_config(config)
    batches = record_batches(loading, spec, _recorded(config), _RECORDED_BATCHES)
    store, worker = make_worker(), make_gpu_worker()
    _build(store, roles.make_params_store)
    load = LearnerLoad(loading, spec, worker, store, batches, str(directory))
    return load, {
        "batch_size": config.learner.batch_size,
        "bytes_per_batch": sum(len(drawn[0]) for drawn in batches.values()),
        "prefetch_batches": config.learner.prefetch_batches,
        "threads": plan_cpus(loading, num_cpus()).learner_threads,
        "peers": 0,
    }
