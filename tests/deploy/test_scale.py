"""`qfleet scale`: order, warm-up, resumption, faults and interruption with a scripted run in place of training; one sweep of real runs."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from actors.environments import probe
from common.errors import UserError
from deploy import cli, plan, run_dir, scale, scale_figures, scale_run
from deploy.metrics_export import ROW_METRICS
from deploy.recipes import RECIPES
from deploy.scale import ScaleFlags, make_points, powers_of_two
from deploy.scale_figures import draw_axis
from deploy.scale_results import AXES, SAMPLES, axis_result, make_card
from deploy.scale_run import RowsTail, figures_of, find_window
from deploy.scale_table import ScaleTable, Settings, lock_directory

SCRIPTED = Path(__file__).with_name("scripted_train.py")
RATES = {str(n): 250 * n / (1 + 0.1 * (n - 1)) for n in (1, 2, 3, 4, 8)}
UNCOMMITTED = run_dir.uncommitted  # As it is without the fixture below.
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with room for all, and the signals as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 44)
    monkeypatch.setattr(run_dir, "num_cpus", lambda: 16)
    monkeypatch.setattr(run_dir, "commit", lambda: "c0ffee")
    monkeypatch.setattr(run_dir, "uncommitted", lambda: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def script(tmp_path):
    def write(**what):
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"env_steps_per_second": RATES} | what))
        return path

    return write


def sweep(script_path, out, **flags):
    config = RECIPES["gridworld"]()
    times = {"seconds": 1.0, "warm_up_seconds": 1.0}
    chosen = ScaleFlags(out=out, **({"actors": (1, 2, 3, 4), "rounds": 2} | times | flags))
    return scale.scale(config, [], chosen, command=[sys.executable, str(SCRIPTED), str(script_path)], spec=probe(config.env))


def calls(script_path, flag="--actors.num-actors"):
    """Returns the number of actors of every run, in order; or another flag's number."""
    words = [json.loads(line) for line in Path(f"{script_path}.calls").read_text().splitlines()]
    return [int(one[one.index(flag) + 1]) for one in words]


def table(out):
    return list(csv.DictReader((out / "scale.csv").read_text().splitlines()))


def test_a_sweep_measures_after_the_warm_up_and_finds_the_law(script, tmp_path, capsys):
    """Before the learner begins the scripted run is ten times as fast, before all actors act and in the warm-up twice: either in the
    window would be seen in the rate, and the learner's busy part would be more than 0.25.
    """
    path, out = script(), tmp_path / "out"
    assert sweep(path, out) == 0
    rows = table(out)
    assert len(rows) == 8
    for row in rows:
        assert float(row["actor/env_steps_per_second"]) == pytest.approx(RATES[row["actors"]])
        assert float(row["learner/updates_per_second"]) == pytest.approx(RATES[row["actors"]] / 4)
        assert float(row["learner/samples_per_second"]) == pytest.approx(RATES[row["actors"]] * 16)
        assert float(row["learner/busy_fraction"]) == pytest.approx(0.25)
        assert float(row["measured_seconds"]) == pytest.approx(1.0)
        # What a run does not tell stays empty, and so do processors: its second was over in no time.
        assert row["actor/env_fraction"] == row["host/cpu_fraction"] == row["fault"] == ""
    results = json.loads((out / "scale.json").read_text())
    law = results["axes"]["actors"]["law"]
    assert law["sigma"]["value"] == pytest.approx(0.1, abs=1e-6) and law["kappa"]["value"] == pytest.approx(0, abs=1e-6)
    assert law["peak"]["value"] is None  # Infinite is no JSON.
    (last,) = [one for one in results["axes"]["actors"]["efficiency"] if one["n"] == 4]
    assert last["median"] == pytest.approx(1 / 1.3)
    assert results["card"]["commit"] == "c0ffee" and results["card"]["hardware"]["usable_cpus"] == 16
    assert (out / "scale-actors.png").read_bytes()[:4] == b"\x89PNG"
    told = capsys.readouterr().out
    assert "4 points x 2 rounds: 8 runs" in told and f"{SIGMA} 0.1 [0.1, 0.1]" in told
    assert not list(out.glob("runs/*/replay")) and len(list(out.glob("runs/*/metrics.jsonl"))) == 8


