"""Real Ray runs, hit at seeded moments by everything that happens to them; judged by what must hold, not by how it went.

The first one is part of `make test`, the others of `make test-slow`.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from faults import Chaos, check_gone, check_told, deaths
from ray_runs import Run, check_ledger, check_logs, end_all

from replay_server.recovery import NOT_IN_LOG
from replay_server.replay_log import segment_paths

pytestmark = pytest.mark.ray

FLEET = [
    *[
        "cartpole",
        "--actors.num-actors",
        "2",
        "--actors.num-envs",
        "2",
        "--replay.num-shards",
        "2",
        "--log-period-seconds",
        "1",
    ],
    *["--evaluation.period-seconds", "5", "--evaluation.final-episodes", "20", "--evaluation.target-return", "None"],
    *["--learner.checkpoint-period-seconds", "5", "--replay.sync-seconds", "0.2", "--replay.priority-exponent", "0.6"],
]


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(*words, path=tmp_path / "run", **named):
        runs.append(Run(path, *words, **named))
        return runs[-1]

    yield begin
    end_all(runs)


@pytest.fixture
def fleet(start, tmp_path):
    """Returns a run of two actors and two shards that has learned a little."""

    def begin(*words, path=tmp_path / "run", **named):
        run = start("train", *FLEET, "--run-dir", path, "--max-minutes", "60", *words, path=path, **named)
        run.wait_for("updates", lambda: run.updates() > 100)
        return run

    return begin


def fill(path):
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for num_bytes in (1 << 20, 1 << 10, 1):
            while file.write(bytes(num_bytes)) == num_bytes:
                pass


def interrupt(run):
    """Ends a run in order; returns its summary."""
    run.process.send_signal(signal.SIGTERM)
    status, summary = run.end()
    assert status == 130
    return summary


def kill_driver(run):
    pids = [worker["pid"] for worker in run.workers().values()]
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(10)
    check_gone(pids)


def goes_on(run, num_updates=100):
    then = run.updates()
    run.wait_for("more updates", lambda: run.updates() > then + num_updates)


def test_every_role_dies_and_the_driver_too_and_nothing_is_lost_in_silence(start, fleet):
    """About a minute: each role once, some more at random, then the driver; what goes on from there ends with a balanced ledger."""
    run = fleet()
    chaos = Chaos(run, seed=3, period_seconds=5.0, hows=("kill",))
    for role in ("shard", "learner", "actor", "store", "evaluator"):
        before = run.text().count("died (")
        chaos.hit(role, "kill")
        run.wait_for(f"the death of a {role} to be told", lambda before=before: run.text().count("died (") > before)
        time.sleep(1.0)
    chaos.go_on(10.0)
    goes_on(run)
    assert len(chaos.done) >= 6
    check_told(run.text(), chaos.done)
    kill_driver(run)
    num_learner_deaths = deaths(run.text(), "the learner")
    held = check_logs(run.path, num_learner_deaths)

    again = start("resume", run.path, "--max-updates", run.updates() + 200)
    status, summary = again.end(180)
    assert status == 0 and summary["stopped_by"] == "max_updates"
    assert "restored from checkpoint" in again.text() and f"{held:,} transitions in 2 shards" in again.text()
    check_ledger(summary["ledger"])
    check_logs(run.path, num_learner_deaths + 1)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "shard", "learner", "store"])
def test_a_process_that_hangs_is_named_and_answers_again(fleet, role):
    """SIGSTOP for a while: nothing is restarted, and nothing lost."""
    run = fleet()
    chaos = Chaos(run, seed=1, period_seconds=1.0, stop_seconds=15.0)
    chaos.hit(role, "stop")
    run.wait_for("it to be named", lambda: "is silent for 10 s" in run.text() and "degraded: " in run.text())
    chaos.go_on(0.0)
    run.wait_for("its answer", lambda: "answers again" in run.text())
    goes_on(run)
    summary = interrupt(run)
    assert "died (" not in run.text()
    check_ledger(summary["ledger"])
    assert summary["ledger"]["lost"] == {}
    check_logs(run.path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "shard", "learner", "store"])
def test_a_process_that_hangs_for_ever_is_replaced(fleet, role):
    run = fleet()
    chaos = Chaos(run, seed=1, period_seconds=1.0, stop_seconds=10_000.0)
    chaos.hit(role, "stop")
    (_, _, name) = chaos.done[0]
    victim = run.workers()[name]["pid"]
    run.wait_for("its end", lambda: "it hangs" in run.text(), seconds=150)
    run.wait_for("another process", lambda: run.workers()[name]["pid"] != victim)
    goes_on(run)
    summary = interrupt(run)
    check_gone([victim])
    check_ledger(summary["ledger"])
    check_logs(run.path, deaths(run.text(), "the learner"))


@pytest.mark.slow
def test_a_full_disk_costs_durability_loudly_and_never_the_run(fleet, tmp_path):
    """A disk of 24 MB that something else fills, and frees again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a disk of its own")
    try:
        run = fleet(path=disk / "run", log=tmp_path / "log")
        filler = disk / "filler"
        fill(filler)
        run.wait_for("the shards to say so", lambda: run.text().count("kept in memory only until writing works again") >= 2)
        run.wait_for("the learner to say so", lambda: "no checkpoint could be written" in run.text())
        run.wait_for("the metrics to say so", lambda: "rows of metrics are dropped" in run.text())
        time.sleep(5.0)
        filler.unlink()
        run.wait_for("the disk's use", lambda: run.text().count("the disk takes what it writes again") >= 3)
        goes_on(run)
        summary = interrupt(run)
        assert "degraded: " in run.text()
        check_ledger(summary["ledger"])
        assert summary["ledger"]["lost"] == {}
        again = Run(run.path, "resume", run.path, "--max-updates", summary["updates"] + 100, log=tmp_path / "second")
        status, second = again.end(120)
        assert status == 0
        ledger = second["ledger"]
        assert ledger["balanced"] and ledger["lost"].get(NOT_IN_LOG, 0) > 0, ledger
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_torn_and_altered_bytes_cost_what_they_hit_and_are_named(start, fleet):
    run = fleet()
    run.wait_for("a second checkpoint", lambda: len(list((run.path / "checkpoints").glob("0*"))) > 1)
    kill_driver(run)
    first, second = (segment_paths(run.path / "replay" / name)[-1] for name in ("0", "1"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 4
    first.write_bytes(data)
    os.truncate(second, second.stat().st_size - 5)
    (newest, *_) = sorted((run.path / "checkpoints").glob("0*"), reverse=True)
    altered = newest / "online.safetensors"
    data = bytearray(altered.read_bytes())
    data[-5] ^= 1
    altered.write_bytes(data)
    refused = start("resume", run.path)
    assert refused.process.wait(60) == 2
    (line,) = refused.text().splitlines()
    assert "online.safetensors: its checksum is wrong" in line and f"move {newest} away" in line
    shutil.move(newest, run.path / "moved")
    again = start("resume", run.path, "--max-updates", run.updates() + 200)
    status, summary = again.end(180)
    assert status == 0
    assert f"{first}: " in again.text() and "are no record (altered)" in again.text()
    assert f"{second}: " in again.text() and "end in the middle of a record" in again.text()
    ledger = summary["ledger"]
    assert ledger["balanced"] and 0 < ledger["lost"][NOT_IN_LOG] < 20


@pytest.mark.slow
def test_remote_calls_that_fail_at_random_lose_nothing_in_silence(fleet):
    """Ray's own injection: one request in a hundred never arrives, one answer in a hundred neither."""
    faults = {"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1, "in_flight_failure_prob": 0}}
    run = fleet(environment={"RAY_testing_rpc_failure": json.dumps(faults)})
    time.sleep(30.0)
    goes_on(run)
    summary = interrupt(run)
    check_ledger(summary["ledger"])
    check_logs(run.path, deaths(run.text(), "the learner"))


# `qfleet train` on a cluster of three nodes of this host. When `killed` is touched, the node dies on which the learner runs.
CLUSTER = """
import json, sys, threading, time
from pathlib import Path
import psutil
from deploy import ray_environment
ray_environment.prepare()
import ray
from ray.cluster_utils import Cluster
from deploy import cli, supervisor

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
nodes = [cluster.add_node(num_cpus=8) for _ in range(2)]  # Either takes all.

def start(config, temp_dir):
    ray.init(address=cluster.address, log_to_driver=False)

def kill(flag):
    while not flag.exists():
        time.sleep(0.2)
    learner = psutil.Process(json.loads((flag.parent / "run" / "workers.json").read_text())["learner"]["pid"])
    raylets = {parent.pid for parent in learner.parents()}
    node = next(node for node in nodes if node.all_processes["raylet"][0].process.pid in raylets)
    cluster.remove_node(node, allow_graceful=False)

supervisor.start_ray = start
threading.Thread(target=kill, args=(Path(sys.argv[1]),), daemon=True).start()
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_whole_node_dies_with_learner_and_shards(start, tmp_path):
    flag = tmp_path / "kill"
    words = [flag, "train", *FLEET, "--run-dir", tmp_path / "run", "--max-minutes", "30"]
    run = start(*words, module=("-c", CLUSTER), environment={"RAY_AUTH_MODE": "disabled"})
    run.wait_for("updates", lambda: run.updates() > 100)
    victim = run.workers()["learner"]["pid"]
    flag.touch()
    run.wait_for("another learner", lambda: run.workers()["learner"]["pid"] != victim, seconds=180)
    goes_on(run)
    summary = interrupt(run)
    check_ledger(summary["ledger"])
    check_logs(run.path, deaths(run.text(), "the learner"))


@pytest.mark.slow
@pytest.mark.timeout(4_000)
def test_twenty_minutes_of_kills_end_like_undisturbed_runs(start, tmp_path):
    """A kill or a hang every 20 s over all roles; five seeds without give the interval of the final evaluation."""
    words = [*FLEET, "--evaluation.final-episodes", "100", "--evaluation.period-seconds", "30"]
    run = start("train", *words, "--run-dir", tmp_path / "run", "--max-minutes", "20")
    run.wait_for("updates", lambda: run.updates() > 100)
    chaos = Chaos(run, seed=5, period_seconds=20.0)
    chaos.go_on(1_300.0)
    chaos.release()
    status, summary = run.end(200)
    assert status == 0 and summary["stopped_by"] == "max_minutes"
    assert len(chaos.done) > 40
    check_told(run.text(), chaos.done)
    check_ledger(summary["ledger"])
    check_logs(run.path, deaths(run.text(), "the learner"))
    returns = []
    for seed in range(5):
        path = tmp_path / f"calm{seed}"
        words_of = [*words, "--seed", seed, "--run-dir", path, "--max-updates", min(summary["updates"], 8_000)]
        calm = start("train", *words_of, path=path)
        status, one = calm.end(1_300)
        assert status == 0
        returns.append(one["evaluation"]["mean_return"])
    low, high = np.mean(returns) - 3 * np.std(returns, ddof=1), np.mean(returns) + 3 * np.std(returns, ddof=1)
    print(f"disturbed {summary['evaluation']['mean_return']}, undisturbed {returns}, faults {len(chaos.done)}")
    assert summary["evaluation"]["mean_return"] >= min(low, high)


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_forty_minutes_leave_memory_and_files_flat(start, tmp_path):
    """Resident memory, descriptors and threads of every role, and the object store, in the last quarter against the second."""
    minutes = os.environ.get("SOAK_MINUTES", "40")
    run = start("train", *FLEET, "--run-dir", tmp_path / "run", "--max-minutes", minutes, "--replay.capacity", "5000")
    run.wait_for("updates", lambda: run.updates() > 500)
    samples = []
    raylet = psutil.Process(run.workers()["learner"]["pid"]).parent()
    while run.process.poll() is None:
        with contextlib.suppress(psutil.Error):  # The run ends meanwhile.
            memory = raylet.memory_info()  # Its shared pages are those of the object store that were ever written to.
            sample = {"object store": (memory.shared, 0, 0), "raylet": (memory.rss - memory.shared, raylet.num_fds(), 0)}
            for name, worker in run.workers().items():
                process = psutil.Process(worker["pid"])
                memory = process.memory_info()
                sample[name] = (memory.rss - memory.shared, process.num_fds(), process.num_threads())
            samples.append(sample)
        time.sleep(10.0)
    status, summary = run.end(10)
    assert status == 0
    check_ledger(summary["ledger"])
    quarter = len(samples) // 4
    for name in samples[0]:
        for index, slack in enumerate((8 << 20, 3, 3)):
            early = np.median([sample[name][index] for sample in samples[quarter : 2 * quarter]])
            late = np.median([sample[name][index] for sample in samples[3 * quarter :]])
            print(f"{name}: {('bytes', 'descriptors', 'threads')[index]} {early:,.0f} -> {late:,.0f}")
            assert late <= early + slack, (name, index, early, late)
