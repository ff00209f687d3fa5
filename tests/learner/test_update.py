"""One update: the optimizer's step against Adam's first step written out; what runs on two threads against what runs on one."""

import threading

import numpy as np
import pytest
import torch

from common.config import EnvSpec, LearnerConfig, NetworkConfig
from common.networks import make_network
from learner.batches import Batch
from learner.update import Update

CPU = torch.device("cpu")


def make_batch(update, size=4):
    rng = np.random.default_rng(0)
    stacks = rng.integers(256, size=(2, size, 4, 84, 84), dtype=np.uint8)
    s_tm1, s_t = (update.transfer.observations(half) for half in stacks)
    return Batch(
        s_tm1=s_tm1,
        s_t=s_t,
        a_tm1=torch.from_numpy(rng.integers(3, size=size)),
        r_t=torch.from_numpy(rng.normal(size=size).astype(np.float32)),
        discount_t=torch.full((size,), 0.9),
        importance_weight=torch.ones(size),
        weight_scale=1.0,
        shares=(),
        mean_params_version=0.0,
        ready=None,
        pinned=None,
    )


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "space_to_depth"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("torso", ["nature", "impala"])
def test_every_parameter_moves_by_its_own_gradient(torso, precision, memory_format):
    """Kills: a gradient in another order of memory than its parameter's, which the fused optimizer reads element by element."""
    if torso == "impala" and memory_format == "space_to_depth":
        pytest.skip("no 8x8/4 convolution")
    torch.set_num_threads(1)
    config = LearnerConfig(
        batch_size=4,
        device="cpu",
        precision=precision,
        memory_format=memory_format,
        learning_rate=1e-3,
        optimizer_epsilon=1e-3,
        max_grad_norm=None,
    )
    network = make_network(NetworkConfig(torso=torso, hidden_sizes=(16,)), EnvSpec((84, 84), "|u1", 4, 3), 0)
    update = Update(config=config, network=network, device=CPU, seed=0, group=None)
    update.gradients(make_batch(update), 1.0)
    parameters = dict(update.online.named_parameters())
    expected = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad.double()
        expected[name] = parameter.detach().double() - 1e-3 * gradient / (gradient.abs() + 1e-3)
    update.apply()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distribution", ["expectation", "quantile"])
def test_the_target_passes_beside_the_others_and_changes_no_bit(distribution, precision):
    """Kills: a pass in another precision, with a gradient, or of a target that is being copied."""
    torch.set_num_threads(1)
    config = LearnerConfig(batch_size=4, device="cpu", precision=precision, learning_rate=1e-3, target_period_updates=2)
    parameters, names = [], set()
    for is_started in (False, True):
        network_config = NetworkConfig(torso="dqn2013", hidden_sizes=(16,), distribution=distribution, num_quantiles=8)
        network = make_network(network_config, EnvSpec((84, 84), "|u1", 4, 3), 0)
        update = Update(config=config, network=network, device=CPU, seed=0, group=None)
        if is_started:
            update.start()
        batch = make_batch(update)
        for updates in range(1, 6):
            update.gradients(batch, 1.0)
            names |= {thread.name.split("_")[0] for thread in threading.enumerate()}
            update.apply()
            update.update_target(updates)
        update.close()
        parameters.append([parameter.detach().clone() for parameter in update.online.parameters()])
        assert ("target" in names) == is_started
    assert all(torch.equal(alone, beside) for alone, beside in zip(*parameters, strict=True))
    assert not any(thread.name.startswith("target") for thread in threading.enumerate())
