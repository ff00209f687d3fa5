from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from common import params
from common.config import EnvSpec, NetworkConfig
from common.layers import NoisyLinear, ResidualBlock, SpectralConv2d, standardized
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
    """Pixels travel as whole numbers, and the first convolution scales them. Kills: no scale; 256; a scale for vectors too."""
    network = make_network(DQN2013, PIXELS, seed=0)
    observations = pixels(2)
    prepared = network.prepare(observations, torch.bfloat16)
    assert torch.equal(prepared.long(), observations.long()) and prepared.max() == 255
    first = network.torso[0]
    expected = torch.conv2d(observations.float() / 255, first.weight, first.bias, stride=4)
    torch.testing.assert_close(first(observations.float()), expected, rtol=1e-4, atol=1e-5)
    wrong = torch.conv2d(observations.float() / 256, first.weight, first.bias, stride=4)
    assert (wrong - expected).abs().max() > 1e-4  # 256 would be seen.
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


# Computed before there was any torso, head or layer but these: a checkpoint and a digest of an earlier version stay what they were.
DIGESTS = {
    ("mlp", False, False): "0019c3287da44896d2436f446240392478ce3245a9074027393c745c533c2ec7",
    ("mlp", False, True): "f7110e77c09783c2dc9d1178c8eb72e3c066011cbdcbb0cd5a3ba3a7e07c3bc8",
    ("mlp", True, False): "05e8a924f5d28435a435316416c3cb0b9c92c41ba730162aabce45b5a47689a9",
    ("mlp", True, True): "9f48b82d9b10382e6fd999d85f68c4629ae22212ec8e7c93ae16787a4eec7da9",
    ("dqn2013", False, False): "3f08cff51cff6018cd98ef9a8e9dfa2099e9c4ac84aa2c825488d69aceab563f",
    ("dqn2013", False, True): "6b1419789b7e36d8ce2dcbd7fae0db20a100ce9b1611e07b5a7387f7d2b91007",
    ("dqn2013", True, False): "5c26d541ae8994d7c8cad31014ac8922d9ca8f8e33fd06b0ffbbc72825e13b60",
    ("dqn2013", True, True): "77ce4e8325c5ed07d6df368f847a3aebbbf66cce064fafb02c7c5eba77da6564",
    ("nature", False, False): "28ba11d844f61f8b0f7b1df2b01be097ab4b8af902da223b3d5986e5c1b986b0",
    ("nature", False, True): "5c6cce99190e158f29ecbc845fac944020768e32a688d27ed65c6243f211bc69",
    ("nature", True, False): "269e0c8d810b8cf63800c47a83a6b28bc52bfa1805599c69f185828c5a4950db",
    ("nature", True, True): "077747ae17c1dd9e1f661b1d23b72608c81105cb33bf52a802cbce5cf7fc1fcd",
}


@pytest.mark.parametrize(("torso", "dueling", "layer_norm"), DIGESTS)
def test_names_and_initial_numbers_of_the_first_networks_never_change(torso, dueling, layer_norm):
    config = NetworkConfig(torso=torso, hidden_sizes=(32, 16), dueling=dueling, layer_norm=layer_norm)
    network = make_network(config, PIXELS, 3)
    assert params.digest(network) == DIGESTS[torso, dueling, layer_norm]
    features = network.torso(network.prepare(pixels(2), torch.float32)).flatten(1)
    expected = nn.Sequential(*network.advantage)(features)
    if dueling:
        expected = nn.Sequential(*network.value)(features) + expected - expected.mean(dim=1, keepdim=True)
    assert torch.equal(network(pixels(2)), expected)


OUTPUTS = {
    "expectation": (6,),
    "categorical": (6, 51),
    "quantile": (200, 6),
    "implicit_quantile": (7, 6),
}
ALL_TOGETHER = {
    "torso": "impala",
    "width": 2,
    "spectral_norm": True,
    "adaptive_pool": 6,
    "layer_norm": True,
    "noisy_sigma": 0.5,
}


def taus_of(network, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) if network.embedding is not None else None


