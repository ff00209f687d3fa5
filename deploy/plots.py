"""Draws learning curves from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl; a line that a killed process left torn is passed over."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


_LINES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("evaluator/return_mean", "evaluator/began_seconds", "evaluator/began_env_steps", "evaluation", {"marker": "o"}),
    ("actor/training_return_mean", "time_seconds", "env_steps", "training, mean of 20 episodes", {"alpha": 0.5}),
)


def draw_learning_curve(run_dirs: Sequence[Path], out: Path) -> None:
    """Draws return over wall-clock minutes and over env steps, one line a run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, path in enumerate(run_dirs):
        rows = read_rows(path)
        prefix = f"{path.name} " if len(run_dirs) > 1 else ""
        colors = (f"C{number}", f"C{number}") if len(run_dirs) > 1 else ("C0", "C1")
        for (name, seconds, steps, label, style), color in zip(_LINES, colors, strict=True):
            kept = [row for row in rows if name in row]
            values = [row[name] for row in kept]
            axes[0].plot([row[seconds] / 60 for row in kept], values, label=prefix + label, color=color, **style)
            axes[1].plot([row[steps] for row in kept], values, label=prefix + label, color=color, **style)
    axes[0].set(xlabel="wall-clock minutes", ylabel="raw return of an episode")
    axes[1].set(xlabel="env steps")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
