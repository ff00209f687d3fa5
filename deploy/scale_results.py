"""What `qfleet scale` makes of its table: for each axis the law, the efficiencies, a sentence and a picture; and the card of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from common import config as config_module
from common.config import RunConfig
from common.files import write_whole
from deploy import run_dir
from deploy.scale_table import Row, Settings
from deploy.scaling_advice import (
    Efficiency,
    Usage,
    actors_advice,
    counted,
    efficiencies,
    law_text,
    limit_text,
    others_text,
    unsettled_text,
)
from deploy.scaling_law import Interval, Law, fit

ENV_STEPS, UPDATES, SAMPLES = "actor/env_steps_per_second", "learner/updates_per_second", "learner/samples_per_second"
UNITS = {ENV_STEPS: "env steps/s", UPDATES: "updates/s", SAMPLES: "samples/s"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """What is swept, and what it is judged by."""

    name: str
    label: str
    """Of its values, in the plural."""
    metric: str
    """Its throughput, a column."""
    second: str
    """Another one to show."""
    has_law: bool
    """Whether its values count what works at once, so that a law of scalability can hold; else they are settings to choose from."""


AXES = {
    axis.name: axis
    for axis in (
        Axis(name="actors", label="actors", metric=ENV_STEPS, second=UPDATES, has_law=True),
        Axis(name="envs_per_actor", label="environments per actor", metric=ENV_STEPS, second=UPDATES, has_law=True),
        Axis(name="shards", label="shards", metric=SAMPLES, second=ENV_STEPS, has_law=True),
        Axis(name="batch_size", label="transitions a batch", metric=SAMPLES, second=UPDATES, has_law=False),
        Axis(name="devices", label="learner devices", metric=SAMPLES, second=ENV_STEPS, has_law=True),
        Axis(name="samples_per_insert", label="samples an insert", metric=ENV_STEPS, second=UPDATES, has_law=False),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisResult:
    """One axis, as far as it was measured."""

    axis: Axis
    values: list[float | str]
    """Rising; "none" last."""
    rows: dict[float | str, list[Row]]
    """By value, one a round."""
    law: Law | None
    efficiencies: list[Efficiency]
    sentence: str
    notes: list[str] = field(default_factory=list)

    def of(self, value: float | str, column: str) -> list[float]:
        """Returns a column at a value, one number a round that has it."""
        return [row[column] for row in self.rows[value] if column in row]


def write_results(
    config: RunConfig,
    axes: Mapping[str, Sequence[Any]],
    rows: Sequence[Row],
    out: Path,
    *,
    seed: int,
    warm_up_seconds: float,
    commit: str | None,
) -> list[str]:
    """Writes scale.json and a picture of each axis; returns the sentences.

    Raises:
      OSError: where that cannot be.
    """
    from deploy.scale_figures import draw_axis

    num_cpus = run_dir.num_cpus() if config.address is None else None
    results = [
        result
        for name in axes
        if (
            result := axis_result(
                AXES[name], config, axes[name], rows, num_cpus=num_cpus, seed=seed, warm_up_seconds=warm_up_seconds
            )
        )
        is not None
    ]
    card = make_card(config, commit)
    for result in results:
        write_whole(out / f"scale-{result.axis.name}.png", draw_axis(result, card))
    run_dir.write_json(out / "scale.json", {"card": card, "axes": {result.axis.name: as_json(result) for result in results}})
    told = [sentence for result in results for sentence in (result.sentence, *result.notes)]
    names = ", ".join(["scale.csv", "scale.json", *(f"scale-{result.axis.name}.png" for result in results)])
    return [*dict.fromkeys(told), f"see {out}: {names}"] if results else [f"nothing was measured; see {out / 'runs'}"]


def axis_result(
    axis: Axis,
    config: RunConfig,
    values: Sequence[Any],
    rows: Sequence[Row],
    *,
    num_cpus: int | None,
    seed: int,
    warm_up_seconds: float,
) -> AxisResult | None:
    """Returns what the rows say of an axis: those that differ from the recipe's settings in nothing else. None where there are none."""
    base = Settings.of(config)
    others = [name for name in Settings.names() if name != axis.name]
    mine: dict[float | str, list[Row]] = {}
    for row in rows:
        if row[axis.name] in values and all(row[name] == getattr(base, name) for name in others):
            mine.setdefault(row[axis.name], []).append(row)
    if not mine:
        return None
    ordered = sorted(mine, key=_number)
    numbers = [value for value in ordered if not isinstance(value, str)]
    law = None
    if axis.has_law:
        pairs = [(value, row[axis.metric]) for value in numbers for row in mine[value]]
        law = fit([n for n, _ in pairs], [x for _, x in pairs], np.random.default_rng(seed))
    by_round: dict[int, dict[float, float]] = {}
    for value in numbers:
        for row in mine[value]:
            by_round.setdefault(row["round"], {})[value] = row[axis.metric]
    found = efficiencies(list(by_round.values())) if axis.has_law else []
    usages = [_usage(axis, value, mine[value], num_cpus) for value in ordered]
    in_rounds = [
        (counted(_number(value), axis.label), row[SAMPLES] / row[ENV_STEPS], row["samples_per_insert"])
        for value in ordered
        for row in mine[value]
        if not isinstance(row["samples_per_insert"], str)
    ]
    notes = [others_text(usages, num_cpus), unsettled_text(in_rounds, warm_up_seconds)]
    return AxisResult(
        axis=axis,
        values=ordered,
        rows=mine,
        law=law,
        efficiencies=found,
        sentence=_sentence(axis, ordered, usages, found, law, num_cpus),
        notes=[note for note in notes if note is not None],
    )


