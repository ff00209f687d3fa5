"""What holds a run back: a pure function from rows of metrics to findings, each with its evidence and the flag to change.

It begins with the learner: as long as that works, nothing else is a bottleneck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.config import MAX_PREFETCH_THREADS, ByteSize, RunConfig

PHASES = {
    "actor": ("env", "inference", "n_step", "compress", "push", "push_wait", "pull"),
    "shard": ("insert", "sample", "priorities", "save"),
    "prefetch": ("collect", "held", "turn", "unpack", "transfer"),
    "learner": ("update", "wait", "agree", "report", "publish", "save"),
}
"""By role: the phases that it counts."""

_IDLE = 0.2  # From this part of its time on, a learner that waits is worth a sentence.
_HELD = 0.15  # And actors that the limiter holds back although the learner waits.
_WAITING = (
    0.3  # An actor that waits for answers for this part of its time; looking whether they are there takes some of it anyway.
)
_BUSY = 0.7  # A shard that is busy for this part answers late: its queue is 1 / (1 - busy) calls long.
_FULL = 0.93  # A host whose processors are busy for this part has no room for more.
_LATE = 0.3  # The part of its time that a role is ready and has no processor, from which on processors are what is missing.
_CHORES = 0.3  # A learner that works this part of its time on something other than updates.
_AWAY_SECONDS = 15.0  # For so long somebody must have been away.
_SPILLED_FRACTION = 0.01  # Of the object store: less than that is an accident.

Kind = Literal[
    "away",
    "spill",
    "unpack",
    "limiter",
    "shard",
    "network",
    "push",
    "env",
    "actors",
    "ranks",
    "chores",
    "cores",
    "filling",
    "unknown",
]

_ADVICE_FOR_DEGRADED = {
    "silent": "look at its process, which is in workers.json: py-spy dump --pid; its host may be overloaded, or its environment may hang",
    "quarantine": "the run's log says of what it died; mend that, and the run goes on with it by itself",
    "disk": "make room there, or bound the log: --replay.disk-budget",
    "node": "add nodes, or ask for less: --actors.max-workers, --actors.node-labels",
    "restart": "the run's log says of what it died; it comes back by itself",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that holds a run back."""

    kind: Kind
    sentence: str
    """What is so, with its evidence."""
    advice: str
    """What to change, with its flag."""
    is_fault: bool = True
    """False: it is the limit of what the run was given, and nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.sentence} -> {self.advice}"


class Window:
    """The last minutes of a run's last command. Each row tells of the time since the row before, and weighs as much as that was.

    Rows of earlier commands may have other settings, or be of a branch that was given up: they are left out. So are those from before the
    first update, where there was one.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], minutes: float = math.inf) -> None:
        """Args:
        rows: of metrics.jsonl; each has a finite `time_seconds`. Values that are no finite numbers count as absent.
        """
        rows = rows[_beginning_of_last_command(rows) :]
        learning = [
            i for i, row in enumerate(rows) if _number(row, "updates") and _number(row, "learner/wait_fraction") is not None
        ]
        self.learns = bool(learning)
        rows = rows[learning[0] :] if learning else rows
        newest = rows[-1]["time_seconds"] if rows else 0.0
        self.rows = [row for row in rows if row["time_seconds"] > newest - 60 * minutes or row is rows[-1]]
        starts = [row["time_seconds"] for row in self.rows[:1]] + [row["time_seconds"] for row in self.rows[:-1]]
        self._seconds = [row["time_seconds"] - start for row, start in zip(self.rows, starts, strict=True)]
        self.seconds = sum(self._seconds)

    def mean(self, name: str) -> float:
        """Returns the mean over time of a column; 0 where no row has it."""
        pairs = self._values(name)
        weight = sum(seconds for _, seconds in pairs)
        return sum(value * seconds for value, seconds in pairs) / weight if weight else 0.0

    def has(self, name: str) -> bool:
        return bool(self._values(name))

    def most_common(self, name: str) -> int:
        """Returns the whole number that the column says for the longest time."""
        seconds: dict[int, float] = {}
        for value, weight in self._values(name):
            seconds[int(value)] = seconds.get(int(value), 0.0) + weight
        return max(seconds, key=lambda value: seconds[value], default=0)

    def increments(self, name: str) -> list[float]:
        """Returns by how much a count has grown, each time that it has."""
        values = [value for value, _ in self._values(name)]
        return [after - before for before, after in itertools.pairwise(values) if after > before]

    def degraded(self) -> dict[tuple[str, str], float]:
        """Returns what the run did without, as (kind, sentence), and for how many seconds."""
        seconds: dict[tuple[str, str], float] = {}
        for row, weight in zip(self.rows, self._seconds, strict=True):
            for key in _degraded(row):
                seconds[key] = seconds.get(key, 0.0) + weight
        return seconds

    def is_degraded_by(self, key: tuple[str, str]) -> bool:
        """Whether the newest row says so."""
        return bool(self.rows) and key in _degraded(self.rows[-1])

    def names(self) -> list[str]:
        """Returns the columns that there are, in order."""
        return sorted({name for row in self.rows for name in row if "/" in name and _number(row, name) is not None})

    def _values(self, name: str) -> list[tuple[float, float]]:
        """Returns (value, seconds) of the rows that have a column."""
        values = [(_number(row, name), seconds) for row, seconds in zip(self.rows, self._seconds, strict=True)]
        return [(value, seconds) for value, seconds in values if value is not None]


