"""What the doctor makes of rows: one healthy run, and each bottleneck as a small change of its rows, with decoys."""

import json
import math
import os
from dataclasses import replace

import pytest

from common.errors import UserError
from deploy.cli import main
from deploy.diagnosis import Window, diagnose, verdict
from deploy.doctor import DoctorFlags, doctor, newest_run
from deploy.recipes import RECIPES
from deploy.run_dir import open_run

_PONG = RECIPES["pong"]()
CONFIG = replace(_PONG, replay=replace(_PONG.replay, samples_per_insert=8.0))  # As in the run that the rows are of.

HEALTHY = {
    "actor/num_alive": 1,
    "actor/env_steps_per_second": 365.0,
    "actor/env_fraction": 0.45,
    "actor/inference_fraction": 0.15,
    "actor/n_step_fraction": 0.03,
    "actor/push_fraction": 0.02,
    "actor/push_wait_fraction": 0.30,  # The learner is the limit, so the limiter holds actors back,
    "actor/delay_fraction": 0.10,
    "actor/answer_p95_seconds_max": 0.06,
    "shard/actors_waiting_fraction": 0.28,
    "shard/learner_waiting_fraction": 0.40,  # and refuses batches that nobody misses.
    "shard/busy_fraction": 0.10,
    "shard/busy_fraction_max": 0.10,
    "shard/busiest_index": 0,
    "prefetch/num_threads": 1,
    "prefetch/collect_fraction": 0.20,
    "prefetch/held_fraction": 0.40,
    "prefetch/unpack_fraction": 0.10,
    "prefetch/transfer_fraction": 0.02,
    "learner/wait_fraction": 0.03,
    "learner/update_fraction": 0.93,
    "learner/delay_fraction": 0.05,
    "learner/slowest_shard": 0,
    "learner/answer_p95_seconds_max": 0.05,
    "learner/update_interval_p50_seconds": 0.0201,
    "host/cpu_fraction": 0.85,
    "object_store/spilled_bytes": 0,
}
STARVED = HEALTHY | {"learner/wait_fraction": 0.61, "learner/update_fraction": 0.35, "shard/actors_waiting_fraction": 0.0}
HELD = STARVED | {"prefetch/held_fraction": 0.8, "prefetch/collect_fraction": 0.05, "actor/push_wait_fraction": 0.02}


def rows(values, num=30, **more):
    return [
        {"time_seconds": 100.0 + 10 * i, "updates": 500 * (i + 1), "env_steps": 4000 * i, **values, **more} for i in range(num)
    ]


def found(values, config=CONFIG, **more):
    return diagnose(Window(rows(values, **more)), config)


def test_a_healthy_run_has_no_finding_and_a_sentence():
    window = Window(rows(HEALTHY))
    assert diagnose(window, CONFIG) == []
    assert verdict(window, [], CONFIG) == (
        "healthy: the learner waits only 3% of its time (20.1 ms an update) and is the limit; actors wait for it 28% of their "
        "time, as the ratio of samples per insert asks"
    )


