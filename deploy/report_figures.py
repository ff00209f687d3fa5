"""The figures of a report: what is plotted, where it lies in the page's SVG, and the same as CSV and PNG.

A `Panel` holds the data; the SVG, the CSV and the PNG are all made of it and of nothing else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.aggregates import Floats, mean_curve
from deploy.report_runs import Group, Row, Run, ascending, evaluations_over, number

WIDTH, HEIGHT = 360.0, 224.0
MARKS_WIDTH = 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 18.0, 12.0, 40.0
_MOST_BINS = 100
_ROWS_IN_A_BIN = 3
NUM_COLORS = 8
_PNG_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a51a3", "#555555")
_LEAST_LABEL_GAP = 11.0  # So that two letters at the ends of lines do not lie on one another.

_AXES = {
    "env_steps": "env steps",
    "samples": "gradient samples",
    "minutes": "wall-clock minutes",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: a run, or the mean of a group's runs with its interval."""

    letter: str
    color: int
    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    is_background: bool = False
    """A single seed behind the mean: thin, without a letter."""
    has_points: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One coordinate system."""

    game: str
    name: str
    """In CSV files."""
    title: str
    x_name: str
    x_label: str
    lines: list[Line]
    references: list[tuple[str, float]] = field(default_factory=list)
    """Levels to compare with; those beyond the data are not drawn."""
    from_zero: bool = False


def learning_panels(groups: Sequence[Group], references: Sequence[tuple[str, float]]) -> list[Panel]:
    """Returns one panel for each x axis, of the groups of one game; none where nothing was evaluated."""
    frames = groups[0].runs[0].config.env.frames_per_step
    labels = _AXES | ({"env_steps": f"env steps (frames: times {frames})"} if frames > 1 else {})
    panels = []
    for axis, label in _AXES.items():
        lines = [line for group in groups for line in _learning_lines(group, axis)]
        if lines:
            panels.append(
                Panel(
                    game=groups[0].game,
                    name=axis,
                    title=f"Mean return over {label}",
                    x_name=axis,
                    x_label=labels[axis],
                    lines=lines,
                    references=list(references),
                )
            )
    return panels


def _learning_lines(group: Group, axis: str) -> list[Line]:
    """Returns the runs of a group, thin, and their mean with its interval before them; a single run alone."""
    curves = [(run, *evaluations_over(run, axis)) for run in group.runs]
    curves = [curve for curve in curves if len(curve[1])]
    is_one = len(group.runs) == 1
    lines = [
        Line(
            letter=group.letter,
            color=group.index,
            name=f"{group.label}, {run.name} (seed {run.config.seed})",
            x=x,
            y=y,
            is_background=not is_one,
            has_points=True,
        )
        for run, x, y in curves
    ]
    mean = mean_curve([(x, y) for _, x, y in curves], np.random.default_rng(0)) if len(curves) > 1 else None
    if mean is not None:
        name = f"{group.label}, mean of {len(curves)} seeds"
        mean_line = Line(letter=group.letter, color=group.index, name=name, x=mean.x, y=mean.mean, low=mean.low, high=mean.high)
        lines.append(mean_line)
    return lines


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column of metrics.jsonl over time."""

    name: str
    title: str
    metrics: tuple[str, ...]
    """Its names, the newest first."""
    scale: float = 1.0
    from_zero: bool = True


QUANTITIES = (
    Quantity("env_steps_per_second", "Env steps per second", ("actor/env_steps_per_second",)),
    Quantity("updates_per_second", "Updates per second", ("learner/updates_per_second",)),
    Quantity("samples_per_second", "Gradient samples per second", ("learner/samples_per_second",)),
    Quantity("samples_per_insert", "Samples per insert", ("shard/samples_per_insert",)),
    Quantity("acting_lag_updates", "Lag of parameters at acting, updates", ("actor/params_lag_updates",)),
    Quantity("sampling_lag_updates", "Lag of parameters at sampling, updates", ("learner/params_lag_updates",)),
    Quantity("learner_busy_percent", "Learner busy, % of the time", ("learner/busy_fraction",), 100.0),
    Quantity("replay_mebibytes", "Memory of replay, MiB", ("shard/resident_bytes", "shard/used_bytes"), 2.0**-20),
    Quantity("training_return", "Training return, exploring", ("actor/training_return_mean",), 1.0, False),
)


