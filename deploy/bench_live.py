"""The running system of `qfleet bench learner`: a learner, a shard, a store and an actor as Ray workers, made by `deploy/roles.py` as a
run's are, with calls of a second each as the supervisor gives them. There is no evaluator and no checkpoint meanwhile."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from common.config import EnvSpec, RunConfig
from common.errors import UserError
from common.metrics import LearnerStats, ShardStats
from deploy import roles
from deploy.bench import RUN, local_ray
from deploy.cpu_usage import cpu_seconds, machine_busy_seconds
from deploy.ledger import Ledger

if TYPE_CHECKING:
    from learner.learner import Learner

_CALL_SECONDS = 1.0
_TIMEOUT_SECONDS = 120.0
_FILL_SECONDS = 120.0
_WARM_UP_UPDATES = 10


class Reading(NamedTuple):
    """What the learner's process says at one time."""

    stats: LearnerStats
    seconds: float
    """On the machine's monotonic clock."""
    cpu_seconds: dict[str, float]
    """Of the thread that updates, of those that prefetch, and of all others (Ray's, and the arithmetic's beside the first)."""


class MeasuredLearner:
    """A learner that says what each kind of its threads took. Lives in the learner's worker."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def start(self) -> None:
        self._learner.start()

    def close(self) -> None:
        self._learner.close()

    def run(self, seconds: float) -> Reading:
        stats = self._learner.run(seconds, None)
        updating = threading.get_native_id()
        prefetching = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("prefetch")}
        cpu_seconds = {"learner_updates": 0.0, "learner_prefetch": 0.0, "learner_other": 0.0}
        for thread in psutil.Process().threads():
            kind = "updates" if thread.id == updating else "prefetch" if thread.id in prefetching else "other"
            cpu_seconds[f"learner_{kind}"] += thread.user_time + thread.system_time
        return Reading(replace(stats), time.monotonic(), cpu_seconds)


def make_measured_learner(*args: Any) -> MeasuredLearner:
    return MeasuredLearner(roles.make_learner(*args))


def measure_live(
    configs: Sequence[RunConfig], specs: Sequence[EnvSpec], *, seconds: float, on_gpu: bool
) -> list[dict[str, Any]]:
    """Returns the figures of each run, one after another on one Ray."""
    rows = []
    with local_ray(configs[0]) as ray, tempfile.TemporaryDirectory() as directory:
        for epoch, (config, spec) in enumerate(zip(configs, specs, strict=True)):
            with _system(ray, config, spec, directory, epoch, on_gpu=on_gpu) as system:
                rows.append(system.measure(seconds))
    return rows


@contextmanager
def _system(ray: Any, config: RunConfig, spec: EnvSpec, directory: str, epoch: int, *, on_gpu: bool) -> Iterator[System]:
    """Starts the workers, in the supervisor's order, and ends them."""
    from deploy.ray_handles import RayReplayReader, RayReplayWriter, Worker
    from deploy.ray_params import RayParamsReader, RayParamsWriter

    def make_worker(num_gpus: int = 0) -> Any:
        return ray.remote(Worker).options(num_cpus=0, num_gpus=num_gpus, max_restarts=0).remote()

    workers = {"learner": make_worker(num_gpus=int(on_gpu))} | {name: make_worker() for name in ("shard", "store", "actor")}
    shard, store = workers["shard"], workers["store"]
    try:
        replay = RayReplayWriter([shard], config.actors.max_in_flight_chunks, first_shard=0)
        reading, writing = RayParamsReader(store), RayParamsWriter(store)
        threads = config.learner.num_threads
        of_learner = (config, spec, RUN, directory, epoch, None, threads, [RayReplayReader(shard, 0)], writing)
        building = {
            "shard": shard.build.remote(roles.make_shard, config, spec, RUN, 0, epoch),
            "store": store.build.remote(roles.make_params_store),
            "learner": workers["learner"].build.remote(make_measured_learner, *of_learner),
            "actor": workers["actor"].build.remote(roles.make_actor, config, spec, RUN, 0, epoch, 0, replay, reading),
        }
        addresses = {name: ray.get(call, timeout=_TIMEOUT_SECONDS) for name, call in building.items()}
        yield System(ray, workers, {name: psutil.Process(address.pid) for name, address in addresses.items()})
    finally:
        for worker in workers.values():
            ray.kill(worker)


