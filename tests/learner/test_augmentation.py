"""Random shifts beside NumPy's own padding and cropping."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import EnvConfig, LearnerConfig, RunConfig
from learner.augmentation import shift_randomly


@pytest.mark.parametrize("max_pixels", [1, 4])
def test_shifts_are_those_of_padding_and_cropping(max_pixels: int) -> None:
    rng = np.random.default_rng(1)
    stacks = rng.integers(0, 256, size=(2, 40, 3, 11, 9), dtype=np.uint8)
    shifted = stacks.copy()
    shift_randomly(shifted, np.random.default_rng(7), max_pixels)
    border = ((0, 0), (max_pixels, max_pixels), (max_pixels, max_pixels))
    crops = np.empty((2, 40, 2), int)
    for half in range(2):
        for item in range(40):
            padded = np.pad(stacks[half, item], border, mode="edge")
            found = [
                (y, x)
                for y in range(2 * max_pixels + 1)
                for x in range(2 * max_pixels + 1)
                if np.array_equal(shifted[half, item], padded[:, y : y + 11, x : x + 9])
            ]
            assert len(found) == 1, "one crop for all planes of a stack"
            crops[half, item] = found[0]
    assert set(crops.reshape(-1).tolist()) == set(range(2 * max_pixels + 1)), "every shift is drawn"
    assert (crops[0] != crops[1]).any(), "s_tm1 and s_t are shifted apart from each other"
    assert (crops[..., 0] != crops[..., 1]).any(), "rows and columns are shifted apart from each other"


def test_shifts_follow_from_the_generator() -> None:
    stacks = np.random.default_rng(1).integers(0, 256, size=(2, 8, 4, 84, 84), dtype=np.uint8)
    once, again, other = stacks.copy(), stacks.copy(), stacks.copy()
    for array, seed in ((once, 3), (again, 3), (other, 4)):
        shift_randomly(array, np.random.default_rng(seed), 4)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_shifts_are_of_frames() -> None:
    with pytest.raises(ValueError, match="random_shift_pixels must be in"):
        LearnerConfig(random_shift_pixels=-1)
    with pytest.raises(ValueError, match="random_shift_pixels must be in"):
        LearnerConfig(random_shift_pixels=43)
    with pytest.raises(ValueError, match="CartPole-v1 has none: leave it out"):
        RunConfig(recipe="x", env=EnvConfig(game="CartPole-v1"), learner=LearnerConfig(random_shift_pixels=4))
