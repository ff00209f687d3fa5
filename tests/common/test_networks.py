from __future__ import annotations

import pytest
import torch
from torch import nn

from common.config import EnvSpec, NetworkConfig
from common.networks import QNetwork, make_network

PIXELS = EnvSpec((84, 84), "|u1", 4, 6)
VECTORS = EnvSpec((4,), "<f4", 1, 2)
NATURE = NetworkConfig(torso="nature", hidden_sizes=(512,))
DQN2013 = NetworkConfig(torso="dqn2013", hidden_sizes=(256,))


def num_params(network):
    return sum(p.numel() for p in network.parameters())


def pixels(batch, spec=PIXELS):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, spec.frame_stack, *spec.plane_shape), dtype=torch.uint8, generator=generator)


def test_nature_network_has_the_shapes_and_count_of_2015():
    network = make_network(NATURE, PIXELS, seed=0)
    convolutions = (32 * 4 * 8 * 8 + 32) + (64 * 32 * 4 * 4 + 64) + (64 * 64 * 3 * 3 + 64)
    head = (512 * 64 * 7 * 7 + 512) + (6 * 512 + 6)
    assert num_params(network) == convolutions + head
    assert network.torso(torch.zeros(2, 4, 84, 84)).shape == (2, 64, 7, 7)
    values = network(pixels(3))
    assert (values.shape, values.dtype) == ((3, 6), torch.float32)


def test_dqn2013_network_has_the_shapes_and_count_of_2013():
    network = make_network(DQN2013, PIXELS, seed=0)
    convolutions = (16 * 4 * 8 * 8 + 16) + (32 * 16 * 4 * 4 + 32)
    assert num_params(network) == convolutions + (256 * 32 * 9 * 9 + 256) + (6 * 256 + 6)
    assert network.torso(torch.zeros(2, 4, 84, 84)).shape == (2, 32, 9, 9)
    assert network(pixels(3)).shape == (3, 6)


@pytest.mark.parametrize("hidden_sizes", [(), (16,), (24, 10)])
def test_mlp_flattens_and_counts(hidden_sizes):
    spec = EnvSpec((3, 2), "<f4", 2, 5)
    network = make_network(NetworkConfig(torso="mlp", hidden_sizes=hidden_sizes), spec, seed=0)
    expected = {(): 12 * 5 + 5, (16,): (12 * 16 + 16) + (16 * 5 + 5), (24, 10): (12 * 24 + 24) + (24 * 10 + 10) + (10 * 5 + 5)}
    assert num_params(network) == expected[hidden_sizes]
    assert network(torch.zeros(7, 2, 3, 2)).shape == (7, 5)


def test_dueling_has_a_second_stream_and_subtracts_the_mean():
    """Kills: the maximum subtracted; the mean over the batch; one shared hidden layer; the mean not subtracted."""
    network = make_network(NetworkConfig(torso="mlp", hidden_sizes=(8,), dueling=True), VECTORS, seed=0)
    assert num_params(network) == (4 * 8 + 8 + 2 * 8 + 2) + (4 * 8 + 8 + 8 + 1)
    observations = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0))
    features = observations.flatten(1)
    value, advantage = network.value(features), network.advantage(features)
    values = network(observations)
    torch.testing.assert_close(values.mean(dim=1, keepdim=True), value)
    torch.testing.assert_close(values[:, :1] - values[:, 1:], advantage[:, :1] - advantage[:, 1:])
    with torch.no_grad():
        network.advantage[-1].bias.add_(100.0)  # What all advantages have in common is not seen.
    torch.testing.assert_close(network(observations), values, atol=1e-4, rtol=0)


def test_values_are_computed_from_pixels_divided_by_255():
    """The first convolution sees [0, 1]. Kills: no scale; 256; a scale for vectors too."""
    network = make_network(DQN2013, PIXELS, seed=0)
    seen = []
    network.torso[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    observations = pixels(2)
    network(observations)
    torch.testing.assert_close(seen[0], observations.float() / 255, rtol=1e-6, atol=0)
    assert seen[0].max() == 1.0  # 255 is in the noise.
    vectors = torch.tensor([[[300.0, -2.0, 0.5, 1.0]]])
    linear = make_network(NetworkConfig(hidden_sizes=()), VECTORS, seed=0)
    layer = linear.advantage[0]
    torch.testing.assert_close(linear(vectors), vectors[:, 0] @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("spec", [PIXELS, VECTORS], ids=["pixels", "vectors"])
def test_forward_does_not_change_its_input(spec):
    config = NATURE if spec is PIXELS else NetworkConfig(hidden_sizes=(8,))
    observations = pixels(2) if spec is PIXELS else torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    before = observations.clone()
    network = make_network(config, spec, seed=0)
    first = network(observations)
    assert torch.equal(observations, before)
    assert torch.equal(network(observations), first)


def test_float_pixels_are_not_changed_in_place():
    """`prepare` takes u8 or f32: on f32 the conversion is no copy."""
    observations = pixels(2).float()
    before = observations.clone()
    make_network(DQN2013, PIXELS, seed=0)(observations)
    assert torch.equal(observations, before)


def test_prepare_and_values_make_forward():
    network = make_network(DQN2013, PIXELS, seed=0)
    observations = pixels(2)
    assert torch.equal(network.values(network.prepare(observations, torch.float32)), network(observations))
    assert network.prepare(observations, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dueling", [False, True])
def test_layer_norm_adds_one_norm_before_every_relu(dueling):
    plain = NetworkConfig(torso="nature", hidden_sizes=(512, 32), dueling=dueling)
    normed = NetworkConfig(torso="nature", hidden_sizes=(512, 32), dueling=dueling, layer_norm=True)
    network = make_network(normed, PIXELS, seed=0)
    streams = 2 if dueling else 1
    extra = 2 * (32 + 64 + 64) + streams * 2 * (512 + 32)
    assert num_params(network) == num_params(make_network(plain, PIXELS, seed=0)) + extra
    for sequence in [network.torso, network.advantage, *([network.value] if dueling else [])]:
        layers = list(sequence)
        relus = [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
        assert relus
        assert all(isinstance(layers[index - 1], nn.GroupNorm | nn.LayerNorm) for index in relus)
    features = network.torso[:2](torch.rand(3, 4, 84, 84, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(features.mean(dim=(1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)  # Channels and positions.
    torch.testing.assert_close(features.var(dim=(1, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)


def test_a_convolution_of_vectors_is_refused():
    with pytest.raises(ValueError, match=r"network\.torso nature needs 2-D planes, got \(4,\): use mlp"):
        QNetwork(NATURE, VECTORS)


def test_parameters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = make_network(DQN2013, PIXELS, seed=7)
    torch.manual_seed(2)
    other, third = make_network(DQN2013, PIXELS, seed=7), make_network(DQN2013, PIXELS, seed=8)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), third.parameters(), strict=True))


def test_make_network_leaves_the_global_generator_untouched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_network(DQN2013, PIXELS, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