@dataclass(frozen=True)
class System:
    """The workers of one run, by role."""

    ray: Any
    workers: dict[str, Any]
    processes: dict[str, psutil.Process]

    def measure(self, seconds: float) -> dict[str, Any]:
        """Waits until the learner is at work, and measures for about so many seconds."""
        self._ask("learner", "start")
        acting = self.workers["actor"].call.remote("run", _CALL_SECONDS)
        deadline = time.monotonic() + _FILL_SECONDS
        while True:
            first, acting = self._learn(_CALL_SECONDS, acting)
            if first.stats.updates >= _WARM_UP_UPDATES:
                break
            if time.monotonic() > deadline:
                raise UserError(f"after {_FILL_SECONDS:.0f} s the learner has not begun: {first.stats.waits_for}")
        cpu_before, shard_before, steps_before = self._cpu_seconds(), self._shard(), self._ask("actor", "stats")
        readings = [first]
        while (left := seconds - (readings[-1].seconds - first.seconds)) > 0:
            reading, acting = self._learn(min(_CALL_SECONDS, left), acting)
            readings.append(reading)
        cpu_after, shard_after, steps_after = self._cpu_seconds(), self._shard(), self._ask("actor", "stats")
        return _figures(readings, cpu_before, cpu_after, shard_before, shard_after) | {
            "env_steps_per_second": (steps_after.env_steps - steps_before.env_steps) / (readings[-1].seconds - first.seconds),
            "ledger": self._ledger(acting),
        }

    def _learn(self, seconds: float, acting: Any) -> tuple[Reading, Any]:
        """Has the learner run once, and the actor meanwhile again and again; returns the reading and the actor's last call."""
        ray, learning = self.ray, self.workers["learner"].call.remote("run", seconds)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            ready, _ = ray.wait([learning, acting], num_returns=1, timeout=_TIMEOUT_SECONDS)
            if time.monotonic() > deadline or not ready:
                raise UserError(f"waited {_TIMEOUT_SECONDS:.0f} s for the learner")
            if acting in ready:
                ray.get(acting, timeout=_TIMEOUT_SECONDS)
                acting = self.workers["actor"].call.remote("run", _CALL_SECONDS)
            if learning in ready:
                return ray.get(learning, timeout=_TIMEOUT_SECONDS), acting

    def _ledger(self, acting: Any) -> dict[str, Any]:
        """Lets learner and actor end, and returns where every transition went."""
        self.ray.get(acting, timeout=_TIMEOUT_SECONDS)
        self._ask("learner", "close")
        stats, ledger = self._ask("actor", "close", _TIMEOUT_SECONDS / 2), Ledger()
        ledger.report(stats.slot, stats.incarnation, stats.sent, stats.pushed)
        return ledger.balance([self._shard()])

    def _shard(self) -> ShardStats:
        stats: ShardStats = self._ask("shard", "stats")
        return stats

    def _ask(self, role: str, method: str, *args: Any) -> Any:
        return self.ray.get(self.workers[role].call.remote(method, *args), timeout=_TIMEOUT_SECONDS)

    def _cpu_seconds(self) -> dict[str, tuple[float, float]]:
        """Returns (time of the reading, CPU seconds so far) of every role but the learner, of Ray and of the whole machine."""
        now, seconds = time.monotonic(), defaultdict(float)
        for name, process in self.processes.items():
            if name != "learner":
                seconds[name] = cpu_seconds(process)
        mine = {process.pid for process in self.processes.values()}
        here = psutil.Process()
        children = (child for child in here.children(recursive=True) if child.pid not in mine)
        seconds["ray"] = cpu_seconds(here) + sum(map(cpu_seconds, children))
        seconds["machine"] = machine_busy_seconds()
        return {name: (now, value) for name, value in seconds.items()}


def _figures(
    readings: Sequence[Reading],
    cpu_before: dict[str, tuple[float, float]],
    cpu_after: dict[str, tuple[float, float]],
    shard_before: ShardStats,
    shard_after: ShardStats,
) -> dict[str, Any]:
    first, last = readings[0], readings[-1]
    seconds, before, after = last.seconds - first.seconds, first.stats, last.stats
    cpu = {name: (value - first.cpu_seconds[name]) / seconds for name, value in last.cpu_seconds.items()}
    for name, (now, value) in cpu_after.items():
        since, earlier = cpu_before[name]
        cpu[name] = (value - earlier) / (now - since)
    held = [sum(wait.total_seconds for wait in stats.waits if wait.who == "learner") for stats in (shard_before, shard_after)]
    return {
        "seconds": seconds,
        "updates": after.updates - before.updates,
        "samples": after.samples - before.samples,
        "updates_per_second": (after.updates - before.updates) / seconds,
        "samples_per_second": (after.samples - before.samples) / seconds,
        "busy_fraction": (after.busy_seconds - before.busy_seconds) / seconds,
        "waiting_fraction": (after.waiting_seconds - before.waiting_seconds) / seconds,
        "held_fraction": (held[1] - held[0]) / seconds,
        "ready_batches": sum(reading.stats.num_ready_batches for reading in readings[1:]) / len(readings[1:]),
        "inserted_transitions": shard_after.num_inserted - shard_before.num_inserted,
        "sampled_transitions": shard_after.num_sampled - shard_before.num_sampled,
        "cpu_seconds_per_second": cpu,
    }