def diagnose(window: Window, config: RunConfig, *, is_running: bool = True) -> list[Finding]:
    """Returns what holds the run back, what matters most first; nothing where the learner updates all the time."""
    urgent, minor = _away(window)
    found = urgent + _spills(window, config)
    if not window.learns:
        return found + _filling(window, config, is_running) + minor
    if config.serial:
        return found + minor
    if window.mean("learner/wait_fraction") + window.mean("learner/agree_fraction") >= _IDLE:
        found.append(_why_idle(window, config))
    elif (chores := _chores(window, config)) is not None:
        found.append(chores)
    elif _lacks_cores(window, "learner"):
        found.append(_full_cores(window, "the learner is the limit, and ", "it", window.mean("learner/delay_fraction")))
    return found + minor


def _away(window: Window) -> tuple[list[Finding], list[Finding]]:
    """Returns those that are away now or were so for long, and those without whom the run does as well."""
    urgent: list[Finding] = []
    minor: list[Finding] = []
    for (kind, sentence), seconds in sorted(window.degraded().items(), key=lambda item: -item[1]):
        is_now = window.is_degraded_by((kind, sentence))
        if seconds < (min(_AWAY_SECONDS, window.seconds / 2) if is_now else max(_AWAY_SECONDS, window.seconds / 3)):
            continue
        finding = Finding(
            kind="away",
            sentence=f"{sentence}{'' if is_now else ' (not now)'}, for {seconds:.0f} of the last {window.seconds:.0f} s",
            advice=_ADVICE_FOR_DEGRADED.get(kind, _ADVICE_FOR_DEGRADED["silent"]),
        )
        (urgent if is_now and "evaluator" not in sentence else minor).append(finding)
    return urgent, minor


def _spills(window: Window, config: RunConfig) -> list[Finding]:
    increments = window.increments("object_store/spilled_bytes")
    spilled = sum(increments)
    if len(increments) < 2 or spilled < _SPILLED_FRACTION * int(config.object_store_memory):
        return []
    told = f"wrote {ByteSize(int(spilled))} to disk in {window.seconds:.0f} s"
    if config.address is None:
        sentence = f"Ray's object store is full: it {told}"
        where = f"raise --object-store-memory, now {config.object_store_memory}"
    else:
        sentence = f"object stores of the cluster are full, whoever fills them: they {told}"
        where = "give the nodes more: ray start --object-store-memory"
    advice = f"{where}; or lower --learner.prefetch-batches or --learner.batch-size"
    return [Finding(kind="spill", sentence=sentence, advice=advice)]


def _filling(window: Window, config: RunConfig, is_running: bool) -> list[Finding]:
    size = window.rows[-1].get("shard/size_transitions", 0) if window.rows else 0
    holds = f"replay holds {size:,} of {config.replay.min_size:,} transitions"
    if not is_running:
        return [
            Finding(
                kind="filling", sentence=f"it ended before anything was learned: {holds}", advice="go on with it: qfleet resume"
            )
        ]
    return [
        Finding(
            kind="filling",
            sentence=f"nothing is learned yet: {holds}",
            advice="wait, or lower --replay.min-size",
            is_fault=False,
        )
    ]


