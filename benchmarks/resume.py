"""A run whose driver is killed in mid-run and that is resumed, beside an undisturbed one: learning curves in one picture.

    python benchmarks/resume.py [--recipe pong] [--env-steps 200000] [--kill-at 100000] [--checkpoint-seconds 60] [--seed 0] [--out docs/resume.png]

The driver gets SIGKILL, which ends all of Ray with it, at the first row of metrics after so many env steps; `qfleet resume` goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy.plots import read_rows

COMMAND = [sys.executable, "-m", "deploy"]


def steps_of(directory: Path) -> int:
    rows = read_rows(directory) if (directory / "metrics.jsonl").exists() else []
    return int(rows[-1]["env_steps"]) if rows else 0


def run_and_kill(words: list[str], directory: Path, kill_at: int) -> tuple[int, str]:
    """Returns the env steps at the kill, and what the command that resumes says of what came back."""
    with subprocess.Popen([*COMMAND, "train", *words, "--run-dir", str(directory)], stdout=subprocess.DEVNULL) as process:
        while steps_of(directory) < kill_at:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
    killed_at = steps_of(directory)
    time.sleep(3.0)  # Ray's processes notice, and end.
    done = subprocess.run([*COMMAND, "resume", str(directory)], check=True, capture_output=True, text=True)
    restored = next(line for line in done.stdout.splitlines() if "restored from" in line)
    return killed_at, restored.split("  ", 1)[1]


def draw(calm: Path, killed: Path, killed_at: int, title: str, out: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for directory, label, color in ((calm, "undisturbed", "tab:gray"), (killed, "killed and resumed", "tab:blue")):
        rows = read_rows(directory)
        name = "actor/training_return_mean"
        axes.plot(
            [row["env_steps"] for row in rows if name in row],
            [row[name] for row in rows if name in row],
            color=color,
            alpha=0.4,
        )
        found = [row for row in rows if "evaluator/return_mean" in row]
        axes.plot(
            [row["evaluator/began_env_steps"] for row in found],
            [row["evaluator/return_mean"] for row in found],
            marker="o",
            color=color,
            label=f"{label}, greedy evaluations",
        )
    axes.axvline(killed_at, color="tab:red", linestyle="--", label="kill -9 of the driver, qfleet resume")
    axes.set(xlabel="env steps", ylabel="mean return (pale: in training)", title=title)
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="pong")
    parser.add_argument("--env-steps", type=int, default=200_000)
    parser.add_argument("--kill-at", type=int, default=100_000)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/resume.png"))
    arguments = parser.parse_args()
    words = [arguments.recipe, "--seed", str(arguments.seed), "--max-env-steps", str(arguments.env_steps)]
    words += ["--evaluation.target-return", "None", "--log-period-seconds", "1"]
    words += ["--learner.checkpoint-period-seconds", str(arguments.checkpoint_seconds)]
    with tempfile.TemporaryDirectory() as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        subprocess.run([*COMMAND, "train", *words, "--run-dir", str(calm)], check=True, stdout=subprocess.DEVNULL)
        killed_at, restored = run_and_kill(words, killed, arguments.kill_at)
        draw(calm, killed, killed_at, f"{arguments.recipe}, seed {arguments.seed}", arguments.out)
        ends = [json.loads((directory / "summary.json").read_text()) for directory in (calm, killed)]
    print(f"killed at {killed_at:,} env steps; {restored}")
    for label, summary in zip(("undisturbed", "killed and resumed"), ends, strict=True):
        evaluation = summary["evaluation"]
        print(
            f"{label}: {evaluation['mean_return']:.1f} over {evaluation['episodes']} episodes after {summary['env_steps']:,} env steps"
        )
    print(f"see {arguments.out}")


if __name__ == "__main__":
    main()