@pytest.mark.parametrize("distribution", OUTPUTS)
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("torso", [{"torso": "dqn2013"}, ALL_TOGETHER], ids=["dqn2013", "impala with everything"])
def test_outputs_have_their_shape_in_float32_and_gradients_reach_every_parameter(torso, dueling, distribution):
    config = NetworkConfig(hidden_sizes=(16,), dueling=dueling, distribution=distribution, **torso)
    network = make_network(config, PIXELS, 0)
    prepared = network.prepare(pixels(3), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 3):
        noise = network.draw_noise(num_rows, generator) if network.num_noise else None
        with torch.autocast("cpu", torch.bfloat16):
            output = network.distribution(prepared, noise=noise, taus=taus_of(network, 3, 7))
            values = network.values(prepared, noise=noise)
        assert (output.shape, output.dtype) == ((3, *OUTPUTS[distribution]), torch.float32)
        assert (values.shape, values.dtype) == (network.mean(output).shape, torch.float32) == ((3, 6), torch.float32)
    output.square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("distribution", OUTPUTS)
def test_dueling_subtracts_the_mean_of_the_actions_of_each_atom_or_quantile(distribution):
    """By loops over rows, actions and atoms, from what the two heads give. Kills: the mean over atoms or over everything, and the
    actions and atoms of a head taken for one another."""
    config = NetworkConfig(
        hidden_sizes=(8,), dueling=True, distribution=distribution, num_atoms=5, num_quantiles=4, num_policy_quantiles=3
    )
    network = make_network(config, EnvSpec((4,), "<f4", 1, 3), 0)
    observations = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    taus = taus_of(network, 2, 3)
    output = network.distribution(observations, taus=taus).detach().numpy()
    features = observations.flatten(1)
    for b in range(2):
        for j in range({"expectation": 1, "categorical": 5, "quantile": 4, "implicit_quantile": 3}[distribution]):
            row = features[b]
            if taus is not None:
                row = row * network.embedding(taus[b : b + 1])[0, j]
            value, advantage = network.value(row[None])[0].tolist(), network.advantage(row[None])[0].tolist()
            columns = {"categorical": [j, 5 + j, 10 + j], "quantile": [3 * j, 3 * j + 1, 3 * j + 2]}.get(
                distribution, [0, 1, 2]
            )
            of_atom = [advantage[column] for column in columns]
            of_state = value[j] if distribution in ("categorical", "quantile") else value[0]
            for action in range(3):
                expected = of_state + of_atom[action] - sum(of_atom) / 3
                index = {"expectation": (b, action), "categorical": (b, action, j)}.get(distribution, (b, j, action))
                assert output[index] == pytest.approx(expected, abs=1e-5)


def test_mean_of_a_distribution_is_its_expectation():
    def network(**options):
        return make_network(NetworkConfig(hidden_sizes=(4,), **options), VECTORS, 0)

    categorical = network(distribution="categorical", num_atoms=3, value_min=-1.0, value_max=3.0)
    assert categorical.atoms.tolist() == [-1.0, 1.0, 3.0] and categorical.taus is None
    logits = torch.tensor([[[0.0, 0.0, 0.0], [0.0, math.log(2.0), math.log(5.0)]]])
    expected = torch.tensor([[(-1 + 1 + 3) / 3, (1 * -1 + 2 * 1 + 5 * 3) / 8]])
    torch.testing.assert_close(categorical.mean(logits), expected)
    quantile = network(distribution="quantile", num_quantiles=4)
    assert quantile.taus.tolist() == [[0.125, 0.375, 0.625, 0.875]] and quantile.atoms is None
    quantiles = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [6.0, 0.0]]])
    assert quantile.mean(quantiles).tolist() == [[3.0, 15.0]]
    plain = network()
    assert plain.atoms is None and plain.taus is None
    assert torch.equal(plain.mean(quantiles[0]), quantiles[0])


def test_values_of_implicit_quantiles_are_their_mean_at_midpoints_and_not_random():
    config = NetworkConfig(hidden_sizes=(8,), distribution="implicit_quantile", num_policy_quantiles=2)
    network = make_network(config, VECTORS, 0)
    observations = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0))
    midpoints = torch.tensor([0.25, 0.75]).repeat(5, 1)
    expected = network.distribution(observations, taus=midpoints).mean(dim=1)
    torch.testing.assert_close(network.values(observations), expected)
    assert torch.equal(network.values(observations), network.values(observations))
    with pytest.raises(AssertionError, match="taus"):
        network.distribution(observations)
    with pytest.raises(AssertionError, match="taus"):
        make_network(NetworkConfig(), VECTORS, 0).distribution(observations, taus=midpoints)