CASES = {
    "shard": (
        STARVED
        | {
            "prefetch/collect_fraction": 0.8,
            "prefetch/held_fraction": 0.0,
            "shard/busy_fraction_max": 0.93,
            "shard/busiest_index": 2,
        }
        | {"learner/answer_p95_seconds_max": 0.048},
        "learner idle 61%: shard 2 is busy 93% and answers in 48 ms at p95 -> one more shard: --replay.num-shards 2",
    ),
    "network": (
        STARVED
        | {
            "prefetch/collect_fraction": 0.8,
            "prefetch/held_fraction": 0.0,
            "shard/busy_fraction_max": 0.05,
            "learner/slowest_shard": 1,
        }
        | {"learner/answer_p95_seconds_max": 0.15},
        "learner idle 61%: shard 1 answers in 150 ms at p95 although it is busy only 5%: the time goes between them, and the learner's "
        "threads wait for answers 80% of it -> prefetch 4 -> 8 (--learner.prefetch-batches 8), or learner and shards on one node "
        "(--learner.node-labels)",
    ),
    "unpack": (
        STARVED | {"prefetch/unpack_fraction": 0.8, "prefetch/transfer_fraction": 0.1, "prefetch/num_threads": 2},
        "learner idle 61%: its 2 prefetch threads unpack batches 90% of their time -> more of them: --learner.num-threads 3, with a core for each",
    ),
    "env": (
        HELD | {"actor/env_fraction": 0.8, "actor/env_steps_per_second": 80.0},
        "learner idle 61%: actors bring 80 steps/s, and 80% of their time is the environment, 80 ms a step of 8 -> more actors: "
        "--actors.num-actors 2, or --actors.env-threads 2 where cores are free",
    ),
    "actors": (
        HELD | {"actor/env_fraction": 0.3, "actor/inference_fraction": 0.5},
        "learner idle 61%: actors bring 365 steps/s, too few for 8 samples per insert, and are not held back (inference 50%, environment 30% "
        "of their time) -> more actors: --actors.num-actors 2, or --actors.num-envs 16; or a higher --replay.samples-per-insert",
    ),
    "limiter": (
        HELD | {"actor/push_wait_fraction": 0.4, "shard/actors_waiting_fraction": 0.35},
        f"learner idle 61%: the limiter holds actors back 35% of the time and the learner 80%: its buffer of "
        f"{CONFIG.limiter_buffer_samples:,} samples is too small for both to go on -> --replay.limiter-buffer-samples "
        f"{4 * CONFIG.limiter_buffer_samples}",
    ),
    "push": (
        HELD | {"actor/push_wait_fraction": 0.6},
        "learner idle 61%: actors wait 60% of their time for answers to their chunks, which take 60 ms at p95 although no shard is busy "
        "more than 10%: the time goes between them -> --actors.max-in-flight-chunks 8, or larger chunks: --actors.chunk-transitions 64",
    ),
    "cores": (
        HELD | {"actor/delay_fraction": 0.5, "host/cpu_fraction": 0.99},
        "learner idle 61%: the processors are full (99% busy), and actors, which are ready to run, have none for 50% of their time; actors "
        "bring 365 steps/s -> more cores or nodes for actors (--address), not more actors here; or a higher --replay.samples-per-insert",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_bottleneck_has_its_sentence(kind):
    values, sentence = CASES[kind]
    findings = found(values)
    assert [(finding.kind, str(finding)) for finding in findings] == [(kind, sentence)]
    assert verdict(Window(rows(values)), findings, CONFIG) == sentence


@pytest.mark.parametrize("kind", CASES)
def test_the_same_rows_with_a_learner_that_never_waits_are_no_bottleneck(kind):
    values, _ = CASES[kind]
    assert found(values | {"learner/wait_fraction": 0.05}) == []


def test_actors_that_wait_for_a_busy_shard_ask_for_another_shard():
    values = HELD | {"actor/push_wait_fraction": 0.6, "shard/busy_fraction_max": 0.9, "shard/busiest_index": 0}
    (finding,) = found(values)
    assert finding.kind == "shard" and "shard 0 is busy 90%" in finding.sentence


def test_full_cores_that_slow_the_learner_are_told_and_no_fault():
    (finding,) = found(HEALTHY | {"learner/delay_fraction": 0.4, "host/cpu_fraction": 0.99})
    assert finding.kind == "cores" and not finding.is_fault


SILENT = ["silent", "actor 3 is silent"]


def test_who_is_away_comes_first_and_a_blink_is_not_told():
    values = rows(CASES["env"][0])
    for row in values[10:]:
        row["degraded"] = [SILENT]
    values[4]["degraded"] = [["restart", "shard 1 is coming back"]]
    findings = diagnose(Window(values), CONFIG)
    assert [finding.kind for finding in findings] == ["away", "env"]
    assert findings[0].sentence == "actor 3 is silent, for 200 of the last 290 s" and "py-spy" in findings[0].advice


def test_who_is_back_is_told_last_and_only_after_a_long_time():
    values = rows(CASES["env"][0])
    for row in values[10:15]:
        row["degraded"] = [SILENT]
    assert [finding.kind for finding in diagnose(Window(values), CONFIG)] == ["env"]
    for row in values[10:22]:
        row["degraded"] = [SILENT]
    findings = diagnose(Window(values), CONFIG)
    assert [finding.kind for finding in findings] == ["env", "away"]
    assert findings[1].sentence == "actor 3 is silent (not now), for 120 of the last 290 s"


def test_a_run_does_as_well_without_its_evaluator():
    values = rows(CASES["env"][0], degraded=[["silent", "the evaluator is silent"]])
    assert [finding.kind for finding in diagnose(Window(values), CONFIG)] == ["env", "away"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("disk", "make room"), ("quarantine", "of what it died"), ("node", "add nodes"), ("restart", "comes back by itself")],
)
def test_each_kind_of_absence_has_its_advice(kind, words):
    (finding,) = found(HEALTHY, degraded=[[kind, "something is so"]])
    assert words in finding.advice and "py-spy" not in finding.advice


def test_spilling_is_growth_in_several_rows_and_not_what_was_spilled_before():
    values = rows(HEALTHY | {"object_store/spilled_bytes": 5 << 30})
    assert diagnose(Window(values), CONFIG) == []
    values[-1]["object_store/spilled_bytes"] += 100 << 20
    assert diagnose(Window(values), CONFIG) == []
    values[-2]["object_store/spilled_bytes"] += 40 << 20
    (finding,) = diagnose(Window(values), CONFIG)
    assert (
        finding.kind == "spill"
        and "100MiB to disk" in finding.sentence
        and "--object-store-memory, now 256MiB" in finding.advice
    )
    (finding,) = diagnose(Window(values), replace(CONFIG, address="auto"))
    assert "whoever fills them" in finding.sentence and "ray start" in finding.advice


def test_a_few_bytes_spilled_are_no_full_store():
    values = rows(HEALTHY)
    for i, row in enumerate(values):
        row["object_store/spilled_bytes"] = 1000 * i
    assert diagnose(Window(values), CONFIG) == []


def test_only_the_last_command_counts():
    one_shard = rows(CASES["shard"][0], **{"supervisor/command_began_seconds": 0.0})
    two_shards = rows(HEALTHY, num=8, **{"supervisor/command_began_seconds": 400.0})
    for i, row in enumerate(two_shards):
        row["time_seconds"] = 401.0 + 10 * i
    window = Window([*one_shard, *two_shards])
    assert len(window.rows) == 8 and diagnose(window, CONFIG) == []


def test_rows_of_a_branch_that_was_given_up_do_not_count():
    later = rows(CASES["shard"][0], num=60)
    again = rows(HEALTHY, num=5)  # From an older checkpoint: the run's time goes back.
    assert diagnose(Window([*later, *again]), CONFIG) == []
    assert diagnose(Window(later), CONFIG) != []


def test_a_rank_that_waits_for_the_others_blames_no_shard():
    (finding,) = found(HEALTHY | {"learner/agree_fraction": 0.5, "learner/update_fraction": 0.4})
    assert finding.kind == "ranks" and "waits 50% of its time for the others" in finding.sentence


def test_where_nothing_explains_it_nothing_is_blamed():
    nothing = {name: value for name, value in STARVED.items() if not name.startswith("prefetch/")}
    for values in (nothing, STARVED | {"prefetch/collect_fraction": 0.05, "prefetch/held_fraction": 0.04}):
        (finding,) = found(values)
        assert finding.kind == "unknown"


FULL = {"host/cpu_fraction": 0.99}


@pytest.mark.parametrize(
    "values",
    [
        CASES["network"][0] | FULL | {"shard/delay_fraction": 0.6, "shard/busy_fraction_max": 0.4},
        CASES["shard"][0] | FULL | {"shard/delay_fraction": 0.8, "shard/busy_fraction_max": 0.8},
        CASES["unpack"][0] | FULL | {"learner/delay_fraction": 0.5},
    ],
)
def test_who_has_no_processor_is_not_called_slow(values):
    (finding,) = found(values)
    assert finding.kind == "cores" and not finding.is_fault


def test_a_busy_shard_that_loses_a_little_to_full_processors_is_still_busy():
    (finding,) = found(CASES["shard"][0] | FULL | {"shard/delay_fraction": 0.31})
    assert finding.kind == "shard"


@pytest.mark.parametrize(
    ("part", "flag"),
    [("publish", "--learner.publish-period-updates 100"), ("save", "--learner.checkpoint-period-seconds 240")],
)
def test_a_learner_that_does_other_things_than_updates_is_not_healthy(part, flag):
    (finding,) = found(HEALTHY | {"learner/update_fraction": 0.2, f"learner/{part}_fraction": 0.6})
    assert finding.kind == "chores" and "60% of its time" in finding.sentence and flag in finding.advice


def test_a_fleet_without_a_single_actor_is_told_as_that():
    (finding,) = found(HELD | {"actor/num_alive": 0, "actor/env_steps_per_second": 0.0})
    assert finding.sentence.endswith("no actor acts")
    (finding,) = found(CASES["env"][0] | {"actor/env_steps_per_second": 0.0})
    assert "inf" not in str(finding)


def test_without_a_ratio_none_is_to_be_changed():
    config = replace(CONFIG, replay=replace(CONFIG.replay, samples_per_insert=None, limiter_buffer_samples=None))
    (finding,) = found(CASES["actors"][0], config)
    assert "samples-per-insert" not in str(finding)


def test_more_prefetch_threads_than_there_may_be_are_not_advised():
    (finding,) = found(CASES["unpack"][0] | {"prefetch/num_threads": 4})
    assert "--learner.num-threads" not in finding.advice and "--learner.batch-size" in finding.advice


def test_a_window_without_duration_says_nothing():
    window = Window(rows(HEALTHY, num=1))
    assert "too little is known" in verdict(window, diagnose(window, CONFIG), CONFIG)


@pytest.mark.parametrize("value", ["abc", None, math.nan, math.inf, True, [1.0]])
def test_what_is_no_number_counts_as_absent(value):
    values = rows(HEALTHY)
    values[5]["learner/wait_fraction"] = values[6]["degraded"] = value
    assert Window(values).mean("learner/wait_fraction") == pytest.approx(0.03)
    assert diagnose(Window(values), CONFIG) == []


def test_before_the_first_update_it_says_what_is_awaited():
    (finding,) = found({"shard/size_transitions": 1200}, updates=0)
    assert finding.kind == "filling" and "1,200 of 5,000" in finding.sentence and not finding.is_fault
    (finding,) = diagnose(Window(rows({"shard/size_transitions": 1200}, updates=0)), CONFIG, is_running=False)
    assert "ended before anything was learned" in finding.sentence and finding.is_fault


def test_a_serial_run_is_one_thread_and_has_no_bottleneck_between_roles():
    config = replace(CONFIG, serial=True)
    assert found(CASES["env"][0], config) == []
    assert verdict(Window(rows(CASES["env"][0])), [], config).startswith("a serial run: one thread")


def test_rows_weigh_as_much_as_the_time_that_they_tell_of():
    base = {"updates": 1, "learner/wait_fraction": 0.0}
    values = [
        {"time_seconds": 0.0, **base},
        {"time_seconds": 10.0, **base, "x": 0.2},
        {"time_seconds": 10.1, **base, "x": 99.0},
        {"time_seconds": 40.0, **base, "x": 0.6},
    ]
    assert Window(values).mean("x") == pytest.approx((0.2 * 10 + 99.0 * 0.1 + 0.6 * 29.9) / 40)


def test_what_was_before_the_first_update_or_long_ago_is_left_out():
    values = (
        rows({"learner/wait_fraction": 0.0, "x": 7.0}, num=3, updates=0)
        + rows({"learner/wait_fraction": 0.0, "x": 1.0}, num=60)[3:]
    )
    for row in values[-6:]:
        row["x"] = 3.0
    window = Window(values, minutes=1.0)
    assert window.mean("x") == pytest.approx(3.0)
    assert Window(values).mean("x") < 3.0
    assert Window(values[:3]).learns is False


def test_minutes_must_be_positive():
    for minutes in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            DoctorFlags(minutes=minutes)


@pytest.fixture
def run(tmp_path):
    directory = open_run(CONFIG, tmp_path / "run")
    directory.write_config(CONFIG)
    directory.close()
    return tmp_path / "run"


def write(run, values):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))


