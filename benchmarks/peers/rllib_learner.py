"""RLlib's DQNTorchLearner of its new API stack: `Learner.update(batch=...)`, local, and the TD errors as DQN reads them from the result.

The network is RLlib's default one by `DefaultModelConfig`, on channels last, as it wants them. Observations come as float32 within [-1, 1]:
its Atari wrapper scales the frames when they are played, so the conversion of bytes is on no clock of an update. What `DQN` runs
before, connectors that make the batch of episodes, is not measured either.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import torch
from gymnasium import spaces
from layers import CONVOLUTIONS, HIDDEN
from learner_harness import LEARNING_RATE, NUM_ACTIONS, RawBatch, serve
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, TD_ERROR_KEY

N_STEP = 3


def model_config(network: str) -> DefaultModelConfig:
    """Returns the settings that give RLlib's default model the network's layers."""
    return DefaultModelConfig(
        conv_filters=[[*filters, "valid"] for filters in CONVOLUTIONS[network]],
        conv_activation="relu",
        head_fcnet_hiddens=[HIDDEN[network]],
        head_fcnet_activation="relu",
    )


class Peer:
    def __init__(self, network: str, batch_size: int) -> None:
        config = (
            DQNConfig()
            .training(
                lr=LEARNING_RATE,
                train_batch_size_per_learner=batch_size,
                double_q=True,
                dueling=False,
                num_atoms=1,
                n_step=N_STEP,
                grad_clip=10.0,
                grad_clip_by="global_norm",
                td_error_loss_fn="huber",
                target_network_update_freq=1_000 * batch_size,
            )
            .rl_module(model_config=model_config(network))
        )
        observations = spaces.Box(-1.0, 1.0, (84, 84, 4), np.float32)
        both = observations, spaces.Discrete(NUM_ACTIONS)
        self._learner = config.build_learner(spaces={DEFAULT_MODULE_ID: both})
        self._learner.build()
        self._batch_size, self._num_steps = batch_size, 0

    def load(self, batches: list[RawBatch]) -> None:
        self._batches = [self._as_multi_agent(raw) for raw in batches]

    def step(self, index: int) -> Any:
        self._num_steps += self._batch_size
        results = self._learner.update(batch=self._batches[index], timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self._num_steps})
        self._results = results[DEFAULT_MODULE_ID]
        td_error = self._results.pop(TD_ERROR_KEY).peek()
        return [np.asarray(values) for values in td_error]

    def num_parameters(self) -> int:
        return sum(
            parameter.numel() for parameter in self._learner.module[DEFAULT_MODULE_ID].parameters() if parameter.requires_grad
        )

    def loss(self) -> float:
        return float(self._results["qf_loss"].peek())

    def _as_multi_agent(self, raw: RawBatch) -> MultiAgentBatch:
        def scaled(stacks: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(stacks.transpose(0, 2, 3, 1)).astype(np.float32) / 127.5 - 1.0

        batch = SampleBatch(
            {
                "obs": scaled(raw.s_tm1),
                "new_obs": scaled(raw.s_t),
                "actions": raw.a_tm1,
                "rewards": raw.r_t,
                "terminateds": raw.terminated.astype(bool),
                "truncateds": np.zeros(len(raw.r_t), bool),
                "weights": np.ones(len(raw.r_t), np.float32),
                "n_step": np.full(len(raw.r_t), N_STEP, np.float32),
            }
        )
        return MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(raw.r_t))


if __name__ == "__main__":
    serve(
        Peer,
        version=f"ray {version('ray')}, torch {torch.__version__}",
        note="double Q-learning, Huber, TD errors out; observations come as float32, not as bytes",
    )
