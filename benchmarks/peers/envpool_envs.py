"""EnvPool's Atari, bare. Ways: `sync`; `async`, which hands out the half of the environments that is done first."""

from __future__ import annotations

from importlib.metadata import version

import envpool
from envs_harness import Step, actions_of, serve_steps


def make(way: str, num_envs: int, num_threads: int) -> Step:
    batch_size = num_envs if way == "sync" else max(num_envs // 2, 1)
    envs = envpool.make(
        "Pong-v5",
        env_type="gymnasium",
        num_envs=num_envs,
        batch_size=batch_size,
        num_threads=num_threads,
        stack_num=4,
        frame_skip=4,
        noop_max=30,
        reward_clip=False,
    )
    draw = actions_of(int(envs.action_space.n))

    def step() -> int:
        envs.step(draw(num_envs))
        return num_envs

    def step_half() -> int:
        *_, info = envs.recv()
        envs.send(draw(batch_size), info["env_id"])
        return batch_size

    if way == "sync":
        envs.reset()
        return step
    envs.async_reset()
    return step_half


if __name__ == "__main__":
    serve_steps(make, version=f"envpool {version('envpool')}", note="")