def test_rounds_are_interleaved_and_shuffled_by_the_seed(script, tmp_path):
    config, spec = RECIPES["gridworld"](), probe(RECIPES["gridworld"]().env)

    def order(seed):
        flags = ScaleFlags(actors=(1, 2, 3, 4), rounds=2, seconds=1.0, warm_up_seconds=1.0, seed=seed)
        found, _ = make_points(config, flags.axes(), flags, spec)
        empty = ScaleTable(tmp_path / "none.csv", [])
        sweep = scale.Sweep(config, flags, flags.axes(), found, tmp_path, empty, [], None)
        return [(number, point.settings.actors) for number, point in sweep.schedule()]

    for seed in range(5):
        numbers = [number for number, _ in order(seed)]
        assert numbers == [1] * 4 + [2] * 4  # Each point once in each round.
        assert sorted(order(seed)) == sorted((number, n) for number in (1, 2) for n in (1, 2, 3, 4))
        assert order(seed) == order(seed)
    path = script()
    sweep(path, tmp_path / "out")
    assert calls(path) == [n for _, n in order(0)]
    assert calls(path, "--seed") == [number - 1 for number, _ in order(0)]  # A round is not the one before again.
    by_round = {tuple(n for number, n in order(seed) if number == wanted) for seed in range(5) for wanted in (1, 2)}
    assert len(by_round) > 5  # Of ten rounds; in one and the same order a warmer machine would be taken for a slower point.


def test_the_same_command_measures_only_what_is_missing(script, tmp_path, monkeypatch, capsys):
    path, out = script(), tmp_path / "out"
    sweep(path, out, actors=(1, 2), rounds=1)
    assert sweep(path, out, actors=(1, 2), rounds=1) == 0 and len(calls(path)) == 2
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2 points x 1 round: ")]
    assert "2 runs, about 1 min" in first and second.endswith(f"0 runs (2 are in {out / 'scale.csv'} already)")
    sweep(path, out, actors=(1, 2, 3), rounds=1)
    assert calls(path)[2:] == [3]
    sweep(path, out, actors=(1, 2, 3), rounds=2)
    assert sorted(calls(path)[3:]) == [1, 2, 3]
    sweep(path, out, actors=(1,), rounds=1, seconds=0.5)  # Another measurement, and so is that of other code.
    monkeypatch.setattr(run_dir, "commit", lambda: "beef")
    sweep(path, out, actors=(1,), rounds=1)
    assert calls(path)[6:] == [1, 1] and len(table(out)) == 8
    assert len({row["digest"] for row in table(out)}) == 4 and {row["commit"] for row in table(out)} == {"c0ffee", "beef"}


def test_points_of_other_uncommitted_code_are_measured_anew(script, tmp_path, monkeypatch):
    path, out = script(), tmp_path / "out"
    monkeypatch.setattr(run_dir, "commit", lambda: "c0ffee-dirty")
    for changes, num_runs in (("a", 1), ("a", 1), ("b", 2), ("a", 2)):
        monkeypatch.setattr(run_dir, "uncommitted", lambda changes=changes: changes)
        assert sweep(path, out, actors=(1,), rounds=1) == 0
        assert len(calls(path)) == num_runs
        assert (
            json.loads((out / "scale.json").read_text())["axes"]["actors"]["points"][0]["rounds"] == 1
        )  # The other is not mixed in.


def test_uncommitted_code_has_a_digest(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True
        )

    assert UNCOMMITTED(tmp_path) is None
    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "a")
    found = []
    for text in ("1\n", "2\n", "3\n", "2\n"):
        (tmp_path / "a.py").write_text(text)
        found.append(UNCOMMITTED(tmp_path))
    assert found[0] is None and found[1] == found[3] and len({*found}) == 3


