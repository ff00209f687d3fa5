"""`qfleet scale RECIPE --role shard|store|learner`: one role alone under the load of synthetic peers, up to its limit and beyond.

The role is made by `deploy/roles.py` in a Ray worker, as a run has it. First a closed loop finds what it can do, then calls come at
offered rates, whatever is answered, and their latency counts from when they were due (`deploy/open_loop.py`). Rounds are interleaved:
each measures every point once. In the output directory: ROLE.csv, a line for each point and round, ROLE.json, ROLE.png.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import shutil
import signal
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import RunConfig, as_dict
from common.errors import UserError
from deploy import ray_environment, run_dir
from deploy.scale_table import lock_directory

if TYPE_CHECKING:
    from deploy.role_loads import Point, RoleLoad, Row

ROLES = ("shard", "store", "learner")
RAMP = tuple(tenth / 10 for tenth in range(1, 11))
"""Offered rates where none are given, as parts of the limit that the closed loop found."""
_PART_TOLD = 0.7
_SCRATCH = ".scale-"
_DEMANDS = ("role_cpu_us_each", "role_thread_us_each", "method_cpu_us_each")


def load_role(config: RunConfig, role: str, *, rates: tuple[float, ...], seconds: float, rounds: int, out: Path) -> int:
    """Loads one role of a run and writes what it carries; returns the exit status: 0, or 130 after Ctrl-C, with what was measured by then.

    Args:
      role: shard, store or learner.
      rates: offered, per second: transitions (shard: inserts, and samples on their own axis), looks (store) or updates (learner). Empty:
        10 % to 100 % of what a closed loop finds.
      seconds: of each point in a round, after a quarter of it to warm up.
      rounds: in each of which every point has its turn.
      out: directory for ROLE.csv, ROLE.json and ROLE.png.

    Raises:
      UserError: for what cannot be measured, or a directory that cannot be written.
    """
    _check(config, role, rates, seconds, rounds)
    with lock_directory(out):
        for left in out.glob(f"{_SCRATCH}*"):  # By a command that was killed.
            shutil.rmtree(left, ignore_errors=True)
        return _load_role(config, role, rates, seconds, rounds, out)


def _load_role(config: RunConfig, role: str, rates: Sequence[float], seconds: float, rounds: int, out: Path) -> int:
    ray_environment.prepare()
    from actors.environments import check_atari_game, probe
    from deploy.bench import local_ray

    if config.env.is_atari:
        check_atari_game(config.env.game)
    spec = probe(config.env)
    rows: list[Row] = []
    about: dict[str, Any] = {}
    is_interrupted = False
    with _writing(out):
        scratch = tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH, ignore_cleanup_errors=True)
    with scratch as directory, local_ray(config):
        from deploy.role_loads import load_of

        try:
            with _interruptible(), load_of(role, config, spec, Path(directory)) as (load, told):
                about.update(told)
                run_rounds(load, rates, seconds, rounds, Table(out / f"{role}.csv", rows).add)
        except KeyboardInterrupt:
            is_interrupted = True
    if not rows:
        print("interrupted before anything was measured")
        return 130
    found = limits(rows)
    card = {
        "role": role,
        "recipe": config.recipe,
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": seconds,
        "rounds": rounds,
        "is_interrupted": is_interrupted,
        "load": about,
        "limits": found,
        "limited_by": dict(Counter(row.limited_by for row in rows if row.loop == "open")),
        "commit": run_dir.commit(),
        "versions": run_dir.versions(),
        "hardware": run_dir.hardware(),
        "config": as_dict(config),
    }
    from deploy.role_figure import draw_role

    for line in sentences(role, rows, found, config.learner.batch_size):
        print(line)
    with _writing(out):
        run_dir.write_json(out / f"{role}.json", card)
        draw_role(rows, found, title=f"one {role}, {config.recipe}", out=out / f"{role}.png")
    print(f"see {', '.join(str(out / f'{role}.{suffix}') for suffix in ('csv', 'json', 'png'))}")
    return 130 if is_interrupted else 0


def _check(config: RunConfig, role: str, rates: Sequence[float], seconds: float, rounds: int) -> None:
    if role not in ROLES:
        raise UserError(f"--role {role}: there are {', '.join(ROLES)}")
    if config.address is not None:
        raise UserError("--role loads a role on this machine: leave out --address")
    if config.serial:
        raise UserError("--role loads a role in a process of its own: leave out --serial")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"--rates must be positive and finite, got {rate:g}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"--role-seconds must be positive and finite, got {seconds:g}")
    if rounds < 1:
        raise UserError(f"--rounds must be positive, got {rounds}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says in a line what cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written ({error.strerror}); what was measured before is in the CSV"
        ) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Has SIGTERM, for which Ray has a handler that ends the process, and SIGINT raise KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: one that is not Python's.


class Table:
    """The CSV: a line as soon as there is one, so that whatever ends the command leaves what was measured before."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        """`rows` takes them in, too."""
        self._path, self._rows = path, rows

    def add(self, row: Row) -> None:
        is_first = not self._rows
        self._rows.append(row)
        with _writing(self._path), self._path.open("w" if is_first else "a", newline="") as file:
            writer = csv.writer(file)
            if is_first:
                writer.writerow([field.name for field in fields(row)])
            writer.writerow([_cell(value) for value in asdict(row).values()])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def run_rounds(
    load: RoleLoad,
    rates: Sequence[float],
    seconds: float,
    rounds: int,
    add: Callable[[Row], None],
    tell: Callable[[str], None] = print,
) -> None:
    """Measures every point once in each round, and in each round anew what a closed loop finds; the first decides what is offered."""
    from deploy.role_loads import Point

    plan: dict[str, list[Point]] = {}
    for number in range(1, rounds + 1):
        for axis in load.axes:
            free: Point = Point(axis=axis, offered=None)
            row = _measure(load, free, seconds, number, add)[0]
            if axis not in plan:
                plan[axis] = load.points(
                    axis, row.carried_per_second, rates or [part * row.carried_per_second for part in RAMP]
                )
            tell(
                f"round {number} of {rounds}, {axis}: {row.carried_per_second:,.{_digits(row.carried_per_second)}f} {row.unit}/s in a closed loop; "
                f"{len(plan[axis])} points of {seconds:g} s"
            )
            for point in plan[axis]:
                for row in _measure(load, point, seconds, number, add):
                    if row.shortfall > 0.0:
                        tell(
                            f"  {row.call}: offered {row.offered_per_second:,.0f}/s, carried {row.carried_per_second:,.0f}/s ({row.limited_by})"
                        )


def _measure(load: RoleLoad, point: Point, seconds: float, number: int, add: Callable[[Row], None]) -> list[Row]:
    rows = [replace(row, round=number) for row in load.measure(point, seconds)]
    for row in rows:
        add(row)
    return rows


def limits(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns for each axis and kind of call: what the closed loop carried, and from the open one the knee and the latency at 70 %.

    The knee is the offered rate at which the carried rate over its p99 is greatest (Kleinrock's power): below it more load costs
    little latency, above it little more is carried.
    """
    found: dict[str, Any] = {}
    for axis, call in dict.fromkeys((row.axis, row.call) for row in rows):
        mine = [row for row in rows if (row.axis, row.call) == (axis, call)]
        closed = [row for row in mine if row.loop == "closed" and not row.answer_ms > 0]
        if not closed:
            continue
        carried = [row.carried_per_second for row in closed]
        limit = statistics.median(carried)
        curve = ramp(mine) if closed[0].role != "learner" else []  # Whose intervals grow where less is offered.
        found.setdefault(axis, {})[call] = {
            "unit": f"{closed[0].unit}/s",
            "limit": {"min": min(carried), "median": limit, "max": max(carried)},
            "limited_by": Counter(row.limited_by for row in closed).most_common(1)[0][0],
            **{name: _median(getattr(row, name) for row in closed) for name in _DEMANDS},
            "knee": max(curve, key=lambda at: at["carried"] / at["p99_ms"])["offered"] if curve else None,
            "p99_ms_at_70_percent": _between(curve, _PART_TOLD * limit),
        }
    return found


