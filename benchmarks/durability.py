"""What durability costs: updates/s of whole Pong runs with and without the log and periodic checkpoints, side by side.

    python benchmarks/durability.py [--rounds 3] [--minutes 1.5] [--checkpoint-seconds 10] [--json F]

Runs `qfleet train pong` on a local Ray in alternation, a fresh run each time: once with neither log nor checkpoints after the first,
once with the log (synced each second) and a checkpoint every so many seconds. It prints the median updates/s of all intervals after
the learner's first, the ratio of each round, and the pause that a checkpoint causes: the longest time from one update's end to the
next while one is copied and written, beside the usual time. No evaluation takes place.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy.plots import read_rows

NEVER = "100000"


def train(minutes: float, directory: Path, flags: list[str]) -> list[dict[str, float]]:
    """Trains once; returns the rows of every interval after the first with updates."""
    command = [sys.executable, "-m", "deploy", "train", "pong", "--run-dir", str(directory), "--max-minutes", str(minutes)]
    command += ["--evaluation.period-seconds", NEVER, "--evaluation.final-episodes", "1", "--evaluation.episodes", "1"]
    command += ["--log-period-seconds", "1", "--replay.min-size", "1000", *flags]
    subprocess.run(command, check=True, capture_output=True)
    rows = [row for row in read_rows(directory)[:-1] if row.get("learner/updates_per_second", 0.0) > 0]
    return rows[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--checkpoint-seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = {
        "neither": ["--replay.sync-seconds", "None", "--learner.checkpoint-period-seconds", NEVER],
        "both": ["--learner.checkpoint-period-seconds", str(arguments.checkpoint_seconds)],
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    usual: list[float] = []
    pauses: list[float] = []
    for _ in range(arguments.rounds):
        for way, flags in ways.items():
            with tempfile.TemporaryDirectory() as directory:
                rows = train(arguments.minutes, Path(directory) / "run", flags)
            rates[way].append(statistics.median(row["learner/updates_per_second"] for row in rows))
            if way == "both":
                usual += [row["learner/update_interval_p50_seconds"] for row in rows]
                pauses += [row[name] for row in rows if (name := "learner/checkpoint_pause_seconds") in row]
    ratios = [after / before for before, after in zip(*rates.values(), strict=True)]
    print(f"{os.cpu_count()} CPUs, medians of {arguments.rounds} runs in alternation")
    for way, values in rates.items():
        print(
            f"{way} of log and checkpoints: {statistics.median(values):.1f} updates/s ({min(values):.1f} to {max(values):.1f})"
        )
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    median, p99 = np.percentile(pauses, (50, 99))
    print(
        f"an update takes {1e3 * statistics.median(usual):.1f} ms; the longest while a checkpoint is written: median {1e3 * median:.1f} ms, "
        f"p99 {1e3 * p99:.1f} ms over {len(pauses)} checkpoints"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rates": rates, "ratios": ratios, "pauses": pauses, "usual": usual}, indent=2))


if __name__ == "__main__":
    main()
