"""`qfleet doctor [RUN]`: where each role's time goes, what holds the run back, and the flag that changes it.

It reads what the run writes anyway: `metrics.jsonl`, live or after the fact. `diagnose` is pure: rows in, findings out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import ByteSize, RunConfig
from common.errors import UserError
from deploy.plots import read_rows
from deploy.run_dir import is_running, read_config, write_json

_IDLE = 0.2  # From this part of its time on, a learner that waits is worth a sentence.
_HELD = 0.15  # And actors that the limiter holds back although the learner waits.
_WAITING = (
    0.3  # An actor that waits for answers for this part of its time; looking whether they are there takes some of it anyway.
)
_BUSY = 0.7  # A shard that is busy for this part answers late: its queue is 1 / (1 - busy) calls long.
_FULL = 0.93  # A host whose processors are busy for this part has no room for more.
_LATE = 0.3  # The part of its time that a role is ready and has no processor, from which on processors are what is missing.
_SILENT_SECONDS = 15.0  # For so long somebody must have been away.
_PHASES = {
    "actor": ("env", "inference", "n_step", "compress", "push", "push_wait", "pull"),
    "shard": ("insert", "sample", "priorities", "save"),
    "prefetch": ("collect", "held", "turn", "unpack", "transfer"),
    "learner": ("update", "wait", "report", "publish", "save"),
}

Kind = Literal["away", "spill", "unpack", "limiter", "shard", "network", "push", "env", "actors", "cores", "filling"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorFlags:
    """Says where the time of a run goes, what holds it back, and what to change."""

    minutes: float = 5.0
    """How far to look back from the newest row of metrics."""
    json: Path | None = None
    """Where to write findings and figures as JSON."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"--minutes must be positive, got {self.minutes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that holds a run back."""

    kind: Kind
    sentence: str
    """What is so, with its evidence."""
    advice: str
    """What to change, with its flag; a sentence of its own where nothing is to change."""
    is_fault: bool = True
    """False: it is the limit of what the run was given, and nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.sentence} -> {self.advice}"


