"""Whole systems side by side on the same work: qfleet, Stable-Baselines3's DQN, CleanRL's DQN and RLlib's DQN, from emulator to update.

    make bench-peers
    python benchmarks/system.py [--network nature dqn2013] [--rounds 3] [--seconds 120] [--fill] [--peers qfleet sb3] [--json F]

The same game, network, batch, environments, frame stack and skip, replay capacity, cores, exploration and number of samples for each env
step. Each system is a script of benchmarks/peers in a process, and for a peer in a virtual environment, of its own, with the settings
that its documentation has for this; where a system has several, a short trial of each comes first and the one with the most env steps a
second is measured. The systems take turns over the rounds, alone on the machine each time.

The window begins when updates have been going on for `--warm-up` seconds, and all figures are of the window alone:

* env steps, updates and samples a second, by the system's own counters; samples for each env step as they really were.
* CPU seconds of all processes of the system, of /proc/PID/stat, ended children included.
* memory: proportional set size (/proc/PID/smaps_rollup: a page that n processes share counts 1/n in each) over all processes
  of the system, every three seconds; the greatest sum. A page that a process outside shares (a library's) counts in part.

`--fill` begins with a full replay, as any long run has: how, and what else is on its clock, says each script. Without it
the replay holds what the window and the little before it have brought, and memory is not that of a long run.

A peer that is not installed, fails or hangs is listed with the reason, and the others go on. Nothing that was started is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent / "peers"))

import numpy as np
from harness import process_tree, pss_bytes
from layers import HIDDEN
from rich.console import Console
from rich.table import Table
from system_harness import Work

from benchmarks.learner import Adapter, Failed, spread
from benchmarks.replay import ROOT, hardware

LOOK_SECONDS = 0.5
MEMORY_SECONDS = 3.0
STOP_SECONDS = 90.0
RATIO_TOLERANCE = 0.05
_PR_SET_CHILD_SUBREAPER = 36
COLUMNS = {
    "env_steps_per_second": ("env steps/s", 1),
    "updates_per_second": ("updates/s", 1),
    "samples_per_second": ("samples/s", 0),
    "samples_per_step": ("samples a step", 2),
    "cpu_ms_per_step": ("CPU ms a step", 2),
    "cpu_ms_per_update": ("CPU ms an update", 1),
    "memory_mb": ("memory MB", 0),
}


class Mode(NamedTuple):
    """One of a system's ordinary settings."""

    name: str
    threads: int | None = None
    """Of PyTorch; None: the system decides."""


@dataclass(frozen=True)
class System:
    """A script of benchmarks/peers and the settings among which it chooses."""

    name: str
    peer: str
    script: str
    modes: tuple[Mode, ...]
    environment: str | None = None

    def adapter(self, work: Work) -> Adapter:
        return Adapter(self.name, self.peer, self.script, (json.dumps(asdict(work)),), self.environment)


SYSTEMS = [
    System("qfleet", "qfleet", "qfleet_system.py", (Mode("bf16"),)),
    System("qfleet fp32", "qfleet", "qfleet_system.py", (Mode("fp32"),)),
    System(
        "stable-baselines3",
        "sb3",
        "sb3_system.py",
        tuple(Mode(name, n) for name in ("dummy", "subproc") for n in (1, 2)),
        "sb3",
    ),
    System("cleanrl", "cleanrl", "cleanrl_system.py", (Mode("sync", 1), Mode("sync", 2)), "sb3"),
    System(
        "rllib",
        "rllib",
        "rllib_system.py",
        (Mode("local", 1), Mode("local", 2), Mode("fragments", 1), Mode("fragments", 2), Mode("runner", 2), Mode("remote", 1)),
        "rllib",
    ),
]


class Tick(NamedTuple):
    """How far a system was at a time of the monotonic clock."""

    seconds: float
    env_steps: int
    updates: int
    samples: int
    is_steady: bool


class Look(NamedTuple):
    """What a system and the whole machine had taken up to a time."""

    seconds: float
    cpu_seconds: float
    machine_cpu_seconds: float


class Memory(NamedTuple):
    """What a system's processes held at a time, by name."""

    seconds: float
    processes: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(size for _, size in self.processes)


@dataclass
class Record:
    """One run of a system."""

    ticks: list[Tick] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)


