"""Stable-Baselines3's `DQN.train(gradient_steps=1)` with its CnnPolicy, on batches that its replay buffer gives at once.

The buffer's `sample` returns a batch that lies ready, so that sampling, which benchmarks/replay.py measures, is on nobody's clock.
dqn2013 is a features extractor of one's own, as https://stable-baselines3.readthedocs.io/en/master/guide/custom_policy.html
says. The copy to the target network is outside `train` and not measured.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from layers import CONVOLUTIONS, HIDDEN
from learner_harness import LEARNING_RATE, NUM_ACTIONS, RawBatch, serve
from stable_baselines3 import DQN
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor, nn

SPACE = spaces.Box(0, 255, (4, 84, 84), np.uint8)


class Screens(gymnasium.Env):
    """An environment that is never stepped: its spaces are what counts."""

    observation_space = SPACE
    action_space = spaces.Discrete(NUM_ACTIONS)


class Small(BaseFeaturesExtractor):
    """The network of 2013 up to its hidden layer; pixels come scaled."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, HIDDEN["dqn2013"])
        layers: list[nn.Module] = []
        channels = 4
        for out_channels, kernel, stride in CONVOLUTIONS["dqn2013"]:
            layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU()]
            channels = out_channels
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2592, HIDDEN["dqn2013"]), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


class ReadyBuffer:
    """Stands for the replay buffer."""

    def __init__(self, batches: list[ReplayBufferSamples]) -> None:
        self._batches = batches
        self.index = 0

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        return self._batches[self.index]


class Peer:
    def __init__(self, network: str, batch_size: int) -> None:
        # Empty: CnnPolicy's own network is that of 2015, with nothing between its features and the values.
        policy: dict[str, Any] = {} if network == "nature" else {"features_extractor_class": Small, "net_arch": []}
        self._dqn = DQN(
            "CnnPolicy",
            Screens(),
            learning_rate=LEARNING_RATE,
            buffer_size=1,
            device="cpu",
            policy_kwargs=policy,
            batch_size=batch_size,
        )
        self._dqn.set_logger(configure(None, []))
        self._batch_size = batch_size

    def load(self, batches: list[RawBatch]) -> None:
        tensor = torch.from_numpy
        self._buffer = ReadyBuffer(
            [
                ReplayBufferSamples(
                    observations=tensor(raw.s_tm1),
                    actions=tensor(raw.a_tm1[:, None]),
                    next_observations=tensor(raw.s_t),
                    dones=tensor(raw.terminated[:, None]),
                    rewards=tensor(raw.r_t[:, None]),
                )
                for raw in batches
            ]
        )
        self._dqn.replay_buffer = self._buffer

    def step(self, index: int) -> Any:
        self._buffer.index = index
        self._dqn.train(gradient_steps=1, batch_size=self._batch_size)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._dqn.q_net.parameters())

    def loss(self) -> float:
        return float(self._dqn.logger.name_to_value["train/loss"])


if __name__ == "__main__":
    serve(
        Peer,
        version=f"{version('stable-baselines3')}, torch {torch.__version__}",
        note="Q-learning (two forward passes, not three), Huber, no priorities, no copy to the target",
    )
