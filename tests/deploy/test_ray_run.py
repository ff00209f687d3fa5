"""Whole runs on a local Ray of their own, driven from outside as a user would: kill, interrupt, go on."""

import os
import signal

import pytest
from ray_runs import Run, end_all

pytestmark = pytest.mark.ray

COMMAND = ["train", "gridworld", "--log-period-seconds", "1", "--evaluation.final-episodes", "5"]
FLEET = ["--actors.num-actors", "3", "--replay.num-shards", "2", "--actors.num-envs", "2", "--evaluation.period-seconds", "1"]
ONE_ACTOR = ["--actors.num-actors", "1"]  # Where what happens is not to actors: each takes seconds to start.


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(*words, **named):
        runs.append(Run(tmp_path / "run", *COMMAND, *FLEET, "--run-dir", tmp_path / "run", *words, **named))
        return runs[-1]

    yield begin
    end_all(runs)


def test_a_killed_actor_is_replaced_and_an_interrupted_run_goes_on(start):
    run = start("--max-updates", "1000000", "--actors.params-alarm-seconds", "10")
    run.wait_for("updates", lambda: run.updates() > 50)
    victim = run.workers()["actor1"]["pid"]
    assert set(run.workers()) == {"learner", "shard0", "shard1", "store", "evaluator", "actor0", "actor1", "actor2"}
    os.kill(victim, signal.SIGKILL)
    run.wait_for("a new actor 1", lambda: run.workers()["actor1"]["pid"] != victim)
    run.wait_for("all three again", lambda: run.rows()[-1]["actor/num_alive"] == 3)
    after_kill = run.updates()
    run.wait_for("updates after the kill", lambda: run.updates() > after_kill + 50)
    run.process.send_signal(signal.SIGINT)
    status, first = run.end()
    assert status == 130 and first["stopped_by"] == "interrupted"
    assert "actor 1 died" in run.text()
    assert "the learner has published" not in run.text()  # No alarm about any actor, the new one included.
    _check_ledger(first["ledger"], lost_causes={"actor died"})
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())][-1].startswith(f"{first['updates']:010d}")

    again = start("--max-updates", str(first["updates"] + 100))
    status, second = again.end(150)
    assert status == 0 and second["stopped_by"] == "max_updates" and second["updates"] == first["updates"] + 100
    assert second["env_steps"] > first["env_steps"]
    assert second["evaluation"]["episodes"] == 5 and second["evaluation"]["params_version"] == second["updates"]
    _check_ledger(second["ledger"], lost_causes=set())


def test_a_killed_rank_restarts_all_from_the_checkpoint(start):
    ranks = [*ONE_ACTOR, "--learner.num-devices", "2", "--learner.device", "cpu"]
    run = start("--max-updates", "1000000", "--learner.checkpoint-period-seconds", "2", *ranks)
    run.wait_for("a checkpoint of some updates", lambda: any((run.path / "checkpoints").glob("0*[1-9]*")))
    before = run.workers()
    assert {"learner0", "learner1"} <= set(before)
    os.kill(before["learner1"]["pid"], signal.SIGKILL)
    run.wait_for(
        "two new ranks", lambda: all(run.workers()[name]["pid"] != before[name]["pid"] for name in ("learner0", "learner1"))
    )
    newest = max(int(path.name[:10]) for path in (run.path / "checkpoints").glob("0*"))
    run.wait_for("more updates", lambda: run.updates() > newest + 50)
    run.process.send_signal(signal.SIGINT)
    status, summary = run.end()
    assert status == 130
    assert "the learner died" in run.text() and "it goes on from checkpoint" in run.text()
    _check_ledger(summary["ledger"], lost_causes=set())


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_a_new_command(start):
    ranks = [*ONE_ACTOR, "--learner.num-devices", "2", "--learner.device", "cpu"]
    for updates in (50, 100):
        status, summary = start("--max-updates", str(updates), *ranks).end(150)
        assert status == 0 and summary["updates"] == updates
        _check_ledger(summary["ledger"], lost_causes=set())


