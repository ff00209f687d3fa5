"""Gymnasium's vector environments over ale-py with AtariPreprocessing and FrameStackObservation.

Ways: `sync`, one after another in this process; `async`, each in a process of its own, observations in shared memory.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import ale_py
import gymnasium
from envs_harness import Step, actions_of, serve_steps
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation


def make_one() -> Any:
    gymnasium.register_envs(ale_py)  # Here, since it runs in each process.
    env = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    return FrameStackObservation(AtariPreprocessing(env, noop_max=30, frame_skip=4), 4)


def make(way: str, num_envs: int, num_threads: int) -> Step:
    kind = {"sync": SyncVectorEnv, "async": functools.partial(AsyncVectorEnv, context="fork")}[way]
    envs: Any = kind([make_one] * num_envs)
    draw = actions_of(int(envs.single_action_space.n))
    envs.reset(seed=0)

    def step() -> int:
        envs.step(draw(num_envs))
        return num_envs

    return step


if __name__ == "__main__":
    serve_steps(make, version=f"gymnasium {version('gymnasium')}, ale-py {version('ale-py')}", note="AtariPreprocessing")
