"""Steps per second of Atari environments alone, and what an actor adds to its environments and its network.

    make bench-peers
    python benchmarks/envs.py [--rounds 25] [--seconds 0.4] [--cases pong:8 nature:1] [--peers envpool] [--json F]

Bare environments, 8 of Pong at random: ale-py's vector environment, EnvPool's, Gymnasium's, on one core and on two, with as many
threads. Then qfleet's actor on one core, for each case (a recipe's network and settings, and how many environments): the loop of
environment and forward pass alone, the whole actor with its chunks dropped, and the whole actor that sends them to a shard through
Ray. Each row is a script of benchmarks/peers that says what is on its clock; for a peer in a virtual environment of its own.

All processes live to the end and take turns of `--seconds`, one at a time, so that whatever else the machine does falls on all
alike; the tables have medians over the rounds with the least and the greatest. An actor's ratios are of the turns of one round. Those
by processor time count beside those by the clock, because other programs take nothing from them. A peer that is not installed or
fails is listed with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.learner import Adapter, Row, Script, spread
from benchmarks.replay import hardware

START_SECONDS = 120.0
NUM_ENVS = 8
CORES = (1, 2)
ACTOR_WAYS = ("alone", "dropping", "pushing")
RECIPES = ("pong", "nature")
DEFAULT_CASES = ("pong:8", "pong:1", "nature:1", "nature:8", "nature:16")


@dataclass(frozen=True)
class Turn:
    """What one row of a table is the rate of."""

    script: str
    """Name of the row's script, as it is shown."""
    way: str
    num_envs: int

    @property
    def name(self) -> str:
        return f"{self.script}, {self.way}"


def adapters() -> list[Adapter]:
    """Returns the scripts, each for a number of cores."""

    def of(peer: str, cores: int, script: str, environment: str | None = None) -> Adapter:
        return Adapter(f"{peer}, {cores} core{'s' if cores > 1 else ''}", peer, script, (str(cores),), environment)

    bare = [of("ale-py", cores, "ale_envs.py") for cores in CORES]
    bare += [of("envpool", cores, "envpool_envs.py", "envpool") for cores in CORES]
    bare += [of("gymnasium", cores, "gymnasium_envs.py", "gymnasium") for cores in CORES]
    return [*bare, Adapter("qfleet", "qfleet", "qfleet_envs.py", (str(os.cpu_count()),))]


def turns_of(adapter: Adapter, cases: Sequence[tuple[str, int]]) -> list[Turn]:
    """Returns what is asked of a script in one round, in this order."""
    if adapter.peer == "qfleet":
        return [Turn(adapter.name, f"{recipe}.{way}", num_envs) for recipe, num_envs in cases for way in ACTOR_WAYS]
    ways = ("sync", "async")
    if adapter.peer == "gymnasium":  # One process does not need two cores, nor several one.
        ways = ("sync",) if adapter.arguments == ("1",) else ("async",)
    return [Turn(adapter.name, way, NUM_ENVS) for way in ways]


def measure(
    rows: Sequence[Row], cases: Sequence[tuple[str, int]], num_rounds: int, seconds: float
) -> Iterator[dict[Turn, dict[str, float]]]:
    """Yields the answers of each round; the first round, which only warms up, is left out."""
    for number in range(num_rounds + 1):
        answers = {}
        for row in rows:
            for turn in turns_of(row.adapter, cases):
                asked = seconds if number else 0.0
                answer = row.ask(f"time {turn.way} {turn.num_envs} {asked}", START_SECONDS + asked)
                if answer is not None:
                    answers[turn] = answer
        if number:
            yield answers


def rates(rounds: Sequence[dict[Turn, dict[str, float]]], turn: Turn) -> dict[str, dict[str, float]] | None:
    """Returns the steps per second by the clock and by processor time, and the cores that were used."""
    found = [answers[turn] for answers in rounds if turn in answers]
    if not found:
        return None
    return {
        "steps_per_second": spread([answer["steps"] / answer["seconds"] for answer in found]),
        "steps_per_cpu_second": spread([answer["steps"] / max(answer["cpu_seconds"], 1e-9) for answer in found]),
        "cores_used": spread([answer["cpu_seconds"] / answer["seconds"] for answer in found]),
    }


