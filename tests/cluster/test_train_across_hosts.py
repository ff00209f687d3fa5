"""`qfleet train` on a cluster of hosts of which some fall silent, leave and join."""

import contextlib
import signal
import sys
import time
from pathlib import Path

import pytest
from hosts import METRICS_PORT
from ray_runs import Run, check_ledger, check_logs, end_all

from common.schedules import ladder
from deploy.recipes import gridworld

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NUM_SLOTS = 6  # Four have room on w1 and w2.
TRAIN = [
    *["train", "gridworld", "--max-updates", "1000000000", "--max-minutes", "60", "--log-period-seconds", "1"],
    *["--actors.num-actors", NUM_SLOTS, "--actors.exploration.kind", "ladder", "--evaluation.period-seconds", "5"],
    *["--actors.node-labels", "role=env", "--learner.node-labels", "role=learner"],
]


@pytest.fixture
def join(cluster):
    """Returns a host that joins the cluster with room for two actors, for one test."""
    joined = []

    def begin(name):
        joined.append(cluster.add(name))
        joined[-1].ray_start(cluster["head"], num_cpus=2, labels="role=env")
        joined[-1].wait_for_ray()
        return joined[-1]

    yield begin
    for host in joined:
        host.kill()


@pytest.fixture
def run(cluster, tmp_path):
    """A run of which four actors act, and two slots wait."""
    words = [*TRAIN, "--address", cluster["head"].ray_address, "--run-dir", tmp_path / "run"]
    run = Run(tmp_path / "run", *words, host=cluster["head"])
    try:
        run.wait_for("metrics", lambda: run.rows())
        wait_for_actors(run, 4)
        yield run
    finally:
        end_all([run])
        for name in ("w1", "w2"):
            cluster[name].link_up()


def wait_for_actors(run, number, seconds=120):
    run.wait_for(f"{number} actors that act", lambda: run.rows()[-1].get("actor/num_alive") == number, seconds)


def goes_on(run, num_updates=100):
    then = run.updates()
    run.wait_for("more updates", lambda: run.updates() > then + num_updates)


def on(run, host):
    """Returns the actors on a host, as the run tells of them."""
    return [
        f"actor {name[5:]}" for name, worker in run.workers().items() if name[:5] == "actor" and worker["host"] == host.hostname
    ]


def check_epsilons(run):
    """All slots act, each with the epsilons that it has for ever."""
    wait_for_actors(run, NUM_SLOTS)
    num = NUM_SLOTS * gridworld().actors.num_envs
    assert run.rows()[-1]["actor/epsilon_mean"] == pytest.approx(sum(ladder(i, num) for i in range(num)) / num)


def interrupt(run):
    """Ends a run with Ctrl-C; it keeps its books to the end."""
    assert run.process.poll() is None, run.text()
    run.process.send_signal(signal.SIGINT)
    status, summary = run.end()
    assert status == 130 and summary["stopped_by"] == "interrupted" and summary["updates"] > 0
    check_ledger(summary["ledger"])
    check_logs(run.path, num_learner_deaths=0)


def go_silent(run, host, seconds):
    """Takes a host's link away for so long; the run names its actors, and has them again afterwards, or others in their places."""
    silent = on(run, host)
    assert len(silent) == 2
    before = len(run.text())
    told = time.monotonic()
    host.link_down()
    run.wait_for("its actors to be named", lambda: all(f"{name} is silent" in run.text()[before:] for name in silent))
    goes_on(run)
    while time.monotonic() < told + seconds:
        time.sleep(0.1)
    host.link_up()

    def is_back(name):
        return f"{name} answers again" in run.text()[before:] or f"{name} died" in run.text()[before:]

    run.wait_for("its actors to be back", lambda: all(is_back(name) for name in silent))


def leave(run, host):
    """Kills a host; the run tells of every actor on it, and their slots wait for room."""
    gone = on(run, host)
    assert len(gone) == 2
    before = len(run.text())
    host.kill()
    run.wait_for("its actors' end to be told", lambda: all(f"{name} died" in run.text()[before:] for name in gone))
    wait_for_actors(run, 4)
    goes_on(run)


def scraped(host):
    """Returns what a Prometheus on a host reads of the host's agent."""
    url = f"http://127.0.0.1:{METRICS_PORT}/metrics"
    done = host.run([sys.executable, "-c", f"import urllib.request as r; print(r.urlopen({url!r}).read().decode())"])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_hosts_fall_silent_join_and_leave_and_the_run_goes_on(cluster, join, run):
    assert len(on(run, cluster["w1"])) == len(on(run, cluster["w2"])) == 2
    assert {run.workers()[name]["host"] for name in ("learner", "shard0", "store", "evaluator")} == {
        cluster["learner"].hostname
    }
    run.wait_for("its metrics where it is driven from", lambda: "ray_qfleet_actor_num_alive{" in scraped(cluster["head"]))
    assert "ray_qfleet_" not in scraped(cluster["w1"])
    go_silent(run, cluster["w2"], seconds=15)
    wait_for_actors(run, 4)
    host = join("w3")
    check_epsilons(run)
    leave(run, host)
    interrupt(run)


@pytest.mark.slow
def test_a_host_that_loses_power_leaves_its_slots_to_another(cluster, join, run):
    """Nobody is told that it is away: its actors are given up as those of a host that hangs."""
    host = join("w3")
    check_epsilons(run)
    host.link_down()
    leave(run, host)
    join("w4")
    check_epsilons(run)
    interrupt(run)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_ten_minutes_of_leaving_silence_and_joining_keep_every_slot(cluster, join, run):
    """Each round a host joins, another is silent for 40 s, and the one that joined leaves, every other time without a word."""
    end = time.monotonic() + 600
    for number in range(3, 100):
        host = join(f"w{number}")
        check_epsilons(run)
        go_silent(run, cluster["w1"], seconds=40)
        check_epsilons(run)
        if number % 2:
            host.link_down()
        leave(run, host)
        if time.monotonic() > end:
            break
    join("last")
    check_epsilons(run)
    interrupt(run)


@pytest.mark.parametrize(
    ("token", "told"),
    [(None, "/dev/shm/.ray/auth_token has no token"), ("wrong", "the cluster refuses the token that it was shown")],
    ids=["none", "wrong"],
)
def test_a_command_without_the_clusters_token_ends_in_one_line_and_writes_nothing(cluster, tmp_path, token, told):
    head = cluster["head"]
    environment = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_TOKEN_PATH"}
    environment["HOME"] = "/dev/shm"
    if token is not None:
        (tmp_path / "token").write_text(token)
        environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    words = ["train", "gridworld", "--address", head.ray_address, "--run-dir", tmp_path / "run"]
    done = head.run([sys.executable, "-m", "deploy", *words], seconds=90, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.startswith(f"qfleet: --address {head.ray_address}: ") and told in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_command_line_log_or_file_has_the_token(cluster, run):
    """Kills: a token that `ps` shows, or that a run directory carries away."""
    secret = cluster.token.read_text()
    hosts = [cluster[name] for name in ("head", "learner", "w1", "w2")]
    shown = []
    for pid in (pid for host in hosts for pid in host.pids()):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            shown.append(Path(f"/proc/{pid}/cmdline").read_text())
    assert len(shown) > 20 and not any(secret in words for words in shown)
    interrupt(run)
    files = [path for path in [*run.path.rglob("*"), run.log, *(host.ray_log for host in hosts)] if path.is_file()]
    assert run.path / "run.json" in files and not any(secret.encode() in path.read_bytes() for path in files)
