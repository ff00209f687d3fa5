"""Makes each role from the run's configuration, inside the process that will run it.

Imports are local: a shard's process must not bring in PyTorch (42 MB a process, not 200), nor must the driver.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import EnvSpec, RunConfig

if TYPE_CHECKING:
    from actors.actor import Actor
    from actors.evaluator import Evaluator
    from common.protocols import ParamsReader, ParamsWriter, ReplayReader, ReplayWriter
    from deploy.ray_params import RayParamsStore
    from deploy.replay_logs import ShardStart
    from learner.learner import Learner
    from replay_server.replay_log import Damage
    from replay_server.shard import ReplayShard


def make_shard(
    config: RunConfig,
    spec: EnvSpec,
    run: str,
    shard_index: int,
    shard_epoch: int,
    start: ShardStart | None = None,
) -> ReplayShard:
    """Makes shard `shard_index` with its share of all that is counted over all shards, from its log where there is one.

    Args:
      start: what it begins with; None: it keeps no log.
    """
    from common.errors import UserError, WireError
    from replay_server.recovery import NO_LOG, emptied, first_state, recover
    from replay_server.replay_log import ReplayLog
    from replay_server.shard import ReplayShard

    log, state = None, start.state if start is not None else None
    damages: list[Damage | str] = []
    if start is not None and start.directory is not None:
        budget = config.replay.disk_budget
        share = None if budget is None else int(budget) // config.replay.num_shards
        directory, capacity = Path(start.directory), shard_shares(config)["capacity"]
        state = state if state is not None else first_state(directory)
        if state is not None:
            state = recover(directory, state, capacity, damages, keeps_samples=start.keeps_samples)
        log = ReplayLog(directory, disk_budget=share)
    shard = ReplayShard(
        run=run,
        spec=spec,
        shard_index=shard_index,
        shard_epoch=shard_epoch,
        seed=int(np.random.SeedSequence([config.seed, shard_index, shard_epoch]).generate_state(1)[0]),
        log=log,
        **shard_shares(config),
    )
    records = log.open(damages) if log is not None else iter(())
    if state is not None:
        state = state if log is not None else emptied(state, NO_LOG)
        priorities = log.read_priorities(state["priorities"], damages) if log is not None else None
        try:
            shard.restore(records, state, priorities)
        except WireError as error:
            raise UserError(
                f"shard {shard_index}: its log does not fit these settings ({error}): go on with the replay.memory that wrote it"
            ) from error
    else:
        assert next(records, None) is None, "a new shard begins with an empty log"
    if log is not None:
        log.damages = damages
        if config.replay.sync_seconds is not None:
            log.start(config.replay.sync_seconds)
    return shard


def shard_shares(config: RunConfig) -> dict[str, Any]:
    """Returns one shard's share of the replay configuration."""
    replay = config.replay
    return {
        "memory": int(replay.memory) // replay.num_shards,
        "capacity": -(-replay.capacity // replay.num_shards),
        "priority_exponent": replay.priority_exponent,
        "send_compressed": replay.send_compressed,
        **limiter_shares(config),
    }


def limiter_shares(config: RunConfig) -> dict[str, Any]:
    """Returns one shard's share of what its limiter holds to: the arguments of `ReplayShard.set_limiter`."""
    replay = config.replay
    return {
        "min_size": -(-replay.min_size // replay.num_shards),
        "samples_per_insert": replay.samples_per_insert,
        "limiter_buffer_samples": -(-config.limiter_buffer_samples // replay.num_shards),
    }


def make_params_store() -> RayParamsStore:
    from deploy.ray_params import RayParamsStore

    return RayParamsStore()


def make_learner(
    config: RunConfig,
    spec: EnvSpec,
    run: str,
    run_dir: str,
    epoch: int,
    checkpoint: str | None,
    num_threads: int,
    readers: Sequence[ReplayReader],
    params: ParamsWriter,
    rank: int = 0,
    address: str | None = None,
    publishes: bool = True,
) -> Learner:
    """Makes the learner, or one rank of it, from a checkpoint where one is named; it publishes what it begins with, unless not.

    Rank r of N draws from the shards r, r + N and so on, and waits here for the other ranks, at rank 0's `address`.
    """
    limit_threads(num_threads)
    from common.networks import make_network
    from learner.batches import shares
    from learner.collective import LearnerGroup
    from learner.learner import Learner
    from learner.update import pick_device

    num_ranks = config.learner.num_devices
    group = None
    if address is not None:
        device = pick_device(config.learner.device)
        group = LearnerGroup(rank=rank, num_ranks=num_ranks, address=address, device=device)
    learner = Learner(
        config=config.learner,
        network=make_network(config.network, spec, config.seed),
        is_prioritized=config.replay.priority_exponent > 0,
        readers=readers[rank::num_ranks],
        num_items=shares(config.learner.batch_size, len(readers))[rank::num_ranks],
        params=params,
        run=run,
        epoch=epoch,
        run_dir=Path(run_dir),
        seed=int(np.random.SeedSequence([config.seed, epoch, rank]).generate_state(1)[0]),
        group=group,
    )
    if checkpoint is not None:
        learner.restore(Path(checkpoint))
    if rank == 0 and publishes:
        learner.publish()
    return learner


def make_actor(
    config: RunConfig,
    spec: EnvSpec,
    run: str,
    slot: int,
    incarnation: int,
    env_steps: int,
    replay: ReplayWriter,
    params: ParamsReader,
) -> Actor:
    """Makes one incarnation of an actor slot."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    limit_threads(1)
    from actors.actor import Actor
    from actors.environments import make_environment
    from common.networks import make_network

    return Actor(
        config=config.actors,
        environment=make_environment(config.env, config.actors.num_envs, num_threads=config.actors.env_threads),
        network=make_network(config.network, spec, config.seed),
        replay=replay,
        params=params,
        run=run,
        slot=slot,
        incarnation=incarnation,
        seed=config.seed,
        env_steps=env_steps,
        priority_floor=config.learner.priority_floor,
        keeps_actions=config.serial,
    )


def make_evaluator(config: RunConfig, spec: EnvSpec, params: ParamsReader | None) -> Evaluator:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    limit_threads(1)
    from actors.evaluator import Evaluator
    from common.networks import make_network

    network = make_network(config.network, spec, config.seed)
    return Evaluator(env=config.env, evaluation=config.evaluation, network=network, params=params)


def limit_threads(num_threads: int) -> None:
    """Sets the threads of this process's arithmetic, for libraries loaded later and for PyTorch."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
