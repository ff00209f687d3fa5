"""Run directories as a run leaves them, with known numbers, for the tests of reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import config as configs
from deploy.recipes import RECIPES

STEPS_PER_SECOND = 50.0


def write_run(
    path: Path,
    *,
    seed: int = 0,
    game: str = "pong",
    recipe: str = "pong",
    level: float = 0.0,
    num_rows: int = 20,
    sticky: float = 0.0,
    learning_rate: float | None = None,
    ends: bool = True,
    fault: str | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    """Writes a run that was evaluated in every second row, at `level - 20 + row`; its rows are ten seconds apart."""
    config = RECIPES[recipe]()
    env = replace(config.env, game=game, sticky_action_probability=sticky)
    learner = config.learner if learning_rate is None else replace(config.learner, learning_rate=learning_rate)
    config = replace(config, env=env, learner=learner, seed=seed, run_dir=str(path))
    path.mkdir()
    info = {"format_version": 1, "run": path.name, "versions": {"python": "3.11"}, "hardware": {"cpu": "abacus"}}
    (path / "run.json").write_text(json.dumps(info | {"config": configs.as_dict(config)}))
    rows = [_row(index, level, config.learner.batch_size) for index in range(num_rows)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ends:
        (path / "summary.json").write_text(json.dumps(_summary(rows, seed, level, fault, env.protocol_name) | (summary or {})))
    return path


def _row(index: int, level: float, batch_size: int) -> dict[str, float]:
    seconds = 10.0 * (index + 1)
    steps = int(STEPS_PER_SECOND * seconds)
    updates = 4 * steps
    row = {
        "time_seconds": seconds,
        "env_steps": steps,
        "frames": 4 * steps,
        "updates": updates,
        "samples": updates * batch_size,
        "actor/env_steps_per_second": STEPS_PER_SECOND,
        "learner/updates_per_second": 4 * STEPS_PER_SECOND + index,
        "learner/busy_fraction": 0.5,
        "learner/params_lag_updates": 100.0 * index,
        "shard/resident_bytes": 2**20 * index,
    }
    if index % 2:
        evaluation = {"evaluator/return_mean": level - 20 + index, "evaluator/params_version": updates - 40}
        row |= evaluation | {"evaluator/began_seconds": seconds - 1, "evaluator/began_env_steps": steps - 50}
    return row


def _summary(rows: list[dict[str, float]], seed: int, level: float, fault: str | None, protocol: str) -> dict[str, Any]:
    last = rows[-1]
    evaluation = {"mean_return": level - 1, "returns": [level - 2, level], "episodes": 2, "epsilon": 0.0, "protocol": protocol}
    return {
        "seed": seed,
        "stopped_by": "fault" if fault else "max_minutes",
        "fault": fault,
        "total_wall_seconds": last["time_seconds"],
        **{name: last[name] for name in ("env_steps", "frames", "updates", "samples")},
        "evaluation": evaluation,
        "ledger": {"sent": 9, "inserted": 9, "refused": 0, "lost": {}, "balanced": True},
    }