class Window:
    """The last minutes of a run's rows. Each row tells of the time since the row before, and weighs as much as that was."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], minutes: float = math.inf) -> None:
        """Rows from before the first update are left out, where there was one."""
        learning = [i for i, row in enumerate(rows) if row.get("updates", 0) > 0 and "learner/wait_fraction" in row]
        self.learns = bool(learning)
        rows = rows[learning[0] :] if learning else rows
        newest = rows[-1]["time_seconds"] if rows else 0.0
        rows = [row for row in rows if row["time_seconds"] > newest - 60 * minutes or row is rows[-1]]
        self.rows = rows
        starts = [row["time_seconds"] for row in rows[:1]] + [row["time_seconds"] for row in rows[:-1]]
        self._seconds = [max(row["time_seconds"] - start, 0.0) for row, start in zip(rows, starts, strict=True)]
        if len(rows) == 1:
            self._seconds = [1.0]
        self.seconds = sum(self._seconds)

    def mean(self, name: str) -> float:
        """Returns the mean over time of a column; 0 where no row has it."""
        pairs = [(row[name], seconds) for row, seconds in zip(self.rows, self._seconds, strict=True) if name in row]
        weight = sum(seconds for _, seconds in pairs)
        return sum(value * seconds for value, seconds in pairs) / weight if weight else 0.0

    def has(self, name: str) -> bool:
        return any(name in row for row in self.rows)

    def most_common(self, name: str) -> int:
        """Returns the whole number that the column says for the longest time."""
        seconds: dict[int, float] = {}
        for row, weight in zip(self.rows, self._seconds, strict=True):
            if name in row:
                seconds[int(row[name])] = seconds.get(int(row[name]), 0.0) + weight
        return max(seconds, key=lambda value: seconds[value], default=0)

    def growth(self, name: str) -> float:
        """Returns by how much a count has grown."""
        values = [row[name] for row in self.rows if name in row]
        return values[-1] - values[0] if values else 0.0

    def degraded(self) -> dict[str, float]:
        """Returns what the run did without, and for how many seconds."""
        seconds: dict[str, float] = {}
        for row, weight in zip(self.rows, self._seconds, strict=True):
            for sentence in row.get("degraded", ()):
                seconds[sentence] = seconds.get(sentence, 0.0) + weight
        return seconds


def diagnose(window: Window, config: RunConfig) -> list[Finding]:
    """Returns what holds the run back, what matters most first; nothing where the learner works all the time."""
    found = _away(window)
    found += _spills(window, config)
    if not window.learns:
        return found + _filling(window, config)
    if config.serial:
        return found
    if window.mean("learner/wait_fraction") >= _IDLE:
        found.append(_why_idle(window, config))
    elif window.mean("learner/delay_fraction") >= _LATE and window.mean("host/cpu_fraction") >= _FULL:
        found.append(_full_cores(window))
    return found


def _away(window: Window) -> list[Finding]:
    return [
        Finding(
            kind="away",
            sentence=f"{sentence}, for {seconds:.0f} of the last {window.seconds:.0f} s",
            advice="its process is in workers.json: look at it with py-spy dump --pid; its host may be overloaded, or its environment may hang",
        )
        for sentence, seconds in sorted(window.degraded().items(), key=lambda item: -item[1])
        if seconds >= min(_SILENT_SECONDS, window.seconds / 2)
    ]


def _spills(window: Window, config: RunConfig) -> list[Finding]:
    spilled = window.growth("object_store/spilled_bytes")
    if spilled <= 0:
        return []
    where = (
        f"raise --object-store-memory, now {config.object_store_memory}"
        if config.address is None
        else "give the nodes more: ray start --object-store-memory"
    )
    return [
        Finding(
            kind="spill",
            sentence=f"Ray's object store is full: it wrote {ByteSize(int(spilled))} to disk in {window.seconds:.0f} s",
            advice=f"{where}; or lower --learner.prefetch-batches or --learner.batch-size",
        )
    ]


def _filling(window: Window, config: RunConfig) -> list[Finding]:
    last = window.rows[-1] if window.rows else {}
    return [
        Finding(
            kind="filling",
            sentence=f"nothing is learned yet: replay holds {last.get('shard/size_transitions', 0):,} of {config.replay.min_size:,} transitions",
            advice="wait, or lower --replay.min-size",
            is_fault=False,
        )
    ]


def _why_idle(window: Window, config: RunConfig) -> Finding:
    """Returns why the learner waits: batches that are drawn and not unpacked, a limiter, actors, or shards that answer late."""
    idle = window.mean("learner/wait_fraction")
    prefix = f"learner idle {idle:.0%}: "
    unpacking = window.mean("prefetch/unpack_fraction") + window.mean("prefetch/transfer_fraction")
    collecting = window.mean("prefetch/collect_fraction") * max(window.mean("prefetch/num_threads"), 1.0)
    held = window.mean("prefetch/held_fraction") * max(window.mean("prefetch/num_threads"), 1.0)
    if unpacking >= _BUSY:
        threads = window.most_common("prefetch/num_threads")
        return Finding(
            kind="unpack",
            sentence=f"{prefix}its {threads} prefetch threads unpack batches {unpacking:.0%} of their time",
            advice=f"more of them: --learner.num-threads {threads + 1}, with a core for each",
        )
    if collecting >= held:
        return _slow_shard(window, config, prefix, collecting)
    if window.mean("actor/push_wait_fraction") >= _HELD and window.mean("shard/actors_waiting_fraction") >= _HELD:
        waiting = window.mean("shard/actors_waiting_fraction")
        return Finding(
            kind="limiter",
            sentence=f"{prefix}the limiter holds actors back {waiting:.0%} of the time and the learner {held:.0%}: its buffer of "
            f"{config.limiter_buffer_samples:,} samples is too small for both to go on",
            advice=f"--replay.limiter-buffer-samples {4 * config.limiter_buffer_samples}",
        )
    return _slow_actors(window, config, prefix)


def _full_cores(window: Window) -> Finding:
    busy, late = window.mean("host/cpu_fraction"), window.mean("learner/delay_fraction")
    return Finding(
        kind="cores",
        sentence=f"the learner is the limit, and the processors are full ({busy:.0%} busy): it is ready and has none for {late:.0%} of its time",
        advice="more cores, or less beside it on this machine",
        is_fault=False,
    )


def _slow_shard(window: Window, config: RunConfig, prefix: str, collecting: float) -> Finding:
    slowest, busiest = window.most_common("learner/slowest_shard"), window.most_common("shard/busiest_index")
    p95 = window.mean("learner/answer_p95_seconds_max")
    busy = window.mean("shard/busy_fraction_max")
    if busy >= _BUSY:
        more = config.replay.num_shards + 1
        return Finding(
            kind="shard",
            sentence=f"{prefix}shard {busiest} is busy {busy:.0%} and answers in {_milliseconds(p95)} at p95",
            advice=f"one more shard: --replay.num-shards {more}",
        )
    depth = config.learner.prefetch_batches
    return Finding(
        kind="network",
        sentence=f"{prefix}shard {slowest} answers in {_milliseconds(p95)} at p95 although it is busy only {busy:.0%}: the time goes between "
        f"them, and the learner's threads wait for answers {min(collecting, 1.0):.0%} of it",
        advice=f"prefetch {depth} -> {2 * depth} (--learner.prefetch-batches {2 * depth}), or learner and shards on one node (--learner.node-labels)",
    )


def _slow_actors(window: Window, config: RunConfig, prefix: str) -> Finding:
    """Returns what the actors' time goes into, where the learner waits for them."""
    parts = {phase: window.mean(f"actor/{phase}_fraction") for phase in _PHASES["actor"]}
    host, late = window.mean("host/cpu_fraction"), window.mean("actor/delay_fraction")
    steps = f"actors bring {window.mean('actor/env_steps_per_second'):,.0f} steps/s"
    if parts["push_wait"] >= _WAITING:
        busy, p95 = window.mean("shard/busy_fraction_max"), window.mean("actor/answer_p95_seconds_max")
        shard = window.most_common("shard/busiest_index")
        if busy >= _BUSY:
            return Finding(
                kind="shard",
                sentence=f"{prefix}actors wait {parts['push_wait']:.0%} of their time for answers to their chunks; shard {shard} is busy {busy:.0%}",
                advice=f"one more shard: --replay.num-shards {config.replay.num_shards + 1}",
            )
        more = 2 * config.actors.max_in_flight_chunks
        return Finding(
            kind="push",
            sentence=f"{prefix}actors wait {parts['push_wait']:.0%} of their time for answers to their chunks, which take {_milliseconds(p95)} at "
            f"p95 although no shard is busy more than {busy:.0%}: the time goes between them",
            advice=f"--actors.max-in-flight-chunks {more}, or larger chunks: --actors.chunk-transitions {2 * config.actors.chunk_transitions}",
        )
    if host >= _FULL and late >= _LATE:
        return Finding(
            kind="cores",
            sentence=f"{prefix}the processors are full ({host:.0%} busy), and actors, which are ready to run, have none for {late:.0%} of their time; "
            f"{steps}",
            advice="more cores or nodes for actors (--address), not more actors here; or a higher --replay.samples-per-insert",
            is_fault=False,
        )
    more_actors = f"more actors: --actors.num-actors {2 * config.actors.num_actors}"
    if parts["env"] >= 0.5:
        vector_steps = window.mean("actor/env_steps_per_second") / config.actors.num_envs
        per_step = parts["env"] * window.mean("actor/num_alive") / vector_steps if vector_steps else math.inf
        return Finding(
            kind="env",
            sentence=f"{prefix}{steps}, and {parts['env']:.0%} of their time is the environment, {_milliseconds(per_step)} a "
            f"step of {config.actors.num_envs}",
            advice=f"{more_actors}, or --actors.env-threads {config.actors.env_threads + 1} where cores are free",
        )
    main = max(parts, key=lambda phase: parts[phase])
    ratio = config.replay.samples_per_insert
    return Finding(
        kind="actors",
        sentence=f"{prefix}{steps}, too few{f' for {ratio:g} samples per insert' if ratio is not None else ''}, and are not held back "
        f"({main.replace('_', '-')} {parts[main]:.0%}, environment {parts['env']:.0%} of their time)",
        advice=f"{more_actors}, or --actors.num-envs {2 * config.actors.num_envs}; or a higher --replay.samples-per-insert",
    )


