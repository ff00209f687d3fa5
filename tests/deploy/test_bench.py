"""`qfleet bench replay`: that it measures what it says, on a few transitions of the real game."""

from __future__ import annotations

import json

import numpy as np
import pytest

from actors.environments import probe
from common import wire
from common.messages import TransitionChunk
from deploy import bench
from deploy.bench import BenchReplayFlags, record_chunks, run_config
from deploy.cli import main

KEYS = {
    "insert_transitions_per_second",
    "sample_transitions_per_second",
    "bytes_per_transition",
    "insert_p50_ms",
    "insert_p99_ms",
    "sample_p50_ms",
    "sample_p99_ms",
    "game",
    "versions",
    "hardware",
}
FEW = ["--transitions", "600", "--seconds", "0.3", "--batch-size", "32", "--chunk-transitions", "16"]


def test_recorded_chunks_are_what_an_actor_sends():
    flags = BenchReplayFlags(transitions=500, chunk_transitions=16, n_step=3)
    chunks = [wire.unpack(message, TransitionChunk) for message in record_chunks(flags)]
    assert sum(chunk.num_transitions for chunk in chunks) >= 500
    assert {chunk.s_tm1.shape[1] for chunk in chunks} == {4}
    assert len({chunk.a_tm1.tobytes() for chunk in chunks}) > 1  # Random actions,
    assert {int(a) for chunk in chunks for a in chunk.a_tm1} == set(range(probe(run_config(flags).env).num_actions))
    assert {round(float(d), 6) for chunk in chunks for d in chunk.discount_t} <= {0.0, *np.round(0.99 ** np.arange(1, 4), 6)}


@pytest.mark.parametrize("unpack", [True, False])
def test_bench_in_process_writes_its_figures(tmp_path, capsys, unpack):
    file = tmp_path / "bench.json"
    assert main(["bench", "replay", *FEW, "--json", str(file), "--unpack" if unpack else "--no-unpack"]) == 0
    figures = json.loads(file.read_text())
    assert set(figures) >= KEYS
    assert (figures["game"], figures["topology"], figures["batch_size"]) == ("pong", "process", 32)
    assert 0 < figures["sample_p50_ms"] <= figures["sample_p99_ms"] < 1e4
    by_median = 32 / figures["sample_p50_ms"] * 1e3
    assert figures["sample_transitions_per_second"] == pytest.approx(by_median, rel=0.9)
    assert "sample_transitions_per_second" in capsys.readouterr().out


@pytest.mark.ray
def test_bench_on_ray_measures_each_alone_and_both_at_once(tmp_path):
    file = tmp_path / "bench.json"
    assert main(["bench", "replay", *FEW, "--topology", "ray", "--num-shards", "2", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures) >= KEYS | {"shard_cpu_per_second", "both_insert", "both_sample"}
    for phase in ("both_insert", "both_sample"):
        assert 0 < figures[phase]["p50_ms"] <= figures[phase]["p99_ms"]
        assert figures[phase]["transitions_per_second"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["replya"], "unknown benchmark 'replya'; there are replay and learner"),
        (["replay", "--game", "pnog"], "pnog"),
        (["replay", "--transitions", "0"], "--transitions must be positive"),
        (["replay", "--batch-size", "1", "--num-shards", "2"], "--batch-size 1 is less than --num-shards 2"),
        ([], "what to measure (replay, learner)"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, sentence):
    assert main(["bench", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error


def test_prefetch_threads_are_bounded(monkeypatch):
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 64)
    assert bench.prefetch_threads(BenchReplayFlags()) == 4
    assert bench.prefetch_threads(BenchReplayFlags(prefetch_threads=7)) == 7
    assert bench.prefetch_threads(BenchReplayFlags(prefetch_threads=0)) == 0
