"""Replay buffers side by side on the same real Atari transitions: this system's shard and its peers.

    make bench-peers
    python benchmarks/replay.py [--games pong ms_pacman] [--items 60000] [--rounds 3] [--peers cpprb reverb] [--json F]

Each row is a script of benchmarks/peers, run in a process and, for a peer, in a virtual environment of its own; what it
measures stands in benchmarks/peers/harness.py. The rounds are interleaved, so that whatever else the machine does falls on all
alike. The table has the median over the rounds with the least and the greatest. A peer that is not installed or fails is listed
with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.replay_data import GAMES, Recipe, collect

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "insert_transitions_per_second": "insert/s",
    "insert_p99_ms": "insert p99 ms",
    "sample_transitions_per_second": "sample/s",
    "sample_p99_ms": "sample p99 ms",
    "bytes_per_transition": "bytes each",
}


@dataclass(frozen=True)
class Adapter:
    """A script of benchmarks/peers in one of its modes."""

    peer: str
    script: str
    mode: str | None = None
    environment: str | None = None
    """Folder of build/peers with the peer's virtual environment; None: the project's own."""

    @property
    def name(self) -> str:
        return f"{self.peer} {self.mode}" if self.mode else self.peer

    @property
    def python(self) -> Path:
        return ROOT / "build/peers" / self.environment / "bin/python" if self.environment else ROOT / ".venv/bin/python"

    @property
    def is_installed(self) -> bool:
        return self.environment is None or (ROOT / "build/peers" / self.environment / "installed").exists()


def own_adapters() -> list[Adapter]:
    """Returns this system's rows."""
    modes = ("serial", "prefetch")
    return [*[Adapter("qfleet", "qfleet_inprocess.py", mode) for mode in modes], Adapter("qfleet-ray", "qfleet_ray.py")]


def peer_adapters() -> list[Adapter]:
    """Returns the peers' rows."""
    return [
        Adapter("bare-ray", "bare_ray.py"),
        *[Adapter("cpprb", "cpprb_buffer.py", mode, "cpprb") for mode in ("stacks", "next_of", "stack_compress")],
        *[Adapter("sb3", "sb3_buffer.py", mode, "sb3") for mode in ("stacks", "optimize_memory_usage")],
        *[
            Adapter("torchrl", "torchrl_buffer.py", mode, "torchrl")
            for mode in ("tensor", "tensor_prefetch", "memmap", "memmap_prefetch")
        ],
        *[Adapter("rllib", "rllib_buffer.py", mode, "rllib") for mode in ("in_process", "actor")],
        Adapter("reverb", "reverb_server.py", environment="reverb"),
    ]


def measure(adapter: Adapter, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the script once; returns its report, or {"failed": why}."""
    if not adapter.is_installed:
        return {"failed": "not installed"}
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [str(adapter.python), str(ROOT / "benchmarks/peers" / adapter.script)]
        command += ["--data", str(data), "--items", str(arguments.items), "--batch", str(arguments.batch)]
        command += ["--batches", str(arguments.batches), "--json", str(report)]
        command += ["--mode", adapter.mode] if adapter.mode else []
        load = os.getloadavg()[0]
        failed = _run(command, arguments.timeout)
        return {"failed": failed} if failed else {**json.loads(report.read_text()), "load_average_before": load}


def _run(command: list[str], timeout_seconds: float) -> str | None:
    """Runs the command in a process group of its own, which has ended when this returns; returns why it failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_seconds:.0f} seconds"
    finally:  # Also where the user interrupts, and what a script has left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return None
    return (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns median, least and greatest of each number over the rounds that went well, or why none did."""
    good = [report for report in reports if "failed" not in report]
    if not good:
        return {"failed": reports[0]["failed"]}
    spreads = {}
    for name in COLUMNS:
        values = [report[name] for report in good]
        spreads[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: good[0][name] for name in ("version", "mode", "items", "note")} | spreads | {"rounds": len(good)}


def show(console: Console, game: str, summaries: dict[Adapter, dict[str, Any]]) -> None:
    """Prints one game's table, and below it the notes and what failed."""
    shown = Table(title=game)
    shown.add_column("", no_wrap=True)
    for title in COLUMNS.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for adapter, row in summaries.items():
        if "failed" not in row:
            shown.add_row(adapter.name, *[_with_spread(row[name]) for name in COLUMNS])
    console.print(shown)
    for adapter, row in summaries.items():
        if "failed" in row:
            console.print(f"{adapter.name}: no result: {row['failed']}", markup=False)
        else:
            parts = (row["version"], f"{row['items']:,} items", row["note"])
            console.print(f"{adapter.name}: {', '.join(filter(None, parts))}", markup=False)


def _with_spread(spread: dict[str, float]) -> str:
    low, middle, high = (f"{spread[name]:,.{0 if spread['median'] >= 100 else 1}f}" for name in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def hardware() -> dict[str, Any]:
    """Returns what the numbers were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }


def parse_arguments(peers: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", nargs="+", default=list(GAMES))
    parser.add_argument("--items", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one script may take")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    adapters = own_adapters() + peer_adapters()
    arguments = parse_arguments(list(dict.fromkeys(adapter.peer for adapter in adapters)))
    adapters = [adapter for adapter in adapters if adapter.peer in arguments.peers]
    console = Console(width=None if sys.stdout.isatty() else 160)
    data = {game: collect(Recipe(game=game, num_items=max(arguments.items, 60_000))) for game in arguments.games}
    reports: dict[tuple[str, Adapter], list[dict[str, Any]]] = {(g, a): [] for g in arguments.games for a in adapters}
    for number in range(arguments.rounds):
        for (game, adapter), so_far in reports.items():
            console.print(f"round {number + 1} of {arguments.rounds}: {game}, {adapter.name}")
            so_far.append(measure(adapter, data[game], arguments))
    for game in arguments.games:
        show(console, game, {adapter: summary(reports[game, adapter]) for adapter in adapters})
    if arguments.json:
        rows = [
            {"game": game, "adapter": adapter.peer, "mode": adapter.mode, "summary": summary(runs), "runs": runs}
            for (game, adapter), runs in reports.items()
        ]
        arguments.json.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