def test_a_run_with_a_fault_is_a_row_and_the_sweep_goes_on_and_tries_again(script, tmp_path, capsys):
    faults = {"2": {"dies_at": 25}, "3": {"status": 1, "ends": "the shard died"}}
    path, out = script(faults=faults), tmp_path / "out"
    assert sweep(path, out, rounds=1) == 1
    rows = {row["actors"]: row for row in table(out)}
    assert rows["2"]["fault"] == "it ended with status 1: the disk is full" and rows["2"]["actor/env_steps_per_second"] == ""
    assert rows["3"]["fault"] == "it ended with status 1: the shard died"
    assert rows["1"]["fault"] == rows["4"]["fault"] == ""
    assert [p["value"] for p in json.loads((out / "scale.json").read_text())["axes"]["actors"]["points"]] == [1, 4]
    assert "no law from 2 points" in capsys.readouterr().out
    assert sweep(script(), out, rounds=1) == 0
    assert sorted(calls(path)[4:]) == [2, 3] and len(table(out)) == 4


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({"alive": 1}, "its learner and 2 actors were not at work after 0 s"),
        ({"restarts_at": 35}, "a role began again meanwhile"),
        ({"deaf": True}, "it did not end within 0 s of being asked to, and was killed"),
        ({"status": 0}, "it ended with status 0: see the summary"),
    ],
    ids=["missing_actor", "restarted_learner", "deaf", "ended_well"],
)
def test_what_else_goes_wrong_is_named(says, expected, script, tmp_path, monkeypatch):
    if "alive" in says:
        monkeypatch.setattr(scale_run, "_MOST_SECONDS_TO_LEARN", 0.4)
    if "deaf" in says:
        monkeypatch.setattr(scale_run, "_END_SECONDS", 0.4)
    out = tmp_path / "out"
    assert sweep(script(faults={"2": says}), out, actors=(2,), rounds=1) == 1
    assert [row["fault"] for row in table(out)] == [expected]


@pytest.mark.parametrize("row", [15, 23], ids=["before_the_window", "within_it"])
def test_a_run_that_tells_nothing_more_is_given_up(row, script, tmp_path, monkeypatch):
    monkeypatch.setattr(scale_run, "_MOST_SECONDS_SILENT", 0.4)
    out = tmp_path / "out"
    path = script(faults={"2": {"silent_at": row}})
    assert sweep(path, out, actors=(2,), rounds=1, seconds=0.5, warm_up_seconds=0.1) == 1
    assert [row["fault"] for row in table(out)] == ["it told nothing more for 1 s"]


def test_a_sweep_whose_first_run_is_refused_is_a_mistake(script, tmp_path):
    with pytest.raises(UserError, match="the first run was refused: no token for --address"):
        sweep(script(faults={"2": {"refuses": "no token for --address"}}), tmp_path / "out", actors=(2,), rounds=1)
    assert not (tmp_path / "out" / "scale.csv").exists()


DRIVER = """
import sys
from pathlib import Path
from deploy import plan, run_dir, scale
from deploy.recipes import RECIPES
run_dir.commit, run_dir.uncommitted = lambda: "c0ffee", lambda: None
flags = scale.ScaleFlags(actors=(1, 2), rounds=2, seconds=1.0, warm_up_seconds=1.0, out=Path(sys.argv[1]))
sys.exit(scale.scale(RECIPES["gridworld"](), [], flags, command=sys.argv[2:]))
"""


def test_ctrl_c_ends_the_run_under_way_in_good_order_and_the_same_command_goes_on(script, tmp_path):
    path, out = script(faults={"2": {"pace": 0.3}}), tmp_path / "out"
    words = [sys.executable, "-c", DRIVER, str(out), sys.executable, str(SCRIPTED), str(path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTED.parents[2])}

    def begin():
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    process = begin()
    deadline = time.monotonic() + 60
    while not (under_way := list(out.glob("runs/actors2-*/metrics.jsonl"))):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told and "the same command goes on from there" in told
    assert "the summary is written" in under_way[0].parent.with_suffix(".log").read_text()
    before = table(out) if (out / "scale.csv").exists() else []
    assert {row["actors"] for row in before} <= {"1"} and len(before) == len(calls(path)) - 1

    script()
    process = begin()
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    done = [(row["actors"], row["round"]) for row in table(out)]
    assert sorted(done) == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")] and table(out)[: len(before)] == before
    assert len(calls(path)) == 4 + 1  # Nothing twice but what was broken off.
    assert under_way[0].exists()  # Its directory is left as it is.


def begin_sweep(path, out):
    """Starts a sweep in a process of its own; returns it once its first run tells rows, with where it does."""
    words = [sys.executable, "-c", DRIVER, str(out), sys.executable, str(SCRIPTED), str(path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTED.parents[2])}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not (under_way := list(out.glob("runs/*/metrics.jsonl"))):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, under_way[0]


