"""What a sweep says in words: operational analysis of its figures, and the law beside it. Pure functions.

A role that is busy a part U of the time while the system makes X env steps a second takes D = c U / X busy seconds of each, where c is how
many of that role there are: its service demand (Denning and Buzen 1978, "The Operational Analysis of Queueing Network Models", the
utilization law). So one of that role is full at 1 / D env steps a second, whatever the shape of the curve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from deploy.scaling_law import LEAST_FOR_KAPPA, LEAST_FOR_SIGMA, Interval, Law

FULL_CORES = 0.9
FULL_LEARNER = 0.9
FULL_SHARD = 0.7  # Beyond it answers come late: in an M/M/1 queue after more than three times the service.
_HELD_BACK = 0.1
_SETTLED = 0.15
_OTHERS = 0.1  # Of the processors, from which on the figures are of what others left.
_SIGMA, _KAPPA = "\N{GREEK SMALL LETTER SIGMA}", "\N{GREEK SMALL LETTER KAPPA}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Medians over the rounds of one point. Fractions are of the time; None where the run did not tell them."""

    n: float
    """How many workers: the value on the axis."""
    throughput: float
    """Env steps or samples a second, as the axis has it."""
    num_shards: int
    num_devices: int
    samples_per_insert: float | None
    shard_busy: float | None = None
    """Mean over the shards."""
    shard_busy_max: float | None = None
    """Of the busiest shard."""
    learner_busy: float | None = None
    host_cpu: float | None = None
    """Of all processors of the host; None on a cluster, where it tells of one node only."""
    run_cpu_cores: float | None = None
    """Processors that the run took, by all its processes."""
    actors_held_back: float | None = None
    """Part of the time for which the limiter held actors back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Throughput of each worker at N over that at the least N, round by round."""

    n: float
    median: float
    low: float
    high: float


def law_text(law: Law | None, num_points: int, label: str) -> str:
    """Says sigma and kappa with their intervals, or why there are none."""
    if law is None:
        return f"no law from {counted(num_points, 'points')}: {_SIGMA} takes {LEAST_FOR_SIGMA}, {_KAPPA} {LEAST_FOR_KAPPA}"
    text = f"{_SIGMA} {_interval(law.sigma)}"
    if law.kappa is None:
        return f"{text} ({_KAPPA} takes {LEAST_FOR_KAPPA} points)"
    text += f", {_KAPPA} {_interval(law.kappa)}"
    peak = law.peak
    if peak is not None and math.isfinite(peak.value):
        text += f", most at {counted(round(peak.value), label)}"
    return text


def limit_text(usages: Sequence[Usage], label: str, *, num_cpus: int | None, unit: str = "env step") -> str:
    """Says what limits the system at the greatest N: the processors, the learner, a shard, or nothing that was measured.

    Args:
      usages: by rising N, at least one.
      label: of N, in the plural.
      num_cpus: processors of the machine; None on a cluster.
      unit: of the throughput, one of it.
    """
    last = usages[-1]
    if num_cpus is not None and last.host_cpu is not None and last.host_cpu > FULL_CORES:
        return _cores_text(usages, label, num_cpus, unit)
    shard, learner = _shard(last), last.learner_busy
    is_tied = last.samples_per_insert is not None
    if is_tied and learner is not None and learner > FULL_LEARNER and learner >= (shard or 0.0):
        return f"the learner is full: busy {_percent(learner)} {where(last.n, label)}{_held_text(last)}"
    if shard is not None and shard >= FULL_SHARD:
        return f"the shard serializes: busy {_percent(shard)} {where(last.n, label)}"
    if (last.actors_held_back or 0.0) > _HELD_BACK and learner is not None:
        return (
            f"actors are held back {_percent(last.actors_held_back)} of the time, and the learner is busy {_percent(learner)} only: it waits for "
            f"batches; raise --learner.prefetch-batches, or --replay.num-shards"
        )
    known = {"learner": learner, "busiest shard": shard, "cores": last.host_cpu}
    text = f"no role is full {where(last.n, label)}"
    if not is_tied and learner is not None and learner > FULL_LEARNER:
        at = f", {where(last.n, label)}" if math.isfinite(last.n) else ""
        text = f"without a ratio the learner is full by itself (busy {_percent(known.pop('learner'))}{at}), which does not hold actors back"
    told = [f"{name} {_percent(busy)}" for name, busy in known.items() if busy is not None]
    return f"{text}{': ' if told else ''}{', '.join(told)}"


def actors_advice(usages: Sequence[Usage], law: Law | None, *, num_cpus: int | None) -> str:
    """Returns what to change so that twice as many actors would run at full speed; empty where the processors are full, since busy times
    then hold the waiting for one.

    Args:
      usages: of the axis of actors, by rising N, throughput in env steps a second.
    """
    last = usages[-1]
    if num_cpus is not None and last.host_cpu is not None and last.host_cpu > FULL_CORES:
        return ""
    rate = law.rate.value if law is not None else usages[0].throughput / usages[0].n
    target = 2 * last.n
    learner = last.learner_busy if last.samples_per_insert is not None else None
    shard = _shard(last)
    if learner is not None and learner > FULL_LEARNER and learner >= (shard or 0.0):
        assert last.samples_per_insert is not None
        factor = needed(last.n * rate, learner, last.throughput, most_busy=1.0)
        ratio = last.samples_per_insert / factor
        if factor <= 1.05:
            return f"it just keeps up with {counted(last.n, 'actors')}"
        return (
            f"{counted(last.n, 'actors')} at full speed would take a learner {factor:.1f} times as fast, or --replay.samples-per-insert {ratio:.2g} "
            f"in place of {last.samples_per_insert:g}"
        )
    if shard is not None and shard >= FULL_SHARD:
        shards = shards_needed(last, rate, target)
        return f"{counted(shards, 'shards')} would carry {target:g} actors"
    busiest = max(((b, name) for b, name in ((learner, "learner"), (shard, "shard")) if b), default=None)
    if busiest is None:
        return ""
    busy, name = busiest
    most = FULL_SHARD if name == "shard" else 1.0
    full_at = last.throughput * most / busy
    return f"the {name} would be the first to be full, at {full_at:,.0f} env steps/s: about {counted(round(full_at / rate), 'actors')}"


