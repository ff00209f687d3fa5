"""Random shifts beside NumPy's own padding and cropping."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import EnvConfig, LearnerConfig, RunConfig
from learner.augmentation import shift_randomly


@pytest.mark.parametrize("max_pixels", [1, 4])
def test_shifts_are_those_of_padding_and_cropping(max_pixels: int) -> None:
    rng = np.random.default_rng(1)
    stacks = rng.integers(0, 256, size=(80, 3, 11, 9), dtype=np.uint8)
    shifted = stacks.copy()
    shift_randomly(shifted, np.random.default_rng(7), max_pixels, 1.0)
    border = ((0, 0), (max_pixels, max_pixels), (max_pixels, max_pixels))
    crops = np.empty((80, 2), int)
    for item in range(80):
        padded = np.pad(stacks[item], border, mode="edge")
        found = [
            (y, x)
            for y in range(2 * max_pixels + 1)
            for x in range(2 * max_pixels + 1)
            if np.array_equal(shifted[item], padded[:, y : y + 11, x : x + 9])
        ]
        assert len(found) == 1, "one crop for all planes of a stack"
        crops[item] = found[0]
    assert set(crops.reshape(-1).tolist()) == set(range(2 * max_pixels + 1)), "every shift is drawn"
    assert (crops[..., 0] != crops[..., 1]).any(), "rows and columns are shifted apart from each other"


@pytest.mark.parametrize("fraction", [0.125, 0.5, 1.0])
def test_a_fraction_is_shifted_and_no_stack_by_more_for_it(fraction: float) -> None:
    """Within five standard deviations of 40,000 draws: a shift by up to 4 is none for one stack of 81."""
    stacks = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None] * 9 + np.arange(9, dtype=np.uint8), (40_000, 1, 9, 9)).copy()
    before = stacks.copy()
    shift_randomly(stacks, np.random.default_rng(5), 4, fraction)
    centers = stacks[:, 0, 4, 4].astype(int)  # Where the middle came from.
    rows, columns = centers // 9 - 4, centers % 9 - 4
    moved = (rows != 0) | (columns != 0)
    expected = fraction * 80 / 81
    assert abs(moved.mean() - expected) < 5 * np.sqrt(0.25 / 40_000)
    np.testing.assert_array_equal(stacks[~moved], before[~moved])
    counts = np.unique(centers[moved], return_counts=True)[1]
    assert len(counts) == 80
    assert abs(counts - moved.sum() / 80).max() < 5 * np.sqrt(moved.sum() / 80)


def test_shifts_follow_from_the_generator() -> None:
    stacks = np.random.default_rng(1).integers(0, 256, size=(16, 4, 84, 84), dtype=np.uint8)
    once, again, other = stacks.copy(), stacks.copy(), stacks.copy()
    for array, seed in ((once, 3), (again, 3), (other, 4)):
        shift_randomly(array, np.random.default_rng(seed), 4, 0.5)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_shifts_are_of_frames() -> None:
    with pytest.raises(ValueError, match="random_shift_pixels must be in"):
        LearnerConfig(random_shift_pixels=-1)
    with pytest.raises(ValueError, match="random_shift_pixels must be in"):
        LearnerConfig(random_shift_pixels=43)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="random_shift_fraction must be in"):
            LearnerConfig(random_shift_pixels=4, random_shift_fraction=fraction)
    with pytest.raises(ValueError, match="CartPole-v1 has none: leave it out"):
        RunConfig(recipe="x", env=EnvConfig(game="CartPole-v1"), learner=LearnerConfig(random_shift_pixels=4))