def _why_idle(window: Window, config: RunConfig) -> Finding:
    """Returns why the learner waits: batches that are drawn and not unpacked, a limiter, actors, or shards that answer late."""
    waits, agrees = window.mean("learner/wait_fraction"), window.mean("learner/agree_fraction")
    if agrees > waits:
        return Finding(
            kind="ranks",
            sentence=f"rank 0 of the learner waits {agrees:.0%} of its time for the others: their shards or devices are slower than its own",
            advice="as many shards as ranks, or a multiple of it (--replay.num-shards), and devices of one kind",
        )
    prefix = f"learner idle {waits:.0%}: "
    threads = max(window.most_common("prefetch/num_threads"), 1)
    unpacking = window.mean("prefetch/unpack_fraction") + window.mean("prefetch/transfer_fraction")
    collecting = window.mean("prefetch/collect_fraction") * threads  # One of them at a time.
    held = window.mean("prefetch/held_fraction") * threads
    if unpacking >= _BUSY:
        if _lacks_cores(window, "learner"):
            return _full_cores(window, prefix, "the learner", window.mean("learner/delay_fraction"))
        more = (
            f"more of them: --learner.num-threads {threads + 1}, with a core for each"
            if threads < MAX_PREFETCH_THREADS
            else "that is as many as there may be: a smaller --learner.batch-size, or more ranks (--learner.num-devices)"
        )
        return Finding(
            kind="unpack",
            sentence=f"{prefix}its {threads} prefetch threads unpack batches {unpacking:.0%} of their time",
            advice=more,
        )
    if max(collecting, held) < _IDLE:
        return Finding(
            kind="unknown",
            sentence=f"{prefix}neither shards nor limiter nor unpacking keep it waiting, by what the rows say",
            advice="look again in some minutes, or at the learner itself: py-spy dump --pid, its pid is in workers.json",
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


def _chores(window: Window, config: RunConfig) -> Finding | None:
    """Returns what else takes the learner's time than updates, where it takes much of it."""
    publishing, saving = window.mean("learner/publish_fraction"), window.mean("learner/save_fraction")
    if max(publishing, saving) < _CHORES:
        return None
    if publishing >= saving:
        period = config.learner.publish_period_updates
        what, advice = f"publishes parameters {publishing:.0%}", f"--learner.publish-period-updates {4 * period}"
    else:
        seconds = config.learner.checkpoint_period_seconds
        what, advice = f"copies checkpoints {saving:.0%}", f"--learner.checkpoint-period-seconds {4 * seconds:g}"
    updating = window.mean("learner/update_fraction")
    return Finding(
        kind="chores",
        sentence=f"the learner {what} of its time, and updates {updating:.0%} of it",
        advice=f"less often: {advice}",
    )


def _lacks_cores(window: Window, role: str) -> bool:
    return window.mean("host/cpu_fraction") >= _FULL and window.mean(f"{role}/delay_fraction") >= _LATE


def _full_cores(window: Window, prefix: str, who: str, late: float) -> Finding:
    busy = window.mean("host/cpu_fraction")
    return Finding(
        kind="cores",
        sentence=f"{prefix}the processors are full ({busy:.0%} busy): {who} is ready and has none for {late:.0%} of its time",
        advice="more cores, or less beside it on this machine",
        is_fault=False,
    )


def _slow_shard(window: Window, config: RunConfig, prefix: str, collecting: float) -> Finding:
    slowest, busiest = window.most_common("learner/slowest_shard"), window.most_common("shard/busiest_index")
    p95 = window.mean("learner/answer_p95_seconds_max")
    busy, late = window.mean("shard/busy_fraction_max"), window.mean("shard/delay_fraction")
    if _lacks_cores(window, "shard") and late >= busy / 2:  # Most of what it is busy with is waiting for a processor.
        return _full_cores(window, prefix, "a shard", late)
    if busy >= _BUSY:
        return Finding(
            kind="shard",
            sentence=f"{prefix}shard {busiest} is busy {busy:.0%} and answers in {_milliseconds(p95)} at p95",
            advice=f"one more shard: --replay.num-shards {config.replay.num_shards + 1}",
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
    if window.mean("actor/num_alive") < 0.5:
        return Finding(
            kind="actors",
            sentence=f"{prefix}no actor acts",
            advice="the run's log says why: they died, or wait for a node that takes them",
        )
    parts = {phase: window.mean(f"actor/{phase}_fraction") for phase in PHASES["actor"]}
    rate, ratio = window.mean("actor/env_steps_per_second"), config.replay.samples_per_insert
    steps = f"actors bring {rate:,.0f} steps/s"
    or_ratio = "; or a higher --replay.samples-per-insert" if ratio is not None else ""
    if parts["push_wait"] >= _WAITING:
        return _slow_pushes(window, config, prefix, parts["push_wait"])
    if _lacks_cores(window, "actor"):
        host, late = window.mean("host/cpu_fraction"), window.mean("actor/delay_fraction")
        return Finding(
            kind="cores",
            sentence=f"{prefix}the processors are full ({host:.0%} busy), and actors, which are ready to run, have none for {late:.0%} of their time; "
            f"{steps}",
            advice=f"more cores or nodes for actors (--address), not more actors here{or_ratio}",
            is_fault=False,
        )
    more_actors = f"more actors: --actors.num-actors {2 * config.actors.num_actors}"
    if parts["env"] >= 0.5 and rate > 0:
        per_step = parts["env"] * window.mean("actor/num_alive") * config.actors.num_envs / rate
        return Finding(
            kind="env",
            sentence=f"{prefix}{steps}, and {parts['env']:.0%} of their time is the environment, {_milliseconds(per_step)} a "
            f"step of {config.actors.num_envs}",
            advice=f"{more_actors}, or --actors.env-threads {config.actors.env_threads + 1} where cores are free",
        )
    main = max(parts, key=lambda phase: parts[phase])
    return Finding(
        kind="actors",
        sentence=f"{prefix}{steps}, too few{f' for {ratio:g} samples per insert' if ratio is not None else ''}, and are not held back "
        f"({main.replace('_', '-')} {parts[main]:.0%}, environment {parts['env']:.0%} of their time)",
        advice=f"{more_actors}, or --actors.num-envs {2 * config.actors.num_envs}{or_ratio}",
    )


def _slow_pushes(window: Window, config: RunConfig, prefix: str, waiting: float) -> Finding:
    busy, p95 = window.mean("shard/busy_fraction_max"), window.mean("actor/answer_p95_seconds_max")
    waits = f"{prefix}actors wait {waiting:.0%} of their time for answers to their chunks"
    if busy >= _BUSY:
        return Finding(
            kind="shard",
            sentence=f"{waits}; shard {window.most_common('shard/busiest_index')} is busy {busy:.0%}",
            advice=f"one more shard: --replay.num-shards {config.replay.num_shards + 1}",
        )
    more, larger = 2 * config.actors.max_in_flight_chunks, 2 * config.actors.chunk_transitions
    return Finding(
        kind="push",
        sentence=f"{waits}, which take {_milliseconds(p95)} at p95 although no shard is busy more than {busy:.0%}: the time goes between them",
        advice=f"--actors.max-in-flight-chunks {more}, or larger chunks: --actors.chunk-transitions {larger}",
    )


def verdict(window: Window, findings: Sequence[Finding], config: RunConfig) -> str:
    """Returns the one sentence that matters."""
    if findings:
        return str(findings[0])
    if config.serial:
        return "a serial run: one thread does everything, as the table says"
    if window.seconds <= 0:
        return f"too little is known yet: look again in {2 * config.log_period_seconds:.0f} s"
    p50 = window.mean("learner/update_interval_p50_seconds")
    held = window.mean("shard/actors_waiting_fraction")
    waits = f"; actors wait for it {held:.0%} of their time, as the ratio of samples per insert asks" if held >= 0.05 else ""
    return (
        f"healthy: the learner waits only {window.mean('learner/wait_fraction'):.0%} of its time ({_milliseconds(p50)} an update) and is "
        f"the limit{waits}"
    )


def _beginning_of_last_command(rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the index of its first row: where the run's time goes back, or a row says that another command began."""
    for i in range(len(rows) - 1, 0, -1):
        before, row = rows[i - 1], rows[i]
        if row["time_seconds"] < before["time_seconds"]:
            return i
        if row.get("supervisor/command_began_seconds") != before.get("supervisor/command_began_seconds"):
            return i
    return 0


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _degraded(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = row.get("degraded")
    pairs = told if isinstance(told, list) else []
    return [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list) and [type(part) for part in pair] == [str, str]]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2g} s"
