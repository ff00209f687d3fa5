"""Human-normalized scores of the Atari-57 games, from the table beside this file: 0 is random play, 1 a human."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

SOURCE = "dqn_zoo atari_data.py, commit 45061f4"
"""Where the table is from (google-deepmind/dqn_zoo)."""


class ReferenceScores(NamedTuple):
    """Mean returns in one game."""

    random: float
    human: float


def reference_scores() -> dict[str, ReferenceScores]:
    """Reads the table: by ROM name, the 57 games."""
    with Path(__file__).with_name("atari57_human_random.csv").open(newline="") as file:
        return {row["game"]: ReferenceScores(float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalized_score(game: str, mean_return: float) -> float | None:
    """Returns (mean_return - random) / (human - random); None for a game that is not of the 57."""
    reference = reference_scores().get(game)
    if reference is None:
        return None
    return (mean_return - reference.random) / (reference.human - reference.random)
