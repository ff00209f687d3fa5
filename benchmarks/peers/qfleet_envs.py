"""What an actor of qfleet adds to its environments and its network, in one Ray worker pinned to one core, which all ways share.

Ways, each with the recipe before it, as `pong.alone`:

* `alone`: ale-py's vector environment, stacking by itself, the recipe's network and epsilon-greedy: a loop of four lines.
* `dropping`: the whole `Actor` of a run: the same, n-step returns with first priorities, LZ4 and packed chunks, which are then dropped.
* `pushing`: the same with the chunks sent through Ray to a shard in another process, on another core where there is one.

Exploration is total, so that all play alike; the network's values are computed in any case.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own is 15; the other scripts run at 0)

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from envs_harness import Step, pin_to_cores, serve, time_steps

from actors.policy import epsilon_greedy
from common import wire
from common.config import EnvSpec, RunConfig
from common.messages import Array, TransitionChunk
from common.metrics import PushCounts
from common.networks import make_network
from deploy import recipes, roles
from deploy.bench import RUN, NoParams, local_ray

TIMEOUT_SECONDS = 120


def config_of(recipe: str, num_envs: int) -> RunConfig:
    """Returns a recipe's settings for Pong played at random, with nothing that makes an actor wait for a learner."""
    config: RunConfig = {"pong": recipes.pong, "nature": recipes.nature}[recipe]()
    exploration = replace(config.actors.exploration, kind="linear", initial=1.0, final=1.0)
    return replace(
        config,
        env=replace(config.env, game="pong", life_loss_terminates=False),
        actors=replace(config.actors, num_envs=num_envs, exploration=exploration),
        replay=replace(config.replay, samples_per_insert=None),
    )


class DroppingWriter:
    """Packs what is pushed and drops it."""

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        return None

    def asks_for_pause(self) -> bool:
        return False

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        for chunk in chunks:
            wire.pack(chunk)
        return len(chunks)

    def counts(self) -> PushCounts:
        return PushCounts()

    def drain(self, timeout_seconds: float) -> None:
        pass


def make_alone(config: RunConfig, spec: EnvSpec) -> Step:
    """The environment and the forward pass, and nothing else."""
    num_envs = config.actors.num_envs
    envs = AtariVectorEnv(config.env.game, num_envs, num_threads=1, stack_num=config.env.frame_stack, reward_clipping=False)
    network = make_network(config.network, spec, config.seed)
    rng = np.random.default_rng(0)
    stacks, _ = envs.reset(seed=0)

    def step() -> int:
        nonlocal stacks
        with torch.inference_mode():
            values = network(torch.from_numpy(stacks)).numpy()
        stacks, *_ = envs.step(epsilon_greedy(rng, values, 1.0))
        return num_envs

    return step


def make_actor(config: RunConfig, spec: EnvSpec, writer: Any) -> Step:
    """The loop of `Actor.run`, one step a call."""
    actor = roles.make_actor(config, spec, RUN, 0, 0, 0, writer, NoParams())

    def step() -> int:
        assert actor.send_waiting(TIMEOUT_SECONDS), "the shard takes no more"
        actor.step()
        return config.actors.num_envs

    return step


class Player:
    """Holds every way that was asked for. Lives in a Ray worker."""

    def __init__(self, shard: Any, spec: EnvSpec) -> None:
        from deploy.ray_handles import RayReplayWriter

        self._spec, self._writer_to = spec, lambda config: RayReplayWriter([shard], config.actors.max_in_flight_chunks, 0)
        self._made: dict[tuple[str, int], Step] = {}
        for task in Path("/proc/self/task").iterdir():  # Ray's threads of this process too.
            os.sched_setaffinity(int(task.name), set(sorted(os.sched_getaffinity(0))[:1]))

    def time(self, way: str, num_envs: int, seconds: float) -> dict[str, float]:
        if (way, num_envs) not in self._made:
            self._made[way, num_envs] = self._make(way, num_envs)
        return time_steps(self._made[way, num_envs], seconds, time.process_time)

    def _make(self, way: str, num_envs: int) -> Step:
        recipe, _, kind = way.partition(".")
        config = config_of(recipe, num_envs)
        if kind == "alone":
            return make_alone(config, self._spec)
        return make_actor(config, self._spec, DroppingWriter() if kind == "dropping" else self._writer_to(config))


def make_player(shard: Any, spec: EnvSpec) -> Player:
    roles.limit_threads(1)
    return Player(shard, spec)


class Shard:
    """A run's shard, pinned to the cores that the player is not on."""

    def __init__(self, *args: Any) -> None:
        cores = sorted(os.sched_getaffinity(0))
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), set(cores[1:] or cores))
        self._shard = roles.make_shard(*args)

    def insert(self, message: Array) -> Any:
        reply = self._shard.insert(message)
        assert reply.refusal is None, reply.refusal
        return reply

    def ask_to_insert(self) -> str | None:
        return self._shard.ask_to_insert()


def main() -> None:
    from actors.environments import probe

    pin_to_cores(int(sys.argv[1]))
    config = config_of("pong", 8)
    spec = probe(config.env)
    with local_ray(config) as ray:
        from deploy.ray_handles import Worker

        def answer(call: Any) -> Any:
            return ray.get(call, timeout=TIMEOUT_SECONDS)

        shard, player = (ray.remote(Worker).options(num_cpus=0).remote() for _ in range(2))
        answer(shard.build.remote(Shard, config, spec, RUN, 0, 0))
        answer(player.build.remote(make_player, shard, spec))
        serve(
            lambda way, num_envs, seconds: answer(player.call.remote("time", way, num_envs, seconds)),
            version="this tree",
            note="",
        )


if __name__ == "__main__":
    main()
