"""The layers, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from common.layers import (
    CosineEmbedding,
    Head,
    NoisyLinear,
    PixelConv2d,
    SpectralConv2d,
    StandardizedConv2d,
    draw_noise,
    standardized,
)

P_REJECT = 1e-6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("num_quantiles", [None, 3])
def test_noisy_linear_agrees_with_the_materialized_parameters(num_rows, num_quantiles):
    """Kills: the noise of inputs and outputs exchanged; a bias without noise; one row's noise for all."""
    torch.manual_seed(0)
    layer = NoisyLinear(5, 3, sigma_0=0.5)
    with torch.no_grad():  # So that no element's sigma is another's.
        layer.sigma_weight.copy_(torch.rand(3, 5))
        layer.sigma_bias.copy_(torch.rand(3))
    inputs = torch.randn(4, 5) if num_quantiles is None else torch.randn(4, num_quantiles, 5)
    noise = draw_noise(num_rows, layer.num_noise, seeded())
    outputs = layer(inputs, noise).detach().numpy()
    mu, sigma = layer.weight.detach().numpy(), layer.sigma_weight.detach().numpy()
    mu_bias, sigma_bias = layer.bias.detach().numpy(), layer.sigma_bias.detach().numpy()
    for row in range(4):
        of_row = noise[row if num_rows > 1 else 0].numpy()
        noise_in, noise_out = of_row[:5], of_row[5:]
        weight = np.array([[mu[j, i] + sigma[j, i] * noise_in[i] * noise_out[j] for i in range(5)] for j in range(3)])
        bias = np.array([mu_bias[j] + sigma_bias[j] * noise_out[j] for j in range(3)])
        np.testing.assert_allclose(outputs[row], inputs[row].numpy() @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_noisy_linear_begins_as_published():
    """Fortunato et al. 2018, section 3.2: means uniform within 1 / sqrt(p), sigmas sigma_0 / sqrt(p), of p inputs."""
    torch.manual_seed(0)
    layer = NoisyLinear(400, 300, sigma_0=0.5)
    assert torch.equal(layer.sigma_weight, torch.full((300, 400), 0.5 / 20))
    assert torch.equal(layer.sigma_bias, torch.full((300,), 0.5 / 20))
    for mean in (layer.weight, layer.bias):
        law = stats.uniform(-1 / 20, 2 / 20)
        assert stats.kstest(mean.detach().numpy().reshape(-1), law.cdf).pvalue > P_REJECT


def test_noise_is_the_signed_root_of_normal_numbers():
    noise = draw_noise(1000, 30, seeded()).numpy().astype(float)
    assert stats.kstest((np.sign(noise) * noise**2).reshape(-1), stats.norm.cdf).pvalue > P_REJECT
    assert torch.equal(draw_noise(3, 4, seeded(1)), draw_noise(3, 4, seeded(1)))
    assert not torch.equal(draw_noise(3, 4, seeded(1)), draw_noise(3, 4, seeded(2)))
    assert draw_noise(2, 0, seeded()).shape == (2, 0)


def test_head_gives_every_noisy_layer_its_own_part_of_the_noise():
    torch.manual_seed(0)
    head = Head(NoisyLinear(4, 3, 0.5), nn.ReLU(), NoisyLinear(3, 2, 0.5))
    noise, inputs = draw_noise(1, head.num_noise, seeded()), torch.randn(6, 4)
    assert head.num_noise == (4 + 3) + (3 + 2)
    torch.testing.assert_close(head(inputs, noise), head[2](head[0](inputs, noise[:, :7]).relu(), noise[:, 7:]))


def test_cosine_embedding_agrees_with_equation_4():
    """Kills: i from 1; a missing pi; no nonlinearity."""
    torch.manual_seed(0)
    embedding = CosineEmbedding(4, 5)
    taus = torch.rand(2, 3)
    weight, bias = embedding.linear.weight.detach().numpy(), embedding.linear.bias.detach().numpy()
    outputs = embedding(taus).detach().numpy()
    assert outputs.shape == (2, 3, 5)
    for b in range(2):
        for n in range(3):
            for j in range(5):
                total = sum(math.cos(math.pi * i * taus[b, n]) * weight[j, i] for i in range(4)) + bias[j]
                assert outputs[b, n, j] == pytest.approx(max(total, 0.0), abs=1e-5)


def standardized_convolution(kind):
    torch.manual_seed(0)
    if kind == "pixel":
        return PixelConv2d(4, 6, 8, 4, scale=1 / 255, standardize=True)
    return StandardizedConv2d(4, 6, 4, 2)


def test_standardized_filters_are_those_of_the_papers():
    """Qiao et al. 2019, equation 8, divided by the root of the fan-in. Kills: the mean over all filters, an unbiased variance."""
    weight = torch.arange(24.0).reshape(3, 2, 2, 2) ** 2
    expected = np.stack([(w - w.mean()) / (w.std() * math.sqrt(8)) for w in weight.numpy().astype(float)])
    np.testing.assert_allclose(standardized(weight).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pixel", "plain"])
def test_a_standardized_convolution_sees_neither_gray_nor_the_length_and_mean_of_its_weight(kind):
    layer = standardized_convolution(kind)
    gray = torch.full((1, 4, 20, 20), 87.0)
    torch.testing.assert_close(layer(gray), layer.bias[None, :, None, None].expand_as(layer(gray)), rtol=1e-4, atol=1e-4)
    inputs = torch.randint(0, 256, (2, 4, 20, 20)).float()
    before = layer(inputs)
    assert before.std() > 0.05
    with torch.no_grad():
        layer.weight.mul_(3.0).add_(torch.arange(6.0)[:, None, None, None])
    torch.testing.assert_close(layer(inputs), before, rtol=1e-3, atol=1e-3)
    layer(inputs).square().sum().backward()
    gradient = layer.weight.grad.flatten(1)
    assert gradient.norm() > 0 and gradient.sum(dim=1).abs().max() < 1e-4 * gradient.norm()


def test_a_standardized_filter_without_shape_is_not_blown_up():
    layer = StandardizedConv2d(2, 1, 2)
    with torch.no_grad():
        layer.weight.copy_(1.0 + 1e-6 * torch.randn(layer.weight.shape))
    assert standardized(layer.weight).abs().max() < 1e-3
    layer(torch.randn(1, 2, 4, 4)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_standardized_filters_are_the_same_in_channels_last_memory_and_under_autocast():
    layer = standardized_convolution("pixel")
    last = standardized_convolution("pixel").to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    inputs = torch.randint(0, 256, (2, 4, 20, 20)).float()
    filters, outputs = standardized(layer.weight), layer(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (layer, last):
            torch.testing.assert_close(standardized(each.weight), filters, rtol=1e-5, atol=1e-6)
            assert each(inputs).dtype == torch.bfloat16
            torch.testing.assert_close(each(inputs).float(), outputs, rtol=0.02, atol=0.02)


def singular_values(layer):
    return np.linalg.svd(layer.normalized().detach().double().flatten(1).numpy(), compute_uv=False)


def test_spectral_norm_divides_by_the_largest_singular_value():
    """Kills: the Frobenius norm; the singular value of one position of the kernel; a vector that is not updated."""
    torch.manual_seed(0)
    layer = SpectralConv2d(6, 8, 3, padding=1)
    with torch.no_grad():
        layer.weight.normal_()
    layer.iterate(200)
    assert singular_values(layer)[0] == pytest.approx(1.0, rel=1e-4)
    weight = layer.weight.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(
        singular_values(layer), np.linalg.svd(weight, compute_uv=False) / np.linalg.norm(weight, 2), rtol=1e-4
    )


def test_spectral_norm_begins_near_and_follows_a_weight_that_is_learned():
    torch.manual_seed(0)
    layer = SpectralConv2d(6, 8, 3, padding=1)
    assert singular_values(layer)[0] == pytest.approx(1.0, rel=0.05)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    inputs = torch.randn(2, 6, 5, 5)
    for _ in range(100):
        optimizer.zero_grad()
        layer(inputs).square().sum().neg().backward()
        optimizer.step()
        layer.iterate()
    assert singular_values(layer)[0] == pytest.approx(1.0, rel=0.05)


def test_spectral_norm_agrees_with_pytorchs():
    """The same vectors: the same output, and the same gradient, which flows through the singular value."""
    torch.manual_seed(0)
    ours, theirs = SpectralConv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    theirs = nn.utils.parametrizations.spectral_norm(theirs).eval()
    norm = theirs.parametrizations.weight[0]
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
        norm._u.copy_(ours.left)
        norm._v.copy_(ours.right)
    inputs = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(ours(inputs), theirs(inputs))
    for layer in (ours, theirs):
        layer(inputs).square().sum().backward()
    gradient = ours.weight.grad
    torch.testing.assert_close(gradient, theirs.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-4)
    # The output does not depend on the weight's length: no gradient along it.
    weight = ours.weight.detach()
    assert gradient.norm() > 0.1 and abs((gradient * weight).sum()) < 1e-5 * gradient.norm() * weight.norm()
    norm._power_method(ours.weight.detach().flatten(1), 1)
    ours.iterate()
    torch.testing.assert_close((ours.left, ours.right), (norm._u, norm._v))


def test_spectral_norm_is_the_same_in_channels_last_memory_and_under_autocast():
    torch.manual_seed(0)
    layer, last = SpectralConv2d(6, 8, 3, padding=1), SpectralConv2d(6, 8, 3, padding=1)
    last.load_state_dict(layer.state_dict())
    last = last.to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(last.normalized(), layer.normalized(), rtol=1e-5, atol=1e-6)
    for each in (layer, last):
        each.iterate(3)
    torch.testing.assert_close((last.left, last.right), (layer.left, layer.right))
