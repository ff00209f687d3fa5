"""Whether a run fits on this machine, and how its roles share the processors. Refuses before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from common.config import ByteSize, EnvSpec, RunConfig
from common.errors import UserError
from deploy.roles import shard_shares
from replay_server.shard import min_memory

MAX_WORKERS_PER_CPU = 8
_TORCH_WORKER_BYTES = 300 << 20  # Resident, with PyTorch on a CPU.
_WORKER_BYTES = 100 << 20
_RAY_BYTES = 600 << 20  # Ray's own processes on a head node.


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """Processors that Ray sets aside for each worker of a role. Where there are more roles than processors they share."""

    learner: float
    shard: float
    store: float
    evaluator: float
    actor: float
    learner_threads: int

    def describe(self) -> str:
        return (
            f"num_cpus: learner {self.learner:g} ({self.learner_threads} threads), each shard {self.shard:g}, "
            f"evaluator {self.evaluator:g}, each actor {self.actor:g}"
        )


def plan_cpus(config: RunConfig, num_cpus: int) -> CpuPlan:
    """Shares out the processors.

    Raises:
      UserError: where there would be more than MAX_WORKERS_PER_CPU workers on a processor.
    """
    num_others = config.replay.num_shards + 2  # Shards, learner, evaluator; the store is idle.
    num_workers = num_others + config.actors.num_actors
    most = MAX_WORKERS_PER_CPU * num_cpus
    if num_workers > most:
        room = most - num_others
        advice = f"set --actors.num-actors to at most {room}" if room > 0 else "lower --replay.num-shards"
        raise UserError(
            f"no CPUs left for {config.actors.num_actors} actors: {num_workers} workers on {num_cpus} CPUs, and at most "
            f"{MAX_WORKERS_PER_CPU} share one; {advice}, or use more CPUs"
        )
    share = 1.0 if num_workers <= num_cpus else int(1000 * num_cpus / num_workers) / 1000
    # Threads that wait for one another at every operation must not share their processors with other roles: on two cores,
    # with five roles, two threads did 16 % fewer updates than one (docs/benchmarks.md).
    spare = num_cpus - num_workers + 1 if num_workers <= num_cpus else num_cpus // 2
    threads = config.learner.num_threads or max(spare, 1)
    return CpuPlan(learner=share, shard=share, store=0.0, evaluator=share, actor=share, learner_threads=threads)


def check_memory(config: RunConfig, spec: EnvSpec) -> None:
    """Raises UserError where the replay cannot hold its index, or the run does not fit in this machine's memory."""
    shares = shard_shares(config)
    least = min_memory(shares["capacity"], spec.frame_stack, prioritized=config.replay.priority_exponent > 0)
    if shares["memory"] < least:
        needed = ByteSize(-(-least * config.replay.num_shards // 2**20) * 2**20)
        raise UserError(
            f"replay.memory {config.replay.memory} is too little for replay.capacity {config.replay.capacity}: its index and "
            f"the smallest store take {needed}; raise --replay.memory to that, or lower --replay.capacity"
        )
    available = available_memory()
    num_torch = config.actors.num_actors + 2
    processes = _TORCH_WORKER_BYTES * num_torch + _WORKER_BYTES * (config.replay.num_shards + 1) + _RAY_BYTES
    if config.serial:
        processes = _TORCH_WORKER_BYTES
    total = config.replay.memory + processes + (0 if config.serial else config.object_store_memory)
    if total > available:
        raise UserError(
            f"this run needs {ByteSize(total)} ({config.replay.memory} for replay.memory, {ByteSize(processes)} for its processes), "
            f"but {ByteSize(available)} are available: lower --replay.memory or --actors.num-actors"
        )
    shared = psutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else available
    if not config.serial and config.object_store_memory > shared:
        raise UserError(
            f"object_store_memory {config.object_store_memory} does not fit in /dev/shm, where {ByteSize(shared)} are free: lower "
            f"--object-store-memory, or give the container more (docker run --shm-size)"
        )


def available_memory() -> int:
    """Returns the bytes that this process may still take: of the machine, or of its control group where that is less."""
    available: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available
