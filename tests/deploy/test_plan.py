"""What `qfleet plan` says a run will take, against what the network is and what the configuration adds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from actors.environments import probe
from common import layers
from common.config import ByteSize, EnvSpec, NetworkConfig
from common.errors import UserError
from common.networks import make_network
from deploy import plan
from deploy.cli import main
from deploy.recipes import RECIPES

GIB = 1 << 30


@pytest.fixture
def plenty(monkeypatch):
    """A machine with 64 GiB and no GPU."""
    monkeypatch.setattr(plan, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr(plan, "gpu_memory", lambda: None)


@pytest.mark.parametrize("recipe", ["cartpole", "pong", "nature", "dqn-2013", "apex"])
def test_network_size_is_that_of_the_recipes_networks(recipe):
    config = RECIPES[recipe]()
    spec = probe(config.env)
    assert plan.network_size(config, spec) == counted(config, spec)


OPTIONS = [
    {"dueling": [False, True], "layer_norm": [False, True], "noisy_sigma": [None, 0.5]},
    {"hidden_sizes": [(), (8,), (12, 7)], "distribution": ["expectation", "categorical", "quantile", "implicit_quantile"]},
]
TORSOS = [
    {"torso": "mlp"},
    {"torso": "dqn2013"},
    {"torso": "nature", "adaptive_pool": 3},
    {"torso": "impala", "width": 2, "adaptive_pool": 6},
    {"torso": "impala", "spectral_norm": True},
]
FEW = {"num_atoms": 5, "num_quantiles": 4, "num_cosines": 6}


@pytest.mark.parametrize("torso", TORSOS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["heads", "outputs"])
def test_network_size_is_that_of_the_network_for_every_option(torso, options):
    """Of planes that are not square, so that rows and columns are told apart. Kills: a bias, a norm, a head, a sigma left out."""
    spec = EnvSpec((84, 61), "|u1", 3, 5)
    base = RECIPES["pong"]()
    learner = replace(base.learner, num_quantile_samples=7, num_target_quantile_samples=3)
    sizes = set()
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        network = NetworkConfig(**{"hidden_sizes": (8,), "dueling": True, **torso, **FEW, **chosen})
        config = replace(base, network=network, learner=learner)
        size = plan.network_size(config, spec)
        assert size == counted(config, spec), chosen
        sizes.add(size)
    assert len(sizes) == math.prod(len(values) for values in options.values())


def counted(config, spec):
    """Counts a network's parameters, and the values in a pass of it by what its layers say that they are given and give."""
    network = make_network(config.network, spec, 0)
    num_quantiles = max(config.learner.num_quantile_samples, config.learner.num_target_quantile_samples)
    values = 0

    def count(module, inputs, output):
        nonlocal values
        values += output.numel()
        if isinstance(module, layers.NoisyLinear):
            values += inputs[0].numel() + 2 * output.numel()  # The scaled input, the noisy output, and that scaled.
        if isinstance(module, layers.CosineEmbedding):  # The embedding once more for its product with the features.
            values += output.numel() + 2 * num_quantiles * config.network.num_cosines

    for module in network.modules():
        is_leaf = not list(module.children()) and not isinstance(module, nn.Sequential)  # The mlp torso is an empty one.
        if is_leaf or isinstance(module, layers.ResidualBlock | layers.CosineEmbedding):
            module.register_forward_hook(count)
    taus = torch.zeros((1, num_quantiles)) if config.network.distribution == "implicit_quantile" else None
    network.distribution(torch.zeros((1, spec.frame_stack, *spec.plane_shape)), taus=taus)
    return sum(param.numel() for param in network.parameters()), values


def test_plan_adds_up_what_every_role_takes(plenty):
    config = RECIPES["pong"]()
    spec = probe(config.env)
    by_role = {role.role: role for role in plan.plan_memory(config, spec, uses_gpu=False)}
    assert by_role["actor"].workers == config.actors.num_actors
    assert by_role["shard"].ram >= config.replay.memory // config.replay.num_shards
    doubled = replace(config, replay=replace(config.replay, memory=ByteSize(2 * config.replay.memory)))
    more = {role.role: role for role in plan.plan_memory(doubled, spec, uses_gpu=False)}
    assert more["shard"].ram - by_role["shard"].ram == config.replay.memory // config.replay.num_shards
    larger = replace(config, learner=replace(config.learner, batch_size=4 * config.learner.batch_size))
    assert {role.role: role for role in plan.plan_memory(larger, spec, uses_gpu=False)}["learner"].ram > by_role["learner"].ram
    on_gpu = {role.role: role for role in plan.plan_memory(config, spec, uses_gpu=True)}
    assert on_gpu["learner"].gpu > 0 == by_role["learner"].gpu


@pytest.mark.parametrize("flags", [[], ["--serial"]])
def test_plan_prints_every_role_and_starts_nothing(plenty, capsys, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "pong", *flags]) == 0
    text = capsys.readouterr().out
    for word in ["one process"] if flags else ["learner", "shard", "actor", "evaluator", "params store", "driver", "num_cpus"]:
        assert word in text
    assert "of 64GiB available" in text and "no GPU is used" in text
    assert not list(tmp_path.iterdir())


def test_plan_says_what_to_change_by_how_much_and_that_makes_it_fit(plenty, capsys):
    assert main(["plan", "pong", "--replay.memory", "80GiB"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    size = error.split("lower --replay.memory to ")[1].split()[0]
    assert main(["plan", "pong", "--replay.memory", size]) == 0


def test_plan_says_how_many_actors_fit(plenty, monkeypatch, capsys):
    monkeypatch.setattr(plan, "num_cpus", lambda: 512)
    assert main(["plan", "pong", "--actors.num-actors", "400", "--replay.memory", "64MiB"]) == 2
    number = capsys.readouterr().err.split("--actors.num-actors to ")[1].split()[0]
    assert 100 < int(number) < 400
    assert main(["plan", "pong", "--actors.num-actors", number, "--replay.memory", "64MiB"]) == 0


def test_plan_refuses_a_gpu_that_is_too_small(plenty, monkeypatch, capsys):
    monkeypatch.setattr(plan, "gpu_memory", lambda: GIB // 2)
    assert main(["plan", "nature"]) == 2
    assert "of GPU memory, but 512MiB are free: lower --learner.batch-size" in capsys.readouterr().err


def test_plan_of_a_machine_without_room_for_either_names_both(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: GIB)
    config = RECIPES["pong"]()
    with pytest.raises(UserError, match="use a machine with more memory"):
        plan.check_memory(config, probe(config.env))
