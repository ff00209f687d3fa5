"""Stable-Baselines3's DQN with its CnnPolicy: `learn` on its own Atari wrappers, `VecFrameStack` and replay buffer.

Modes: `dummy`, all environments in this process; `subproc`, each in a process of its own. The replay has `optimize_memory_usage`, so that
each stack is kept once. A step of all environments, then the updates that the ratio asks for, by `train_freq` and `gradient_steps`.

`fill`: recorded random steps are added by `ReplayBuffer.add` until it is full. Its arrays are dense: what they hold does not matter.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from layers import HIDDEN
from sb3_learner import Small
from stable_baselines3 import DQN
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack
from system_harness import (
    DISCOUNT,
    EPSILON,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TARGET_PERIOD_UPDATES,
    Reports,
    Work,
    add_until_full,
    make_game,
    read_work,
)

TOTAL_STEPS = 10**9
NUM_RECORDED = 64


class Progress(BaseCallback):
    """Tells after every step of all environments."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def _on_step(self) -> bool:
        self._reports.step(self.model.num_timesteps, self.model._n_updates)
        return True


def make_envs(work: Work) -> VecEnv:
    envs = make_vec_env(
        functools.partial(make_game, work.game),
        n_envs=work.num_envs,
        wrapper_class=AtariWrapper,
        wrapper_kwargs={"terminal_on_life_loss": False},
        vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[work.mode],
    )
    return VecFrameStack(envs, n_stack=4)


def make_dqn(work: Work, envs: VecEnv) -> DQN:
    # Empty: CnnPolicy's own network is that of 2015.
    policy: dict[str, Any] = {} if HIDDEN[work.network] == 512 else {"features_extractor_class": Small, "net_arch": []}
    num_steps, num_updates = work.rhythm
    return DQN(
        "CnnPolicy",
        envs,
        learning_rate=LEARNING_RATE,
        buffer_size=work.capacity,
        learning_starts=work.learning_starts,
        batch_size=work.batch,
        gamma=DISCOUNT,
        train_freq=(num_steps, "step"),
        gradient_steps=num_updates,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        optimize_memory_usage=True,
        target_update_interval=TARGET_PERIOD_UPDATES * work.batch // work.samples_per_step,
        exploration_fraction=work.learning_starts / TOTAL_STEPS,
        exploration_final_eps=EPSILON,
        max_grad_norm=MAX_GRAD_NORM,
        policy_kwargs=policy,
        device="cpu",
        seed=0,
    )


def record(envs: VecEnv) -> list[tuple[Any, ...]]:
    """Returns what `ReplayBuffer.add` takes, of random steps."""
    steps = []
    s_tm1 = envs.reset()
    for _ in range(NUM_RECORDED):
        actions = np.array([envs.action_space.sample() for _ in range(envs.num_envs)])
        s_t, reward, done, infos = envs.step(actions)
        steps.append((s_tm1, s_t, actions, reward, done, infos))
        s_tm1 = s_t
    return steps


def main() -> None:
    work = read_work()
    torch.set_num_threads(work.threads)
    reports = Reports(
        work,
        version=f"{version('stable-baselines3')}, torch {torch.__version__}",
        note="Q-learning, Huber; optimize_memory_usage",
    )
    dqn = make_dqn(work, make_envs(work))
    if work.fill:
        add_until_full(dqn.replay_buffer, record(dqn.env))
    dqn.learn(TOTAL_STEPS, callback=Progress(reports), log_interval=100)


if __name__ == "__main__":
    main()
