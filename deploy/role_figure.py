"""The picture of one role under load: latency against the offered rate, up to its limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.role_loads import Row
from deploy.scale_role import ramp


def draw_role(rows: Sequence[Row], found: dict[str, Any], *, title: str, out: Path) -> None:
    """Draws a panel for each axis: medians of the rounds as lines, the rounds as dots, the limit and the knee as verticals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(found)
    figure, panels = pyplot.subplots(1, len(axes), figsize=(5.5 * len(axes), 4.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes, panels[0], strict=True):
        mine = [row for row in rows if row.axis == axis]
        if axis == "answers":
            _draw_depths(panel, mine, found[axis]["update"]["limit"]["median"])
        elif axis == "updates":
            _draw_updates(panel, mine, found[axis]["update"]["limit"]["median"])
        else:
            _draw_latencies(panel, mine, found[axis])
    figure.suptitle(title)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _draw_latencies(panel: Any, rows: Sequence[Row], calls: dict[str, Any]) -> None:
    """One line of p50 and one of p99 for each kind of call, against its own offered rate in parts of its limit where there are two."""
    several = len(calls) > 1
    for number, (call, of) in enumerate(calls.items()):
        mine = [row for row in rows if row.call == call]
        scale = of["limit"]["median"] if several else 1.0
        for name, style, color in (("p50_ms", "--", f"C{2 * number}"), ("p99_ms", "-", f"C{2 * number + 1}")):
            curve = ramp(mine)
            label = f"{call} {name.removesuffix('_ms')}"
            panel.plot([at["offered"] / scale for at in curve], [at[name] for at in curve], style, color=color, label=label)
            for is_full, marker in ((False, "o"), (True, "x")):
                dots = [
                    row for row in mine if row.loop == "open" and (row.limited_by in ("cores", "peers", "transport")) == is_full
                ]
                xs, ys = [row.offered_per_second / scale for row in dots], [getattr(row, name) for row in dots]
                panel.plot(xs, ys, marker, color=color, markersize=4, alpha=0.6)
        if of["knee"] is not None:
            panel.axvline(
                of["knee"] / scale, color=f"C{2 * number + 1}", linestyle=":", linewidth=1, label=f"knee {of['knee']:,.0f}/s"
            )
        panel.axvline(
            of["limit"]["median"] / scale, color="0.5", linewidth=1, label=f"limit {of['limit']['median']:,.0f} {call}s/s"
        )
    of = next(iter(calls.values()))
    panel.set(xlabel="offered, as part of the limit" if several else f"offered {of['unit']}", ylabel="ms", yscale="log")
    panel.set_title("x: processors, peers or Ray were the limit, not the role", fontsize="small")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small", loc="best", framealpha=0.6)


def _draw_updates(panel: Any, rows: Sequence[Row], limit: float) -> None:
    """Updates a second and the part of the time without a batch, against the batches that shards offer."""
    opened = [row for row in rows if row.loop == "open"]
    offered = [row.offered_per_second for row in opened]
    panel.plot(offered, [row.carried_per_second for row in opened], "o", color="C0", alpha=0.7, label="updates/s")
    panel.axline((0.0, 0.0), slope=1.0, color="0.7", linewidth=1)
    panel.axhline(limit, color="0.5", linewidth=1, label=f"limit {limit:,.1f} updates/s")
    panel.set(xlabel="batches offered a second", ylabel="updates/s", xlim=(0, None), ylim=(0, None))
    waiting = panel.twinx()
    waiting.plot(offered, [row.wait_fraction for row in opened], "x", color="C3", label="waits, part of the time")
    waiting.set(ylabel="part of the time without a batch", ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small", loc="upper left")
    waiting.legend(fontsize="x-small", loc="upper right")


def _draw_depths(panel: Any, rows: Sequence[Row], limit: float) -> None:
    """Updates a second against how late shards answer; dotted: what the depth allows, its batches in an answer's time."""
    late = [row for row in rows if row.answer_ms > 0]
    for number, depth in enumerate(sorted({row.prefetch_batches for row in late})):
        mine = sorted((row for row in late if row.prefetch_batches == depth), key=lambda row: row.answer_ms)
        color = f"C{number}"
        panel.plot(
            [row.answer_ms for row in mine],
            [row.carried_per_second for row in mine],
            "o",
            color=color,
            markersize=4,
            label=f"prefetch_batches {depth:.0f}",
        )
        panel.plot(
            [row.answer_ms for row in mine],
            [min(limit, 1e3 * depth / row.answer_ms) for row in mine],
            ":",
            color=color,
            alpha=0.7,
        )
    panel.set(xlabel="ms from request to answer", ylabel="updates/s", xscale="log", ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small", loc="lower left")
