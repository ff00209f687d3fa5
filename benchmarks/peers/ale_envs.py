"""ale-py's own vector environment, bare. Ways: `sync`; `async`, which hands out the half of the environments that is done first."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from envs_harness import Step, actions_of, serve_steps


def make(way: str, num_envs: int, num_threads: int) -> Step:
    batch_size = num_envs if way == "sync" else max(num_envs // 2, 1)
    envs = AtariVectorEnv(
        "pong", num_envs, batch_size=batch_size, num_threads=num_threads, stack_num=4, reward_clipping=False, noop_max=30
    )
    draw = actions_of(int(envs.single_action_space.n))
    envs.reset(seed=0)

    def step() -> int:
        envs.step(draw(num_envs))
        return num_envs

    def step_half() -> int:
        envs.recv()
        envs.send(draw(batch_size))
        return batch_size

    if way == "sync":
        return step
    envs.send(np.zeros(batch_size, np.int64))
    return step_half


if __name__ == "__main__":
    serve_steps(make, version=f"ale-py {version('ale-py')}", note="")
