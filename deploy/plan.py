"""Whether a run fits on this machine, and how its roles share the processors. Refuses before anything starts.

`qfleet plan RECIPE` prints what every role will take. The figures of a process are resident sets measured on Linux; what Python
and PyTorch share between processes is counted in each, as `top` does, so the sum errs on the safe side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from common.config import MAX_PREFETCH_THREADS, ByteSize, EnvSpec, LearnerConfig, NetworkConfig, RunConfig
from common.errors import UserError
from common.torsos import CONVOLUTIONS, IMPALA_BLOCKS, IMPALA_CHANNELS, check_pool, halved
from deploy.roles import shard_shares
from deploy.run_dir import num_cpus
from replay_server.shard import index_bytes, min_memory

MAX_WORKERS_PER_CPU = 8
_MIB = 1 << 20
_DRIVER_BYTES = 150 * _MIB
_RAY_BYTES = 600 * _MIB  # Ray's own processes on a head node.
_WORKER_BYTES = 125 * _MIB  # A Ray worker without PyTorch: a shard, the store.
_TORCH_WORKER_BYTES = 320 * _MIB  # With PyTorch on a CPU and one environment: an actor, the evaluator.
_LEARNER_BYTES = 480 * _MIB  # With the compiler of the unpacking loop.
_ENV_BYTES = 3 * _MIB  # One more emulator.
_CUDA_BYTES = 700 * _MIB  # What a process that uses a GPU takes of it, and of RAM, before it does anything.
_COPIES_OF_PARAMS = 6  # Online, target, gradients, two moments of Adam, and a snapshot on its way.


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
    num_others = config.replay.num_shards + config.learner.num_devices + 1  # The evaluator; the store is idle.
    num_workers = num_others + config.actors.num_workers
    most = MAX_WORKERS_PER_CPU * num_cpus
    if num_workers > most:
        room = most - num_others
        advice = f"set --actors.num-actors to at most {room}" if room > 0 else "lower --replay.num-shards"
        raise UserError(
            f"no CPUs left for {config.actors.num_workers} actors: {num_workers} workers on {num_cpus} CPUs, and at most "
            f"{MAX_WORKERS_PER_CPU} share one; {advice}, or use more CPUs"
        )
    share = 1.0 if num_workers <= num_cpus else int(1000 * num_cpus / num_workers) / 1000
    # Threads that wait for one another at every operation must not share their processors with other roles: on two cores,
    # with five roles, two threads did 16 % fewer updates than one (docs/benchmarks.md).
    ranks = config.learner.num_devices
    spare = num_cpus - num_workers + ranks if num_workers <= num_cpus else num_cpus // 2
    threads = config.learner.num_threads or max(spare // ranks, 1)
    return CpuPlan(learner=share, shard=share, store=0.0, evaluator=share, actor=share, learner_threads=threads)


MAX_GPU_LEARNER_CPUS = 5.0  # Its loop and four prefetch threads.
MAX_LEARNER_CPUS = 16.0  # Of a learner without a GPU: more threads wait for one another.


def plan_cluster_cpus(config: RunConfig, node_cpus: float | None, *, uses_gpu: bool) -> CpuPlan:
    """Shares out the processors of the node that takes learner, shards and evaluator; each actor has whole ones, wherever it is.

    Args:
      node_cpus: of the largest node that may take them; None: of a node that is still to come, one that holds what is asked for.
    """
    ranks, num_others = config.learner.num_devices, config.replay.num_shards + 1
    actor = float(config.actors.env_threads)
    if node_cpus is None:
        node_cpus = num_others + ranks * (MAX_GPU_LEARNER_CPUS if uses_gpu else 1.0)
    if node_cpus < num_others + ranks:
        share = int(1000 * node_cpus / (num_others + ranks)) / 1000
        return CpuPlan(share, share, 0.0, share, actor, config.learner.num_threads or max(int(node_cpus) // 2 // ranks, 1))
    # Without a GPU half of the node; the rest is for actors, or for others.
    most = MAX_GPU_LEARNER_CPUS if uses_gpu else min(max(node_cpus // 2 // ranks, 1.0), MAX_LEARNER_CPUS)
    if config.learner.num_threads is not None and not uses_gpu:
        most = min(most, float(config.learner.num_threads))
    if config.actors.on_head:  # Perhaps on this very node: room for one.
        node_cpus = max(node_cpus - actor, num_others + ranks)
    learner = min(float((node_cpus - num_others) // ranks), most)
    return CpuPlan(learner, 1.0, 0.0, 1.0, actor, config.learner.num_threads or int(learner))


def spread_slots(num_slots: int) -> list[int]:
    """Returns all slots in an order whose every beginning is spread over them: where some have no place, the others still
    span the ladder of epsilons. Source: van der Corput's sequence, the bits of 0, 1, 2, ... reversed.
    """
    num_bits = max(num_slots - 1, 1).bit_length()
    return sorted(range(num_slots), key=lambda slot: int(f"{slot:0{num_bits}b}"[::-1], 2))


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """What the processes of one role will take, in bytes."""

    role: str
    workers: int
    ram: int
    """Of each worker."""
    gpu: int = 0
    """Of each worker."""
    note: str = ""


def plan_memory(config: RunConfig, spec: EnvSpec, *, uses_gpu: bool) -> list[RoleMemory]:
    """Returns the roles of a run with what they take."""
    params = 4 * network_size(config, spec)[0]
    learning = _batches_bytes(config, spec) + _activation_bytes(config, spec) + _COPIES_OF_PARAMS * params
    batches = f"{_num_batches(config)} batches of {config.learner.batch_size}"
    replay = int(config.replay.memory)
    if config.serial:
        everything = _LEARNER_BYTES + replay + learning + config.actors.num_envs * config.actors.num_actors * _ENV_BYTES
        return [RoleMemory("one process", 1, everything, _CUDA_BYTES + learning if uses_gpu else 0, "serial")]
    num_evaluated = min(max(config.evaluation.episodes, config.evaluation.final_episodes), config.evaluation.num_envs)
    share = shard_shares(config)
    index = index_bytes(share["capacity"], spec.frame_stack, prioritized=config.replay.priority_exponent > 0)
    learner_ram = _LEARNER_BYTES + (_CUDA_BYTES + _batches_bytes(config, spec) if uses_gpu else learning)
    return [
        RoleMemory("driver", 1, _DRIVER_BYTES),
        RoleMemory("Ray", 1, _RAY_BYTES, note="its own processes"),
        RoleMemory("learner", config.learner.num_devices, learner_ram, _CUDA_BYTES + learning if uses_gpu else 0, batches),
        RoleMemory(
            "shard",
            config.replay.num_shards,
            _WORKER_BYTES + share["memory"],
            note=f"replay.memory {ByteSize(share['memory'])}, of it index {ByteSize(index)} for {share['capacity']:,} transitions",
        ),
        RoleMemory("params store", 1, _WORKER_BYTES + 2 * params),
        RoleMemory("evaluator", 1, _TORCH_WORKER_BYTES + num_evaluated * _ENV_BYTES + 2 * params),
        RoleMemory(
            "actor",
            config.actors.num_workers,
            _TORCH_WORKER_BYTES + config.actors.num_envs * _ENV_BYTES + 2 * params,
            note=f"{config.actors.num_envs} environments",
        ),
    ]


def check_memory(config: RunConfig, spec: EnvSpec, *, uses_gpu: bool = False) -> None:
    """Raises UserError where the replay cannot hold its index, or the run does not fit in this machine's memory."""
    check_index(config, spec)
    available = available_memory()
    roles = plan_memory(config, spec, uses_gpu=uses_gpu)
    total = sum(role.workers * role.ram for role in roles) + _shared_memory(config)
    if total > available:
        raise UserError(
            f"this run needs {ByteSize(total)} ({config.replay.memory} for replay.memory), but {ByteSize(available)} are available: "
            f"{_memory_advice(config, roles, total - available)}"
        )
    shared = psutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else available
    if _shared_memory(config) > shared:
        raise UserError(
            f"object_store_memory {config.object_store_memory} does not fit in /dev/shm, where {ByteSize(shared)} are free: lower "
            f"--object-store-memory, or give the container more (docker run --shm-size)"
        )