def test_fixed_atoms_and_quantiles_are_no_state():
    """They follow from the configuration: neither a checkpoint nor a snapshot has them."""
    for distribution in OUTPUTS:
        network = make_network(NetworkConfig(distribution=distribution), VECTORS, 0)
        assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]


def test_noise_has_as_many_numbers_as_the_noisy_layers_have_inputs_and_outputs():
    config = NetworkConfig(hidden_sizes=(8, 5), noisy_sigma=0.5, dueling=True)
    network = make_network(config, VECTORS, 0)
    assert network.num_noise == (4 + 8) + (8 + 5) + (5 + 2) + (4 + 8) + (8 + 5) + (5 + 1)
    assert network.draw_noise(3, torch.Generator()).shape == (3, network.num_noise)
    assert make_network(NetworkConfig(), VECTORS, 0).num_noise == 0


@pytest.mark.parametrize("distribution", OUTPUTS)
def test_a_row_of_noise_is_one_network_with_other_parameters(distribution):
    """Every row of a batch with noise of its own, against a plain network for each, whose parameters are those of that draw.
    Kills: rows mixed up; the two heads, or two layers, given the same numbers; a mean left out."""
    options = {"hidden_sizes": (8, 5), "dueling": True, "distribution": distribution, "num_atoms": 3, "num_quantiles": 3}
    noisy = make_network(NetworkConfig(noisy_sigma=0.7, **options), VECTORS, 0)
    plain = make_network(NetworkConfig(**options), VECTORS, 0)
    observations = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
    noise, taus = noisy.draw_noise(4, torch.Generator().manual_seed(1)), taus_of(noisy, 4, 6)
    output = noisy.distribution(observations, noise=noise, taus=taus)
    shared = noisy.distribution(observations, noise=noise[:1], taus=taus)
    if taus is not None:
        plain.embedding.load_state_dict(noisy.embedding.state_dict())
    for row in range(4):
        start = 0
        for name, head in (("advantage", noisy.advantage), ("value", noisy.value)):
            for index, layer in enumerate(head):
                if isinstance(layer, NoisyLinear):
                    noise_in = noise[row, start : start + layer.in_features]
                    noise_out = noise[row, start + layer.in_features : start + layer.in_features + layer.out_features]
                    start += layer.in_features + layer.out_features
                    of_draw = getattr(plain, name)[index]
                    with torch.no_grad():
                        of_draw.weight.copy_(layer.weight + layer.sigma_weight * torch.outer(noise_out, noise_in))
                        of_draw.bias.copy_(layer.bias + layer.sigma_bias * noise_out)
        expected = plain.distribution(observations, taus=taus)
        torch.testing.assert_close(output[row], expected[row], rtol=1e-4, atol=1e-5)
        if row == 0:
            torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output[1], shared[1], atol=1e-3)


def test_without_noise_a_noisy_network_is_its_means():
    noisy = make_network(NetworkConfig(hidden_sizes=(8,), noisy_sigma=0.5), VECTORS, 0)
    plain = make_network(NetworkConfig(hidden_sizes=(8,)), VECTORS, 0)
    plain.load_state_dict({name: p for name, p in noisy.state_dict().items() if "sigma" not in name})
    observations = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy(observations), plain(observations))


def test_impala_torso_has_the_count_of_2018():
    """Espeholt et al. 2018, figure 3, right: 15 convolutions and a layer of 256, over four frames of 84 x 84; 11 x 11 are left."""
    network = make_network(NetworkConfig(torso="impala", hidden_sizes=(256,)), PIXELS, 0)
    first = (4 * 9 * 16 + 16) + 4 * (16 * 9 * 16 + 16)
    second = (16 * 9 * 32 + 32) + 4 * (32 * 9 * 32 + 32)
    third = 5 * (32 * 9 * 32 + 32)
    head = (32 * 11 * 11 * 256 + 256) + (256 * 6 + 6)
    assert num_params(network) == first + second + third + head == 1_090_774
    assert len([module for module in network.modules() if isinstance(module, nn.Conv2d)]) == 15
    assert network.torso(torch.zeros(2, 4, 84, 84)).shape == (2, 32, 11, 11)


