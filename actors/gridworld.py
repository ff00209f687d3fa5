"""A grid world with starred terminal states, small enough that value iteration finds its optimal Q-values.

    . . . *      * ends the episode with its reward; any other step costs `step_reward`
    . # . *      # cannot be entered: the agent stays where it is
    S . . .

It doubles as an oracle: what a learner finds must agree with `optimal_q`. Not an Atari game, but the same path through
actors, replay and learner. Source: Sutton and Barto 2018, "Reinforcement Learning", 4.4 (value iteration).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from common.messages import Array

GRIDWORLD_ID = "GridWorld-v0"
_MAP = ("...A", ".#.B", "....")
_STARS = {"A": 1.0, "B": -1.0}
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # Up, right, down, left.
STEP_REWARD = -0.04


class GridWorld(gymnasium.Env[Array, np.int64]):
    """Observations are one-hot f32[12]; episodes begin in any free cell, so that every state is visited."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (num_cells(),), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(_MOVES))
        self._cell = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._cell = int(self.np_random.choice(free_cells()))
        return one_hot(self._cell), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self._cell, reward, terminated = transition(self._cell, int(action))
        return one_hot(self._cell), reward, terminated, False, {}

    def render(self) -> Any:
        colours = {".": (230, 230, 230), "#": (60, 60, 60), "A": (90, 180, 90), "B": (200, 90, 90)}
        picture = np.array([[colours[symbol] for symbol in row] for row in _MAP], np.uint8)
        picture[divmod(self._cell, len(_MAP[0]))] = (70, 110, 200)
        return picture.repeat(48, axis=0).repeat(48, axis=1)


def num_cells() -> int:
    return len(_MAP) * len(_MAP[0])


def free_cells() -> list[int]:
    """Cells where an episode can be: neither wall nor star."""
    return [i for i, symbol in enumerate("".join(_MAP)) if symbol == "."]


def one_hot(cell: int) -> Array:
    return np.asarray(np.eye(num_cells(), dtype=np.float32)[cell])


def transition(cell: int, action: int) -> tuple[int, float, bool]:
    """Returns (next cell, reward, terminated) of a move, which is certain."""
    width = len(_MAP[0])
    row, column = cell // width + _MOVES[action][0], cell % width + _MOVES[action][1]
    inside = 0 <= row < len(_MAP) and 0 <= column < width
    if not inside or _MAP[row][column] == "#":
        return cell, STEP_REWARD, False
    star = _STARS.get(_MAP[row][column])
    return row * width + column, STEP_REWARD if star is None else star, star is not None


def optimal_q(discount: float) -> Array:
    """Returns f64[12, 4], the fixed point of the Bellman optimality equation by value iteration; zero off the free cells."""
    q = np.zeros((num_cells(), len(_MOVES)))
    change = np.inf
    while change > 1e-12:
        new = np.zeros_like(q)
        for cell in free_cells():
            for action in range(len(_MOVES)):
                next_cell, reward, terminated = transition(cell, action)
                new[cell, action] = reward + (0.0 if terminated else discount * q[next_cell].max())
        change = np.abs(new - q).max()
        q = new
    return q


def register() -> None:
    """Makes the environment known to Gymnasium, with a cap of 50 steps an episode."""
    if GRIDWORLD_ID not in gymnasium.registry:
        gymnasium.register(GRIDWORLD_ID, entry_point="actors.gridworld:GridWorld", max_episode_steps=50)
