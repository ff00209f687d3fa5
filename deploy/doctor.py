"""`qfleet doctor [RUN]`: where each role's time goes, what holds the run back, and the flag that changes it.

It reads what the run writes anyway, `metrics.jsonl`, live or after the fact; `deploy/diagnosis.py` judges it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import RunConfig
from common.errors import UserError
from deploy import locks
from deploy.diagnosis import PHASES, Window, diagnose, verdict
from deploy.plots import read_rows
from deploy.run_dir import read_config, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorFlags:
    """Says where the time of a run goes, what holds it back, and what to change."""

    minutes: float = 5.0
    """How far to look back from the newest row of metrics, within the run's last command."""
    json: Path | None = None
    """Where to write findings and figures as JSON."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"--minutes must be positive, got {self.minutes}")


def doctor(path: Path, flags: DoctorFlags) -> int:
    """Prints where the time goes and what to change; returns the exit status.

    Raises:
      UserError: where there is no run, or none that has told anything yet.
    """
    config = read_config(path)
    window = _read(path, config, flags.minutes)
    under_way = locks.is_held(path)
    findings = diagnose(window, config, is_running=under_way)
    sentence = verdict(window, findings, config)
    state = "under way" if under_way else "at rest"
    print(f"{path}: {window.seconds / 60:.1f} minutes of the last command, {len(window.rows)} rows, {state}")
    for line in _table(window, config):
        print(f"  {line}")
    print(sentence)
    for finding in findings[1:]:
        print(f"also: {finding}")
    if flags.json is not None:
        means = {name: window.mean(name) for name in window.names()}
        try:
            write_json(flags.json, {"verdict": sentence, "findings": [asdict(f) for f in findings], "means": means})
        except OSError as error:
            raise UserError(f"--json {flags.json}: {error.strerror}") from error
    return 0


def newest_run(root: Path = Path("runs")) -> Path:
    """Returns the run under `root` that wrote last; raises UserError where there is none."""
    runs = [path.parent for path in root.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"qfleet doctor needs a run directory: there is none under {root}/")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


def _read(path: Path, config: RunConfig, minutes: float) -> Window:
    try:
        rows = read_rows(path)
    except OSError as error:
        raise UserError(
            f"{path}/metrics.jsonl cannot be read ({error.strerror}): a run writes it from its first seconds on"
        ) from error
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("time_seconds"), (int, float))]
    rows = [row for row in rows if math.isfinite(row["time_seconds"])]
    if not rows:
        raise UserError(f"{path}/metrics.jsonl has no row yet: try again in {config.log_period_seconds:.0f} s")
    if not any("host/cpu_fraction" in row for row in rows):
        raise UserError(
            f"{path}: its rows do not say where time goes: it was written by an older version; go on with it for a minute"
        )
    return Window(rows, minutes)


def _table(window: Window, config: RunConfig) -> list[str]:
    """Returns a line for each role: parts of its time, and the processors that it takes."""
    names = {
        "actor": f"actors ({config.actors.num_actors})",
        "shard": f"shards ({config.replay.num_shards})",
        "prefetch": f"prefetch ({window.most_common('prefetch/num_threads')} threads)",
        "learner": "learner",
    }
    lines = []
    for role, phases in PHASES.items():
        parts = {phase: window.mean(f"{role}/{phase}_fraction") for phase in phases if window.has(f"{role}/{phase}_fraction")}
        if not any(parts.values()):
            continue
        cores = f"  {window.mean(f'{role}/cpu_cores'):.2f} cores" if window.has(f"{role}/cpu_cores") else ""
        late = f", {window.mean(f'{role}/delay_fraction'):.0%} without one" if window.has(f"{role}/delay_fraction") else ""
        told = "  ".join(f"{phase.replace('_', '-')} {part:.0%}" for phase, part in parts.items())
        between = max(1 - sum(parts.values()), 0.0)
        lines.append(f"{names[role]:<22}{told}  else {between:.0%}{cores}{late}")
    lines.append(f"{'host':<22}processors {window.mean('host/cpu_fraction'):.0%} busy")
    return lines