def test_a_killed_sweep_takes_its_run_with_it_and_none_begins_before_that_ended(script, tmp_path):
    out = tmp_path / "out"
    process, _ = begin_sweep(script(faults={key: {"pace": 0.3, "deaf": True} for key in "12"}), out)
    (run,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    time.sleep(0.5)
    try:
        assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE  # This one does not heed it.
        with pytest.raises(UserError, match="or a run of one that was killed is ending"):
            lock_directory(out)
    finally:
        run.kill()
    psutil.wait_procs([run], timeout=10)
    lock_directory(out).close()

    process, under_way = begin_sweep(script(faults={key: {"pace": 0.3} for key in "12"}), tmp_path / "other")
    (run,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    psutil.wait_procs([run], timeout=10)
    is_left = run.is_running()
    if is_left:
        run.kill()
    assert not is_left and "the summary is written" in under_way.parent.with_suffix(".log").read_text()


def test_ctrl_c_before_anything_was_measured_names_no_table(script, tmp_path):
    process, _ = begin_sweep(script(faults={key: {"pace": 0.3} for key in "12"}), tmp_path / "out")
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "out" / "scale.csv").exists(), told
    assert told.splitlines()[-1] == "interrupted before anything was measured; the same command begins again"
    assert "scale.csv" not in told and "nothing was measured" not in told


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("train", "; checkpoints that were written before are kept"),
        ("scale", "; what was measured before is kept"),
        ("plan", ""),
    ],
)
def test_what_is_ended_at_once_says_what_it_keeps(command, kept, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_config", interrupt)
    assert cli.main([command, "gridworld"]) == 130
    assert capsys.readouterr().err == f"qfleet: ended at once{kept}\n"


def rows_of(values):
    """Rows with these (seconds, env steps, updates, alive, busy)."""
    names = ("time_seconds", "env_steps", "updates", "actor/num_alive", "learner/busy_fraction")
    return [dict(zip(names, row, strict=True)) | {"samples": 64 * row[2]} for row in values]


def test_the_window_begins_with_the_learner_and_all_actors_and_a_warm_up():
    rows = rows_of(
        [
            (1, 10, 0, 2, 0.0),
            (2, 20, 1, 1, 0.0),
            (3.5, 30, 2, 2, 0.0),
            (5, 40, 3, 2, 0.0),
            (6, 50, 4, 2, 0.0),
            (9, 60, 5, 1, 0.0),
        ]
    )
    asked = {"num_actors": 2, "warm_up_seconds": 2.0, "seconds": 3.0}
    assert [find_window(rows[:k], **asked) for k in (1, 3, 4, 5, 6)] == [None, None, None, (4, None), (4, 5)]
    assert find_window(rows, num_actors=1, warm_up_seconds=0.0, seconds=1.0) == (1, 2)
    assert find_window(rows, num_actors=3, warm_up_seconds=0.0, seconds=1.0) is None


def test_figures_are_from_counters_and_means_are_weighted_with_time():
    """2 s at 0.5 and 1 s at 0.8: 0.6. Kills: the first row's mean, which is of the time before; the plain mean, 0.65; the last one's."""
    rows = rows_of([(10, 100, 10, 2, 0.99), (12, 160, 14, 1, 0.5), (13, 190, 16, 2, 0.8)])
    rows[1]["shard/busy_fraction"] = 0.3  # Known of one row only.
    figures = figures_of(rows)
    assert figures["measured_seconds"] == 3 and figures["actor/num_alive"] == 1
    assert figures["actor/env_steps_per_second"] == 30
    assert (figures["learner/updates_per_second"], figures["learner/samples_per_second"]) == (2, 128)
    assert figures["learner/busy_fraction"] == pytest.approx(0.6) and figures["shard/busy_fraction"] == pytest.approx(0.3)
    assert "actor/env_fraction" not in figures


def test_every_column_that_is_read_is_one_that_rows_have():
    assert {*scale_run.MEANS, *scale_run.RATES, *scale_run.RATES.values(), "actor/num_alive"} <= set(ROW_METRICS)
    shown = {column for column, _, _ in scale_figures._BUSY}
    assert shown <= set(scale_run.COLUMNS)


def test_a_row_that_is_being_written_waits_for_its_end(tmp_path):
    tail, file = RowsTail(tmp_path), tmp_path / "metrics.jsonl"
    seen = [tail.rows()[:]]
    for part in ('{"updates": 1}\n{"upd', 'ates": 2}', '\n{"updates": 3}\n', '{"upda{"updates": 4}\n{"updates": 5}\n'):
        with file.open("a") as growing:
            growing.write(part)
        seen.append([row["updates"] for row in tail.rows()])
    assert seen == [[], [1], [1], [1, 2, 3], [1, 2, 3, 5]]  # A line torn by a full disk is passed over.


def points(flags, config=None, spec=None):
    config = config or RECIPES["gridworld"]()
    return make_points(config, scale._chosen_axes(config, flags), flags, spec or probe(config.env))


def test_one_axis_is_swept_at_a_time_and_a_point_of_two_axes_is_measured_once():
    found, left_out = points(ScaleFlags(actors=(1, 2), shards=(1, 2), samples_per_insert=(16.0, "none"), batch_size=(64,)))
    base = Settings.of(RECIPES["gridworld"]())
    assert base == Settings(actors=1, envs_per_actor=4, shards=1, batch_size=64, devices=1, samples_per_insert=16.0)
    changed = [{"actors": 2}, {"shards": 2}, {"samples_per_insert": "none"}]
    assert [point.settings for point in found] == [base, *(replace(base, **one) for one in changed)]
    assert not left_out and len({point.digest for point in found}) == 4
    assert found[-1].config.replay.samples_per_insert is None and found[-1].settings.flags()[-1] == "None"


def test_settings_are_what_the_flags_of_train_say():
    settings = Settings(actors=3, envs_per_actor=5, shards=2, batch_size=48, devices=2, samples_per_insert=0.3)
    config = settings.applied_to(RECIPES["gridworld"]())
    assert Settings.of(config) == settings
    assert cli._run_config(RECIPES["gridworld"](), ["--actors.num-actors", "9", *settings.flags()], "qfleet train") == config


def test_what_has_no_room_is_left_out_by_name_and_what_contradicts_itself_is_refused(monkeypatch):
    monkeypatch.setattr(run_dir, "num_cpus", lambda: 2)
    found, left_out = points(ScaleFlags(actors=(1, 64)))
    assert [point.settings.actors for point in found] == [1]
    assert left_out[0].startswith("actors 64: no CPUs left for 64 actors")
    with pytest.raises(UserError, match="actors 64: no CPUs left"):
        points(ScaleFlags(actors=(64,)))
    with pytest.raises(UserError, match=r"devices 2: learner\.num_devices 2 needs as many shards"):
        points(ScaleFlags(devices=(1, 2)))
    monkeypatch.setattr(plan, "available_memory", lambda: 3 << 30)
    found, left_out = points(ScaleFlags(actors=(1, 10)))
    assert len(found) == 1 and "this run needs" in left_out[0]


def test_more_devices_than_gpus_are_refused(monkeypatch):
    config = RECIPES["gridworld"]()
    config = replace(config, replay=replace(config.replay, num_shards=4))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--devices 4: this machine has 2 GPUs"):
        points(ScaleFlags(devices=(1, 4)), config)
    assert len(points(ScaleFlags(devices=(1, 2)), config)[0]) == 2
    on_cpu = replace(config, learner=replace(config.learner, device="cpu"))
    assert len(points(ScaleFlags(devices=(1, 4)), on_cpu)[0]) == 2  # Processes.


def test_without_an_axis_actors_double_up_to_the_processors():
    assert [powers_of_two(most) for most in (1, 2, 6, 16)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8, 16)]
    assert [point.settings.actors for point in points(ScaleFlags())[0]] == [1, 2, 4, 8, 16]
    with pytest.raises(UserError, match="on a cluster say what to sweep"):
        scale._chosen_axes(replace(RECIPES["gridworld"](), address="auto"), ScaleFlags())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scale"], "needs a recipe"),
        (["scale", "pnog"], "did you mean 'pong'"),
        (["scale", "gridworld", "--actors", "0"], "--actors must be positive"),
        (["scale", "gridworld", "--samples-per-insert", "non"], "--samples-per-insert"),
        (["scale", "gridworld", "--rounds", "0"], "--rounds must be positive"),
        (["scale", "gridworld", "--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["scale", "gridworld", "--seconds", "inf"], "--seconds must be positive and finite, got inf"),
        (["scale", "gridworld", "--warm-up-seconds", "nan"], "--warm-up-seconds must be finite"),
        (
            ["scale", "gridworld", "--samples-per-insert", "8", "nan"],
            "--samples-per-insert must be positive and finite, got nan",
        ),
        (["scale", "gridworld", "--role", "shard", "--role-seconds", "nan"], "--role-seconds must be positive and finite"),
        (["scale", "gridworld", "--role", "shard", "--rates", "5", "inf"], "--rates must be positive and finite, got inf"),
        (["scale", "gridworld", "--rates", "5"], "name it with --role"),
        (["scale", "gridworld", "--role", "shard", "--batch-size", "64"], "leave out --batch-size"),
        (["scale", "gridworld", "--actor", "2"], "did you mean --actors"),
        (["scale", "gridworld", "--", "--run-dir=x"], "give --out to qfleet scale"),
        (["scale", "gridworld", "--", "--address", "auto"], "before the --"),
        (["scale", "gridworld", "--", "--lerner.batch-size", "3"], "did you mean --learner.batch-size"),
        (["scale", "gridworld", "--address", "10.0.0.1"], "write HOST:PORT"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qfleet: ") and expected in line
    assert list(tmp_path.iterdir()) == []


def test_two_sweeps_in_one_directory_and_a_foreign_table_are_refused(script, tmp_path):
    out = tmp_path / "out"
    with lock_directory(out), pytest.raises(UserError, match="another qfleet scale is at work there"):
        sweep(script(), out)
    (out / "scale.csv").write_text("name,value\na,1\n")
    with pytest.raises(UserError, match="not a table of qfleet scale"):
        sweep(script(), out)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "scale.csv"
    base = Settings.of(RECIPES["gridworld"]())
    for index, ratio in enumerate((4.0, "none")):
        rows = ScaleTable.read(path)
        settings = replace(base, samples_per_insert=ratio)
        about = {
            "round": 1,
            "digest": f"d{index}",
            "commit": "",
            "date": "2026-11-23",
            "fault": 'the "disk", is full' if index else "",
        }
        rows.add(picture_row(settings, 1, 100.0) | about | {"learner/busy_fraction": 0.5})
        rows.write()
    again = ScaleTable.read(path)
    assert again.has("d0", None, 1) and not again.has("d0", None, 2) and not again.has("d0", "c0ffee", 1)
    assert not again.has("d1", None, 1)  # It had a fault.
    (row,) = again.measured({"d0", "d1"}, None)
    assert (row["samples_per_insert"], row["learner/busy_fraction"], row["round"], row["actors"]) == (4.0, 0.5, 1, 1)
    assert "shard/busy_fraction" not in row


@pytest.mark.parametrize("cell", ["nan", "0.0", "", "inf", "-1"])
def test_a_row_without_its_rate_is_named_by_its_line(cell, script, tmp_path):
    path, out = script(faults={"2": {"dies_at": 25}}), tmp_path / "out"
    sweep(path, out, actors=(1, 2, 3), rounds=1)
    rows = table(out)
    (spoilt,) = [row for row in rows if row["actors"] == "3"]
    spoilt["learner/updates_per_second"] = cell
    with (out / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(spoilt))
        writer.writeheader()
        writer.writerows(rows)
    told = {"": "empty", "0.0": "0"}.get(cell, cell)
    place = f"scale.csv, line {rows.index(spoilt) + 2}: learner/updates_per_second is {told}; delete the line"
    with pytest.raises(UserError, match=re.escape(place)):
        sweep(path, out, actors=(1, 2, 3), rounds=1)
    assert len(calls(path)) == 3


def test_an_axis_takes_only_rows_that_differ_in_nothing_else():
    """A row of two shards is no point of the axis of actors, whose law it would bend."""
    config = RECIPES["gridworld"]()
    base = Settings.of(config)

    def row(rate, **changed):
        return picture_row(replace(base, **changed), 1, rate)

    rows = [
        row(100.0),
        row(190.0, actors=2),
        row(9.0, shards=2),
        row(9.0, actors=2, shards=2),
        row(120.0, samples_per_insert="none"),
    ]
    actors = axis_result(AXES["actors"], config, [1, 2], rows, num_cpus=4, seed=0, warm_up_seconds=10.0)
    assert actors.values == [1, 2] and [len(actors.rows[n]) for n in (1, 2)] == [1, 1] and actors.law is None
    assert actors.efficiencies[-1].median == 0.95
    shards = axis_result(AXES["shards"], config, [1, 2], rows, num_cpus=4, seed=0, warm_up_seconds=10.0)
    assert shards.of(2, "learner/samples_per_second") == [144.0]
    ratio = axis_result(AXES["samples_per_insert"], config, ["none", 16.0], rows, num_cpus=4, seed=0, warm_up_seconds=10.0)
    assert (
        ratio.values == [16.0, "none"]
        and ratio.sentence.startswith("samples an insert: 100 env steps/s at 16, 120 without a ratio; ")
        and "most without a ratio" in ratio.sentence
        and ratio.law is None
    )
    assert actors.notes == []
    unsettled = axis_result(
        AXES["actors"], config, [2], [row(100.0, actors=2) | {SAMPLES: 3_000.0}], num_cpus=4, seed=0, warm_up_seconds=10.0
    )
    assert unsettled.notes[0].startswith("1 of 1 runs had not settled: 30 samples a step in place of 16 at 2 actors")
    assert axis_result(AXES["devices"], config, [2], rows, num_cpus=4, seed=0, warm_up_seconds=10.0) is None


def picture_row(settings, number, rate, **more):
    values = {name: getattr(settings, name) for name in Settings.names()}
    rates = {
        "actor/env_steps_per_second": rate,
        "learner/samples_per_second": 16 * rate,
        "learner/updates_per_second": rate / 4,
    }
    return values | {"round": number} | rates | more


@pytest.mark.parametrize(
    ("axis", "values", "more"),
    [
        ("actors", (1, 2, 4, 8), {"shard/busy_fraction_max": 0.5, "host/cpu_fraction": 0.4}),
        ("actors", (1, 4, 16, 64, 360), {"learner/busy_fraction": 0.5}),
        ("actors", (3,), {}),
        ("batch_size", (32, 64, 512), {}),
        ("samples_per_insert", (1.0, 8.0, "none"), {}),
        ("devices", (1, 2, 4), {}),
    ],
)
def test_every_kind_of_axis_has_a_picture(axis, values, more):
    """Warnings are errors here: of a logarithm of nothing, of an empty legend, of labels that find no room."""
    config = replace(RECIPES["gridworld"](), recipe="a_$x^2$")
    base = Settings.of(config)
    rows = [
        picture_row(replace(base, **{axis: value}), number, 100.0 * (index + 1) ** 0.7 + number, **more)
        for index, value in enumerate(values)
        for number in (1, 2)
    ]
    result = axis_result(AXES[axis], config, values, rows, num_cpus=4, seed=0, warm_up_seconds=10.0)
    assert (result.law is None) == (axis in ("batch_size", "samples_per_insert") or len(values) < 3)
    picture = draw_axis(result, make_card(config, None))
    assert picture[:4] == b"\x89PNG" and len(picture) > 20_000


def test_a_full_disk_is_one_line_and_what_was_measured_is_kept(script, tmp_path, monkeypatch):
    path, out = script(), tmp_path / "out"
    sweep(path, out, actors=(1,), rounds=1)
    before = (out / "scale.csv").read_bytes()

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("deploy.scale_table.write_whole", full)
    with pytest.raises(
        UserError, match=r"scale\.csv: cannot be written \(No space left on device\); what was measured before is kept"
    ):
        sweep(path, out, actors=(1, 2), rounds=1)
    assert (out / "scale.csv").read_bytes() == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_sweep_measures_the_whole_system(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    out = tmp_path / "out"
    words = [
        "scale",
        "gridworld",
        "--actors",
        "1",
        "--rounds",
        "1",
        "--seconds",
        "3",
        "--warm-up-seconds",
        "1",
        "--out",
        str(out),
    ]
    assert cli.main([*words, "--", "--actors.num-envs", "2"]) == 0
    (row,) = table(out)
    assert row["envs_per_actor"] == "2" and float(row["actor/env_steps_per_second"]) > 0
    ratio = float(row["learner/samples_per_second"]) / float(row["actor/env_steps_per_second"])
    assert 8 < ratio < 32  # The recipe's 16; both counters are reported once a second.
    assert 0 < float(row["learner/busy_fraction"]) <= 1 and float(row["run/memory_bytes"]) > 5e8
    assert 0 < float(row["host/cpu_fraction"]) <= 1
    assert 0.2 < float(row["run/cpu_cores"]) <= float(row["host/cpu_fraction"]) * os.cpu_count() + 0.2
    (rows,) = [json.loads(path.read_text()) for path in out.glob("runs/*/summary.json")]
    assert rows["stopped_by"] == "interrupted" and rows["evaluation"] is None  # No evaluation disturbed it.
    assert "see" in capsys.readouterr().out
