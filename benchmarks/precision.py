"""Does bf16 cost anything? The same recipe in fp32 and in bf16, seed by seed, serial runs side by side.

    python benchmarks/precision.py [--recipe cartpole] [--seeds 5] [--max-updates 5000]

A serial run with the same seed and precision gives the same bits, so the spread is that of seeds and not of the machine. Prints the mean
return of the final evaluation (greedy, 100 episodes of CartPole) of every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def final_return(recipe: str, precision: str, seed: int, max_updates: int, directory: Path) -> float:
    path = directory / f"{precision}-{seed}"
    command = [sys.executable, "-m", "deploy", "train", recipe, "--serial", "--seed", str(seed), "--run-dir", str(path)]
    command += ["--max-updates", str(max_updates), "--learner.precision", precision, "--log-period-seconds", "1000"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=3600)
    return float(json.loads((path / "summary.json").read_text())["evaluation"]["mean_return"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cartpole")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-updates", type=int, default=5_000)
    flags = parser.parse_args()
    returns: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(flags.seeds):
            for precision, values in returns.items():
                values.append(final_return(flags.recipe, precision, seed, flags.max_updates, Path(directory)))
                print(f"seed {seed} {precision}: {values[-1]:.1f}", flush=True)
    for precision, values in returns.items():
        print(f"{precision}: median {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
