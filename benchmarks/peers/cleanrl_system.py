"""CleanRL's `dqn_atari.py`, its loop written out: Stable-Baselines3's replay buffer and wrappers, Gymnasium's vector environment.

Source: https://github.com/vwxyzjn/cleanrl/blob/master/cleanrl/dqn_atari.py (MIT; Huang et al. 2022, JMLR 23(274)). The same operations in the
same order; the update is that of cleanrl_learner.py. Departures, all in its favour or without effect: it steps one environment, here as many
as the others, so that one forward pass serves them all; no event files; wrappers of Gymnasium 1 in the place of those of 0.29;
a lost life ends no episode, as in the other systems.

Mode: `sync`, its own. `fill`: as sb3_system.py, since the buffer is the same.
"""

from __future__ import annotations

import functools
import random
from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
import torch
from cleanrl_learner import Peer
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation, GrayscaleObservation, RecordEpisodeStatistics, ResizeObservation
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, FireResetEnv, MaxAndSkipEnv, NoopResetEnv
from stable_baselines3.common.buffers import ReplayBuffer
from system_harness import EPSILON, Reports, Work, add_until_full, make_game, read_work

NUM_RECORDED = 64


def make_env(game: str) -> gymnasium.Env:
    env = RecordEpisodeStatistics(make_game(game))
    env = NoopResetEnv(env, noop_max=30)
    env = MaxAndSkipEnv(env, skip=4)
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = FireResetEnv(env)
    env = ClipRewardEnv(env)
    env = ResizeObservation(env, (84, 84))
    env = GrayscaleObservation(env)
    return FrameStackObservation(env, 4)


class Loop:
    """The script's loop, a round at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._envs = SyncVectorEnv(
            [functools.partial(make_env, work.game) for _ in range(work.num_envs)], autoreset_mode=AutoresetMode.SAME_STEP
        )
        actions = self._envs.single_action_space
        self._learner = Peer(work.network, work.batch, int(actions.n))
        self._buffer = ReplayBuffer(
            work.capacity,
            self._envs.single_observation_space,
            actions,
            "cpu",
            n_envs=work.num_envs,
            optimize_memory_usage=True,
            handle_timeout_termination=False,
        )
        self._s_tm1, _ = self._envs.reset(seed=1)
        self.env_steps = 0

    @property
    def num_updates(self) -> int:
        return self._learner.num_updates

    def fill(self) -> None:
        """Fills the buffer with random steps."""
        add_until_full(self._buffer, [self._step(self._random_actions()) for _ in range(NUM_RECORDED)])

    def round(self) -> None:
        """Steps all environments, then takes the updates that the ratio asks for."""
        num_steps, num_updates = self._work.rhythm
        for _ in range(num_steps):
            self._buffer.add(*self._step(self._actions()))
            self.env_steps += self._work.num_envs
        if self.env_steps > self._work.learning_starts:
            for _ in range(num_updates):
                data = self._buffer.sample(self._work.batch)
                self._learner.update(data.observations, data.next_observations, data.actions, data.rewards, data.dones)

    def _random_actions(self) -> np.ndarray:
        return np.array([self._envs.single_action_space.sample() for _ in range(self._work.num_envs)])

    def _actions(self) -> np.ndarray:
        epsilon = max(1 - (1 - EPSILON) * self.env_steps / self._work.learning_starts, EPSILON)
        if random.random() < epsilon:
            return self._random_actions()
        return torch.argmax(self._learner.online(torch.Tensor(self._s_tm1)), dim=1).cpu().numpy()

    def _step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """Returns what the buffer's `add` takes."""
        s_t, reward, terminated, truncated, infos = self._envs.step(actions)
        real_s_t = s_t.copy()
        for row in np.flatnonzero(terminated | truncated):
            real_s_t[row] = infos["final_obs"][row]
        step = self._s_tm1, real_s_t, actions, reward, terminated, infos
        self._s_tm1 = s_t
        return step


def main() -> None:
    work = read_work()
    torch.set_num_threads(work.threads)
    reports = Reports(
        work,
        version=f"torch {torch.__version__}, stable-baselines3 {version('stable-baselines3')}",
        note="Q-learning, MSE, no clipping; optimize_memory_usage",
    )
    loop = Loop(work)
    if work.fill:
        loop.fill()
    while True:
        loop.round()
        reports.step(loop.env_steps, loop.num_updates)


if __name__ == "__main__":
    main()
