"""benchmarks/envs.py: what it makes of the scripts' answers. Of the scripts, only ale-py's runs, for a moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import envs
from benchmarks.envs import Turn
from benchmarks.learner import ROOT, Row, Script

ALONE, PUSHING = Turn("qfleet", "pong.alone", 8), Turn("qfleet", "pong.pushing", 8)
BARE = Turn("ale-py, 1 core", "sync", 8)


def answer(steps, seconds=2.0, cpu_seconds=1.0):
    return {"steps": steps, "seconds": seconds, "cpu_seconds": cpu_seconds}


def test_ratios_are_of_the_turns_of_one_round():
    """Kills: a ratio of medians (0.75), one upside down, a round in which either failed, the wrong clock."""
    rounds = [
        {ALONE: answer(100), PUSHING: answer(90)},
        {PUSHING: answer(1)},
        {ALONE: answer(200), PUSHING: answer(75)},
        {ALONE: answer(60), PUSHING: answer(48, cpu_seconds=0.5)},
    ]
    found = envs.ratios(rounds, PUSHING, ALONE)
    assert found["by_clock"] == {"median": 0.8, "min": 0.375, "max": 0.9}
    assert found["by_cpu"] == {"median": 0.9, "min": 0.375, "max": 1.6}
    assert envs.ratios(rounds[1:2], PUSHING, ALONE) is None


def test_a_row_has_rates_and_the_ratio_to_the_loop_of_the_same_case():
    other = Turn("qfleet", "pong.alone", 1)
    rounds = [{BARE: answer(400), ALONE: answer(100), PUSHING: answer(80), other: answer(1)}]
    bare, alone, pushing, _ = envs.results(rounds, [BARE, ALONE, PUSHING, other])
    assert (bare["recipe"], bare["way"], bare["ratio_to_alone"]) == (None, "sync", None)
    assert bare["steps_per_second"]["median"] == 200 and bare["steps_per_cpu_second"]["median"] == 400
    assert bare["cores_used"]["median"] == 0.5
    assert (pushing["recipe"], pushing["way"], pushing["num_envs"]) == ("pong", "pushing", 8)
    assert pushing["ratio_to_alone"]["by_clock"]["median"] == 0.8 and alone["ratio_to_alone"]["by_clock"]["median"] == 1


def test_a_script_that_never_answered_has_no_row():
    assert envs.results([{}, {BARE: answer(1)}], [ALONE, BARE])[0]["script"] == "ale-py, 1 core"
    assert envs.results([], [ALONE]) == []


def test_each_script_is_asked_for_its_ways_in_turn():
    adapters = {adapter.name: adapter for adapter in envs.adapters()}
    turns = envs.turns_of(adapters["qfleet"], [("pong", 8), ("nature", 1)])
    assert [(turn.way, turn.num_envs) for turn in turns[2:4]] == [("pong.pushing", 8), ("nature.alone", 1)]
    assert [turn.way for turn in envs.turns_of(adapters["gymnasium, 1 core"], [])] == ["sync"]
    assert [turn.way for turn in envs.turns_of(adapters["gymnasium, 2 cores"], [])] == ["async"]
    assert [turn.way for turn in envs.turns_of(adapters["ale-py, 2 cores"], [])] == ["sync", "async"]


@pytest.mark.parametrize("case", ["pong", "pong:0", "pong:x", "breakout:8"])
def test_a_wrong_case_is_refused(capsys, case):
    with pytest.raises(SystemExit):
        envs.parse_arguments(["--cases", case])
    assert "is not RECIPE:ENVS" in capsys.readouterr().err


def test_a_script_answers_and_ends_with_its_input():
    (adapter, *_) = envs.adapters()
    row = Row(adapter, {}, Script(adapter))
    assert row.ask("about", 60.0)["version"].startswith("ale-py")
    (answers,) = envs.measure([row], [], 1, 0.05)
    assert set(answers) == {Turn(adapter.name, "sync", 8), Turn(adapter.name, "async", 8)}
    assert all(found["steps"] >= 12 and 0 < found["seconds"] < 30 for found in answers.values())
    script = row.script
    script.close()
    assert script._process.returncode == 0 and row.failed is None


def test_a_failed_script_is_told_by_its_last_line(monkeypatch, tmp_path):
    process = Script(envs.adapters()[0])
    process.ask("about", 60.0)
    row = Row(envs.adapters()[0], {}, process)
    assert row.ask("time nonsense 8 0.0 1 2 3", 60.0) is not None, "words beyond those it reads are no fault"
    assert row.ask("time sync none 0.0", 60.0) is None
    assert "invalid literal" in row.failed and row.script is None


def test_pinning_reaches_what_a_process_starts():
    code = (
        "import os, subprocess, sys; sys.path.insert(0, 'benchmarks/peers'); import envs_harness; envs_harness.pin_to_cores(1);"
        "print(subprocess.run([sys.executable, '-c', 'import os; print(len(os.sched_getaffinity(0)))'], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"
