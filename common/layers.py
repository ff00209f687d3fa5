"""The layers of which `common/networks.py` composes the Q-networks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.torsos import CONVOLUTIONS, IMPALA_BLOCKS, IMPALA_CHANNELS, check_pool, halved

MIN_FILTER_VARIANCE = 1e-4
"""Times the fan-in, of a filter that is standardized: below, it is not blown up to a norm of 1."""


class NoisyLinear(nn.Linear):
    """A fully connected layer with factorized Gaussian noise, which is an argument and not its state.

        y = x weight^T + bias + ((x * noise_in) sigma_weight^T + sigma_bias) * noise_out

    That is the layer with weight + sigma_weight * outer(noise_out, noise_in) and bias + sigma_bias * noise_out, which is never
    materialized: so every row can have noise of its own. `weight` and `bias` are the means. They start uniform within
    1 / sqrt(num_in), as those of nn.Linear, and both sigmas at sigma_0 / sqrt(num_in).

    Source: Fortunato et al. 2018, "Noisy Networks for Exploration", https://arxiv.org/abs/1706.10295.
    """

    def __init__(self, num_in: int, num_out: int, sigma_0: float) -> None:
        super().__init__(num_in, num_out)
        self.sigma_weight = nn.Parameter(torch.full((num_out, num_in), sigma_0 / math.sqrt(num_in)))
        self.sigma_bias = nn.Parameter(torch.full((num_out,), sigma_0 / math.sqrt(num_in)))

    @property
    def num_noise(self) -> int:
        return self.in_features + self.out_features

    def forward(self, input: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns f32[B, ..., num_out].

        Args:
          input: f32[B, ..., num_in].
          noise: f32[R, num_noise] as `draw_noise` gives it, for the inputs and then for the outputs; R is 1 or B. None: the means.
        """
        mean = functional.linear(input, self.weight, self.bias)
        if noise is None:
            return mean
        # In bfloat16 where the input is: the product is rounded to that in any case, and float32 would double what it takes.
        noise = noise.to(input.dtype).view(noise.shape[0], *[1] * (input.ndim - 2), self.num_noise)
        noise_in, noise_out = noise[..., : self.in_features], noise[..., self.in_features :]
        return mean + functional.linear(input * noise_in, self.sigma_weight, self.sigma_bias) * noise_out


def draw_noise(num_rows: int, num_noise: int, generator: torch.Generator) -> Tensor:
    """Returns f32[R, num_noise] of f(x) = sign(x) sqrt(abs(x)) of normal numbers, on the generator's device."""
    normal = torch.randn(num_rows, num_noise, generator=generator, device=generator.device)
    return normal.sign() * normal.abs().sqrt()


class Head(nn.Sequential):
    """Fully connected layers, which may be noisy. The last one computes in float32 under autocast too: bfloat16 has steps of 0.008
    between 1 and 2, where the values of two actions often differ by less."""

    def forward(self, input: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns f32[B, ..., num_out] for f32[B, ..., num_in]; `noise` f32[R, num_noise] is that of its layers, in order."""
        start = 0
        for i, layer in enumerate(self):
            is_last = i == len(self) - 1
            with torch.autocast(input.device.type, enabled=False) if is_last else contextlib.nullcontext():
                input = input.float() if is_last else input
                if isinstance(layer, NoisyLinear):
                    of_layer = None if noise is None else noise[:, start : start + layer.num_noise]
                    input, start = layer(input, of_layer), start + layer.num_noise
                else:
                    input = layer(input)
        return input

    @property
    def num_noise(self) -> int:
        """Normal numbers in one draw of its noise; 0 without noisy layers."""
        return sum(layer.num_noise for layer in self if isinstance(layer, NoisyLinear))


def make_head(num_in: int, hidden_sizes: tuple[int, ...], num_out: int, *, layer_norm: bool, noisy_sigma: float | None) -> Head:
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers.append(_linear(num_in, size, noisy_sigma))
        layers += [nn.LayerNorm(size)] if layer_norm else []
        layers.append(nn.ReLU(inplace=True))
        num_in = size
    return Head(*layers, _linear(num_in, num_out, noisy_sigma))


def _linear(num_in: int, num_out: int, noisy_sigma: float | None) -> nn.Linear:
    return nn.Linear(num_in, num_out) if noisy_sigma is None else NoisyLinear(num_in, num_out, noisy_sigma)


class CosineEmbedding(nn.Module):
    """Embeds quantiles: ReLU of a linear layer over cos(pi i tau), i = 0 .. num_cosines - 1.

    Source: Dabney et al. 2018, "Implicit Quantile Networks", https://arxiv.org/abs/1806.06923, equation 4. Dopamine counts i from 1,
    where the paper has the constant cos(0).
    """

    frequencies: Tensor

    def __init__(self, num_cosines: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(num_cosines), persistent=False)
        self.linear = nn.Linear(num_cosines, num_features)

    def forward(self, taus: Tensor) -> Tensor:
        """Returns f32[B, N, num_features] for taus f32[B, N] in [0, 1]."""
        return functional.relu(self.linear((taus[..., None] * self.frequencies).cos()))


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix [out, in * kernel * kernel], is divided by its largest singular value.

    That is left^T weight right with the singular vectors `left` and `right`: buffers that `iterate` improves by a step of the power
    method. Not PyTorch's parametrization, which takes that step in every forward pass in training mode: here a pass changes
    nothing, so that all passes of one update, and the actors', compute the same. The singular value carries gradient, the
    vectors do not.

    Source: Miyato et al. 2018, "Spectral Normalization", https://arxiv.org/abs/1802.05957.
    """

    left: Tensor
    right: Tensor

    def __init__(self, num_in: int, num_out: int, kernel: int, *, padding: int) -> None:
        super().__init__(num_in, num_out, kernel, padding=padding)
        self.register_buffer("left", functional.normalize(torch.randn(num_out), dim=0))
        self.register_buffer("right", functional.normalize(torch.randn(num_in * kernel * kernel), dim=0))
        self.iterate(15)  # As PyTorch's, so that the first updates are not far off.

    @torch.no_grad()
    def iterate(self, num_steps: int = 1) -> None:
        """Takes steps of the power method."""
        matrix = self.weight.flatten(1)
        for _ in range(num_steps):
            self.left.copy_(functional.normalize((matrix * self.right).sum(dim=1), dim=0))
            self.right.copy_(functional.normalize((matrix * self.left[:, None]).sum(dim=0), dim=0))

    def normalized(self) -> Tensor:
        """Returns the weight in use f32[out, in, kernel, kernel]."""
        # Sums and not products of matrices, which autocast would compute in bfloat16: 1 % off.
        rank_one = self.left[:, None, None, None] * self.right.view(self.weight.shape[1:])
        return self.weight / (self.weight * rank_one).sum()

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.normalized(), self.bias, padding=self.padding)


