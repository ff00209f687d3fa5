"""Human-normalized scores, by hand, over exactly the 57 games that ale-py has."""

import ale_py.roms
import pytest

from deploy.human_scores import human_normalized_score, reference_scores


@pytest.mark.parametrize(
    ("game", "mean_return", "expected"),
    [
        ("pong", -20.7, 0.0),
        ("pong", 14.6, 1.0),
        ("pong", 21.0, (21.0 + 20.7) / (14.6 + 20.7)),
        ("breakout", 16.1, 0.5),  # (16.1 - 1.7) / (30.5 - 1.7) = 14.4 / 28.8.
        ("skiing", -17098.1 + 2 * (17098.1 - 4336.9), 2.0),  # All returns are negative, and more is better.
        ("freeway", -29.6, -1.0),  # Worse than random play is below zero.
    ],
)
def test_human_normalized_score(game, mean_return, expected):
    """Kills: random and human exchanged, a percentage, a score that is clipped or not shifted."""
    assert human_normalized_score(game, mean_return) == pytest.approx(expected)


@pytest.mark.parametrize("game", ["CartPole-v1", "GridWorld-v0", "tetris", ""])
def test_other_games_have_no_human_normalized_score(game):
    assert human_normalized_score(game, 1.0) is None


def test_the_table_is_of_57_games_that_ale_py_has():
    references = reference_scores()
    assert len(references) == 57
    assert set(references) <= set(ale_py.roms.get_all_rom_ids())
    assert all(reference.human > reference.random for reference in references.values())
    assert references["video_pinball"].random == 16256.9
