"""One measured run of `qfleet scale`: a `qfleet train` in a process of its own, whose metrics.jsonl is read while it goes on.

What is measured lies between two of its rows, after the learner has begun and a warm-up; then the run is asked to end, as by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

Row = dict[str, Any]

RATES = {
    "actor/env_steps_per_second": "env_steps",
    "learner/updates_per_second": "updates",
    "learner/samples_per_second": "samples",
}
"""Rates over the whole window, from the counters of its first and last row."""

MEANS = (
    "learner/busy_fraction",
    "shard/busy_fraction",
    "shard/busy_fraction_max",
    "shard/actors_waiting_fraction",
    "shard/learner_waiting_fraction",
    "actor/waiting_fraction",
    *(f"actor/{phase}_fraction" for phase in ("env", "inference", "n_step", "compress", "push", "push_wait", "pull")),
    *(f"shard/{phase}_fraction" for phase in ("insert", "sample", "priorities")),
    *(f"learner/{phase}_fraction" for phase in ("wait", "update", "publish", "report")),
    *(f"prefetch/{phase}_fraction" for phase in ("turn", "collect", "held", "unpack", "transfer")),
    *(f"{role}/cpu_cores" for role in ("actor", "shard", "learner")),
    "actor/answer_p95_seconds",
    "actor/answer_p95_seconds_max",
    "learner/answer_p95_seconds_max",
    "shard/samples_per_insert",
    "actor/params_lag_updates",
)
"""Columns of the rows, each as long as it is there: the mean over the window, weighted with the time since the row before."""

MEASURED = ("actor/num_alive", "host/cpu_fraction", "run/cpu_cores", "run/memory_bytes")
"""The least number of actors; the busy part of this host's processors; what of them, and of memory, the run's processes took (proportional
set size, else resident)."""

COLUMNS = ("measured_seconds", *RATES, *MEASURED, *MEANS)

_LOOK_SECONDS = 0.1
_MOST_SECONDS_TO_LEARN = 1_800.0
_MOST_SECONDS_SILENT = 60.0  # Beyond all that is measured; rows come once a second.
_END_SECONDS = 180.0
_KILL_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What became of a run."""

    figures: dict[str, float] = field(default_factory=dict)
    """By column; empty where it was not measured to the end."""
    fault: str | None = None
    """One line, where the run did something else than it should."""
    status: int | None = None
    """The run's exit status."""
    is_interrupted: bool = False
    """Someone asked the sweep to end before it was measured."""


def measure_run(
    command: Sequence[str],
    path: Path,
    *,
    warm_up_seconds: float,
    seconds: float,
    num_actors: int,
    on_this_host: bool,
    lock: TextIO,
    stop: Callable[[], bool],
) -> Measurement:
    """Starts a training run, measures it and ends it.

    Args:
      command: of the run that writes to `path`; its output goes to a file beside that, with the suffix .log.
      num_actors: that must act before the warm-up begins.
      on_this_host: whether all its processes run here, so that their processors and memory can be told.
      lock: of the sweep's directory. The run holds it too, so that no other sweep measures beside one that its own, killed, left behind.
      stop: is asked again and again whether the sweep is to end.

    Raises:
      OSError: where its output cannot be written.
    """
    with path.with_suffix(".log").open("w") as log:
        # In a session of its own: Ctrl-C is for the sweep, which then asks the run to end.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            pass_fds=(lock.fileno(),),
            env=_environment(),
        )
    try:
        figures, fault = _watch(process, path, warm_up_seconds, seconds, num_actors, on_this_host, stop)
        status = _end(process)
    finally:
        if process.poll() is None:
            _kill(process)
    if not figures and stop():
        return Measurement(status=status, is_interrupted=True)
    if status is None:
        fault = f"it did not end within {_END_SECONDS:.0f} s of being asked to, and was killed"
    elif status != 130:
        said = last_line(path.with_suffix(".log"))
        fault = said if status == 2 else f"it ended with status {status}: {said}"
    elif not figures and fault is None:
        fault = "somebody else interrupted it"
    return Measurement(figures=figures, fault=fault, status=status)


class RowsTail:
    """Reads metrics.jsonl as it grows, each row once: to read all of it again each time would take processors from what is measured."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._offset = 0
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Returns all rows that are there whole; a line that is none, torn on a full disk, is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return self._rows
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                self._rows.append(json.loads(line))
        self._offset += len(whole + newline)
        return self._rows


def find_window(
    rows: Sequence[Row], *, num_actors: int, warm_up_seconds: float, seconds: float
) -> tuple[int, int | None] | None:
    """Returns the first and the last row to measure between; None, or a last of None, as long as they have not been written.

    The warm-up begins with the first row after the learner has begun and all actors act; before that the replay is filled at another pace.
    """
    begun = next(
        (row["time_seconds"] for row in rows if row["updates"] > 0 and row.get("actor/num_alive", 0) >= num_actors), None
    )
    if begun is None:
        return None
    first = _first_at(rows, begun + warm_up_seconds)
    return None if first is None else (first, _first_at(rows, rows[first]["time_seconds"] + seconds))


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the rates and means from the first to the last of these rows, at least two."""
    first, last = rows[0], rows[-1]
    elapsed = last["time_seconds"] - first["time_seconds"]
    figures = {"measured_seconds": elapsed}
    for name, counter in RATES.items():
        figures[name] = (last[counter] - first[counter]) / elapsed
    figures["actor/num_alive"] = float(min(row.get("actor/num_alive", 0) for row in rows))
    lasted = [now["time_seconds"] - before["time_seconds"] for before, now in itertools.pairwise(rows)]
    for name in MEANS:
        told = [(row[name], seconds) for row, seconds in zip(rows[1:], lasted, strict=True) if name in row]
        weight = sum(seconds for _, seconds in told)
        if weight > 0:
            figures[name] = sum(value * seconds for value, seconds in told) / weight
    return figures