def _usage(axis: Axis, value: float | str, rows: Sequence[Row], num_cpus: int | None) -> Usage:
    def middle(column: str) -> float | None:
        told = [row[column] for row in rows if column in row]
        return median(told) if told else None

    settings = Settings(**{name: rows[0][name] for name in Settings.names()})
    throughput = middle(axis.metric)
    assert throughput is not None
    return Usage(
        n=_number(value),
        throughput=throughput,
        num_shards=settings.shards,
        num_devices=settings.devices,
        samples_per_insert=settings.ratio,
        shard_busy=middle("shard/busy_fraction"),
        shard_busy_max=middle("shard/busy_fraction_max"),
        learner_busy=middle("learner/busy_fraction"),
        host_cpu=middle("host/cpu_fraction") if num_cpus is not None else None,
        run_cpu_cores=middle("run/cpu_cores") if num_cpus is not None else None,
        actors_held_back=middle("shard/actors_waiting_fraction"),
    )


def _sentence(
    axis: Axis,
    values: Sequence[float | str],
    usages: Sequence[Usage],
    found: Sequence[Efficiency],
    law: Law | None,
    num_cpus: int | None,
) -> str:
    unit = UNITS[axis.metric]
    rates = [f"{usage.throughput:,.0f}" for usage in usages]
    rates[0] += f" {unit}"
    parts = [f"{axis.label}: " + ", ".join(f"{rate} {_at(value)}" for rate, value in zip(rates, values, strict=True))]
    if axis.has_law and len(found) > 1:
        last = found[-1]
        parts.append(f"efficiency {last.median:.2f} ({last.low:.2f} to {last.high:.2f}) at {last.n:g}")
    if axis.has_law:
        parts.append(law_text(law, len(values), axis.label))
    elif len(values) > 1:
        best = max(range(len(values)), key=lambda index: usages[index].throughput)
        parts.append(f"most {_at(values[best])}")
    limit = limit_text(usages, axis.label, num_cpus=num_cpus, unit=unit.removesuffix("s/s"))
    advice = actors_advice(usages, law, num_cpus=num_cpus) if axis.name == "actors" else ""
    return "; ".join(part for part in (*parts, limit, advice) if part)


def _number(value: float | str) -> float:
    return math.inf if isinstance(value, str) else value


def _at(value: float | str) -> str:
    return "without a ratio" if isinstance(value, str) else f"at {value_text(value)}"


def value_text(value: float | str) -> str:
    """Writes a value of an axis, as its picture has it."""
    return "no ratio" if isinstance(value, str) else f"{value:g}"


def as_json(result: AxisResult) -> dict[str, Any]:
    """Returns an axis as scale.json has it; what is infinite is null."""
    law = result.law
    return {
        "metric": result.axis.metric,
        "points": [
            {
                "value": value,
                "rounds": len(result.rows[value]),
                **{metric: _spread(result.of(value, metric)) for metric in UNITS},
            }
            for value in result.values
        ],
        "efficiency": [asdict(one) for one in result.efficiencies],
        "law": None
        if law is None
        else {
            "lambda": _interval(law.rate),
            "sigma": _interval(law.sigma),
            "kappa": _interval(law.kappa),
            "peak": _interval(law.peak),
            "relative_residual": law.residual,
        },
        "sentence": result.sentence,
        "notes": result.notes,
    }


def make_card(config: RunConfig, commit: str | None) -> dict[str, Any]:
    """Returns on what the figures hold: hardware, versions, commit and settings."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "recipe": config.recipe,
        "game": config.env.game,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": run_dir.hardware()
        | {"usable_cpus": run_dir.num_cpus(), "memory_bytes": int(psutil.virtual_memory().total), "gpus": gpus},
        "address": config.address,
        "versions": run_dir.versions(),
        "commit": commit,
        "config": config_module.as_dict(config),
    }


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {name: _finite(value) for name, value in asdict(interval).items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}
