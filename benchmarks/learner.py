"""One update of deep Q-learning side by side: this system's, Stable-Baselines3's, CleanRL's and RLlib's, on the same batches.

    make bench-peers
    python benchmarks/learner.py [--networks nature dqn2013] [--batches 128 32] [--rounds 7] [--seconds 1] [--peers sb3] [--json F]

Each row is a script of benchmarks/peers in a process, and for a peer in a virtual environment, of its own: one thread, Adam, uint8
observations that lie in memory; `learner_harness.py` says what is measured, each script what is on its clock. All processes live to the
end and take turns of a second, one at a time, so that whatever else the machine does falls on all alike. First each shows that it
learns: the loss of one batch must halve. Updates per second of processor time count beside those by the clock, because other
programs take nothing from them. A peer that is not installed or fails is listed with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.replay import ROOT, hardware

START_SECONDS = 300.0
END_SECONDS = 20.0


@dataclass(frozen=True)
class Adapter:
    """A script of benchmarks/peers with its arguments."""

    name: str
    peer: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    """Folder of build/peers with the peer's virtual environment; None: the project's own."""

    @property
    def python(self) -> Path:
        return ROOT / "build/peers" / self.environment / "bin/python" if self.environment else Path(sys.executable)

    @property
    def is_installed(self) -> bool:
        return self.environment is None or (ROOT / "build/peers" / self.environment / "installed").exists()


OURS = [
    Adapter(f"qfleet {precision}{note}", "qfleet", "qfleet_learner.py", (precision, algorithm))
    for algorithm, note in (("double_q_learning", ""), ("q_learning", ", Q-learning"))
    for precision in ("bf16", "fp32")
]
ADAPTERS = [
    *OURS,
    Adapter("stable-baselines3", "sb3", "sb3_learner.py", environment="sb3"),
    Adapter("cleanrl", "cleanrl", "cleanrl_learner.py"),
    Adapter("rllib", "rllib", "rllib_learner.py", environment="rllib"),
]


class Failed(Exception):
    """A script gave no answer."""


class Script:
    """A running script."""

    def __init__(self, adapter: Adapter) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed below.
        self._process = subprocess.Popen(
            [str(adapter.python), str(ROOT / "benchmarks/peers" / adapter.script), *adapter.arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, line: str, timeout_seconds: float) -> dict[str, Any]:
        """Returns the answer to one line.

        Raises:
          Failed: where there is none, with the last line of what the script complained of.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_error()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_seconds):
                raise Failed(f"no answer to {line!r} after {timeout_seconds:.0f} seconds")
        answer = self._process.stdout.readline()
        if not answer:
            raise Failed(self._last_error())
        return dict(json.loads(answer))

    def close(self) -> None:
        """Ends the script: by the end of its input, or by force."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def _last_error(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]


@dataclass
class Row:
    """One adapter, its process, and what came of it."""

    adapter: Adapter
    about: dict[str, Any]
    script: Script | None = None
    failed: str | None = None

    def ask(self, line: str, timeout_seconds: float) -> dict[str, Any] | None:
        """Returns the answer, or None where there is none now or was none before."""
        if self.script is None:
            return None
        try:
            return self.script.ask(line, timeout_seconds)
        except Failed as error:
            self.failed = str(error)
            self.script.close()
            self.script = None
            return None


def start(adapters: Sequence[Adapter], networks: Sequence[str]) -> list[Row]:
    """Starts the scripts one after another and has each show that it learns."""
    rows = []
    for adapter in adapters:
        row = Row(adapter, {}, failed=None if adapter.is_installed else "not installed")
        row.script = Script(adapter) if adapter.is_installed else None
        rows.append(row)
        row.about = row.ask("about", START_SECONDS) or {}
        row.about["check_updates"] = {network: row.ask(f"check {network}", START_SECONDS) for network in networks}
    return rows


def measure(rows: Sequence[Row], cases: Sequence[tuple[str, int]], arguments: argparse.Namespace) -> dict[Any, list[Any]]:
    """Returns the turns by (row's name, network, batch)."""
    turns: dict[Any, list[Any]] = {(row.adapter.name, *case): [] for row in rows for case in cases}
    for number in range(-1, arguments.rounds):  # The first round only warms up.
        for network, batch in cases:
            for row in rows:
                seconds = arguments.seconds if number >= 0 else 0.0
                answer = row.ask(f"time {network} {batch} {seconds}", START_SECONDS + seconds)
                if answer is not None and number >= 0:
                    turns[row.adapter.name, network, batch].append(answer)
    return turns


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(turns: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Returns rates, and those of qfleet bf16 over them, round by round."""

    def rates(of: Sequence[dict[str, Any]], clock: str) -> list[float]:
        return [turn["updates"] / max(turn[clock], 1e-9) for turn in of]

    figures: dict[str, Any] = {"batch_size": batch}
    for name, clock in (("by_clock", "seconds"), ("by_cpu", "cpu_seconds")):
        mine, theirs = rates(own, clock), rates(turns, clock)
        figures[name] = {
            "updates_per_second": spread(theirs),
            "samples_per_second": spread([batch * rate for rate in theirs]),
            "qfleet_ratio": spread([a / b for a, b in zip(mine, theirs, strict=False)]) if mine else None,
        }
    return figures


def show(console: Console, case: tuple[str, int], summaries: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{case[0]}, batch {case[1]}")
    for title in ("", "samples/s", "updates/s", "CPU ms an update", f"{OURS[0].name} over it", "the same by CPU time"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, row in summaries.items():
        clock, cpu = row["by_clock"], row["by_cpu"]
        ratios = [
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if (ratio := by["qfleet_ratio"]) else ""
            for by in (clock, cpu)
        ]
        samples, updates = clock["samples_per_second"], clock["updates_per_second"]["median"]
        table.add_row(
            name,
            f"{samples['median']:,.0f} ({samples['min']:,.0f} to {samples['max']:,.0f})",
            f"{updates:.1f}",
            f"{1e3 / cpu['updates_per_second']['median']:.1f}",
            *ratios,
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=("nature", "dqn2013"), default=["nature", "dqn2013"])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    peers = list(dict.fromkeys(adapter.peer for adapter in ADAPTERS))
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = start([adapter for adapter in ADAPTERS if adapter.peer in arguments.peers], arguments.networks)
    cases = [(network, batch) for network in arguments.networks for batch in arguments.batches]
    try:
        turns = measure(rows, cases, arguments)
    finally:
        for row in rows:
            if row.script is not None:
                row.script.close()
    results = []
    for network, batch in cases:
        own = turns.get((OURS[0].name, network, batch), [])
        of_case = {row.adapter.name: turns[row.adapter.name, network, batch] for row in rows}
        summaries = {name: summary(found, own, batch) for name, found in of_case.items() if found}
        show(console, (network, batch), summaries)
        results += [{"name": name, "network": network} | row | {"turns": of_case[name]} for name, row in summaries.items()]
    for row in rows:
        if row.failed:
            console.print(f"{row.adapter.name}: no result: {row.failed}", markup=False)
        else:
            checks = {network: found["updates"] for network, found in row.about["check_updates"].items() if found}
            halved = ", ".join(f"{network} after {num}" for network, num in checks.items())
            console.print(
                f"{row.adapter.name}: {row.about['version']}; {row.about['note']}; loss of a batch halved: {halved}",
                markup=False,
            )
    if arguments.json:
        about = [{"name": row.adapter.name, "failed": row.failed} | row.about for row in rows]
        load = os.getloadavg()
        arguments.json.write_text(
            json.dumps({"hardware": hardware(), "load_average": load, "about": about, "rows": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
