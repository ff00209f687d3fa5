"""CleanRL's update, written after its published script dqn_atari.py, which has it inside its training loop.

Source: https://github.com/vwxyzjn/cleanrl/blob/master/cleanrl/dqn_atari.py (MIT; Huang et al. 2022, JMLR 23(274)). The same
operations in the same order: the network divides the bytes by 255, Q-learning without the second network's choice, squared error, Adam
of 1e-4, a hard copy every 1,000 updates. Its current script clips no gradients, and it has no priorities.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from layers import CONVOLUTIONS, HIDDEN
from learner_harness import LEARNING_RATE, NUM_ACTIONS, RawBatch, serve
from torch import Tensor, nn
from torch.nn import functional

DISCOUNT = 0.99
TARGET_PERIOD_UPDATES = 1_000


class Network(nn.Module):
    """Convolutions and ReLUs as listed, on pixels over 255."""

    def __init__(self, network: str, num_actions: int = NUM_ACTIONS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 4
        for out_channels, kernel, stride in CONVOLUTIONS[network]:
            layers += [nn.Conv2d(channels, out_channels, kernel, stride=stride), nn.ReLU()]
            channels = out_channels
        layers.append(nn.Flatten())
        num_features = nn.Sequential(*layers)(torch.zeros(1, 4, 84, 84)).shape[1]
        layers += [nn.Linear(num_features, HIDDEN[network]), nn.ReLU(), nn.Linear(HIDDEN[network], num_actions)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels / 255.0)


class Peer:
    def __init__(self, network: str, batch_size: int, num_actions: int = NUM_ACTIONS) -> None:
        self.online = Network(network, num_actions)
        self._target = copy.deepcopy(self.online)
        self._optimizer = torch.optim.Adam(self.online.parameters(), lr=LEARNING_RATE)
        self.num_updates = 0

    def load(self, batches: list[RawBatch]) -> None:
        """As Stable-Baselines3's ReplayBuffer, which it uses, returns them: uint8 tensors, the rest with a second dimension."""
        self._batches = [
            [torch.from_numpy(part) for part in (raw.s_tm1, raw.s_t, raw.a_tm1[:, None], raw.r_t, raw.terminated)]
            for raw in batches
        ]

    def step(self, index: int) -> Any:
        self.update(*self._batches[index])

    def update(self, s_tm1: Tensor, s_t: Tensor, a_tm1: Tensor, r_t: Tensor, terminated: Tensor) -> None:
        """Does one update and, where it is time, the copy to the target network."""
        with torch.no_grad():
            best_q_t, _ = self._target(s_t).max(dim=1)
            target_tm1 = r_t.flatten() + DISCOUNT * best_q_t * (1 - terminated.flatten())
        qa_tm1 = self.online(s_tm1).gather(1, a_tm1).squeeze()
        self._loss = functional.mse_loss(target_tm1, qa_tm1)
        self._optimizer.zero_grad()
        self._loss.backward()
        self._optimizer.step()
        self.num_updates += 1
        if self.num_updates % TARGET_PERIOD_UPDATES == 0:
            self._target.load_state_dict(self.online.state_dict())

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.online.parameters())

    def loss(self) -> float:
        return self._loss.item()


if __name__ == "__main__":
    serve(
        Peer,
        version=f"torch {torch.__version__}",
        note="Q-learning (two forward passes, not three), MSE, no clipping, no priorities",
    )
