"""Q-networks: a torso, hidden layers and a head, composed by configuration.

Observations come as they are stored (uint8 pixels are scaled to [0, 1] inside), values leave as float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.config import EnvSpec, NetworkConfig

# (channels out, kernel, stride) of each convolution.
_TORSOS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "dqn2013": ((16, 8, 4), (32, 4, 2)),
    "nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
}


class QNetwork(nn.Module):
    """Maps stacked observations [B, K, *plane_shape] to action values f32[B, A].

    The torsos are those of Mnih et al. 2013 (https://arxiv.org/abs/1312.5602) and Mnih et al. 2015
    (https://doi.org/10.1038/nature14236); the dueling head is that of Wang et al. 2016
    (https://arxiv.org/abs/1511.06581) with the mean subtracted.
    """

    def __init__(self, config: NetworkConfig, spec: EnvSpec) -> None:
        super().__init__()
        self._scale = 1.0 / 255.0 if spec.plane_dtype == "|u1" else 1.0
        layers: list[nn.Module] = []
        if config.torso == "mlp":
            num_features = spec.frame_stack * math.prod(spec.plane_shape)
        else:
            if len(spec.plane_shape) != 2:
                raise ValueError(f"network.torso {config.torso} needs 2-D planes, got {spec.plane_shape}: use mlp")
            channels, (height, width) = spec.frame_stack, spec.plane_shape
            for out_channels, kernel, stride in _TORSOS[config.torso]:
                layers.append(nn.Conv2d(channels, out_channels, kernel, stride))
                layers += [nn.GroupNorm(1, out_channels)] if config.layer_norm else []
                layers.append(nn.ReLU())
                channels, height, width = out_channels, (height - kernel) // stride + 1, (width - kernel) // stride + 1
            num_features = channels * height * width
        self.torso = nn.Sequential(*layers)
        self.dueling = config.dueling
        self.advantage = _mlp(num_features, config.hidden_sizes, spec.num_actions, config.layer_norm)
        self.value = _mlp(num_features, config.hidden_sizes, 1, config.layer_norm) if config.dueling else None

    def prepare(self, observations: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales and converts: what of `forward` needs no parameters, so that another thread can do it.

        Args:
          observations: u8 or f32 [B, K, *plane_shape].
          dtype: what the first layer computes in.
        """
        scaled = observations.to(dtype)
        return scaled if self._scale == 1.0 else scaled * self._scale

    def values(self, prepared: Tensor) -> Tensor:
        """Returns f32[B, A] for what `prepare` made."""
        features = self.torso(prepared).flatten(1)
        advantage: Tensor = self.advantage(features).float()
        if self.value is None:
            return advantage
        value: Tensor = self.value(features).float()
        return value + advantage - advantage.mean(dim=1, keepdim=True)

    def forward(self, observations: Tensor) -> Tensor:
        """Returns f32[B, A] for u8 or f32 [B, K, *plane_shape]."""
        return self.values(self.prepare(observations, torch.float32))


def _mlp(num_in: int, hidden_sizes: tuple[int, ...], num_out: int, layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers.append(nn.Linear(num_in, size))
        layers += [nn.LayerNorm(size)] if layer_norm else []
        layers.append(nn.ReLU())
        num_in = size
    return nn.Sequential(*layers, nn.Linear(num_in, num_out))


def make_network(config: NetworkConfig, spec: EnvSpec, seed: int) -> QNetwork:
    """Builds a network whose initial parameters depend on the seed alone, so that all roles start from the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QNetwork(config, spec)
