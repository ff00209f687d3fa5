"""What `qfleet plan` says a run will take, against what the network is and what the configuration adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actors.environments import probe
from common.config import ByteSize
from common.errors import UserError
from common.networks import QNetwork
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
@pytest.mark.parametrize("layer_norm", [False, True])
def test_network_size_is_that_of_the_network(recipe, layer_norm):
    """It is computed without PyTorch, by a formula that leaves out biases and norms."""
    config = RECIPES[recipe]()
    config = replace(config, network=replace(config.network, layer_norm=layer_norm))
    spec = probe(config.env)
    network = QNetwork(config.network, spec)
    values = 0

    def count(_module, _inputs, output):
        nonlocal values
        values += output.numel()

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    network(torch.zeros((1, spec.frame_stack, *spec.plane_shape)))
    params = sum(param.numel() for param in network.parameters())
    assert plan.network_size(config, spec) == (pytest.approx(params, rel=0.06), pytest.approx(values, rel=0.03))


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