def shards_needed(usage: Usage, rate: float, num_actors: float) -> int:
    """Returns how many shards carry `num_actors` that each make `rate` env steps a second, none of them busier than FULL_SHARD.

    ceil(N lambda D / FULL_SHARD),   D = num_shards * busy / throughput
    """
    busy = usage.shard_busy if usage.shard_busy is not None else usage.shard_busy_max
    assert busy is not None
    wanted = needed(num_actors * rate, usage.num_shards * busy, usage.throughput, most_busy=FULL_SHARD)
    return max(math.ceil(round(wanted, 9)), usage.num_shards)


def needed(throughput: float, busy: float, measured: float, *, most_busy: float) -> float:
    """Returns how many of a role `throughput` takes, where `busy` of them (the sum of their busy parts) made `measured`."""
    return throughput * busy / measured / most_busy


def efficiencies(rounds: Sequence[dict[float, float]]) -> list[Efficiency]:
    """Returns (X(N) / N) / (X(n) / n), n the least N of all, from each round's throughput by N. Both are of one round, so that a machine that
    was slower for a while does not count; a round without its least N tells nothing.
    """
    every = sorted({n for one in rounds for n in one})
    found = []
    for n in every:
        least = every[0]
        values = sorted((one[n] / n) / (one[least] / least) for one in rounds if n in one and least in one)
        if values:
            found.append(Efficiency(n=n, median=median(values), low=values[0], high=values[-1]))
    return found


def others_text(usages: Sequence[Usage], num_cpus: int | None) -> str | None:
    """Says where processes of others took a part of the machine that changes the figures."""
    others = [
        usage.host_cpu * num_cpus - usage.run_cpu_cores
        for usage in usages
        if num_cpus is not None and usage.host_cpu is not None and usage.run_cpu_cores is not None
    ]
    if num_cpus is None or not others or max(others) <= _OTHERS * num_cpus:
        return None
    return f"other processes took up to {max(others):.1f} of {num_cpus} cores meanwhile: measure again on a machine with nothing else to do"


def unsettled_text(measured: Sequence[tuple[str, float, float]], warm_up_seconds: float) -> str | None:
    """Says where samples a step, over the window, were not those that the limiter holds the run to in the long run: then one side was still
    catching up with the other, and its rate is not the system's.

    Args:
      measured: (point in words, samples a step over the window, those asked for).
    """
    far = [(abs(math.log(max(found, 1e-9) / asked)), point, found, asked) for point, found, asked in measured]
    worst = max(far, default=None)
    num_off = sum(off > _SETTLED for off, *_ in far)
    if worst is None or num_off == 0:
        return None
    _, point, found, asked = worst
    return (
        f"{num_off} of {len(far)} runs had not settled: {found:.3g} samples a step in place of {asked:g} at {point}; give more than "
        f"{warm_up_seconds:g} --warm-up-seconds, or more --seconds"
    )


def counted(n: float, label: str) -> str:
    """Returns "1 actor", "2 actors"."""
    one = re.sub(r"s\b", "", label)
    return f"{n:g} {one if n == 1 else label}"


def where(n: float, label: str) -> str:
    """Returns "at 2 actors"; where the axis is the ratio and there is none, so that n is infinite, "without a ratio"."""
    return f"at {counted(n, label)}" if math.isfinite(n) else "without a ratio"


def _cores_text(usages: Sequence[Usage], label: str, num_cpus: int, unit: str) -> str:
    """The cores are full from the first N on from which they stay so. Of a step the run took cores / throughput seconds of one."""
    first = usages[-1]
    for usage in reversed(usages):
        if usage.host_cpu is None or usage.host_cpu <= FULL_CORES:
            break
        first = usage
    last = usages[-1]
    assert last.host_cpu is not None
    first_at = f"from {counted(first.n, label)} on" if math.isfinite(first.n) else where(first.n, label)
    roles = {"learner": last.learner_busy, "busiest shard": _shard(last)}
    told = [f"{name} {_percent(busy)}" for name, busy in roles.items() if busy is not None]
    return (
        f"{num_cpus} cores are full {first_at} ({_percent(last.host_cpu)} at the last"
        + (f"; busy, waiting for a core included: {', '.join(told)}" if told else "")
        + f"): the curve and its {_SIGMA} are theirs, not the design's"
        + (f"; one {unit} takes {1e3 * last.run_cpu_cores / last.throughput:.3g} ms of a core" if last.run_cpu_cores else "")
    )


def _shard(usage: Usage) -> float | None:
    return usage.shard_busy_max if usage.shard_busy_max is not None else usage.shard_busy


def _held_text(usage: Usage) -> str:
    held = usage.actors_held_back
    return "" if held is None or held <= 0 else f", which wait for it {_percent(held)} of the time"


def _interval(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2g}"
    return f"{_small(interval.value)} [{_small(interval.low)}, {_small(interval.high)}]"


def _small(value: float) -> str:
    return "0" if value < 5e-6 else f"{value:.2g}"


def _percent(part: float | None) -> str:
    assert part is not None
    return f"{100 * part:.0f} %"
