"""Stable-Baselines3's ReplayBuffer, which samples uniformly: there are no priorities to write back.

Modes: `stacks` keeps both states of transitions of 3 steps; `optimize_memory_usage` keeps one-step transitions whose next state
is the next row.

One `add` takes one step of all 8 environments, as in its off-policy algorithms
(https://stable-baselines3.readthedocs.io/en/master/common/buffers.html); images stay uint8, channels first.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import numpy as np
from gymnasium import spaces
from harness import CHUNK, NUM_ENVS, STACK, Bench, Transitions
from stable_baselines3.common.buffers import ReplayBuffer


def make_buffer(mode: str, num_items: int) -> ReplayBuffer:
    """Returns an empty buffer for the mode."""
    optimize = mode == "optimize_memory_usage"
    return ReplayBuffer(
        num_items,
        spaces.Box(0, 255, (STACK, 84, 84), np.uint8),
        spaces.Discrete(18),
        device="cpu",
        n_envs=NUM_ENVS,
        optimize_memory_usage=optimize,
        handle_timeout_termination=not optimize,
    )


def by_step(bench: Bench) -> Transitions:
    """Returns the transitions with those of the 8 environments at one time step side by side."""
    if bench.mode == "stacks":
        transitions, env = bench.data.n_step(), bench.data.env[: bench.data.num_items]
    else:
        transitions = bench.data.one_step()
        env = bench.data.step_env[transitions.s_tm1[:, -1]]
    rows = [np.flatnonzero(env == e) for e in range(NUM_ENVS)]
    shortest = min(map(len, rows))
    return transitions[np.stack([r[:shortest] for r in rows], axis=1).reshape(-1)]


def insert_all(bench: Bench, buffer: ReplayBuffer, transitions: Transitions) -> None:
    """Adds all, one step of 8 environments a call and 32 calls on one reading of the clock."""
    infos = [{} for _ in range(NUM_ENVS)]

    def add_part(part: Transitions, obs: np.ndarray, next_obs: np.ndarray, done: np.ndarray) -> None:
        for begin in range(0, len(part), NUM_ENVS):
            rows = slice(begin, begin + NUM_ENVS)
            buffer.add(obs[rows], next_obs[rows], part.a_tm1[rows], part.r_t[rows], done[rows], infos)

    for begin in range(0, len(transitions), CHUNK):
        part = transitions[begin : begin + CHUNK]
        obs, next_obs = bench.data.stacks(part.s_tm1), bench.data.stacks(part.s_t)
        arguments = (part, obs, next_obs, part.discount_t == 0)
        bench.insert(lambda arguments=arguments: add_part(*arguments), len(part))


def main() -> None:
    bench = Bench("stable-baselines3", ("stacks", "optimize_memory_usage"))
    bench.start()
    buffer = make_buffer(bench.mode, bench.data.num_items)
    transitions = by_step(bench)
    insert_all(bench, buffer, transitions)
    bench.inserted()
    batch = bench.sample(lambda priorities: buffer.sample(bench.batch))
    sampled = {
        "s_tm1": batch.observations.numpy(),
        "s_t": batch.next_observations.numpy(),
        "a_tm1": batch.actions.numpy()[:, 0],
        "r_t": batch.rewards.numpy()[:, 0],
        "discount_t": batch.dones.numpy()[:, 0],
    }
    over = (transitions.discount_t == 0).astype(np.float32)  # What it keeps in place of the discount.
    # Where the next state is the next row, that of a terminal one is another episode's.
    s_t_counts = sampled["discount_t"] == 0 if bench.mode == "optimize_memory_usage" else True
    bench.check(replace(transitions, discount_t=over), sampled, s_t_counts=s_t_counts)
    note = "uniform" if bench.mode == "stacks" else "uniform, one-step transitions"
    bench.report(version=version("stable-baselines3"), note=note)


if __name__ == "__main__":
    main()