def last_line(log: Path) -> str:
    """Returns what a run said last: the last line that is addressed to the user, else the last one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("qfleet: ")]
    return (told or lines or ["(it said nothing)"])[-1].removeprefix("qfleet: ")


def _watch(
    process: subprocess.Popen[bytes],
    path: Path,
    warm_up_seconds: float,
    seconds: float,
    num_actors: int,
    on_this_host: bool,
    stop: Callable[[], bool],
) -> tuple[dict[str, float], str | None]:
    """Returns the figures, as soon as they are there; none where the run ends before, or the sweep. And a fault, where it was one."""
    deadline = time.monotonic() + _MOST_SECONDS_TO_LEARN
    silent_seconds = warm_up_seconds + seconds + _MOST_SECONDS_SILENT
    tail = RowsTail(path)
    began: _Host | None = None
    num_rows, heard = 0, time.monotonic()
    while process.poll() is None and not stop():
        time.sleep(_LOOK_SECONDS)
        rows = tail.rows()
        if len(rows) > num_rows:
            num_rows, heard = len(rows), time.monotonic()
        elif rows and time.monotonic() > heard + silent_seconds:
            return {}, f"it told nothing more for {silent_seconds:.0f} s"
        window = find_window(rows, num_actors=num_actors, warm_up_seconds=warm_up_seconds, seconds=seconds)
        if window is None:
            if time.monotonic() > deadline:
                return {}, f"its learner and {num_actors} actors were not at work after {_MOST_SECONDS_TO_LEARN:.0f} s"
            continue
        first, last = window
        began = began or _Host.look(process.pid)
        if last is not None:
            measured = rows[first : last + 1]
            figures = figures_of(measured)
            if any(after[name] < before[name] for before, after in itertools.pairwise(measured) for name in RATES.values()):
                return {}, "a role began again meanwhile"
            if figures["actor/num_alive"] < num_actors:
                return {}, f"{figures['actor/num_alive']:.0f} of {num_actors} actors acted"
            if figures["actor/env_steps_per_second"] <= 0 or figures["learner/samples_per_second"] <= 0:
                return {}, f"nothing moved for {figures['measured_seconds']:.0f} s"
            now = _Host.look(process.pid)
            saw_it_all = (
                now.seconds - began.seconds > 0.5 * figures["measured_seconds"]
            )  # Not where rows came long after their time.
            return figures | (now.since(began) if on_this_host and saw_it_all else {}), None
    return {}, None


def _end(process: subprocess.Popen[bytes]) -> int | None:
    """Asks the run to end, as a person would; returns its exit status, None where it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _end_with_parent() -> None:
    """Has the system ask this process to end, as by Ctrl-C, when the sweep is killed and cannot."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the run with all its processes."""
    for one in _tree(process.pid):
        try:
            one.kill()
        except psutil.Error:  # It has ended meanwhile.
            continue
    process.wait(_KILL_SECONDS)


@dataclass(frozen=True, slots=True)
class _Host:
    """The processors of this machine at one moment."""

    seconds: float
    busy: float
    """Processor seconds of everybody, since the machine began."""
    total: float
    run: dict[int, float]
    """Of each process of the run, by pid."""
    memory_bytes: int

    @classmethod
    def look(cls, pid: int) -> _Host:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # They are in user and nice.
        tree = _tree(pid)
        return cls(
            seconds=time.monotonic(),
            busy=total - idle,
            total=total,
            run={one.pid: seconds for one in tree if (seconds := _cpu_seconds(one)) is not None},
            memory_bytes=sum(map(_memory_bytes, tree)),
        )

    def since(self, before: _Host) -> dict[str, float]:
        """Returns what happened between another moment and this one. Processes that came or went meanwhile are not counted."""
        elapsed = self.seconds - before.seconds
        run = sum(seconds - before.run[pid] for pid, seconds in self.run.items() if pid in before.run)
        return {
            "host/cpu_fraction": (self.busy - before.busy) / max(self.total - before.total, 1e-9),
            "run/cpu_cores": run / max(elapsed, 1e-9),
            "run/memory_bytes": float(self.memory_bytes),
        }


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _cpu_seconds(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _memory_bytes(process: psutil.Process) -> int:
    """Returns the proportional set size, where the system tells it: shared pages count once. Else the resident set."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0


def _first_at(rows: Sequence[Row], seconds: float) -> int | None:
    return next((index for index, row in enumerate(rows) if row["time_seconds"] >= seconds), None)


def _environment() -> dict[str, str]:
    """Returns this process's environment, with this checkout's modules."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *(path for path in paths if path and path != root)])}