def verdict(window: Window, findings: Sequence[Finding]) -> str:
    """Returns the one sentence that matters."""
    if findings:
        return str(findings[0])
    if not window.has("learner/wait_fraction"):
        return "nothing is known yet: the first rows of metrics come within half a minute"
    busy = 1 - window.mean("learner/wait_fraction")
    p50 = window.mean("learner/update_interval_p50_seconds")
    held = window.mean("shard/actors_waiting_fraction")
    waits = f"; actors wait for it {held:.0%} of their time, as the ratio of samples per insert asks" if held >= 0.05 else ""
    return (
        f"healthy: the learner waits only {1 - busy:.0%} of its time ({_milliseconds(p50)} an update) and is the limit{waits}"
    )


def doctor(path: Path, flags: DoctorFlags) -> int:
    """Prints where the time goes and what to change; returns the exit status.

    Raises:
      UserError: where there is no run, or none that has told anything yet.
    """
    config = read_config(path)
    try:
        rows = read_rows(path)
    except OSError as error:
        raise UserError(
            f"{path}/metrics.jsonl cannot be read ({error.strerror}): a run writes it from its first seconds on"
        ) from error
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("time_seconds"), (int, float))]
    if not rows:
        raise UserError(f"{path}/metrics.jsonl has no row yet: try again in {config.log_period_seconds:.0f} s")
    if not any("host/cpu_fraction" in row for row in rows):
        raise UserError(
            f"{path}: its rows do not say where time goes: it was written by an older version; go on with it for a minute"
        )
    window = Window(rows, flags.minutes)
    findings = diagnose(window, config)
    state = "under way" if is_running(path) else "at rest"
    print(f"{path}: {window.seconds / 60:.1f} minutes, {len(window.rows)} rows, {state}")
    for line in _table(window, config):
        print(f"  {line}")
    print(verdict(window, findings))
    for finding in findings[1:]:
        print(f"also: {finding}")
    if flags.json is not None:
        figures = {name: window.mean(name) for name in sorted({name for row in window.rows for name in row if "/" in name})}
        report = {"verdict": verdict(window, findings), "findings": [asdict(f) for f in findings], "means": figures}
        try:
            write_json(flags.json, report)
        except OSError as error:
            raise UserError(f"--json {flags.json}: {error.strerror}") from error
    return 0


