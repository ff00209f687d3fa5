from __future__ import annotations

import numpy as np
import pytest
import torch

from common import params, wire
from common.config import EnvSpec, NetworkConfig
from common.errors import WireError
from common.messages import ParamsSnapshot
from common.networks import make_network

PIXELS = EnvSpec((84, 84), "|u1", 4, 6)
CONFIG = NetworkConfig(torso="dqn2013", hidden_sizes=(16,), dueling=True, layer_norm=True)


def network_of(seed, *, config=CONFIG, channels_last=False):
    network = make_network(config, PIXELS, seed)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def snapshot_of(network, **fields):
    defaults = {"run": "r", "epoch": 0, "version": 1, "layout": params.layout(network), "params": params.flatten(network)}
    return ParamsSnapshot(**defaults | fields)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize("to_last", [False, True], ids=["to_contiguous", "to_channels_last"])
def test_parameters_round_trip_through_the_wire(from_last, to_last):
    """Kills: the order of memory for the order of the shape, which only channels_last networks tell apart."""
    source, destination = network_of(1, channels_last=from_last), network_of(2, channels_last=to_last)
    convolution = destination.torso[0].weight
    assert convolution.is_contiguous() != to_last
    assert not same(source, destination)
    params.load(destination, wire.unpack(wire.pack(snapshot_of(source)), ParamsSnapshot))
    assert same(source, destination)
    assert destination.torso[0].weight is convolution  # Optimizers hold the tensor.
    assert convolution.is_contiguous() != to_last
    assert params.digest(source) == params.digest(destination)


def test_flatten_is_in_the_order_of_layout_and_a_copy():
    network = make_network(NetworkConfig(hidden_sizes=(2,)), EnvSpec((3,), "<f4", 1, 2), 0)
    assert (
        params.layout(network) == "advantage.0.weight(2, 3);advantage.0.bias(2,);advantage.2.weight(2, 2);advantage.2.bias(2,)"
    )
    flat = params.flatten(network)
    assert (flat.dtype, flat.shape) == (np.float32, (2 * 3 + 2 + 2 * 2 + 2,))
    np.testing.assert_array_equal(flat[:6], network.advantage[0].weight.detach().numpy().reshape(-1))
    np.testing.assert_array_equal(flat[-2:], network.advantage[2].bias.detach().numpy())
    with torch.no_grad():
        network.advantage[0].weight.zero_()
    assert (flat[:6] != 0).all()


def test_load_keeps_no_view_of_the_snapshot():
    source, destination = network_of(1), network_of(2)
    snapshot = snapshot_of(source)
    params.load(destination, snapshot)
    snapshot.params[:] = 0
    assert same(source, destination)


def test_load_refuses_another_layout_and_writes_nothing():
    destination, twin = network_of(2), network_of(2)
    for other in (
        network_of(1, config=NetworkConfig(torso="dqn2013", hidden_sizes=(16,), dueling=True)),
        network_of(1, config=NetworkConfig(torso="dqn2013", hidden_sizes=(17,), dueling=True, layer_norm=True)),
    ):
        with pytest.raises(WireError, match=r"^layout: "):
            params.load(destination, snapshot_of(other))
    assert same(destination, twin)


@pytest.mark.parametrize("change", [-1, 1])
def test_load_refuses_a_wrong_count_and_writes_nothing(change):
    destination, twin = network_of(2), network_of(2)
    flat = params.flatten(network_of(1))
    wrong = flat[:-1] if change < 0 else np.append(flat, np.float32(0))
    with pytest.raises(WireError, match=rf"^params: {len(flat) + change} numbers"):
        params.load(destination, snapshot_of(destination, params=wrong))
    assert same(destination, twin)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_load_refuses_a_number_that_is_not_finite_and_writes_nothing(bad):
    destination, twin = network_of(2), network_of(2)
    flat = params.flatten(network_of(1))
    flat[-1] = bad
    with pytest.raises(WireError, match=r"^params: "):
        params.load(destination, snapshot_of(destination, params=flat))
    assert same(destination, twin)