def standardized(weight: Tensor) -> Tensor:
    """Returns f32[out, in, kernel, kernel] whose filters have a mean of 0 and a norm of 1; the mean and the norm carry gradient.

    So a plane of one gray level gives nothing but the bias where nothing is padded, and no filter outweighs the others. With plain filters a
    layer norm over channels and positions mostly sees which filters sum to much, where a game's background is not black.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    https://arxiv.org/abs/1903.10520; divided by the root of the fan-in too, as in Brock et al. 2021, https://arxiv.org/abs/2101.08692.
    """
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * (variance * weight[0].numel()).clamp(min=MIN_FILTER_VARIANCE).rsqrt()


class StandardizedConv2d(nn.Conv2d):
    """A convolution with the filters that `standardized` makes of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, standardized(self.weight), self.bias, self.stride, self.padding)


class PixelConv2d(nn.Conv2d):
    """The first convolution of a torso, on pixels as they are stored: the weight is scaled, and not the pixels.

    So bytes travel and convert without rounding (bfloat16 holds every whole number up to 256), and no pass over the observations
    is spent on their scale. It also takes observations in blocks, `functional.pixel_unshuffle(observations, stride)`, where
    kernel and planes divide by the stride: the convolution is then one of stride 1 over stride * stride times as many
    channels, with the same weight, which GPUs do faster. `standardize`: with the filters that `standardized` makes of the weight.
    """

    def __init__(
        self, num_in: int, num_out: int, kernel: int, stride: int = 1, *, padding: int = 0, scale: float, standardize: bool
    ) -> None:
        super().__init__(num_in, num_out, kernel, stride, padding)
        self._scale, self._standardize = scale, standardize

    def forward(self, input: Tensor) -> Tensor:
        """Returns [B, num_out, ...] for [B, num_in, H, W], or for the same in blocks."""
        weight = standardized(self.weight) if self._standardize else self.weight
        weight = weight if self._scale == 1.0 else weight * self._scale
        if input.shape[1] == self.in_channels:
            return functional.conv2d(input, weight, self.bias, self.stride, self.padding)
        return functional.conv2d(input, functional.pixel_unshuffle(weight, self.stride[0]), self.bias)


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), with 3 x 3 convolutions; a layer norm stands before either ReLU."""

    def __init__(self, channels: int, *, layer_norm: bool, convolution: Callable[..., nn.Conv2d]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(1, channels)] if layer_norm else []
            layers += [nn.ReLU(), convolution(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.layers(input)  # type: ignore[no-any-return]


def make_torso(
    name: str,
    num_planes: int,
    plane_shape: tuple[int, ...],
    *,
    width: int,
    layer_norm: bool,
    spectral_norm: bool,
    weight_standardization: bool,
    adaptive_pool: int | None,
    scale: float,
) -> tuple[nn.Sequential, int]:
    """Returns the layers, and how many features they give when flattened. ReLUs overwrite where nobody else reads. Convolutional ones multiply pixels by `scale`."""
    if name == "mlp":
        return nn.Sequential(), num_planes * math.prod(plane_shape)
    if len(plane_shape) != 2:
        raise ValueError(f"network.torso {name} needs 2-D planes, got {plane_shape}: use mlp")
    layers: list[nn.Module] = []
    channels, (height, columns) = num_planes, plane_shape
    first = partial(PixelConv2d, scale=scale, standardize=weight_standardization)
    plain = StandardizedConv2d if weight_standardization else nn.Conv2d
    if name == "impala":
        residual = SpectralConv2d if spectral_norm else plain
        for base in IMPALA_CHANNELS:
            out_channels = base * width
            convolution = plain if layers else first
            layers += [convolution(channels, out_channels, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
            layers += [ResidualBlock(out_channels, layer_norm=layer_norm, convolution=residual) for _ in range(IMPALA_BLOCKS)]
            channels, height, columns = out_channels, halved(height), halved(columns)
        layers += [nn.GroupNorm(1, channels)] if layer_norm else []
        layers.append(nn.ReLU(inplace=True))
    else:
        for out_channels, kernel, stride in CONVOLUTIONS[name]:
            convolution = plain if layers else first
            layers.append(convolution(channels, out_channels, kernel, stride))
            layers += [nn.GroupNorm(1, out_channels)] if layer_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels, height, columns = out_channels, (height - kernel) // stride + 1, (columns - kernel) // stride + 1
    if adaptive_pool is not None:
        check_pool(adaptive_pool, height, columns, name)
        layers.append(nn.AdaptiveMaxPool2d(adaptive_pool))
        height = columns = adaptive_pool
    return nn.Sequential(*layers), channels * height * columns