def throughput_panels(groups: Sequence[Group]) -> list[Panel]:
    """Returns one panel for each quantity that a run of these groups has recorded, a line a run, over minutes."""
    panels = []
    for quantity in QUANTITIES:
        lines = []
        for group in groups:
            for run in group.runs:
                x, y = over_minutes(run, quantity)
                name = f"{group.label}, {run.name} (seed {run.config.seed})"
                if len(x):
                    lines.append(Line(letter=group.letter, color=group.index, name=name, x=x, y=y))
        if lines:
            panels.append(
                Panel(
                    game=groups[0].game,
                    name=quantity.name,
                    title=quantity.title,
                    x_name="minutes",
                    x_label="minutes",
                    lines=lines,
                    from_zero=quantity.from_zero,
                )
            )
    return panels


def over_minutes(run: Run, quantity: Quantity) -> tuple[Floats, Floats]:
    """Returns minutes and values, at most 100: means over equal times, in which a row counts as long as it lasted.

    A row's rates are of what was reported since the row before, which need not have happened then: two rows may come within
    milliseconds, and a report late. So a mean is of three rows at least.
    """
    rows = ascending(run.rows, "time_seconds")
    points = []
    before = 0.0
    for row in rows:
        value = _first_number(row, quantity.metrics)
        if value is not None:
            points.append((row["time_seconds"] / 60, value * quantity.scale, row["time_seconds"] - before))
        before = row["time_seconds"]
    if not points:
        return np.empty(0), np.empty(0)
    minutes, values, lasted = np.array(points, np.float64).T
    num_bins = max(min(_MOST_BINS, len(points) // _ROWS_IN_A_BIN), 1)
    begin, end = minutes[0], minutes[-1]
    bins = np.minimum(((minutes - begin) / max(end - begin, 1e-9) * num_bins).astype(int), num_bins - 1)
    total = np.bincount(bins, lasted, num_bins)
    kept = total > 0
    x = np.bincount(bins, lasted * minutes, num_bins)[kept] / total[kept]
    y = np.bincount(bins, lasted * values, num_bins)[kept] / total[kept]
    return x, y


def _first_number(row: Row, names: Iterable[str]) -> float | None:
    return next((value for name in names if (value := number(row, name)) is not None), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnLine:
    """A line in the units of the SVG."""

    name: str
    color: int
    is_background: bool
    path: str
    band: str
    points: list[tuple[float, float, str]]
    """x, y, and what a pointer over it is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A panel in the units of the SVG, for the page's template."""

    panel: Panel
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[DrawnLine]
    references: list[tuple[float, str, bool]]
    """y, name, and whether it is high: its name then stands at the left, where a curve that rises is not."""
    letters: list[tuple[float, float, str, int]]
    summary: str
    """Says in words what is seen."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Takes values of [low, high] to positions from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 2)


def draw(panel: Panel) -> Drawing:
    """Lays out a panel."""
    x_scale, y_scale = scales(panel)
    front = [line for line in panel.lines if not line.is_background]
    has_letters = len({line.letter for line in panel.lines}) > 1
    ends = [(x_scale(line.x[-1]) + 5, y_scale(line.y[-1]) + 3.5, line.letter, line.color % NUM_COLORS) for line in front]
    return Drawing(
        panel=panel,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        x_ticks=[(x_scale(tick), compact(tick)) for tick in _ticks(x_scale.low, x_scale.high, 5)],
        y_ticks=[(y_scale(tick), compact(tick)) for tick in _ticks(y_scale.low, y_scale.high, 5)],
        lines=[_draw_line(line, panel, x_scale, y_scale) for line in panel.lines],
        references=[
            (y_scale(value), name, value > (y_scale.low + y_scale.high) / 2)
            for name, value in panel.references
            if y_scale.low <= value <= y_scale.high
        ],
        letters=_spread(ends) if has_letters else [],
        summary="; ".join(f"{line.name}: {compact(line.y[0])} at first, {compact(line.y[-1])} at last" for line in front),
    )


def scales(panel: Panel) -> tuple[Scale, Scale]:
    """Returns where values lie, horizontally and vertically."""
    values = [line.y for line in panel.lines]
    values += [band for line in panel.lines for band in (line.low, line.high) if band is not None]
    low, high = (float(value) for value in (min(v.min() for v in values), max(v.max() for v in values)))
    if panel.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or max(abs(high) * 0.06, 1.0)
    bottom = low if panel.from_zero and low == 0 else low - margin
    last = max(float(line.x[-1]) for line in panel.lines)
    return (
        Scale(0.0, last or 1.0, _LEFT, WIDTH - _RIGHT),
        Scale(bottom, high + margin, HEIGHT - _BOTTOM, _TOP),
    )


def _draw_line(line: Line, panel: Panel, x_scale: Scale, y_scale: Scale) -> DrawnLine:
    at = [x_scale(x) for x in line.x]
    band = ""
    if line.low is not None and line.high is not None:
        upper = [f"{x} {y_scale(y)}" for x, y in zip(at, line.high, strict=True)]
        lower = [f"{x} {y_scale(y)}" for x, y in zip(at, line.low, strict=True)]
        band = f"M{' L'.join(upper + lower[::-1])}Z"
    told = [f"{line.name}: {plain(y)} at {plain(x)} {panel.x_label}" for x, y in zip(line.x, line.y, strict=True)]
    height = [y_scale(y) for y in line.y]
    return DrawnLine(
        name=line.name,
        color=line.color % NUM_COLORS,
        is_background=line.is_background,
        path="M" + " L".join(f"{x} {y}" for x, y in zip(at, height, strict=True)),
        band=band,
        points=list(zip(at, height, told, strict=True)) if line.has_points else [],
    )


def _spread(ends: list[tuple[float, float, str, int]]) -> list[tuple[float, float, str, int]]:
    """Moves letters down that would lie on another one at nearly the same place."""
    placed: list[tuple[float, float, str, int]] = []
    for x, y, letter, color in sorted(ends, key=lambda end: end[1]):
        if any(other == letter and abs(y - at) < _LEAST_LABEL_GAP for _, at, other, _ in placed):
            continue
        near = [at for other_x, at, _, _ in placed if abs(other_x - x) < _LEAST_LABEL_GAP]
        placed.append((x, max([y, *(at + _LEAST_LABEL_GAP for at in near)]), letter, color))
    return placed


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def compact(value: float) -> str:
    """Writes a number in few characters: 1.5M, 370k, 19.4."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{name}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def plain(value: float) -> str:
    """Writes a number to read: 12,345, 19.4, 0.013."""
    text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An estimate of one method in the figure of aggregates, in the units of the SVG."""

    letter: str
    color: int
    y: float
    x: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkPanel:
    """One statistic, a row a method."""

    title: str
    height: float
    bottom: float
    ticks: list[tuple[float, str]]
    marks: list[Mark]


def draw_marks(title: str, rows: Sequence[tuple[str, int, float, float | None, float | None]]) -> MarkPanel:
    """Lays out (letter, color, value, low, high) of each method."""
    values = [value for row in rows for value in row[2:] if value is not None]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(abs(high) * 0.2, 0.1)
    scale = Scale(low - margin, high + margin, 34.0, MARKS_WIDTH - _RIGHT)
    row_height = 30.0
    bottom = 14.0 + row_height * len(rows)
    return MarkPanel(
        title=title,
        height=bottom + 20,
        bottom=bottom,
        ticks=[(scale(tick), compact(tick)) for tick in _ticks(scale.low, scale.high, 4)],
        marks=[
            Mark(
                letter=letter,
                color=color % NUM_COLORS,
                y=round(20 + row_height * (row + 0.5), 2) - 4,
                x=scale(value),
                low=None if low is None else scale(low),
                high=None if high is None else scale(high),
                text=f"{value:.2f}".replace("-", "\N{MINUS SIGN}"),
            )
            for row, (letter, color, value, low, high) in enumerate(rows)
        ],
    )


def csv_rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Returns every plotted point."""
    rows = []
    for panel in panels:
        for line in panel.lines:
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                row: dict[str, Any] = {"game": panel.game, "quantity": panel.name, "line": line.name}
                row |= {"x_name": panel.x_name, "x": float(x), "y": float(y)}
                row["low_95"] = "" if line.low is None else float(line.low[i])
                row["high_95"] = "" if line.high is None else float(line.high[i])
                rows.append(row)
    return rows


def png(panels: Sequence[Panel]) -> bytes:
    """Draws panels in rows of three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = min(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    size = (4.4 * num_columns, 3.2 * num_rows)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for line in panel.lines:
            style: dict[str, Any] = {"color": _PNG_COLORS[line.color % NUM_COLORS], "marker": "." if line.has_points else None}
            style |= {"alpha": 0.35, "linewidth": 0.8} if line.is_background else {"linewidth": 1.4}
            axis.plot(line.x, line.y, label=None if line.is_background else _without_dollars(line.name), **style)
            if line.low is not None and line.high is not None:
                axis.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0)
        axis.set_title(_without_dollars(f"{panel.game}: {panel.title}"), fontsize="small")
        axis.set_xlabel(panel.x_label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="xx-small")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, dpi=110, format="png")
    pyplot.close(figure)
    return out.getvalue()


def _without_dollars(text: str) -> str:
    """Keeps Matplotlib from reading a name as a formula, or, where it begins with an underscore, from leaving it out."""
    return f" {text}".replace("$", r"\$")
