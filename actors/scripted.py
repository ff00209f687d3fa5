"""An environment that plays what it is told, with observations that say where they come from: the oracle's own control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from common.messages import Array

NUM_ACTIONS = 3


class Outcome(NamedTuple):
    """What one step gives."""

    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    stands_still: bool = False
    """The observation equals the one before."""


class ScriptedEnv(gymnasium.Env[Array, np.int64]):
    """Gives the outcomes of a script one after another, from the first again after the last; resets take none.

    Observations hold environment, episode and step, so no two are equal unless the script says so, and none is zero: pixels
    u8[*shape], noise from a seed of the three behind them, or f32[3]. Its actions begin at 5.
    """

    metadata = {"render_modes": []}

    def __init__(self, script: Sequence[Outcome], *, number: int = 0, pixels: tuple[int, int] | None = (6, 5)) -> None:
        self._script, self._number, self._pixels = script, number, pixels
        if pixels is None:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        else:
            self.observation_space = gymnasium.spaces.Box(0, 255, pixels, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(NUM_ACTIONS, start=5)
        self._episode, self._step, self._taken = -1, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.int64(action)), f"action {action}"
        outcome = self._script[self._taken % len(self._script)]
        self._taken += 1
        self._step += not outcome.stands_still
        return self._observe(), outcome.reward, outcome.terminated, outcome.truncated, {}

    def _observe(self) -> Array:
        place = [self._number, self._episode, self._step]
        if self._pixels is None:
            return np.array(place, np.float32) + 1
        observation = np.random.default_rng(place).integers(1, 256, self._pixels).astype(np.uint8)
        observation[0, :3] = [self._number + 1, self._episode % 255 + 1, self._step % 255 + 1]
        return observation