def parse_tick(line: dict[str, Any]) -> Tick:
    return Tick(**{name: line[name] for name in Tick._fields})


def steady_window(ticks: Sequence[Tick], warm_up_seconds: float, seconds: float) -> tuple[Tick, Tick] | None:
    """Returns the window's first and last tick, or None where it is not over.

    It begins with the first tick that comes `warm_up_seconds` or more after the first one with updates and a system past its start,
    and ends with the first tick at least `seconds` later.
    """
    steady = [tick for tick in ticks if tick.is_steady and tick.updates > 0]
    begins = [tick for tick in steady if tick.seconds >= steady[0].seconds + warm_up_seconds]
    ends = [tick for tick in begins if tick.seconds >= begins[0].seconds + seconds]
    return (begins[0], ends[0]) if ends else None


def figures(record: Record, begin: Tick, end: Tick) -> dict[str, Any]:
    """Returns what the window's figures are, in the units of their names; CPU times between two looks are interpolated.

    Raises:
      Failed: where nothing was done in the window, or no memory seen.
    """
    seconds, env_steps, updates, samples = (getattr(end, name) - getattr(begin, name) for name in Tick._fields[:-1])
    if env_steps <= 0 or updates <= 0:
        raise Failed(f"{env_steps} env steps and {updates} updates in {seconds:.0f} seconds")
    memories = [memory for memory in record.memories if begin.seconds <= memory.seconds <= end.seconds]
    if not memories:
        raise Failed("its memory was never read in the window")
    peak = max(memories, key=lambda memory: memory.total)
    cpu, machine = (
        float(np.diff(np.interp([begin.seconds, end.seconds], [look.seconds for look in record.looks], values))[0])
        for values in zip(*[look[1:] for look in record.looks], strict=True)
    )
    return {
        "seconds": seconds,
        "env_steps": env_steps,
        "updates": updates,
        "env_steps_per_second": env_steps / seconds,
        "updates_per_second": updates / seconds,
        "samples_per_second": samples / seconds,
        "samples_per_step": samples / env_steps,
        "cpu_ms_per_step": 1e3 * cpu / env_steps,
        "cpu_ms_per_update": 1e3 * cpu / updates,
        "cores_used": cpu / seconds,
        "cores_used_by_others": (machine - cpu) / seconds,
        "memory_mb": peak.total / 1e6,
        "memory_mb_of_whole_run": max(memory.total for memory in record.memories) / 1e6,
        "memory_mb_by_process": [(name, round(size / 1e6, 1)) for name, size in peak.processes],
    }


