"""The picture of an axis of `qfleet scale`: its throughput with the fitted law, another rate, and how busy the roles are."""

from __future__ import annotations

import io
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import ByteSize
from deploy.scale_results import UNITS, AxisResult, value_text
from deploy.scaling_law import band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE = 20.0
_POINTS, _LAW, _IDEAL = "#0072b2", "#d55e00", "#888888"
_BUSY = (
    ("learner/busy_fraction", "learner", "#0072b2"),
    ("shard/busy_fraction_max", "busiest shard", "#d55e00"),
    ("host/cpu_fraction", "cores of this host", "#009e73"),
    ("shard/actors_waiting_fraction", "actors held back by the ratio", "#cc79a7"),
)


def draw_axis(result: AxisResult, card: dict[str, Any]) -> bytes:
    """Returns the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    at = _positions(result)
    _draw_rate(panels[0], result, result.axis.metric, at, has_law=result.axis.has_law)
    _draw_rate(panels[1], result, result.axis.second, at, has_law=False)
    _draw_busy(panels[2], result, at)
    for panel in panels:
        if _is_wide(result, at):
            panel.set_xscale("log", base=2)
            panel.minorticks_off()
        panel.set_xticks(at, [value_text(value) for value in result.values])
        panel.set_xlabel(result.axis.label)
        panel.set_xlim(*_limits(result, at))
        panel.grid(alpha=0.3)
    figure.suptitle(_title(card), fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, dpi=120, format="png")
    pyplot.close(figure)
    return out.getvalue()


def _positions(result: AxisResult) -> list[float]:
    """Returns where values lie: as numbers where they count what works at once, else side by side."""
    return [float(value) for value in result.values] if result.axis.has_law else [float(i) for i in range(len(result.values))]


def _is_wide(result: AxisResult, at: list[float]) -> bool:
    """Whether values need a logarithmic scale to be told apart; in proportion is a straight line there too."""
    return result.axis.has_law and at[-1] > _WIDE * at[0]


def _limits(result: AxisResult, at: list[float]) -> tuple[float, float]:
    if _is_wide(result, at):
        return at[0] / 1.2, at[-1] * 1.2
    return (0.0, 1.06 * at[-1]) if result.axis.has_law else (at[0] - 0.5, at[-1] + 0.5)


def _draw_rate(panel: Axes, result: AxisResult, metric: str, at: list[float], *, has_law: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    spread = [result.of(value, metric) for value in result.values]
    middle = [median(values) for values in spread]
    panel.plot(at, middle, color=_POINTS, linewidth=1.4, label="median of the rounds")
    panel.plot(
        [x for x, values in zip(at, spread, strict=True) for _ in values],
        [value for values in spread for value in values],
        color=_POINTS,
        marker="o",
        linestyle="",
        markersize=4,
        alpha=0.6,
        label="a round",
    )
    top = max(max(values) for values in spread)
    if has_law:
        top = max(top, _draw_law(panel, result, middle, at))
        for one in result.efficiencies[1:]:
            index = result.values.index(one.n)
            is_low = min(spread[index]) < 0.12 * top and not _is_wide(result, at)
            y, offset, anchor = (max(spread[index]), 7, "bottom") if is_low else (min(spread[index]), -7, "top")
            panel.annotate(
                f"{one.median:.0%}", (at[index], y), (0, offset), textcoords="offset points", ha="center", va=anchor, fontsize=8
            )
    if _is_wide(result, at):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_ylim(0.6 * min(min(values) for values in spread), 1.5 * top)
    else:
        panel.set_ylim(0, 1.12 * top)
    panel.yaxis.set_major_formatter("{x:,.0f}" if top >= 20 else "{x:g}")
    panel.set_ylabel(UNITS[metric])
    name = ", percent: efficiency" if has_law and len(result.efficiencies) > 1 else ""
    panel.set_title(f"{UNITS[metric]}{name}", fontsize="medium")
    if has_law:
        panel.legend(fontsize="x-small", loc="upper left")


def _draw_law(panel: Axes, result: AxisResult, middle: list[float], at: list[float]) -> float:
    """Draws the ideal line and the law, where there is one; returns the greatest value to be seen, which the ideal may go beyond."""
    least, most = _limits(result, at)
    ideal = [middle[0] / at[0] * n for n in (least, most)]
    panel.plot([least, most], ideal, color=_IDEAL, linewidth=1, linestyle=":", label="in proportion to the least")
    top = min(middle[0] / at[0] * at[-1], 2.2 * max(middle))
    if result.law is not None:
        x = np.linspace(at[0], most, 200)
        fitted, low, high = band(result.law, x)
        panel.plot(x, fitted, color=_LAW, linewidth=1.4, linestyle="--", label=_law_name(result))
        panel.fill_between(x, low, high, color=_LAW, alpha=0.15, linewidth=0)
    return top


def _law_name(result: AxisResult) -> str:
    law = result.law
    assert law is not None
    sigma = f"$\\sigma$ {law.sigma.value:.2g}"
    name = "law of scalability" if law.kappa is not None else "Amdahl's law"
    kappa = f", $\\kappa$ {law.kappa.value:.2g}" if law.kappa is not None else ""
    return f"{name}, 95 %: {sigma}{kappa}"


def _draw_busy(panel: Axes, result: AxisResult, at: list[float]) -> None:
    for column, name, color in _BUSY:
        told = [(x, values) for x, value in zip(at, result.values, strict=True) if (values := result.of(value, column))]
        if told:
            panel.plot(
                [x for x, _ in told],
                [100 * median(values) for _, values in told],
                color=color,
                marker="o",
                markersize=4,
                label=name,
            )
    panel.set_ylim(0, 105)
    panel.set_ylabel("% of the time")
    panel.set_title("busy", fontsize="medium")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="x-small", loc="best")


def _title(card: dict[str, Any]) -> str:
    hardware = card["hardware"]
    where = f"{hardware['usable_cpus']} CPUs of {hardware['cpu']}, {ByteSize(hardware['memory_bytes'])}"
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    on = f"{where}, {gpus}" if card["address"] is None else f"cluster at {card['address']}; driver on {where}"
    commit = (card["commit"] or "no commit")[:10]
    return f"qfleet scale {card['recipe']} ({card['game']}) on {on}; {card['date']}, {commit}".replace("$", r"\$")