def test_impala_torso_agrees_with_its_definition_written_out():
    network = make_network(NetworkConfig(torso="impala"), EnvSpec((21, 17), "|u1", 2, 3), 0)
    convolutions = [module for module in network.torso.modules() if isinstance(module, nn.Conv2d)]
    observations = torch.rand(2, 2, 21, 17, generator=torch.Generator().manual_seed(0))
    x, left = observations, iter(convolutions)
    for _ in range(3):
        x = functional.max_pool2d(next(left)(x), 3, stride=2, padding=1)
        for _ in range(2):
            inside = next(left)(x.relu())
            x = x + next(left)(inside.relu())
    torch.testing.assert_close(network.torso(observations), x.relu())
    assert network.torso(observations).shape == (2, 32, 3, 3)


def test_impala_at_width_2_with_pool_6_gives_6_by_6():
    network = make_network(NetworkConfig(torso="impala", width=2, adaptive_pool=6, hidden_sizes=(512,)), PIXELS, 0)
    plain = make_network(NetworkConfig(torso="impala", width=2, hidden_sizes=(512,)), PIXELS, 0)
    prepared = network.prepare(pixels(2), torch.float32)
    assert network.torso(prepared).shape == (2, 64, 6, 6)
    assert network.advantage[0].in_features == 64 * 36
    torch.testing.assert_close(network.torso(prepared), functional.adaptive_max_pool2d(plain.torso(prepared), 6))


@pytest.mark.parametrize(("torso", "channels"), [("dqn2013", 32), ("nature", 64), ("impala", 32)])
def test_adaptive_pool_is_of_every_convolutional_torso(torso, channels):
    network = make_network(NetworkConfig(torso=torso, adaptive_pool=3, hidden_sizes=(4,)), PIXELS, 0)
    assert network.torso(torch.zeros(1, 4, 84, 84)).shape == (1, channels, 3, 3)
    with pytest.raises(ValueError, match=r"adaptive_pool 12 is more than the \d+ x \d+ that torso"):
        QNetwork(NetworkConfig(torso=torso, adaptive_pool=12), PIXELS)