def machine_cpu_seconds() -> float:
    """Returns what all processes of the machine have taken since it started."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def process_name(pid: int, names: dict[str, str]) -> str:
    """Returns the name that the script gave to a process, or else its command line."""
    if str(pid) in names:
        return names[str(pid)]
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
    except OSError:
        return "ended"
    return " ".join(Path(word).name for word in words)[:60]


class Run:
    """A system at work: its script, and all processes below this one. One at a time."""

    def __init__(self, system: System, work: Work, directory: str) -> None:
        adapter = system.adapter(work)
        if not adapter.is_installed:
            raise Failed("not installed")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": directory}
        if system.environment is not None:  # RLlib writes its results below the home directory.
            environment |= {"OMP_NUM_THREADS": str(work.threads), "HOME": directory}
        self._errors = (Path(directory) / "errors").open("w+")
        self._process = subprocess.Popen(
            [str(adapter.python), str(ROOT / "benchmarks/peers" / adapter.script), *adapter.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for this process alone.
        )
        self.about: dict[str, Any] = {}
        self.record = Record()

    def measure(self, warm_up_seconds: float, seconds: float, timeout_seconds: float) -> dict[str, Any]:
        """Returns the figures of the window.

        Raises:
          Failed: where the script ends before, or is not done in time.
        """
        deadline = time.monotonic() + timeout_seconds
        for line in self._lines(deadline, min(MEMORY_SECONDS, seconds / 4)):
            if "root" in line:
                self.about = line
                continue
            self.record.ticks.append(parse_tick(line))
            window = steady_window(self.record.ticks, warm_up_seconds, seconds)
            if window is not None and self.record.looks[-1].seconds >= window[1].seconds:
                return figures(self.record, *window)
        raise Failed(self._last_error())

    def stop(self) -> str:
        """Asks the script to end; returns how it did.

        Raises:
          Failed: where it fails in doing so: qfleet's tells that its ledger does not balance.
        """
        self._process.terminate()
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "by force"
        if code not in (0, -signal.SIGTERM):
            raise Failed(self._last_error())
        return "in order"

    def close(self) -> None:
        end_descendants()
        self._process.wait()
        self._errors.close()

    def _lines(self, deadline: float, memory_seconds: float) -> Iterator[dict[str, Any]]:
        """Yields the script's lines until it ends, and looks at the system meanwhile."""
        assert self._process.stdout is not None
        output, pending = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                self._look(now, memory_seconds)
                if not selector.select(LOOK_SECONDS / 2):
                    continue
                block = os.read(output, 1 << 16)
                if not block:
                    return
                *lines, pending = (pending + block).split(b"\n")
                yield from map(json.loads, lines)
        progress = f"the last that it said: {self.record.ticks[-1]}" if self.record.ticks else "it never said how far it was"
        raise Failed(f"not done in time; {progress}")

    def _look(self, now: float, memory_seconds: float) -> None:
        record = self.record
        if record.looks and now - record.looks[-1].seconds < LOOK_SECONDS:
            return
        tree = process_tree(os.getpid())
        del tree[os.getpid()]
        if self.about.get("root", self._process.pid) != self._process.pid:
            tree.pop(self._process.pid, None)
        record.looks.append(Look(now, sum(tree.values()), machine_cpu_seconds()))
        if not record.memories or now - record.memories[-1].seconds >= memory_seconds:
            names = self.about.get("names", {})
            sizes = sorted(((process_name(pid, names), pss_bytes(pid)) for pid in tree), key=lambda named: -named[1])
            record.memories.append(Memory(now, tuple(sizes)))

    def _last_error(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends, so that `process_tree` has all of them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> None:
    """Kills what is left of a system, by pid, and waits until it is gone. This process has no other descendants."""
    while left := process_tree(os.getpid()).keys() - {os.getpid()}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def run_once(system: System, work: Work, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs a system once; returns its figures and what it says of itself, or {"failed": why}."""
    with tempfile.TemporaryDirectory(
        prefix="s", dir="/tmp", ignore_cleanup_errors=True
    ) as directory:  # Short: Ray's sockets lie there.
        try:
            run = Run(system, work, directory)
            try:
                found = run.measure(arguments.warm_up, seconds, arguments.timeout)
                found["ended"] = run.stop()
            finally:
                run.close()
        except Failed as error:
            return {"failed": str(error)}
    return found | {name: run.about[name] for name in ("version", "note")} | {"mode": work.mode, "threads": work.threads}


def with_mode(work: Work, mode: Mode) -> Work:
    return replace(work, mode=mode.name, threads=mode.threads or 1)


def choose_mode(trials: Sequence[tuple[Mode, dict[str, Any]]]) -> Mode:
    """Returns the mode with the most env steps a second; the first one where none was measured."""
    good = [(mode, found) for mode, found in trials if "failed" not in found]
    return max(good, key=lambda trial: trial[1]["env_steps_per_second"])[0] if good else trials[0][0]


def summary(runs: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the spread of each figure over the rounds, and qfleet's advantage, round by round, or why there is none.

    An advantage above 1 is qfleet's: more env steps a second, less CPU time a step, less memory.
    """
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"failed": runs[0]["failed"] if runs else "interrupted before its first round"}
    pairs = [(a, b) for a, b in zip(own, runs, strict=False) if "failed" not in a and "failed" not in b]
    advantages = {
        "env_steps_per_second": [a["env_steps_per_second"] / b["env_steps_per_second"] for a, b in pairs],
        "cpu_ms_per_step": [b["cpu_ms_per_step"] / a["cpu_ms_per_step"] for a, b in pairs],
        "memory_mb": [b["memory_mb"] / a["memory_mb"] for a, b in pairs],
    }
    return {name: good[-1][name] for name in ("version", "note", "mode", "threads")} | {
        "rounds": len(good),
        "rounds_ended_by_force": sum(run["ended"] == "by force" for run in good),
        "figures": {name: spread([run[name] for run in good]) for name in [*COLUMNS, "cores_used", "cores_used_by_others"]},
        "qfleet_advantage": {name: spread(values) for name, values in advantages.items()} if pairs else None,
    }


def remarks(name: str, row: dict[str, Any], work: Work) -> list[str]:
    """Returns what a reader of the table must know of a row."""
    if "failed" in row:
        return [f"{name}: no result: {row['failed']}"]
    threads = f", {row['threads']} PyTorch threads" if name.partition(" ")[0] != "qfleet" else ""
    said = [f"{name}: {row['version']}; mode {row['mode']}{threads}; {row['note']}; {row['rounds']} rounds"]
    if row["rounds_ended_by_force"]:
        said.append(f"{name}: {row['rounds_ended_by_force']} rounds did not end in {STOP_SECONDS:.0f} seconds when asked to")
    ratio = row["figures"]["samples_per_step"]
    if max(abs(ratio[end] / work.samples_per_step - 1) for end in ("min", "max")) > RATIO_TOLERANCE:
        said.append(f"{name}: WRONG RATIO: {work.samples_per_step} samples a step were asked for")
    return said


def show(console: Console, work: Work, summaries: dict[str, dict[str, Any]]) -> None:
    replay = f"replay of {work.capacity:,}{', full' if work.fill else ''}"
    table = Table(
        title=f"{work.game}, {work.network}, batch {work.batch}, {work.samples_per_step} samples a step, {work.num_envs} environments, {replay}, {work.cores} cores"
    )
    table.add_column("", no_wrap=True)
    for title in [*[title for title, _ in COLUMNS.values()], "qfleet over it: steps/s", "CPU", "memory"]:
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in summaries.items():
        if "failed" in row:
            continue
        cells = [with_spread(row["figures"][column], digits) for column, (_, digits) in COLUMNS.items()]
        advantages = row["qfleet_advantage"]
        table.add_row(name, *cells, *([f"{a['median']:.2f}x" for a in advantages.values()] if advantages else []))
    console.print(table)
    for name, row in summaries.items():
        for remark in remarks(name, row, work):
            console.print(remark, markup=False)


def with_spread(values: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{values[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


class Measurement:
    """All trials and rounds so far, and where they are written."""

    def __init__(self, works: Sequence[Work], systems: Sequence[System], arguments: argparse.Namespace) -> None:
        self._works, self._systems, self._arguments = works, systems, arguments
        self._console = Console(width=None if sys.stdout.isatty() else 220)
        self._trials: dict[tuple[str, str], list[tuple[Mode, dict[str, Any]]]] = {}
        self._runs: dict[tuple[str, str], list[dict[str, Any]]] = {
            (work.network, system.name): [] for work in works for system in systems
        }

    def run(self) -> None:
        modes: dict[tuple[str, str], Mode] = {}
        for work in self._works:
            for system in self._systems:
                modes[work.network, system.name] = self._choose(work, system)
        for number in range(self._arguments.rounds):
            for work in self._works:
                for system in self._systems:
                    key = work.network, system.name
                    self._say(f"round {number + 1} of {self._arguments.rounds}: {work.network}, {system.name}")
                    done = run_once(system, with_mode(work, modes[key]), self._arguments, self._arguments.seconds)
                    self._runs[key].append(done)
                    self._say_result(done)
                    self.write()

    def show(self) -> None:
        for work in self._works:
            show(self._console, work, self._summaries(work))

    def write(self) -> None:
        """Writes the JSON file, if there is to be one."""
        if self._arguments.json is None:
            return
        rows = [
            {"name": name, "network": work.network} | row | {"runs": self._runs[work.network, name]}
            for work in self._works
            for name, row in self._summaries(work).items()
        ]
        trials = [
            {"name": name, "network": network, "mode": mode.name, "threads": mode.threads} | found
            for (network, name), tried in self._trials.items()
            for mode, found in tried
        ]
        about = {"hardware": hardware(), "works": [asdict(work) for work in self._works]}
        about |= {name: getattr(self._arguments, name) for name in ("rounds", "seconds", "warm_up", "trial_seconds")}
        self._arguments.json.write_text(json.dumps(about | {"trials": trials, "rows": rows}, indent=2) + "\n")

    def _choose(self, work: Work, system: System) -> Mode:
        if len(system.modes) == 1 or not self._arguments.trial_seconds or not system.adapter(work).is_installed:
            return system.modes[0]
        tried = self._trials[work.network, system.name] = []
        for mode in system.modes:
            self._say(f"trial: {work.network}, {system.name}, {mode.name}, {mode.threads} threads")
            empty = replace(with_mode(work, mode), fill=False)
            tried.append((mode, run_once(system, empty, self._arguments, self._arguments.trial_seconds)))
            self._say_result(tried[-1][1])
        return choose_mode(tried)

    def _summaries(self, work: Work) -> dict[str, dict[str, Any]]:
        own = self._runs.get((work.network, SYSTEMS[0].name), [])
        return {system.name: summary(self._runs[work.network, system.name], own) for system in self._systems}

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _say_result(self, found: dict[str, Any]) -> None:
        if "failed" in found:
            self._say(f"  no result: {found['failed']}")
        else:
            figures = [f"{found[name]:.{digits}f} {title}" for name, (title, digits) in COLUMNS.items()]
            self._say(f"  {', '.join(figures)}; others took {found['cores_used_by_others']:.2f} cores")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags; a wrong one ends the process in one line and with exit status 2."""
    parser = Parser(description=__doc__.splitlines()[0])
    peers = list(dict.fromkeys(system.peer for system in SYSTEMS))
    parser.add_argument("--game", default="pong", help="an Atari game, named as its ROM")
    parser.add_argument("--network", nargs="+", choices=tuple(HIDDEN), default=["nature"])
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--samples-per-step", type=positive, default=8, help="samples for each env step")
    parser.add_argument("--num-envs", type=positive, default=8)
    parser.add_argument("--capacity", type=positive, default=100_000, help="transitions of the replay")
    parser.add_argument("--learning-starts", type=positive, default=1_000, help="env steps before the first update")
    parser.add_argument("--cores", type=positive, default=2)
    parser.add_argument("--fill", action="store_true", help="begin with a full replay")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=positive, default=120, help="of the measured window")
    parser.add_argument("--warm-up", type=positive, default=20, help="seconds from the first update to the window")
    parser.add_argument("--trial-seconds", type=int, default=20, help="window of a trial; 0: the first mode of each system")
    parser.add_argument("--timeout", type=positive, default=900, help="seconds that one run may take")
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    problem = problem_with(arguments)
    if problem is not None:
        parser.error(problem)
    return arguments


def problem_with(arguments: argparse.Namespace) -> str | None:
    """Returns what contradicts itself or cannot be, or None."""
    import ale_py.roms

    num_cpus = len(os.sched_getaffinity(0))
    rules = {
        f"--game {arguments.game}: ale-py has no such ROM": arguments.game in ale_py.roms.get_all_rom_ids(),
        f"--cores {arguments.cores}: there are {num_cpus} here": arguments.cores <= num_cpus,
        f"--learning-starts {arguments.learning_starts} is more than --capacity {arguments.capacity}": arguments.learning_starts
        <= arguments.capacity,
        f"--learning-starts {arguments.learning_starts} is less than --batch {arguments.batch}": arguments.learning_starts
        >= arguments.batch,
        f"--trial-seconds {arguments.trial_seconds} is negative": arguments.trial_seconds >= 0,
        f"--json {arguments.json}: no directory that can be written to": arguments.json is None
        or os.access(arguments.json.resolve().parent, os.W_OK),
    }
    return next((text for text, holds in rules.items() if not holds), None)


def works_of(arguments: argparse.Namespace) -> list[Work]:
    """Returns the work for each network."""
    same = {
        name: getattr(arguments, name)
        for name in ("game", "batch", "samples_per_step", "num_envs", "capacity", "learning_starts", "fill", "cores")
    }
    return [Work(network=network, **same) for network in arguments.network]


def interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    arguments = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # A shell's background jobs ignore SIGINT otherwise.
        signal.signal(number, interrupt)
    adopt_orphans()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    systems = [system for system in SYSTEMS if system.peer in arguments.peers]
    measurement = Measurement(works_of(arguments), systems, arguments)
    try:
        measurement.run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_descendants()
        measurement.show()
        measurement.write()


if __name__ == "__main__":
    main()
