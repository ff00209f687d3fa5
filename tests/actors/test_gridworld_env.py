"""The grid world: its rules by hand, and the Q-values that other tests take for the truth."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from actors import gridworld
from actors.gridworld import GRIDWORLD_ID, GridWorld, free_cells, one_hot, optimal_q, transition

UP, RIGHT, DOWN, LEFT = range(4)
# Cells:  0 1 2 A(3) / 4 # 6 B(7) / 8 9 10 11


@pytest.mark.parametrize(
    ("cell", "action", "expected"),
    [
        (2, RIGHT, (3, 1.0, True)),
        (6, RIGHT, (7, -1.0, True)),
        (11, UP, (7, -1.0, True)),
        (8, UP, (4, -0.04, False)),
        (8, RIGHT, (9, -0.04, False)),
        (8, LEFT, (8, -0.04, False)),
        (8, DOWN, (8, -0.04, False)),
        (11, RIGHT, (11, -0.04, False)),
        (4, RIGHT, (4, -0.04, False)),  # The wall.
        (1, DOWN, (1, -0.04, False)),
        (1, UP, (1, -0.04, False)),
        (4, UP, (0, -0.04, False)),
        (4, DOWN, (8, -0.04, False)),
        (6, LEFT, (6, -0.04, False)),
    ],
)
def test_gridworld_moves(cell, action, expected):
    assert transition(cell, action) == expected


def test_gridworld_free_cells_are_neither_wall_nor_star():
    assert free_cells() == [0, 1, 2, 4, 6, 8, 9, 10, 11]


def test_optimal_q_by_hand():
    q = optimal_q(0.9)
    assert q.shape == (12, 4)
    assert q[2, RIGHT] == pytest.approx(1.0)
    assert q[1, RIGHT] == pytest.approx(-0.04 + 0.9 * 1.0)
    assert q[2, UP] == pytest.approx(-0.04 + 0.9 * 1.0)  # Against the border, then in.
    assert q[6, RIGHT] == pytest.approx(-1.0)
    assert q[6, UP] == pytest.approx(-0.04 + 0.9 * 1.0)
    assert q[11, UP] == pytest.approx(-1.0)
    # From the start both ways take four moves to cell 2, and one into the star.
    far = -0.04 * (1 + 0.9 + 0.81 + 0.729) + 0.9**4 * 1.0
    assert q[8, UP] == pytest.approx(far)
    assert q[8, RIGHT] == pytest.approx(far)


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
def test_optimal_q_satisfies_bellman(discount):
    q = optimal_q(discount)
    for cell in free_cells():
        for action in range(4):
            next_cell, reward, terminated = transition(cell, action)
            target = reward if terminated else reward + discount * max(q[next_cell])
            assert q[cell, action] == pytest.approx(target, abs=1e-9)
    for cell in {3, 5, 7}:
        assert (q[cell] == 0).all()


def test_gridworld_env_agrees_with_transition():
    env = GridWorld()
    rng = np.random.default_rng(0)
    starts, num_ends = set(), 0
    observation, _ = env.reset(seed=0)
    for _ in range(2_000):
        cell = int(observation.argmax())
        starts.add(cell)
        np.testing.assert_array_equal(observation, one_hot(cell))
        action = int(rng.integers(4))
        observation, reward, terminated, truncated, _ = env.step(np.int64(action))
        assert env.observation_space.contains(observation)
        assert (int(observation.argmax()), reward, terminated) == transition(cell, action)
        assert not truncated
        if terminated:
            num_ends += 1
            observation, _ = env.reset()
    assert starts == set(free_cells()) and num_ends > 50


def test_gridworld_episodes_begin_everywhere_and_by_the_seed():
    env = GridWorld()
    starts = [int(env.reset(seed=seed)[0].argmax()) for seed in range(200)]
    assert set(starts) == set(free_cells())
    assert starts == [int(env.reset(seed=seed)[0].argmax()) for seed in range(200)]


def test_gridworld_is_cut_after_50_steps():
    gridworld.register()  # Twice does no harm.
    env = gymnasium.make(GRIDWORLD_ID)
    observation, _ = env.reset(seed=0)
    ends = []
    for _ in range(50):
        up_is_safe = not transition(int(observation.argmax()), UP)[2]
        observation, _, terminated, truncated, _ = env.step(np.int64(UP if up_is_safe else DOWN))
        ends.append((terminated, truncated))
    assert ends == [(False, False)] * 49 + [(False, True)]


def test_gridworld_picture_shows_the_agent():
    env = GridWorld(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (3 * 48, 4 * 48, 3) and before.dtype == np.uint8
    blue = (before == (70, 110, 200)).all(axis=2)
    assert blue.sum() == 48 * 48
