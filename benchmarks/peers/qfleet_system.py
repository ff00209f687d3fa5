"""qfleet: `qfleet train nature` with flags for the common work, on its own Ray, in a new run directory that is deleted at the end.

The measured processes are those of the command: driver, Ray's own, learner, shard, params store, actor and evaluator, which plays one episode
at the beginning, before the measurement, and then rests. What is told are the rows of metrics.jsonl; a count in them is as old as
the role's last report, at most a second. SIGTERM ends the run as Ctrl-C does; the ledger of all transitions must balance.

Modes: the learner's precision, `bf16` or `fp32`. `fill`: the learner waits until the replay is full of what the actor has played.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from layers import HIDDEN
from system_harness import (
    DISCOUNT,
    EPSILON,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TARGET_PERIOD_UPDATES,
    Reports,
    Work,
    interrupt_on_sigterm,
    read_work,
)

LOG_SECONDS = 2.0
END_SECONDS = 60.0
NEVER_SECONDS = 1e6


def command(work: Work, run_dir: Path) -> list[str]:
    min_size = work.capacity if work.fill else work.learning_starts
    flags: dict[str, Any] = {
        "run-dir": run_dir,
        "log-period-seconds": LOG_SECONDS,
        "env.game": work.game,
        "network.torso": work.network,
        "network.hidden-sizes": HIDDEN[work.network],
        "actors.num-actors": 1,
        "actors.num-envs": work.num_envs,
        "actors.n-step": 1,
        "actors.chunk-transitions": 32,  # As recipe `pong`, for two cores.
        "actors.pull-period-steps": 10,
        "actors.discount": DISCOUNT,
        "actors.exploration.kind": "linear",
        "actors.exploration.final": EPSILON,
        "actors.exploration.decay-steps": min_size,
        "replay.capacity": work.capacity,
        "replay.memory": "1GiB",
        "replay.min-size": min_size,
        "replay.samples-per-insert": work.samples_per_step,
        "learner.algorithm": "q_learning",
        "learner.loss": "huber",
        "learner.batch-size": work.batch,
        "learner.learning-rate": LEARNING_RATE,
        "learner.max-grad-norm": MAX_GRAD_NORM,
        "learner.target-period-updates": TARGET_PERIOD_UPDATES,
        "learner.precision": work.mode,
        "learner.device": "cpu",
        "evaluation.episodes": 1,
        "evaluation.final-episodes": 1,
        "evaluation.num-envs": 1,
        "evaluation.period-seconds": NEVER_SECONDS,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "deploy", "train", "nature", *words]


class Rows:
    """The rows of metrics.jsonl that were not read before, with the monotonic time of each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0
        self._started = float("inf")

    def read(self) -> list[tuple[float, dict[str, Any]]]:
        if not self._path.exists():
            return []
        *lines, _ = self._path.read_text().split("\n")  # What follows the last line's end is not a row yet.
        rows = [json.loads(line) for line in lines[self._num_read :]]
        self._num_read = len(lines)
        for row in rows:  # A row is read at most a moment after it was written, so its clock began then at the latest.
            self._started = min(self._started, time.monotonic() - row["time_seconds"])
        return [(self._started + row["time_seconds"], row) for row in rows]


def follow(reports: Reports, run_dir: Path, process: subprocess.Popen[bytes]) -> None:
    """Tells every row until the run or the measurement ends."""
    rows, has_evaluated = Rows(run_dir / "metrics.jsonl"), False
    while process.poll() is None:
        for seconds, row in rows.read():
            if "evaluator/return_mean" in row:
                has_evaluated = True
                workers = json.loads((run_dir / "workers.json").read_text())
                reports.name_processes({worker["pid"]: name for name, worker in workers.items()})
            reports.tell(seconds, row["env_steps"], row["updates"], row["samples"], is_steady=has_evaluated)
        time.sleep(0.1)


def last_words(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["no output"])[-1]


def run(work: Work, directory: Path) -> None:
    """Trains until SIGTERM.

    Raises:
      SystemExit: where the run fails, or its ledger does not balance.
    """
    run_dir, log = directory / "run", directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command(work, run_dir), stdout=output, stderr=subprocess.STDOUT)
    reports = Reports(work, version="this tree", note=f"Q-learning, Huber, {work.mode}", root=process.pid)
    try:
        follow(reports, run_dir, process)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait(END_SECONDS)
        ledger = json.loads((run_dir / "summary.json").read_text())["ledger"]
        sys.exit(None if ledger["balanced"] else f"the ledger does not balance: {ledger}")
    sys.exit(f"the run ended by itself: {last_words(log)}")


def main() -> None:
    work = read_work()
    interrupt_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="q") as directory:
        run(work, Path(directory))


if __name__ == "__main__":
    main()