def test_layer_norm_of_impala_stands_before_every_relu():
    network = make_network(NetworkConfig(torso="impala", layer_norm=True), PIXELS, 0)
    blocks = [list(block.layers) for block in network.torso if isinstance(block, ResidualBlock)]
    assert len(blocks) == 6
    for layers in [*blocks, list(network.torso)]:
        relus = [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
        assert relus and all(isinstance(layers[index - 1], nn.GroupNorm) for index in relus)
    assert len([module for module in network.torso.modules() if isinstance(module, nn.GroupNorm)]) == 6 * 2 + 1


def test_spectral_norm_is_of_the_residual_convolutions_alone():
    network = make_network(NetworkConfig(torso="impala", spectral_norm=True), PIXELS, 0)
    convolutions = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert len([module for _, module in convolutions if isinstance(module, SpectralConv2d)]) == 12
    assert all(isinstance(module, SpectralConv2d) == ("layers" in name) for name, module in convolutions)


@pytest.mark.parametrize("torso", ["dqn2013", "nature", "impala"])
def test_weight_standardization_is_of_every_convolution_or_of_none(torso):
    for standardize in (False, True):
        network = make_network(NetworkConfig(torso=torso, weight_standardization=standardize), PIXELS, 0)
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        assert len(convolutions) == {"dqn2013": 2, "nature": 3, "impala": 15}[torso]
        # The same function of another weight, where it is standardized.
        before = network(pixels(1))
        for module in convolutions:
            with torch.no_grad():
                module.weight.add_(module.weight.mean(dim=(1, 2, 3), keepdim=True) + 0.1)
            assert torch.allclose(network(pixels(1)), before, atol=1e-3) == standardize


def test_gray_levels_do_not_drown_what_moves():
    """What a plain first layer gives of a gray plane with ball and paddle, normalized, differs by a hundredth between positions; by a quarter with
    standardized filters, whose biases alone tell the channels apart."""
    frames = torch.full((1, 4, 84, 84), 87, dtype=torch.uint8)
    frames[..., 40:44, 30:32] = 236
    frames[..., 30:46, 70:72] = 147
    shares = []
    for standardize in (False, True):
        config = NetworkConfig(torso="dqn2013", layer_norm=True, weight_standardization=standardize)
        network = make_network(config, PIXELS, 0)
        normalized = network.torso[:2](network.prepare(frames, torch.float32))
        shares.append(normalized.mean(dim=(0, 2, 3)).var(correction=0).item())
    assert shares[0] > 0.98 and shares[1] < 0.8


def test_a_pass_changes_nothing_and_a_step_of_the_spectral_norms_only_them():
    network = make_network(NetworkConfig(**ALL_TOGETHER), PIXELS, 0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(pixels(1))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.step_spectral_norms()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith((".left", ".right"))}
    assert len(changed) == 2 * 12


@pytest.mark.parametrize("distribution", OUTPUTS)
def test_a_pass_is_one_graph_without_breaks(distribution):
    """Data-dependent control flow, or a number read on the host, would break it."""
    plain = {"torso": "dqn2013", "noisy_sigma": 0.5, "weight_standardization": True}
    options = ALL_TOGETHER if distribution == "implicit_quantile" else plain
    config = NetworkConfig(hidden_sizes=(8,), dueling=True, distribution=distribution, **options)
    network = make_network(config, PIXELS, 0)
    prepared, noise = network.prepare(pixels(2), torch.float32), network.draw_noise(1, torch.Generator().manual_seed(0))

    def output(prepared, noise, taus):
        return network.distribution(prepared, noise=noise, taus=taus), network.values(prepared, noise=noise)

    arguments = prepared, noise, taus_of(network, 2, 7)
    compiled = torch.compile(output, fullgraph=True, backend="eager")
    for one, other in zip(compiled(*arguments), output(*arguments), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("torso", ["dqn2013", "nature"])
def test_space_to_depth_is_the_same_convolution(torso, standardize):
    """The same parameters, and equal outputs and gradients in fp32, but for the order of sums."""
    network = make_network(NetworkConfig(torso=torso, weight_standardization=standardize, hidden_sizes=(16,)), PIXELS, seed=0)
    observations = pixels(6)
    results = []
    for in_blocks in (False, True):
        prepared = network.prepare(observations, torch.float32, in_blocks=in_blocks)
        assert prepared.shape[1:] == ((64, 21, 21) if in_blocks else (4, 84, 84))
        values = network.values(prepared)
        results.append([values, *torch.autograd.grad(values.square().sum(), list(network.parameters()))])
    for plain, blocks in zip(*results, strict=True):
        torch.testing.assert_close(plain, blocks, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))
    first = network.torso[0]  # A block's channels in another order would be seen.
    weight = standardized(first.weight) if standardize else first.weight
    shuffled = torch.conv2d(prepared.flip(1), torch.nn.functional.pixel_unshuffle(weight, 4) / 255, first.bias)
    assert (shuffled - first(prepared)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [{}, {"dueling": True}, {"noisy_sigma": 0.5}, {"distribution": "categorical"}])
def test_values_are_not_rounded_to_bfloat16_under_autocast(kind):
    """Two actions whose values differ by a thousandth at 1.5, where bfloat16 goes in steps of 0.008, stay apart."""
    network = make_network(NetworkConfig(torso="dqn2013", hidden_sizes=(16,), **kind), EnvSpec((84, 84), "|u1", 4, 2), 0)
    num_each = 51 if kind.get("distribution") == "categorical" else 1
    with torch.no_grad():
        last = network.advantage[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.5, 1.501]).repeat_interleave(num_each))
    prepared = network.prepare(torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = network.distribution(prepared)
    assert outputs.dtype == torch.float32
    first, second = outputs.view(3, 2, num_each).unbind(1)
    torch.testing.assert_close(second - first, torch.full((3, num_each), 0.001), rtol=0, atol=1e-5)