def _median(values: Iterable[float]) -> float | None:
    """Returns the median; None, which JSON has, where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else None


def ramp(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Returns the offered rates of one call, ascending, each with the medians of its rounds."""
    points: dict[int, list[Row]] = {}
    in_round: Counter[int] = Counter()
    for row in rows:
        if row.loop == "open":
            points.setdefault(in_round[row.round], []).append(row)  # Offered rates of one point differ, as random arrivals do.
            in_round[row.round] += 1
    curve = [
        {
            "offered": statistics.median(row.offered_per_second for row in same),
            "carried": statistics.median(row.carried_per_second for row in same),
            "p50_ms": statistics.median(row.p50_ms for row in same),
            "p99_ms": statistics.median(row.p99_ms for row in same),
        }
        for same in points.values()
    ]
    return sorted((at for at in curve if not math.isnan(at["p99_ms"])), key=lambda at: at["offered"])


def _between(curve: Sequence[dict[str, float]], offered: float) -> float | None:
    """Returns the p99 at an offered rate, on the line between the two points around it; None where there are none."""
    for low, high in itertools.pairwise(curve):
        if low["offered"] <= offered <= high["offered"]:
            part = (offered - low["offered"]) / max(high["offered"] - low["offered"], 1e-9)
            return low["p99_ms"] + part * (high["p99_ms"] - low["p99_ms"])
    return None


