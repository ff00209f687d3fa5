"""`qfleet bench learner`: that its figures are what they are called, on small sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deploy import bench_update
from deploy.bench_learner import BenchLearnerFlags, make_problems, run_config
from deploy.bench_update import PlainUpdates, ProductUpdates, count_flops, has_plain_twin, make_update, raw_batches, time_steps
from deploy.cli import main

FEW = ["--rounds", "2", "--seconds", "0.05", "--batch-sizes", "8", "--threads", "1", "--device", "cpu"]
UPDATE_KEYS = {
    "kind",
    "network",
    "precision",
    "batch_size",
    "updates",
    "samples",
    "updates_per_second",
    "samples_per_second",
    "cpu_seconds_per_update",
    "flops_per_update",
    "flops_per_second",
    "mfu",
    "mfu_by_cpu",
    "preparation_seconds",
    "preparation_cpu_seconds",
}


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def problem_of(name, *, precision="fp32", batch_size=8, **flags):
    given = BenchLearnerFlags(networks=(name,), precisions=(precision,), batch_sizes=(batch_size,), device="cpu", **flags)
    (problem,) = make_problems(given, [run_config(name, given)])
    return problem


def test_bare_update_writes_its_figures(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "learner", "--networks", "dqn2013", *FEW, "--live-seconds", "0", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures) >= {"updates", "matrix", "live", "device", "threads", "rounds", "seconds", "versions", "hardware"}
    assert figures["live"] == []
    rows = {(row["kind"], row["precision"]): row for row in figures["updates"]}
    assert set(rows) == {("qfleet", "fp32"), ("qfleet", "bf16"), ("plain", "fp32"), ("plain_prepared", "fp32")}
    for (kind, _), row in rows.items():
        assert set(row) >= UPDATE_KEYS
        assert row["samples"] == row["updates"] * row["batch_size"] and row["updates"] >= 2 * 3
        assert row["samples_per_second"]["median"] == pytest.approx(8 * row["updates_per_second"]["median"])
        assert row["flops_per_second"]["median"] == pytest.approx(row["flops_per_update"] * row["updates_per_second"]["median"])
        assert row["mfu"] > 0 and 0 < row["mfu_by_cpu"] < 1.2  # By the clock others may have held the one and not the other.
        if kind == "qfleet":
            for twin in ("plain", "plain_prepared"):
                ratio = row[f"cpu_ratio_to_{twin}"]
                assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert (row["preparation_seconds"] is None) == (kind == "plain_prepared")
    shown = capsys.readouterr().out
    assert "plain_prepared fp32" in shown and "MFU" in shown


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_flops_agree_with_a_count_by_hand(precision):
    problem = problem_of("dqn2013", precision=precision)
    first = 2 * 400 * 16 * 256
    forward = first + 2 * (81 * 32 * 256 + 2592 * 256 + 256 * problem.spec.num_actions)
    # Three passes forward; backward is two of them, without the gradient of the pixels.
    assert count_flops(problem) == pytest.approx(8 * (5 * forward - first), rel=0.01)


def test_plain_update_has_the_gradients_of_the_products():
    """The twin is a twin: loss, importance weights, target and clipping are the same."""
    problem = problem_of("nature", dueling=True)
    ours, plain = ProductUpdates(problem), PlainUpdates(problem, is_prepared=False)
    ours.step()
    plain.step()
    mine, its = (
        torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        for network in (ours._update.online, plain._online)
    )
    assert its.norm() > 1e-3 and (mine - its).norm() < 1e-3 * its.norm()


def test_prepared_batches_are_those_that_lie_raw():
    problem = problem_of("dqn2013", precision="bf16")
    ours, raw = ProductUpdates(problem), raw_batches(problem)
    np.testing.assert_array_equal(ours._batches[1].s_t.float().numpy(), raw[1].stacks[1])
    np.testing.assert_array_equal(ours._batches[1].a_tm1.numpy(), raw[1].a_tm1)


@pytest.mark.parametrize(
    ("name", "has_twin"),
    [("dqn2013", True), ("pong", False), ("impala", True), ("iqn", False), ("rainbow", False), ("nature", True)],
)
def test_only_problems_that_the_plain_update_computes_have_one(name, has_twin):
    problem = problem_of(name)
    assert has_plain_twin(problem) == has_twin
    assert make_update(problem).online.is_convolutional


def test_a_recipe_brings_its_own_game_and_losses():
    flags = BenchLearnerFlags(networks=("cartpole",))
    run = run_config("cartpole", flags)
    assert (run.env.game, run.learner.learning_rate, run.actors.num_actors) == ("CartPole-v1", 1e-3, 1)
    assert run_config("munchausen-iqn", flags).learner.algorithm == "munchausen_q_learning"


def test_time_steps_counts_what_it_did(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_update.time, "perf_counter", lambda: next(clock))
    calls = []
    done = time_steps(lambda: calls.append(1), 5.0, torch.device("cpu"))
    assert done.updates == len(calls) >= 3
    assert done.by_clock == done.updates / done.seconds


@pytest.mark.ray
def test_running_system_learns_and_loses_nothing(tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = [
        "bench",
        "learner",
        "--networks",
        "dqn2013",
        "--precisions",
        "bf16",
        *FEW,
        "--live-seconds",
        "2",
        "--json",
        str(file),
    ]
    assert main(words) == 0
    figures = json.loads(file.read_text())
    (live,) = figures["live"]
    assert (live["network"], live["precision"], live["batch_size"]) == ("dqn2013", "bf16", 8)
    assert live["samples"] == 8 * live["updates"] > 0
    assert live["samples_per_second"] == pytest.approx(live["samples"] / live["seconds"]) and live["seconds"] >= 2
    assert 0 < live["busy_fraction"] + live["waiting_fraction"] < 1.05
    assert 0 <= live["ready_batches"] <= 4
    row = figures["updates"][0]
    assert live["ratio_to_bare"] == pytest.approx(live["samples_per_second"] / row["samples_per_second"]["median"])
    ledger = live["ledger"]
    assert ledger["balanced"] and ledger["lost"] == {} and ledger["inserted"] >= 1_000
    cpu = live["cpu_seconds_per_second"]
    assert set(cpu) == {
        "learner_updates",
        "learner_prefetch",
        "learner_other",
        "shard",
        "store",
        "actor",
        "ray",
        "machine",
    }
    assert cpu["learner_updates"] > 0 and all(value >= 0 for value in cpu.values())
    assert "running system, dqn2013 bf16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--networks", "natrue"], "--networks natrue: there are dqn2013, nature, impala, cartpole"),
        (["--rounds", "0"], "--rounds must be positive"),
        (["--batch-sizes", "0"], "--batch-sizes must be positive"),
        (["--game", "pnog"], "pnog"),
        (["--precisions", "fp8"], "fp8"),
        (["--json", "/nowhere/at/all.json"], "no directory that can be written to"),
        (["--networks", "c51", "--algorithm", "munchausen_q_learning"], "not for network.distribution categorical"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, sentence):
    assert main(["bench", "learner", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(capsys):
    assert main(["bench", "learner", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no GPU here" in capsys.readouterr().err
