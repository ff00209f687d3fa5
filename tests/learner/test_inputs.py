"""What the prefetch threads make of stacks, against the network's own conversion."""

import numpy as np
import pytest
import torch

from common.config import EnvSpec, NetworkConfig
from common.networks import make_network
from learner.inputs import Transfer, make_prepare

CPU = torch.device("cpu")


def make(torso="dqn2013", stack=4):
    spec = EnvSpec((84, 84), "|u1", stack, 3)
    network = NetworkConfig() if torso == "mlp" else NetworkConfig(torso=torso, hidden_sizes=(8,))
    return make_network(network, spec, 0)


def stacks_of(stack=4):
    stacks = np.random.default_rng(0).integers(256, size=(5, stack, 84, 84), dtype=np.uint8)
    stacks[0, :, 0, 0], stacks[0, :, 0, 1] = 0, 255
    return stacks


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "space_to_depth"])
@pytest.mark.parametrize("torso", ["dqn2013", "impala", "mlp"])
def test_every_path_gives_the_networks_own_numbers_to_the_bit(torso, memory_format, dtype, stack):
    """The compiled conversion (bf16, channels last, four planes) is one of them. Kills: planes or pixels out of order."""
    if memory_format == "space_to_depth" and torso != "dqn2013":
        pytest.skip("no 8x8/4 convolution")
    network = make(torso, stack)
    stacks = stacks_of(stack)
    got = Transfer(CPU, make_prepare(network, CPU, dtype, memory_format)).observations(stacks)
    expected = network.prepare(torch.from_numpy(stacks), dtype, in_blocks=memory_format == "space_to_depth")
    assert got.dtype == dtype and torch.equal(got, expected)
    if torso != "mlp" and memory_format != "contiguous":
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_compiled_conversion_is_exact_for_every_pixel():
    stacks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(4, axis=1)
    stacks[:, 1], stacks[:, 2], stacks[:, 3] = 255 - stacks[:, 0], stacks[:, 0][..., ::-1], 7
    prepare = make_prepare(make(), CPU, torch.bfloat16, "channels_last")
    np.testing.assert_array_equal(prepare(torch.from_numpy(stacks)).float().numpy(), stacks.astype(np.float32))


def test_a_transfer_on_a_cpu_waits_for_nothing():
    transfer = Transfer(CPU, lambda stacks: stacks)
    array = transfer.empty((2, 3), np.dtype(np.float32))
    assert array.shape == (2, 3) and transfer.ready() is None
    assert transfer.scalars(array).data_ptr() == array.ctypes.data  # No copy.
