"""Returns of a random player and of a person on the 57 Atari games, and returns on their scale.

The table is that of dqn_zoo (`atari_data.py`): no-op starts, at most 108,000 frames an episode.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("atari57_human_random.csv")


@cache
def random_and_human() -> dict[str, tuple[float, float]]:
    """Returns {game as its ROM is named: (random player's return, person's return)}."""
    with _FILE.open(newline="") as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalized_score(game: str, mean_return: float) -> float | None:
    """Returns (return - random) / (human - random): 0 plays as at random, 1 as a person; None where the game has no entry."""
    if game not in random_and_human():
        return None
    random, human = random_and_human()[game]
    return (mean_return - random) / (human - random)