def sentences(role: str, rows: Sequence[Row], found: dict[str, Any], batch_size: int) -> list[str]:
    """Returns what was found, for a person."""
    lines = []
    for axis, calls in found.items():
        if axis == "answers":  # Told by depths, below.
            continue
        parts = []
        for call, of in calls.items():
            limit = of["limit"]
            digits = _digits(limit["median"])
            parts.append(
                f"{limit['median']:,.{digits}f} {_plural(call)}/s ({limit['min']:,.{digits}f} to {limit['max']:,.{digits}f})"
            )
        line = f"one {role}{' with both' if axis == 'both' else ''}: {' and '.join(parts)}, held by the {of['limited_by']}"
        p99s = [
            f"{_plural(call)} {of['p99_ms_at_70_percent']:.1f} ms" for call, of in calls.items() if of["p99_ms_at_70_percent"]
        ]
        line += f"; p99 at 70 % of that: {', '.join(p99s)}" if p99s else ""
        line += f"; {batch_size * limit['median']:,.0f} samples/s" if role == "learner" else ""
        each = of["role_cpu_us_each"]
        if each is not None:
            line += f"; {_time(each)} of CPU each, {_time(of['role_thread_us_each'])} of it in the thread that does the work"
            if of["limited_by"] == "cores" and role != "learner":
                line += f": {1e6 / of['role_thread_us_each']:,.0f}/s with a core to itself (projected)"
        lines.append(line)
    lines += _told_of_depths(rows)
    held = Counter(row.limited_by for row in rows if row.loop == "open")
    num_open = sum(held.values())
    if held["cores"]:
        lines.append(
            f"in {held['cores']} of {num_open} points this machine's processors were full: there latencies and limits are the machine's, not the role's"
        )
    if held["peers"]:
        lines.append(f"in {held['peers']} of {num_open} points the synthetic peers were the limit")
    return lines


def _told_of_depths(rows: Sequence[Row]) -> list[str]:
    """Returns for each depth of prefetching the slowest answers with which the learner waited less than a twentieth of the time."""
    late = [row for row in rows if row.answer_ms > 0]
    lines = []
    for depth in sorted({row.prefetch_batches for row in late}):
        waits: dict[float, list[float]] = {}
        for row in late:
            if row.prefetch_batches == depth:
                waits.setdefault(row.answer_ms, []).append(row.wait_fraction)
        kept = [answer for answer, fractions in waits.items() if statistics.median(fractions) < 0.05]
        slowest = f"up to {max(kept):,.0f} ms" if kept else f"less than {min(waits):,.0f} ms"
        lines.append(
            f"with --learner.prefetch-batches {depth:.0f} shards may take {slowest} to answer before the learner waits"
        )
    return lines


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e3 else f"{microseconds / 1e3:.1f} ms"


def _plural(call: str) -> str:
    return f"{call}s"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1