def newest_run(root: Path = Path("runs")) -> Path:
    """Returns the run under `root` that wrote last; raises UserError where there is none."""
    runs = [path.parent for path in root.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"qfleet doctor needs a run directory: there is none under {root}/")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


def _table(window: Window, config: RunConfig) -> list[str]:
    """Returns a line for each role: parts of its time, and the processors that it takes."""
    names = {
        "actor": f"actors ({config.actors.num_actors})",
        "shard": f"shards ({config.replay.num_shards})",
        "prefetch": f"prefetch ({window.most_common('prefetch/num_threads')} threads)",
        "learner": "learner",
    }
    lines = []
    for role, phases in _PHASES.items():
        parts = {phase: window.mean(f"{role}/{phase}_fraction") for phase in phases}
        if not any(parts.values()):
            continue
        cores = f"  {window.mean(f'{role}/cpu_cores'):.2f} cores" if window.has(f"{role}/cpu_cores") else ""
        late = f", {window.mean(f'{role}/delay_fraction'):.0%} without one" if window.has(f"{role}/delay_fraction") else ""
        told = "  ".join(f"{phase.replace('_', '-')} {part:.0%}" for phase, part in parts.items())
        between = max(1 - sum(parts.values()), 0.0)
        lines.append(f"{names[role]:<22}{told}  else {between:.0%}{cores}{late}")
    lines.append(f"{'host':<22}processors {window.mean('host/cpu_fraction'):.0%} busy")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2g} s"