def test_store_and_learner_are_killed_and_sigterm_ends_the_run_cleanly(start):
    """The store comes back behind the same handle, empty. Kills: one that stays so, and actors act with old parameters for ever."""
    periods = ["--learner.checkpoint-period-seconds", "2", "--actors.params-alarm-seconds", "10"]
    run = start("--max-updates", "1000000", *periods, *ONE_ACTOR)
    run.wait_for("updates", lambda: run.updates() > 5)
    store, learner = (run.workers()[name]["pid"] for name in ("store", "learner"))
    os.kill(store, signal.SIGKILL)
    run.wait_for("a new store", lambda: run.workers()["store"]["pid"] != store)
    then = run.updates()
    run.wait_for("an evaluation of newer parameters", lambda: run.rows()[-1].get("evaluator/params_version", 0) > then)
    run.wait_for(
        "an actor with newer ones", lambda: run.rows()[-1]["updates"] - run.rows()[-1]["actor/params_lag_updates_max"] > then
    )
    assert "the params store is back; the learner publishes again" in run.text()

    run.wait_for("a checkpoint of some updates", lambda: any((run.path / "checkpoints").glob("0*[1-9]*")))
    os.kill(learner, signal.SIGKILL)
    run.wait_for("a new learner", lambda: run.workers()["learner"]["pid"] != learner)
    newest = max(int(path.name[:10]) for path in (run.path / "checkpoints").glob("0*"))
    run.wait_for("more updates", lambda: run.updates() > newest + 50)
    assert "stand still" not in run.text()
    run.process.send_signal(signal.SIGTERM)
    status, summary = run.end()
    assert status == 130 and summary["updates"] > newest + 50
    assert run.text().count("it goes on from checkpoint") == 1
    assert list((run.path / "checkpoints").glob(f"{summary['updates']:010d}*"))
    _check_ledger(summary["ledger"], lost_causes=set())


# As `python -m deploy`, but actor 1's way to the params store never brings anything.
DEAF = """
import sys
from deploy import cli, roles

class DeafReader:
    def poll(self, epoch, version):
        return None

    def age_seconds(self):
        return None

def make_actor(config, spec, run, slot, incarnation, steps, replay, params):
    from deploy import roles

    return roles.make_actor(config, spec, run, slot, incarnation, steps, replay, DeafReader() if slot == 1 else params)

roles.make_actor = make_actor  # The driver's; workers import their own.
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_actor_that_never_gets_parameters_is_named(start):
    run = start("--max-updates", "1000000", "--actors.params-alarm-seconds", "5", module=["-c", DEAF])
    run.wait_for("the alarm", lambda: "never received parameters" in run.text())
    rows = len(run.rows())
    run.wait_for("more rows", lambda: len(run.rows()) > rows + 8)
    run.process.send_signal(signal.SIGINT)
    status, _ = run.end()
    alarms = [line for line in run.text().splitlines() if "the learner has published" in line]
    assert status == 130 and len(alarms) == 1 and "actor 1 has never received parameters and acts for" in alarms[0]
    row = run.rows()[-2]
    # Actors 0 and 2 stay near the learner, actor 1 where it began.
    assert row["actor/params_lag_updates_max"] > 2 * row["actor/params_lag_updates"] > 0
    assert 0 < row["actor/params_age_seconds"] <= row["actor/params_age_seconds_max"] < 30


def _check_ledger(ledger, lost_causes):
    assert ledger["balanced"]
    assert ledger["sent"] == ledger["inserted"] + ledger["refused"] + sum(ledger["lost"].values())
    assert ledger["inserted"] == ledger["resident"] + ledger["evicted"] > 0
    assert set(ledger["lost"]) <= lost_causes and ledger["refused"] == 0
