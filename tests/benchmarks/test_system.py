"""benchmarks/system.py: what it makes of the systems' lines, and that it finds and ends all their processes. No system runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict

import pytest

from benchmarks import system
from benchmarks.learner import Failed
from benchmarks.system import Look, Memory, Mode, Record, Tick

MB = 10**6


def tick(seconds, env_steps=0, updates=1, samples=32, is_steady=True):
    return Tick(seconds, env_steps, updates, samples, is_steady)


def run(env_steps_per_second=100.0, *, samples_per_step=8.0, cpu_ms_per_step=10.0, memory_mb=500.0):
    found = dict.fromkeys([*system.COLUMNS, "cores_used", "cores_used_by_others"], 1.0)
    found |= {"env_steps_per_second": env_steps_per_second, "samples_per_step": samples_per_step}
    found |= {"cpu_ms_per_step": cpu_ms_per_step, "memory_mb": memory_mb}
    return found | {"version": "1", "note": "", "mode": "m", "threads": 1, "ended": "in order"}


def test_a_line_of_a_script_is_a_tick():
    line = json.loads('{"seconds": 2.5, "env_steps": 8, "updates": 2, "samples": 64, "is_steady": true}')
    assert system.parse_tick(line) == Tick(2.5, 8, 2, 64, True)


def test_the_window_begins_after_the_warm_up_that_follows_the_first_update():
    """Kills: a warm-up from the start of the run, from the first tick that is steady, or from the first with updates."""
    ticks = [
        tick(0, updates=0, is_steady=False),
        tick(10, updates=0),  # Steady without updates: a decoy.
        tick(20, updates=5, is_steady=False),  # Updates while something of the start goes on: a decoy.
        tick(30, updates=9),
        tick(34.9, updates=10),
        tick(35.5, updates=11),
        tick(40, updates=12),
        tick(45.4, updates=13),
        tick(45.5, updates=14),
        tick(50, updates=15),
    ]
    assert system.steady_window(ticks, 5, 10) == (ticks[5], ticks[8])


@pytest.mark.parametrize("num", range(5))
def test_a_window_that_is_not_over_is_none(num):
    ticks = [tick(0, updates=0), tick(1), tick(6), tick(15.9), tick(16)]
    assert (system.steady_window(ticks[:num], 5, 10) is None) and system.steady_window(ticks, 5, 10) == (ticks[2], ticks[4])


def record():
    """The window is from 10 to 20 seconds: 400 steps, 100 updates of 32; what lies outside are decoys."""
    looks = [Look(0, 0, 100), Look(9, 7, 108), Look(11, 9, 112), Look(19, 21, 128), Look(21, 25, 132), Look(30, 99, 999)]
    memories = [
        Memory(9, (("driver", 900 * MB),)),
        Memory(12, (("driver", 200 * MB), ("actor", 50 * MB))),
        Memory(18, (("driver", 230 * MB), ("actor", 30 * MB))),
        Memory(21, (("driver", 800 * MB),)),
    ]
    return Record([], looks, memories)


def test_figures_are_of_the_window_alone():
    found = system.figures(record(), tick(10, 1_000, 50, 1_600), tick(20, 1_400, 150, 4_800))
    cpu = (21 + 25) / 2 - (7 + 9) / 2  # At 20 and at 10 seconds, between two looks each.
    machine = 130 - 110
    assert found == {
        "seconds": 10,
        "env_steps": 400,
        "updates": 100,
        "env_steps_per_second": 40,
        "updates_per_second": 10,
        "samples_per_second": 320,
        "samples_per_step": 8,
        "cpu_ms_per_step": pytest.approx(1e3 * cpu / 400),
        "cpu_ms_per_update": pytest.approx(1e3 * cpu / 100),
        "cores_used": pytest.approx(1.5),
        "cores_used_by_others": pytest.approx((machine - cpu) / 10),
        "memory_mb": 260,  # The greatest sum, not the sum of the greatest (280).
        "memory_mb_of_whole_run": 900,
        "memory_mb_by_process": [("driver", 230), ("actor", 30)],
    }


@pytest.mark.parametrize(
    ("end", "sentence"),
    [(tick(20, 1_000, 60), "0 env steps"), (tick(20, 1_400, 50), "0 updates"), (tick(11, 1_400, 60), "memory was never read")],
)
def test_a_window_in_which_nothing_was_done_is_no_result(end, sentence):
    with pytest.raises(Failed, match=sentence):
        system.figures(record(), tick(10, 1_000, 50), end)


def test_advantages_are_of_rounds_and_point_the_right_way():
    """Kills: a ratio of medians (240 / 60 = 4), ratios upside down, a failed round that shifts the others."""
    own = [run(200, cpu_ms_per_step=5, memory_mb=400), run(240), run(480, cpu_ms_per_step=8, memory_mb=500)]
    runs = [run(100, cpu_ms_per_step=20, memory_mb=1_000), {"failed": "x"}, run(60, cpu_ms_per_step=4, memory_mb=2_000)]
    found = system.summary(runs, own)
    assert found["rounds"] == 2
    assert found["figures"]["env_steps_per_second"] == {"median": 80, "min": 60, "max": 100}
    advantages = found["qfleet_advantage"]
    assert advantages["env_steps_per_second"] == {"median": 5, "min": 2, "max": 8}
    assert advantages["cpu_ms_per_step"] == {"median": (4 + 0.5) / 2, "min": 0.5, "max": 4}
    assert advantages["memory_mb"] == {"median": (2.5 + 4) / 2, "min": 2.5, "max": 4}


def test_without_a_good_round_the_reason_stands_there():
    assert system.summary([{"failed": "not installed"}], [run()]) == {"failed": "not installed"}
    assert "interrupted" in system.summary([], [])["failed"]
    assert system.summary([run()], [])["qfleet_advantage"] is None  # qfleet was left out.


def test_the_mode_with_the_most_env_steps_is_chosen():
    a, b, c = Mode("a", 1), Mode("a", 2), Mode("b", 1)
    assert system.choose_mode([(a, run(10)), (b, run(30)), (c, {"failed": "x"})]) == b
    assert system.choose_mode([(a, {"failed": "x"}), (b, {"failed": "x"})]) == a


def test_a_ratio_that_is_off_is_said():
    work = system.works_of(system.parse_arguments([]))[0]
    right, wrong = (system.summary([run(samples_per_step=ratio)], []) for ratio in (8.3, 7.5))
    assert not any("WRONG RATIO" in said for said in system.remarks("x", right, work))
    assert any("WRONG RATIO" in said for said in system.remarks("x", wrong, work))


def test_a_system_that_does_not_end_when_asked_is_said():
    work = system.works_of(system.parse_arguments([]))[0]
    row = system.summary([run(), run() | {"ended": "by force"}], [])
    assert any("1 rounds did not end" in said for said in system.remarks("x", row, work))


@pytest.mark.parametrize(
    ("num_envs", "samples_per_step", "batch", "rhythm"),
    [(8, 8, 32, (1, 2)), (1, 8, 32, (4, 1)), (8, 8, 128, (2, 1)), (8, 3, 32, (4, 3)), (8, 32, 32, (1, 8))],
)
def test_rhythm_keeps_the_ratio(num_envs, samples_per_step, batch, rhythm):
    flags = ["--num-envs", num_envs, "--samples-per-step", samples_per_step, "--batch", batch]
    (work,) = system.works_of(system.parse_arguments(list(map(str, flags))))
    num_steps, num_updates = work.rhythm
    assert (num_steps, num_updates) == rhythm
    assert num_updates * batch == samples_per_step * num_steps * num_envs


def test_a_script_reads_the_work_that_it_is_given(monkeypatch):
    (work,) = system.works_of(system.parse_arguments(["--network", "dqn2013", "--fill"]))
    adapter = system.SYSTEMS[0].adapter(work)
    from system_harness import read_work

    monkeypatch.setattr(sys, "argv", ["script", *adapter.arguments])
    assert read_work() == work
    assert asdict(work)["network"] == "dqn2013" and work.fill


def test_memory_and_cpu_are_those_of_the_whole_tree():
    """A process of 40 MB and its child of 120 MB, which takes a quarter of a second of CPU time."""
    busy = (
        "import time\nheld = b'x' * 120_000_000\nwhile time.process_time() < 0.25: pass\nprint('r', flush=True)\ntime.sleep(60)"
    )
    parent = f"import subprocess, sys, time\nheld = b'x' * 40_000_000\nsubprocess.Popen([sys.executable, '-c', {busy!r}])\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "r\n"  # The child's.
        tree = system.process_tree(process.pid)
        assert len(tree) == 2 and process.pid in tree
        assert 160e6 < sum(map(system.pss_bytes, tree)) < 160e6 + 40e6
        assert 0.25 <= sum(tree.values()) < 2
    finally:
        for pid in system.process_tree(process.pid):
            os.kill(pid, 9)
        process.wait()
        process.stdout.close()


def test_what_a_script_leaves_behind_is_ended():
    """A grandchild in a session of its own, whose parent has ended: in a process of its own, which ends all its descendants."""
    code = textwrap.dedent("""
        import os, subprocess, sys, time
        from benchmarks import system
        system.adopt_orphans()
        leave = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
        subprocess.run([sys.executable, "-c", leave], check=True)
        left = system.process_tree(os.getpid()).keys() - {os.getpid()}
        assert len(left) == 1, left
        system.end_descendants()
        assert not os.path.exists(f"/proc/{left.pop()}")
    """)
    subprocess.run([sys.executable, "-c", code], cwd=system.ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--game", "pnog"], "no such ROM"),
        (["--network", "resnet"], "invalid choice: 'resnet'"),
        (["--batch", "0"], "0 is not positive"),
        (["--rounds", "x"], "--rounds"),
        (["--cores", "4096"], "--cores 4096: there are"),
        (["--learning-starts", "200000"], "more than --capacity 100000"),
        (["--learning-starts", "31"], "less than --batch 32"),
        (["--json", "/nowhere/at/all.json"], "no directory that can be written to"),
        (["--peers", "dopamine"], "invalid choice"),
        (["--frames", "4"], "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        system.parse_arguments(flags)
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert sentence in error and "\n" not in error
