"""Epsilon-greedy: the law, with a proof that the test would see a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from actors.policy import epsilon_greedy

P_REJECT = 1e-6  # A correct policy fails once in a million seeds.
NUM_ACTIONS, GREEDY, NUM_DRAWS = 4, 2, 100_000
VALUES = np.tile(np.array([0.0, -1.0, 3.0, 2.9], np.float32), (NUM_DRAWS, 1))


def counts_at(epsilon):
    actions = epsilon_greedy(np.random.default_rng(0), VALUES, epsilon)
    assert actions.shape == (NUM_DRAWS,) and actions.dtype == np.int64
    return np.bincount(actions, minlength=NUM_ACTIONS)


def p_value(counts, epsilon):
    """Of the number of greedy actions, by the binomial law: exploring picks the greedy one too."""
    return stats.binomtest(int(counts[GREEDY]), NUM_DRAWS, 1 - epsilon + epsilon / NUM_ACTIONS).pvalue


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 0.9])
def test_epsilon_greedy_follows_the_binomial_law(epsilon):
    counts = counts_at(epsilon)
    assert p_value(counts, epsilon) > P_REJECT
    others = np.delete(counts, GREEDY)
    assert stats.chisquare(others).pvalue > P_REJECT


@pytest.mark.parametrize("wrong", [0.3 * 3 / 4, 0.3 * 1.05, 0.7], ids=["excludes_greedy", "off_by_5_percent", "complement"])
def test_the_policy_test_has_power(wrong):
    assert p_value(counts_at(wrong), 0.3) < P_REJECT


def test_epsilon_zero_is_greedy_and_one_is_uniform():
    assert counts_at(0.0).tolist() == [0, 0, NUM_DRAWS, 0]
    assert stats.chisquare(counts_at(1.0)).pvalue > P_REJECT


def test_epsilon_is_each_environments_own():
    epsilon = np.where(np.arange(NUM_DRAWS) % 2 == 0, 0.0, 1.0)
    actions = epsilon_greedy(np.random.default_rng(0), VALUES, epsilon)
    assert (actions[::2] == GREEDY).all()
    assert stats.chisquare(np.bincount(actions[1::2], minlength=NUM_ACTIONS)).pvalue > P_REJECT


def test_greedy_tie_takes_the_first():
    values = np.array([[1, 5, 5, 0], [2, 2, 2, 2], [-3, -1, -2, -1]], np.float32)
    assert epsilon_greedy(np.random.default_rng(0), values, 0.0).tolist() == [1, 0, 1]


def test_stream_does_not_depend_on_epsilon_nor_values():
    states, actions = [], []
    for epsilon, values in ((0.0, VALUES), (0.5, -VALUES), (1.0, VALUES)):
        rng = np.random.default_rng(7)
        actions.append(epsilon_greedy(rng, values, epsilon))
        states.append(rng.bit_generator.state)
    assert states[0] == states[1] == states[2]
    explored = actions[1] != VALUES[0].argmin()
    np.testing.assert_array_equal(actions[1][explored], actions[2][explored])  # The same random action where it explores.
