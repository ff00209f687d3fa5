"""Real runs on Ray with a bottleneck put into them: the doctor must name it, and find nothing in a healthy one."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from ray_runs import Run, end_all

HERE = Path(__file__).parent
SCRIPT = str(HERE / "faulty_run.py")
SECONDS = 12.0  # Of rows that the doctor looks at, from some seconds after the first update on.
QUIET = ["--log-period-seconds", "1", "--evaluation.period-seconds", "1000", "--evaluation.target-return", "None"]
WIDE = ["--network.hidden-sizes", "512", "512"]  # So that an update takes some milliseconds.

HEALTHY = {
    "learner-bound": ["cartpole", *WIDE],
    "two-shards": ["cartpole", *WIDE, "--replay.num-shards", "2", "--replay.priority-exponent", "0.6"],
}
BOTTLENECKS = {
    # name: (kind of faulty run, recipe and flags, kind of finding, words of its sentence, flag of its advice)
    "env": (
        "none",
        ["cartpole", "--env.game", "slow_env:SlowCartPole-v0"],
        "env",
        "is the environment",
        "--actors.num-actors 2",
    ),
    "shard": ("shard", ["cartpole"], "shard", "shard 0 is busy", "--replay.num-shards 2"),
    "network": ("network", ["cartpole"], "network", "the time goes between", "--learner.prefetch-batches 8"),
    "actors": (
        "none",
        ["cartpole", "--replay.samples-per-insert", "0.25", "--replay.min-size", "500", "--actors.num-envs", "1"],
        "actors",
        "too few for 0.25 samples per insert",
        "--actors.num-actors 2",
    ),
    "limiter": (
        "none",
        ["cartpole", "--actors.chunk-transitions", "8", "--actors.num-envs", "1", "--replay.limiter-buffer-samples", "256"],
        "limiter",
        "is too small for both",
        "--replay.limiter-buffer-samples 1024",
    ),
}

QUICK = ("shard",)  # The others are slow tests: each takes half a minute of a quiet machine.


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(kind, *words):
        path = tmp_path / "run"
        environment = {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
        runs.append(Run(path, *words, "--run-dir", path, module=(SCRIPT, kind, "train"), environment=environment))
        return runs[-1]

    yield begin
    end_all(runs)


def examine(run, tmp_path, name="report.json"):
    """Asks the doctor while the run goes on; returns (what it printed, its report)."""
    out = tmp_path / name
    doctor = Run(run.path, "doctor", run.path, "--minutes", SECONDS / 60, "--json", out, log=tmp_path / f"{name}.log")
    assert doctor.process.wait(60) == 0, doctor.text()
    return doctor.text(), json.loads(out.read_text())


def learn_for(run, seconds):
    """Waits until the rows tell of so many seconds of learning."""

    def learned():
        times = [row["time_seconds"] for row in run.rows() if "learner/wait_fraction" in row and row["updates"]]
        return times and times[-1] - times[0] >= seconds

    run.wait_for("learning", learned)


@pytest.mark.ray
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BOTTLENECKS])
def test_a_bottleneck_is_named_with_the_flag_to_change(start, tmp_path, name):
    kind, words, expected, sentence, flag = BOTTLENECKS[name]
    run = start(kind, *words, *QUIET)
    learn_for(run, SECONDS + 3)
    text, report = examine(run, tmp_path)
    if expected != "limiter" and report["means"]["host/cpu_fraction"] >= 0.93 and report["findings"][0]["kind"] == "cores":
        pytest.skip("this machine is too busy with other things to have any other bottleneck")
    assert [finding["kind"] for finding in report["findings"]] == [expected], text
    assert sentence in report["verdict"] and flag in report["verdict"], text
    assert report["verdict"] in text and "under way" in text


@pytest.mark.ray
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in HEALTHY])
def test_a_healthy_run_gets_no_false_alarm(start, tmp_path, name):
    run = start("none", *HEALTHY[name], *QUIET)
    learn_for(run, SECONDS + 3)
    text, report = examine(run, tmp_path)
    assert not [finding for finding in report["findings"] if finding["is_fault"]], text
    assert "healthy" in text or "the learner is the limit" in text


@pytest.mark.ray
@pytest.mark.slow
def test_a_stuck_actor_is_named(start, tmp_path):
    run = start("none", "cartpole", *WIDE, "--actors.num-actors", "2", *QUIET)
    learn_for(run, 3)
    victim = run.workers()["actor1"]["pid"]
    os.kill(victim, signal.SIGSTOP)
    try:
        run.wait_for("silence", lambda: "actor 1 is silent" in run.text())
        before = len(run.rows())
        run.wait_for("rows of it", lambda: len(run.rows()) > before + 8)
        text, report = examine(run, tmp_path)
    finally:
        with contextlib.suppress(ProcessLookupError):  # The supervisor may have given it up by now.
            os.kill(victim, signal.SIGCONT)
    assert report["findings"][0]["kind"] == "away", text
    assert "actor 1 is silent" in report["verdict"]


@pytest.mark.ray
@pytest.mark.slow
def test_an_object_store_that_spills_is_named(start, tmp_path):
    words = ["pong", "--learner.batch-size", "512", "--learner.prefetch-batches", "16", "--replay.samples-per-insert", "None"]
    words += ["--replay.no-send-compressed", "--replay.min-size", "3000", "--object-store-memory", "80MiB"]
    run = start("none", *words, *QUIET)
    learn_for(run, SECONDS + 3)
    text, report = examine(run, tmp_path)
    assert "spill" in [finding["kind"] for finding in report["findings"]], text
    assert "--object-store-memory" in text