def ratios(rounds: Sequence[dict[Turn, dict[str, float]]], turn: Turn, alone: Turn) -> dict[str, dict[str, float]] | None:
    """Returns the rate of one turn over that of another in the same round, by the clock and by processor time."""
    both = [(answers[turn], answers[alone]) for answers in rounds if turn in answers and alone in answers]
    if not both:
        return None
    return {
        name: spread([(a["steps"] / max(a[clock], 1e-9)) / (b["steps"] / max(b[clock], 1e-9)) for a, b in both])
        for name, clock in (("by_clock", "seconds"), ("by_cpu", "cpu_seconds"))
    }


def results(rounds: Sequence[dict[Turn, dict[str, float]]], turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Returns a row of figures for each turn that was ever answered."""
    found = []
    for turn in turns:
        figures = rates(rounds, turn)
        if figures is None:
            continue
        recipe, is_actor, way = turn.way.partition(".")
        ratio = ratios(rounds, turn, Turn(turn.script, f"{recipe}.alone", turn.num_envs)) if is_actor else None
        runs = [answers[turn] for answers in rounds if turn in answers]
        about = {"script": turn.script, "recipe": recipe if is_actor else None, "way": way or turn.way}
        found.append(about | {"num_envs": turn.num_envs} | figures | {"ratio_to_alone": ratio, "turns": runs})
    return found


def show(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """Prints the tables."""
    bare = Table(title=f"bare environments, {NUM_ENVS} of Pong")
    actors = Table(title="an actor on one core")
    for title in ("", "steps/s", "steps/s of CPU time", "cores used"):
        bare.add_column(title, justify="right" if title else "left", no_wrap=True)
    for title in ("", "steps/s", "steps/s of CPU time", "over the loop alone", "the same by CPU time"):
        actors.add_column(title, justify="right" if title else "left", no_wrap=True)
    for row in found:
        speeds = [_text(row[name], 0) for name in ("steps_per_second", "steps_per_cpu_second")]
        if row["recipe"] is None:
            bare.add_row(f"{row['script']}, {row['way']}", *speeds, _text(row["cores_used"], 2))
        else:
            by = [_text(row["ratio_to_alone"][name], 3) if row["way"] != "alone" else "" for name in ("by_clock", "by_cpu")]
            actors.add_row(f"{row['recipe']}, {row['num_envs']} environments, {row['way']}", *speeds, *by)
    for table in (bare, actors):
        if table.row_count:
            console.print(table)


def _text(spread: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{spread[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def parse_case(text: str) -> tuple[str, int]:
    """Reads RECIPE:ENVS."""
    recipe, _, num_envs = text.partition(":")
    if recipe not in RECIPES or not num_envs.isdecimal() or int(num_envs) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not RECIPE:ENVS, {' or '.join(RECIPES)} and a positive number")
    return recipe, int(num_envs)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    peers = list(dict.fromkeys(adapter.peer for adapter in adapters()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one turn")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[parse_case(text) for text in DEFAULT_CASES])
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = []
    for adapter in adapters():
        if adapter.peer in arguments.peers:
            row = Row(adapter, {}, failed=None if adapter.is_installed else "not installed")
            row.script = Script(adapter) if adapter.is_installed else None
            rows.append(row)
    rounds = []
    try:
        for row in rows:
            row.about = row.ask("about", START_SECONDS) or {}
        for answers in measure(rows, arguments.cases, arguments.rounds, arguments.seconds):
            rounds.append(answers)
            console.print(f"round {len(rounds)} of {arguments.rounds}")
    finally:
        for row in rows:
            if row.script is not None:
                row.script.close()
    found = results(rounds, [turn for row in rows for turn in turns_of(row.adapter, arguments.cases)])
    show(console, found)
    for row in rows:
        about = f"no result: {row.failed}" if row.failed else ", ".join(filter(None, row.about.values()))
        console.print(f"{row.adapter.name}: {about}", markup=False)
    if arguments.json:
        about = [{"name": row.adapter.name, "failed": row.failed} | row.about for row in rows]
        figures = {"hardware": hardware(), "load_average": os.getloadavg(), "about": about, "rows": found}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
