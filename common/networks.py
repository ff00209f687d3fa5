"""Q-networks: a torso, hidden layers and a head, composed by configuration.

Observations come as they are stored (uint8 pixels are scaled to [0, 1] inside, by the first layer), outputs leave as float32. Nothing in here
is random: noise and quantiles are arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import EnvSpec, NetworkConfig
from common.layers import CosineEmbedding, Head, SpectralConv2d, draw_noise, make_head, make_torso


class QNetwork(nn.Module):
    """Maps stacked observations [B, K, *plane_shape] to the returns that it expects of each action.

    `distribution` gives them as the heads do, by `network.distribution`:

        expectation        f32[B, A]                 action values
        categorical        f32[B, A, num_atoms]      logits of `atoms`
        quantile           f32[B, num_quantiles, A]  quantiles at `taus`
        implicit_quantile  f32[B, N, A]              quantiles at the taus that are asked for

    and `values` their means f32[B, A]. With `dueling` the mean over the actions is subtracted of each atom or quantile alone.

    The torsos are those of Mnih et al. 2013 (https://arxiv.org/abs/1312.5602), Mnih et al. 2015
    (https://doi.org/10.1038/nature14236) and Espeholt et al. 2018 (https://arxiv.org/abs/1802.01561, the residual one); the dueling
    head is that of Wang et al. 2016 (https://arxiv.org/abs/1511.06581) with the mean subtracted.

    Attributes:
      num_noise: normal numbers in one draw of noise; 0 without noisy layers.
      atoms: categorical: f32[num_atoms], the returns that the logits are of. Else None.
      taus: quantile: f32[1, num_quantiles], what the outputs are quantiles of; implicit_quantile:
        f32[1, num_policy_quantiles], those whose mean is an action's value. Midpoints of equal parts of [0, 1]. Else None.
      value_rescaling: whether the values are of h(return), see `common/value_rescaling.py`.
    """

    atoms: Tensor | None
    taus: Tensor | None

    def __init__(self, config: NetworkConfig, spec: EnvSpec) -> None:
        super().__init__()
        self._scale = 1.0 / 255.0 if spec.plane_dtype == "|u1" else 1.0
        self.torso, num_features = make_torso(
            config.torso,
            spec.frame_stack,
            spec.plane_shape,
            width=config.width,
            layer_norm=config.layer_norm,
            spectral_norm=config.spectral_norm,
            weight_standardization=config.weight_standardization,
            adaptive_pool=config.adaptive_pool,
            scale=self._scale,
        )
        self._first_stride = int(self.torso[0].stride[0]) if len(self.torso) else 1  # type: ignore[index]
        self.dueling, self.value_rescaling = config.dueling, config.value_rescaling
        self._kind, num_actions = config.distribution, spec.num_actions
        # What each action's values are, and where the actions are among the dimensions of an output.
        self._num_each = {"categorical": config.num_atoms, "quantile": config.num_quantiles}.get(config.distribution)
        self._action_dim = 1 if config.distribution == "categorical" else -1
        num_each = self._num_each or 1

        def head(num_out: int) -> Head:
            return make_head(
                num_features, config.hidden_sizes, num_out, layer_norm=config.layer_norm, noisy_sigma=config.noisy_sigma
            )

        self.advantage = head(num_each * num_actions)
        self.value = head(num_each) if config.dueling else None
        implicit = config.distribution == "implicit_quantile"
        self.embedding = CosineEmbedding(config.num_cosines, num_features) if implicit else None
        self.num_noise = self.advantage.num_noise + (self.value.num_noise if self.value is not None else 0)
        # Configuration, not state: in no checkpoint and in no snapshot.
        atoms = torch.linspace(config.value_min, config.value_max, config.num_atoms)
        self.register_buffer("atoms", atoms if config.distribution == "categorical" else None, persistent=False)
        num_taus = {"quantile": config.num_quantiles, "implicit_quantile": config.num_policy_quantiles}.get(config.distribution)
        taus = ((torch.arange(num_taus) + 0.5) / num_taus)[None] if num_taus else None
        self.register_buffer("taus", taus, persistent=False)

    @property
    def is_convolutional(self) -> bool:
        return len(self.torso) > 0

    @property
    def takes_blocks(self) -> bool:
        """Whether `prepare` can make blocks for the first convolution."""
        return self._first_stride > 1

    @property
    def takes_taus(self) -> bool:
        """Whether `distribution` needs to be told which quantiles to give."""
        return self.embedding is not None

    def prepare(self, observations: Tensor, dtype: torch.dtype, *, in_blocks: bool = False) -> Tensor:
        """Converts: what of `forward` needs no parameters, so that another thread can do it.

        Args:
          observations: u8 or f32 [B, K, *plane_shape].
          dtype: what the first layer computes in.
          in_blocks: as space-to-depth: [B, K * stride * stride, H / stride, W / stride] of the first convolution's stride.
        """
        if in_blocks:
            observations = functional.pixel_unshuffle(observations, self._first_stride)
        converted = observations.to(dtype)
        return converted if self.is_convolutional or self._scale == 1.0 else converted * self._scale

    def draw_noise(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Returns f32[R, num_noise], one argument `noise`, on the generator's device.

        Args:
          num_rows: R: 1, one draw for the whole batch, or B, one for each row.
          generator: what is drawn from.
        """
        return draw_noise(num_rows, self.num_noise, generator)

    def distribution(self, prepared: Tensor, *, noise: Tensor | None = None, taus: Tensor | None = None) -> Tensor:
        """Returns what the heads give, see the class, for what `prepare` made.

        Args:
          prepared: f32[B, K, *plane_shape], or of another floating-point type under autocast.
          noise: f32[R, num_noise] of `draw_noise`, R = 1 or B. None: the mean parameters.
          taus: implicit_quantile only, and there always: f32[B, N] or f32[1, N] in [0, 1].
        """
        assert (taus is None) == (self.embedding is None), f"taus are implicit_quantile's, this network is {self._kind}"
        features = self.torso(prepared).flatten(1)
        if self.embedding is not None:
            features = features[:, None] * self.embedding(taus)  # [B, N, F]
        num = self.advantage.num_noise
        advantage = self._split(self.advantage(features, None if noise is None else noise[:, :num]).float())
        if self.value is None:
            return advantage
        value = self._split(self.value(features, None if noise is None else noise[:, num:]).float())
        return value + advantage - advantage.mean(dim=self._action_dim, keepdim=True)

    def mean(self, distribution: Tensor) -> Tensor:
        """Returns f32[B, A], the expectations of what `distribution` gave."""
        if self.atoms is not None:
            return (distribution.softmax(dim=-1) * self.atoms).sum(dim=-1)
        return distribution if self.taus is None else distribution.mean(dim=1)

    def values(self, prepared: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Returns f32[B, A] for what `prepare` made: the means of `distribution`.

        implicit_quantile: over quantiles at fixed midpoints, where the paper samples them: the same expectation but for the error of the
        midpoint rule, without the variance, and nothing random in an evaluation.
        """
        taus = self.taus if self.embedding is not None else None
        return self.mean(self.distribution(prepared, noise=noise, taus=taus))

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the values f32[B, A] for u8 or f32 [B, K, *plane_shape]."""
        return self.values(self.prepare(observations, torch.float32), noise=noise)

    def step_spectral_norms(self) -> None:
        """Takes one step of the power method in every normalized convolution; nothing where there is none.

        The learner does, on its online network, once an update and after the optimizer's step; other networks get the singular
        vectors with the parameters.
        """
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.iterate()

    def _split(self, output: Tensor) -> Tensor:
        """Returns a head's f32[..., outputs] with a dimension for the actions (one in the head of the state's value)."""
        if self._num_each is None:
            return output
        if self._kind == "categorical":
            return output.view(*output.shape[:-1], -1, self._num_each)
        return output.view(*output.shape[:-1], self._num_each, -1)


def make_network(config: NetworkConfig, spec: EnvSpec, seed: int) -> QNetwork:
    """Builds a network whose initial parameters depend on the seed alone, so that all roles start from the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QNetwork(config, spec)