def check_index(config: RunConfig, spec: EnvSpec) -> None:
    """Raises UserError where the budget of the replay does not hold its index."""
    shares = shard_shares(config)
    least = min_memory(shares["capacity"], spec.frame_stack, prioritized=config.replay.priority_exponent > 0)
    if shares["memory"] < least:
        needed = ByteSize(-(-least * config.replay.num_shards // 2**20) * 2**20)
        raise UserError(
            f"replay.memory {config.replay.memory} is too little for replay.capacity {config.replay.capacity}: its index and "
            f"the smallest store take {needed}; raise --replay.memory to that, or lower --replay.capacity"
        )


def check_learner(config: LearnerConfig) -> None:
    """Raises UserError where the learner asks for what this machine does not have: a GPU, or a compiler."""
    if config.device == "cuda" or config.compilation in ("compile", "cuda_graph"):
        from learner.update import pick_compilation, pick_device  # Two seconds, and not for the others.

        pick_compilation(config.compilation, pick_device(config.device))


def print_plan(config: RunConfig) -> int:
    """`qfleet plan`: prints what the run will take on each node; returns the exit status.

    Raises:
      UserError: what to change, where it does not fit.
    """
    from actors.environments import probe

    spec = probe(config.env)
    if config.address is None:
        check_learner(config.learner)
    check_index(config, spec)
    gpu = gpu_memory() if config.learner.device != "cpu" and config.address is None else None
    roles = plan_memory(config, spec, uses_gpu=gpu is not None)
    table = Table("role", "workers", "RAM each", "RAM", "GPU memory", "", box=None, pad_edge=False)
    for role in roles:
        gpu_text = str(ByteSize(role.gpu)) if role.gpu else ""
        table.add_row(
            role.role, str(role.workers), str(ByteSize(role.ram)), str(ByteSize(role.workers * role.ram)), gpu_text, role.note
        )
    total, shared = sum(role.workers * role.ram for role in roles), _shared_memory(config)
    console = Console(width=130, highlight=False)
    where = "all on this node" if config.address is None else "on a cluster"
    console.print(f"qfleet {'run in one process' if config.serial else 'run'} of {config.recipe}, {where}:")
    console.print(table)
    if config.address is not None:
        console.print(_cluster_sentence(config, roles))
        console.print(_replay_sentence(config, spec))
        return 0
    console.print(
        f"RAM {ByteSize(total)} and shared memory {ByteSize(shared)} (Ray's object store) of {ByteSize(available_memory())} available; "
        + (
            f"GPU memory {ByteSize(sum(role.gpu for role in roles))} of {ByteSize(gpu)}"
            if gpu is not None
            else "no GPU is used"
        )
    )
    if not config.serial:
        console.print(plan_cpus(config, num_cpus()).describe())
    console.print(_replay_sentence(config, spec))
    check_memory(config, spec, uses_gpu=gpu is not None)
    needed = sum(role.gpu for role in roles)
    if gpu is not None and needed > gpu:
        raise UserError(
            f"the learner needs {ByteSize(needed)} of GPU memory, but {ByteSize(gpu)} are free: lower --learner.batch-size or "
            f"--learner.prefetch-batches"
        )
    return 0


def _cluster_sentence(config: RunConfig, roles: list[RoleMemory]) -> str:
    """Says what nodes a run needs; which there are is known when it is attached."""
    cpus = plan_cluster_cpus(config, None, uses_gpu=config.learner.device != "cpu")
    together = [role for role in roles if role.role in ("learner", "shard", "params store", "evaluator")]
    num_cpus = config.learner.num_devices * cpus.learner + config.replay.num_shards * cpus.shard + cpus.evaluator
    memory = ByteSize(sum(role.workers * role.ram for role in together))
    (actor,) = [role for role in roles if role.role == "actor"]
    return (
        f"learner, shards, params store and evaluator, best on one node: {num_cpus:g} CPUs, {memory} of RAM, and a GPU for each learner where there are "
        f"some; driver and Ray on the head; each of {actor.workers} actors {cpus.actor:g} CPU and {ByteSize(actor.ram)}, wherever there is room"
    )


def gpu_memory() -> int | None:
    """Returns the free bytes of the first GPU, or None where there is none."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def available_memory() -> int:
    """Returns the bytes that this process may still take: of the machine, or of its control group where that is less."""
    available: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def _shared_memory(config: RunConfig) -> int:
    return 0 if config.serial else int(config.object_store_memory)


def _memory_advice(config: RunConfig, roles: list[RoleMemory], missing: int) -> str:
    """Says which one setting makes the run fit, by how much; both, where neither does alone."""
    advice = []
    learning = (
        next((role.ram for role in roles if role.role in ("learner", "one process")), 0) - config.replay.memory * config.serial
    )
    if learning - _LEARNER_BYTES > missing:
        advice.append("lower --learner.batch-size or --learner.prefetch-batches")
    if _shared_memory(config) - missing >= 64 * _MIB:
        advice.append(f"lower --object-store-memory to {(_shared_memory(config) - missing) // _MIB}MiB")
    if config.replay.memory - missing >= _MIB:
        advice.append(f"lower --replay.memory to {(config.replay.memory - missing) // _MIB}MiB")
    each = next((role.ram for role in roles if role.role == "actor"), 0)
    num_fewer = -(-missing // each) if each else config.actors.num_actors
    if config.actors.num_actors > num_fewer:
        advice.append(f"lower --actors.num-actors to {config.actors.num_actors - num_fewer}")
    return " or ".join(advice) or "lower --replay.memory and --actors.num-actors, or use a machine with more memory"


def _replay_sentence(config: RunConfig, spec: EnvSpec) -> str:
    """Says how many transitions replay will hold; what a game's frames compress to is not known before."""
    per_shard = shard_shares(config)
    index = index_bytes(per_shard["capacity"], spec.frame_stack, prioritized=config.replay.priority_exponent > 0)
    for_planes = (per_shard["memory"] - index) * config.replay.num_shards
    stacks = 2 * spec.frame_stack * _plane_bytes(spec)
    per_plane = for_planes / config.replay.capacity
    return (
        f"replay holds {config.replay.capacity:,} transitions if their planes compress to {per_plane:,.0f} bytes each (Atari: 90 to 600; "
        f"as stacks a transition takes {stacks:,}), else as many as fit in {ByteSize(for_planes)}"
    )


def _plane_bytes(spec: EnvSpec) -> int:
    return math.prod(spec.plane_shape) * np.dtype(spec.plane_dtype).itemsize


def _batches_bytes(config: RunConfig, spec: EnvSpec) -> int:
    """Both stacks of every batch held: as stored, and as prepared for the network in at most four bytes a value."""
    values = 2 * spec.frame_stack * math.prod(spec.plane_shape)
    each = config.learner.batch_size * (2 * spec.frame_stack * _plane_bytes(spec) + 4 * values)
    return _num_batches(config) * each


def _num_batches(config: RunConfig) -> int:
    """Those that are ready, those that the prefetch threads unpack, and the one that is learned from."""
    return config.learner.prefetch_batches + MAX_PREFETCH_THREADS + 1


def network_size(config: RunConfig, spec: EnvSpec) -> tuple[int, int]:
    """Returns (parameters, values that a pass holds for one observation), without PyTorch: the driver does not load it.

    Values are the outputs of all layers, nonlinearities and norms. The layers of implicit quantiles hold them once for each
    quantile: with 64 and the nature torso 200,000 for the embedding, as many for its nonlinearity and for the product with the
    features, 77 MB in a batch of 32.
    """
    network = config.network
    num_features, params, values = _torso_size(network, spec)
    num_rows = 1
    if network.distribution == "implicit_quantile":
        num_rows = max(config.learner.num_quantile_samples, config.learner.num_target_quantile_samples)
        params += (network.num_cosines + 1) * num_features
        values += num_rows * (2 * network.num_cosines + 3 * num_features)
    num_each = {"categorical": network.num_atoms, "quantile": network.num_quantiles}.get(network.distribution, 1)
    for num_columns in (spec.num_actions, 1) if network.dueling else (spec.num_actions,):
        num_in = num_features
        for num_out in network.hidden_sizes:
            of_linear, of_norm = _linear_size(network, num_in, num_out), _norm_size(network, num_out, num_out)
            params += of_linear[0] + of_norm[0]
            values += num_rows * (of_linear[1] + of_norm[1] + num_out)
            num_in = num_out
        of_linear = _linear_size(network, num_in, num_each * num_columns)
        params += of_linear[0]
        values += num_rows * of_linear[1]
    return params, values


def _torso_size(network: NetworkConfig, spec: EnvSpec) -> tuple[int, int, int]:
    """Returns (features, parameters, values) of the torso."""
    if network.torso == "mlp":
        return spec.frame_stack * math.prod(spec.plane_shape), 0, 0
    channels, (height, columns) = spec.frame_stack, spec.plane_shape
    params = values = 0
    if network.torso == "impala":
        for base in IMPALA_CHANNELS:
            num_in, channels = channels, base * network.width
            values += channels * height * columns
            height, columns = halved(height), halved(columns)
            size = channels * height * columns
            norm = _norm_size(network, channels, size)
            params += _convolution(num_in, channels, 3) + IMPALA_BLOCKS * 2 * (_convolution(channels, channels, 3) + norm[0])
            values += size + IMPALA_BLOCKS * (2 * (2 * size + norm[1]) + size)  # The pool; each block, and its sum.
        params += norm[0]
        values += size + norm[1]
    else:
        for num_out, kernel, stride in CONVOLUTIONS[network.torso]:
            height, columns = (height - kernel) // stride + 1, (columns - kernel) // stride + 1
            size = num_out * height * columns
            norm = _norm_size(network, num_out, size)
            params += _convolution(channels, num_out, kernel) + norm[0]
            values += 2 * size + norm[1]
            channels = num_out
    if network.adaptive_pool is not None:
        check_pool(network.adaptive_pool, height, columns, network.torso)
        height = columns = network.adaptive_pool
        values += channels * height * columns
    return channels * height * columns, params, values


def _convolution(num_in: int, num_out: int, kernel: int) -> int:
    """Returns the parameters of a convolution."""
    return num_out * (num_in * kernel * kernel + 1)


def _norm_size(network: NetworkConfig, num_scales: int, num_values: int) -> tuple[int, int]:
    """Returns (parameters, values) of a layer norm; zeros where there is none."""
    return (2 * num_scales, num_values) if network.layer_norm else (0, 0)


def _linear_size(network: NetworkConfig, num_in: int, num_out: int) -> tuple[int, int]:
    """Returns (parameters, values) of a fully connected layer of a head; a noisy one is two, and scales input and output."""
    params = (num_in + 1) * num_out
    return (params, num_out) if network.noisy_sigma is None else (2 * params, num_in + 3 * num_out)


def _activation_bytes(config: RunConfig, spec: EnvSpec) -> int:
    """What an update holds between forward and backward: at most four bytes a value, three passes, and as much gradient."""
    return 4 * 4 * network_size(config, spec)[1] * config.learner.batch_size
