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
    """One shard: N * q = [1, 2, 0.5]: weights [1, 1/2, 2] ** beta over their maximum. Kills: beta on the maximum only; the
    minimum or the sum for the maximum; the sign of the exponent. (The number of items cancels: no test can see it.)"""
    probability = np.array([0.1, 0.2, 0.05])
    full = importance_weights(probability, probability, 10, exponent=1.0)[0]
    assert full.dtype == np.float32
    np.testing.assert_allclose(full, np.array([1, 1 / 2, 2]) / 2, rtol=1e-6)
    half = importance_weights(probability, probability, 10, exponent=0.5)[0]
    np.testing.assert_allclose(half, np.sqrt([1 / 2, 1 / 4, 1]), rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(probability, probability, 10, exponent=0.0)[0], [1, 1, 1])


def test_importance_weights_of_equal_probabilities_are_one():
    probability = np.full(7, 1 / 13)
    np.testing.assert_array_equal(importance_weights(probability, probability, 13, exponent=0.4)[0], np.ones(7))


def test_importance_weights_survive_tiny_probabilities():
    probability = np.array([1e-30, 0.5])
    weights = importance_weights(probability, probability, 2_000_000, exponent=1.0)[0]
    np.testing.assert_allclose(weights, [1, 2e-30], rtol=1e-6)


@pytest.mark.parametrize(
    ("tiny", "exponent", "expected"),
    [
        (1e-310, 1.0, [0.5, 1]),  # 1 / (N * P), though 1 / (N * q) is more than a float64 holds.
        (1e-310, 0.5, [0, 1]),
        (0.0, 1.0, [0.5, 1]),
        (0.0, 0.5, [0, 1]),
    ],
)  # fmt: skip
def test_importance_weights_survive_a_shard_whose_priorities_are_tiny(tiny, exponent, expected):
    """The shard is asked for its share whatever its mass is: such an item is drawn, and has a weight."""
    weights = importance_weights(np.array([tiny, 1.0]), np.array([0.5, 0.25]), 2, exponent=exponent)[0]
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-45)


def test_importance_weights_of_two_shards_merged_by_hand():
    """Shard A: 2 items of priorities 1 and 3, asked for 1 of 4; shard B: 3 items of 1, 1, 6, asked for 3 of 4.

    In one table q = [1, 3, 1, 1, 6] / 12. The draw's P = share * priority / mass: A 1/4 * [1/4, 3/4], B 3/4 * [1/8, 1/8, 6/8];
    both sum to 1 over 5 items, and q / P = [4/3, 4/3, 8/9, 8/9, 8/9]. Kills: a maximum for each shard; the share left out; q
    and P exchanged; the exponent on q / P too.
    """
    probability = np.array([1, 3, 1, 1, 6]) / 12
    draw_probability = np.array([1 / 4 * 1 / 4, 1 / 4 * 3 / 4, 3 / 4 * 1 / 8, 3 / 4 * 1 / 8, 3 / 4 * 6 / 8])
    assert probability.sum() == draw_probability.sum() == 1

    def weights(exponent):
        return importance_weights(probability, draw_probability, 5, exponent=exponent)[0]

    np.testing.assert_allclose(weights(0.0), [1, 1, 2 / 3, 2 / 3, 2 / 3], rtol=1e-6)
    by_hand = np.array([1 / (5 * p) for p in draw_probability])
    np.testing.assert_allclose(by_hand, [16 / 5, 16 / 15, 32 / 15, 32 / 15, 16 / 45], rtol=1e-12)
    np.testing.assert_allclose(weights(1.0), by_hand / (16 / 5), rtol=1e-6)
    by_hand = np.array([12, 4, 12, 12, 2]) ** 0.5 * [4 / 3, 4 / 3, 8 / 9, 8 / 9, 8 / 9]
    np.testing.assert_allclose(weights(0.5), by_hand / (12**0.5 * 4 / 3), rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_weighted_draw_is_that_of_one_table(seed, exponent):
    """P * w is q * (N * q) ** -beta but for the one factor of the normalization, however the items lie in shards; with beta = 1
    it is the same for every item."""
    rng = np.random.default_rng(seed)
    share, part_of_mass = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3))
    within = [rng.dirichlet(np.ones(n)) for n in (4, 9, 2)]
    draw_probability, probability = (
        np.concatenate([factor[s] * part for s, part in enumerate(within)]) for factor in (share, part_of_mass)
    )
    product = draw_probability * importance_weights(probability, draw_probability, 15, exponent=exponent)[0]
    expected = probability * (15 * probability) ** -exponent
    np.testing.assert_allclose(product / product.sum(), expected / expected.sum(), rtol=1e-6)
    if exponent == 1:
        np.testing.assert_allclose(product, product[0], rtol=1e-6)