def test_the_command_prints_the_table_and_writes_json(run, tmp_path, capsys):
    write(run, rows(CASES["shard"][0]))
    assert main(["doctor", str(run), "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "at rest" in text and "env 45%" in text and CASES["shard"][1] in text
    assert json.loads((tmp_path / "out.json").read_text())["findings"][0]["kind"] == "shard"


def test_a_torn_or_foreign_row_is_passed_over(run, capsys):
    write(run, rows(HEALTHY))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n"text"\n{"half": ')
    assert doctor(run, DoctorFlags()) == 0
    assert "healthy" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["doctor", "nowhere"], ["doctor", "RUN", "--minutes", "0"], ["doctor", "RUN"]])
def test_mistakes_end_in_one_line(run, words, capsys):
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qfleet: ") and error.count("\n") == 1


def test_rows_of_an_older_version_are_told(run):
    write(run, [{"time_seconds": 1.0, "env_steps": 1, "updates": 1}])
    with pytest.raises(UserError, match="older version"):
        doctor(run, DoctorFlags())


def test_without_a_run_it_takes_the_one_that_wrote_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs a run directory"):
        newest_run()
    for number, name in enumerate(("b", "c", "a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").touch()
        os.utime(tmp_path / "runs" / name / "metrics.jsonl", (number, 100 - abs(number - 1)))
    assert newest_run().name == "c"
