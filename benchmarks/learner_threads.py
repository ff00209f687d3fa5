"""How many threads the learner should have where roles share few cores: updates/s of whole Pong runs, side by side.

    python benchmarks/learner_threads.py [--threads 1 2] [--rounds 3] [--minutes 0.8] [--json F]

Runs `qfleet train pong` on a local Ray in alternation, a fresh run each time, and prints the median over all intervals after the
learner's first. No evaluation takes place, so that learner, actor and shard are all that runs.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy.plots import read_rows


def updates_per_second(threads: int, minutes: float, directory: Path) -> list[float]:
    """Trains once; returns the rate of every interval after the first with updates."""
    command = [sys.executable, "-m", "deploy", "train", "pong", "--run-dir", str(directory), "--max-minutes", str(minutes)]
    command += [
        "--learner.num-threads",
        str(threads),
        "--evaluation.period-seconds",
        "100000",
        "--evaluation.final-episodes",
        "1",
    ]
    command += ["--log-period-seconds", "5", "--evaluation.episodes", "1", "--replay.min-size", "1000"]
    subprocess.run(command, check=True, capture_output=True)
    rates = [row.get("learner/updates_per_second", 0.0) for row in read_rows(directory)[:-1]]
    return [rate for rate in rates if rate > 0][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {threads: [] for threads in arguments.threads}
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            with tempfile.TemporaryDirectory() as directory:
                rates[threads].append(
                    statistics.median(updates_per_second(threads, arguments.minutes, Path(directory) / "run"))
                )
    print(f"{os.cpu_count()} CPUs, medians of {arguments.rounds} runs in alternation")
    for threads, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{threads} learner threads: {statistics.median(values):.1f} updates/s of batch 64 ({spread})")
    if arguments.json:
        arguments.json.write_text(json.dumps({str(threads): values for threads, values in rates.items()}, indent=2))


if __name__ == "__main__":
    main()