def bf16_of(value):
    """The bits of the bf16 number nearest to a float, ties to even, by the definition: among all that there are."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    numbers = (bits << 16).view(np.float32)
    finite = np.isfinite(numbers) & (np.signbit(numbers) == np.signbit(value))
    bits, numbers = bits[finite], numbers[finite].astype(np.float64)
    distance = np.abs(numbers - np.float64(value))
    nearest = bits[distance == distance.min()]
    return int(nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0])


def test_bf16_is_rounded_to_nearest_even():
    """Kills: truncation, and ties away from zero."""
    network = torch.nn.Linear(8, 1, bias=False)
    ulp = 2.0**-7  # Of bf16 numbers in [1, 2).
    values = [1.0, 1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.501 * ulp, -(1 + 0.499 * ulp), 0.1, -0.0, 1e-40]
    with torch.no_grad():
        network.weight[0] = torch.tensor(values)
    flat = params.flatten(network, bf16=True)
    assert flat.dtype == np.uint16
    assert flat.tolist() == [bf16_of(value) for value in network.weight[0].tolist()]
    assert flat.tolist()[1:3] == [0x3F80, 0x3F82]


@pytest.mark.parametrize("to_last", [False, True], ids=["to_contiguous", "to_channels_last"])
def test_bf16_parameters_round_trip_and_are_widened(to_last):
    source, destination, twin = network_of(1), network_of(2, channels_last=to_last), network_of(1)
    snapshot = snapshot_of(source, params=params.flatten(source, bf16=True))
    params.load(destination, wire.unpack(wire.pack(snapshot), ParamsSnapshot))
    assert all(p.dtype == torch.float32 for p in destination.parameters())
    assert not same(source, destination)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.bfloat16())
    assert same(twin, destination)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_load_refuses_bf16_that_is_not_finite_and_writes_nothing(bits):
    destination, twin = network_of(2), network_of(2)
    flat = params.flatten(network_of(1), bf16=True)
    flat[-1] = bits
    with pytest.raises(WireError, match=r"^params: "):
        params.load(destination, snapshot_of(destination, params=flat))
    assert same(destination, twin)


def test_a_parameter_past_the_range_of_bf16_is_refused():
    source, destination = network_of(1), network_of(2)
    with torch.no_grad():
        source.advantage[0].weight[0, 0] = 3.4e38  # Finite in fp32; the nearest bf16 number is infinity.
    params.load(destination, snapshot_of(source))
    with pytest.raises(WireError, match=r"^params: holds NaN or infinity"):
        params.load(destination, snapshot_of(source, params=params.flatten(source, bf16=True)))


def test_digest_changes_with_one_bit_and_with_the_layout():
    network = network_of(1)
    digest = params.digest(network)
    assert len(digest) == 64 and digest == params.digest(network_of(1))
    bits = network.advantage[0].weight.detach().view(torch.int32)
    bits[3, 5] ^= 1
    assert params.digest(network) != digest
    bits[3, 5] ^= 1
    assert params.digest(network) == digest
    one, other = (torch.nn.Linear(num_in, num_out, bias=False) for num_in, num_out in ((2, 3), (3, 2)))
    with torch.no_grad():
        one.weight.zero_()
        other.weight.zero_()
    assert params.digest(one) != params.digest(other)  # The same numbers in another shape.


def test_digest_does_not_depend_on_the_memory_format():
    assert params.digest(network_of(1)) == params.digest(network_of(1, channels_last=True))


SPECTRAL = NetworkConfig(torso="impala", spectral_norm=True, hidden_sizes=(8,), noisy_sigma=0.5, dueling=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_who_loads_a_snapshot_computes_what_the_learner_does_with_a_spectral_norm(channels_last):
    """The singular vectors travel with the parameters: an actor that normalized by its own would compute something else."""
    learner, actor = network_of(1, config=SPECTRAL, channels_last=channels_last), network_of(2, config=SPECTRAL)
    observations = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # Vectors that no initialization gives.
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        learner.step_spectral_norms()
    assert params.digest(actor) != params.digest(learner)
    params.load(actor, wire.unpack(wire.pack(snapshot_of(learner)), ParamsSnapshot))
    assert params.digest(actor) == params.digest(learner)
    before = params.digest(learner)
    with torch.inference_mode():
        expected = learner.to(memory_format=torch.contiguous_format)(observations)
        assert torch.equal(actor(observations), expected)
        assert torch.equal(actor(observations), learner.eval()(observations))  # Modes make no difference.
    assert params.digest(learner) == before
    decoy = network_of(2, config=SPECTRAL)
    decoy.load_state_dict(dict(learner.named_parameters()), strict=False)
    with torch.inference_mode():
        assert not torch.allclose(decoy(observations), expected, atol=1e-6)


def test_the_layout_of_a_spectral_norm_names_its_vectors():
    layout = params.layout(network_of(1, config=SPECTRAL)).split(";")
    assert "torso.2.layers.1.left(16,)" in layout and "torso.2.layers.1.right(144,)" in layout
    assert len([name for name in layout if ".left(" in name or ".right(" in name]) == 2 * 12
