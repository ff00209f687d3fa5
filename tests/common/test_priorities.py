from __future__ import annotations

import numpy as np
import pytest

from common.priorities import importance_weights, priority


def test_priority_is_the_absolute_error_plus_the_floor():
    """Kills: the floor inside abs (0.5 for -0.75); max(abs, floor); the exponent applied here; float32 sums."""
    td_error = np.array([0.0, -0.75, 2.0, 1e-9], np.float32)
    result = priority(td_error, floor=0.25)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [0.25, 1.0, 2.25, np.float64(np.float32(1e-9)) + 0.25])
    np.testing.assert_array_equal(td_error, np.array([0.0, -0.75, 2.0, 1e-9], np.float32))


def test_importance_weights_by_hand():
    """N * P = [1, 2, 0.5]: weights [1, 1/2, 2] ** beta over their maximum. Kills: beta on the maximum only; the minimum or
    the sum for the maximum; the sign of the exponent. (The number of items cancels: no test can see it.)"""
    probability = np.array([0.1, 0.2, 0.05])
    full = importance_weights(probability, 10, exponent=1.0)
    assert full.dtype == np.float32
    np.testing.assert_allclose(full, np.array([1, 1 / 2, 2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(importance_weights(probability, 10, exponent=0.5), np.sqrt([1 / 2, 1 / 4, 1]), rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(probability, 10, exponent=0.0), [1, 1, 1])


def test_importance_weights_of_equal_probabilities_are_one():
    np.testing.assert_array_equal(importance_weights(np.full(7, 1 / 13), 13, exponent=0.4), np.ones(7))


def test_importance_weights_survive_tiny_probabilities():
    weights = importance_weights(np.array([1e-30, 0.5]), 2_000_000, exponent=1.0)
    np.testing.assert_allclose(weights, [1, 2e-30], rtol=1e-6)


def test_importance_weights_of_two_shards_merged_by_hand():
    """Shard A: 2 items of priorities 1 and 3, asked for 1 of 4; shard B: 3 items of 1, 1, 6, asked for 3 of 4.

    Probability = share * priority / mass: A 1/4 * [1/4, 3/4], B 3/4 * [1/8, 1/8, 6/8]; they sum to 1 over 5 items.
    Kills: a maximum for each shard; the share left out.
    """
    probability = np.array([1 / 4 * 1 / 4, 1 / 4 * 3 / 4, 3 / 4 * 1 / 8, 3 / 4 * 1 / 8, 3 / 4 * 6 / 8])
    assert probability.sum() == 1
    by_hand = np.array([1 / (5 * p) for p in probability])
    np.testing.assert_allclose(by_hand, [16 / 5, 16 / 15, 32 / 15, 32 / 15, 16 / 45], rtol=1e-12)
    weights = importance_weights(probability, 5, exponent=1.0)
    np.testing.assert_allclose(weights, by_hand / (16 / 5), rtol=1e-6)
    np.testing.assert_allclose(importance_weights(probability, 5, exponent=0.4), (by_hand / (16 / 5)) ** 0.4, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_full_weights_make_the_weighted_draw_uniform(seed):
    """With beta = 1, probability * weight is the same for every item, however the items lie in shards."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(3))
    probability = np.concatenate([share[s] * rng.dirichlet(np.ones(n)) for s, n in enumerate((4, 9, 2))])
    product = probability * importance_weights(probability, 15, exponent=1.0)
    np.testing.assert_allclose(product, probability.min(), rtol=1e-6)
