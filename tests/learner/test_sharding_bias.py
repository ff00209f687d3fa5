"""What sharding does to the gradient that the learner expects: nothing, where the correction is full.

Real shards of very unequal sizes and priority masses, `shares` and `merge`. An item i of shard s has

    P_i = (share of the batch asked of s) * priority_i / mass_s      chance that one row of the merged batch is item i
    w_i = (N * P_i) ** -exponent, over the maximum of the batch      its importance weight

The maximum changes from batch to batch and depends on what was drawn, so the mean of normalized gradients is biased whatever
the sharding (Schaul et al. accept that: it only ever makes steps smaller). What can be exact is what it is divided out of:
within a batch the weights are as (N * P_i) ** -exponent, and with the batch's maximum multiplied back

    E[mean of w_i * g_i] = sum of P_i * (N * P_i) ** -exponent * g_i

which at exponent 1 is the plain mean of all g_i, in one table or in many; below 1 it is what one table gives that draws with
the probabilities P_i. That is the table of the same priorities only where every shard's mass is in proportion to its share.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from common import wire
from common.config import EnvSpec
from common.messages import SampleBatch
from common.priorities import importance_weights
from learner.batches import merge, shares
from replay_server.shard import ReplayShard

P_REJECT = 1e-6  # A correct learner fails once in a million seeds.
NUM_BATCHES = 4_000
ENOUGH_BATCHES = 1_500  # For every item to be drawn.
NUM_ITEMS = 40
ALPHA = 0.6
CPU = torch.device("cpu")
SPEC = EnvSpec((3,), "<f4", 1, 2)

_rng = np.random.default_rng(0)
_turn = np.linspace(0, np.pi, NUM_ITEMS)
# The gradient turns with the place in the table, and the priority rises: shards differ in both.
FEATURES = np.stack([np.cos(_turn), np.sin(_turn), _rng.normal(size=NUM_ITEMS)], axis=1).astype(np.float32)
REWARDS = (2 + 0.5 * _rng.normal(size=NUM_ITEMS)).astype(np.float32)
PRIORITIES = np.sort(_rng.lognormal(sigma=1.8, size=NUM_ITEMS))
GRADIENTS = -REWARDS[:, None].astype(float) * FEATURES  # Of (r_t - s_tm1 @ params)**2 / 2 at params = 0.


class Sharding(NamedTuple):
    sizes: tuple[int, ...]
    batch_size: int
    """Does not divide by the number of shards: shares are unequal."""


SHARDINGS = {"1_shard": Sharding((40,), 5), "2_shards": Sharding((34, 6), 3), "5_shards": Sharding((20, 3, 1, 12, 4), 7)}
SHARDED = [name for name in SHARDINGS if name != "1_shard"]


def powers_of(priorities):
    return priorities**ALPHA


def draw_probabilities(sharding, priorities=PRIORITIES):
    """P_i of every item, by the definition."""
    parts = np.split(powers_of(priorities), np.cumsum(sharding.sizes)[:-1])
    asked = shares(sharding.batch_size, len(sharding.sizes))
    return np.concatenate([num / sharding.batch_size * part / part.sum() for num, part in zip(asked, parts, strict=True)])


@pytest.fixture
def make_shards(make_chunk):
    """Shards that hold the items in order; item_id and place in the table differ by the first item's place."""

    def make(sharding, priorities=PRIORITIES, seed=0):
        shards, first = [], 0
        for index, size in enumerate(sharding.sizes):
            rows = slice(first, first + size)
            first += size
            shard = ReplayShard(
                run="run-a",
                spec=SPEC,
                shard_index=index,
                shard_epoch=0,
                memory=4 << 20,
                capacity=size,
                min_size=1,
                samples_per_insert=None,
                limiter_buffer_samples=0,
                priority_exponent=ALPHA,
                send_compressed=True,
                seed=seed + index,
            )
            references = np.arange(size)[:, None]
            chunk = make_chunk(
                np.random.default_rng(0),
                num_transitions=size,
                plane_dtype="<f4",
                plane_shape=(3,),
                frame_stack=1,
                planes=FEATURES[rows],
                s_tm1=references,
                s_t=references,
                a_tm1=np.zeros(size),
                r_t=REWARDS[rows],
                priority=priorities[rows],
            )
            assert shard.insert(wire.pack(chunk)).refusal is None
            shards.append(shard)
        return shards

    return make


ROWS = ("s_tm1", "s_t", "a_tm1", "r_t", "discount_t", "item_id", "probability", "params_version")


def draw_parts(shards, sharding, num_batches):
    """Returns for each batch the shards' parts. A shard is asked once for all: its draws are independent."""
    asked = shares(sharding.batch_size, len(shards))
    drawn = [wire.unpack(shard.sample(num * num_batches).batch, SampleBatch) for shard, num in zip(shards, asked, strict=True)]
    return [
        [
            dataclasses.replace(part, **{name: getattr(part, name)[number * num : (number + 1) * num] for name in ROWS})
            for part, num in zip(drawn, asked, strict=True)
        ]
        for number in range(num_batches)
    ]


def places(parts, sharding):
    """Returns where in the table each row of the merged batch is."""
    firsts = np.cumsum([0, *sharding.sizes[:-1]])
    return np.concatenate([first + part.item_id for first, part in zip(firsts, parts, strict=True)])


def merged(parts, exponent):
    return merge(parts, importance_exponent=exponent, prepare=lambda stacks: stacks[:, 0], device=CPU)


# Weights of the merged batch: ours, and what one would write without a thought of sharding. Each gives f64[B] and (N * P) ** -1
# as it believes it to be.


def ours(parts, exponent):
    probability = np.concatenate([part.probability * len(part.item_id) for part in parts]) / sum(len(p.item_id) for p in parts)
    weights = merged(parts, exponent).importance_weight.numpy().astype(float)
    return weights, 1 / (sum(part.size for part in parts) * probability)


def probability_within_the_shard(parts, exponent):
    probability = np.concatenate([part.probability for part in parts])
    num_items = sum(part.size for part in parts)
    return importance_weights(probability, num_items, exponent=exponent).astype(float), 1 / (num_items * probability)


def size_of_the_shard(parts, exponent):
    believed = np.concatenate([1 / (part.size * part.probability) for part in parts])
    return (believed / believed.max()) ** exponent, believed


def size_of_the_shard_with_shares(parts, exponent):
    num_rows = sum(len(part.item_id) for part in parts)
    believed = np.concatenate([1 / (part.size * part.probability * len(part.item_id) / num_rows) for part in parts])
    return (believed / believed.max()) ** exponent, believed


NAIVE = {
    "probability_within_the_shard": probability_within_the_shard,
    "size_of_the_shard": size_of_the_shard,
    "size_of_the_shard_with_shares": size_of_the_shard_with_shares,
}


def weight_of_every_item(batches, sharding, exponent, weigh=ours):
    """Returns f64[N], each batch's maximum multiplied back; asserts that an item has one weight, whatever it is drawn with."""
    least, most = np.full(NUM_ITEMS, np.inf), np.zeros(NUM_ITEMS)
    for parts in batches:
        weights, believed = weigh(parts, exponent)
        rows, weights = places(parts, sharding), weights * believed.max() ** exponent
        np.minimum.at(least, rows, weights)
        np.maximum.at(most, rows, weights)
    assert (most > 0).all(), "an item was never drawn"
    np.testing.assert_allclose(least, most, rtol=1e-5)  # The weights are float32.
    return (least + most) / 2


def expected_gradient(sharding, weights, priorities=PRIORITIES):
    """sum of P_i * w_i * g_i: exact, no draw in it."""
    return (draw_probabilities(sharding, priorities) * weights) @ GRADIENTS


@pytest.mark.parametrize("name", SHARDINGS)
def test_reported_probabilities_and_shares_make_the_draw_probabilities(make_shards, name):
    sharding = SHARDINGS[name]
    probability = draw_probabilities(sharding)
    assert probability.sum() == pytest.approx(1)
    for parts in draw_parts(make_shards(sharding), sharding, 200):
        reported = np.concatenate([part.probability * (len(part.item_id) / sharding.batch_size) for part in parts])
        np.testing.assert_allclose(reported, probability[places(parts, sharding)], rtol=1e-9)
        assert [len(part.item_id) for part in parts] == shares(sharding.batch_size, len(parts))


# Exact: the weights that `merge` gives, and the expectation by its sum


@pytest.mark.parametrize("name", SHARDINGS)
def test_with_full_correction_the_expected_gradient_is_the_mean_of_all_items(make_shards, name):
    """So it is the same over 1, 2 and 5 shards. For any g_i: P_i * w_i is the same number for every item."""
    sharding = SHARDINGS[name]
    weights = weight_of_every_item(draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES), sharding, 1.0)
    np.testing.assert_allclose(draw_probabilities(sharding) * weights, 1 / NUM_ITEMS, rtol=1e-5)
    np.testing.assert_allclose(expected_gradient(sharding, weights), GRADIENTS.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("naive", NAIVE)
def test_naive_weights_expect_another_direction(make_shards, naive, name):
    """Another direction, not only another length, which the normalization would take away.

    Where all shares are equal, leaving them out is only such a factor; here they are 2 : 1 and 2 : 2 : 1 : 1 : 1.
    """
    sharding = SHARDINGS[name]
    weights = weight_of_every_item(draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES), sharding, 1.0, NAIVE[naive])
    share = np.repeat(np.array(shares(sharding.batch_size, len(sharding.sizes))) / sharding.batch_size, sharding.sizes)
    size = np.repeat(sharding.sizes, sharding.sizes)
    by_hand = {
        "probability_within_the_shard": share / NUM_ITEMS,
        "size_of_the_shard": share / size,
        "size_of_the_shard_with_shares": 1 / size,
    }
    np.testing.assert_allclose(draw_probabilities(sharding) * weights, by_hand[naive], rtol=1e-5)
    found, mean = expected_gradient(sharding, weights), GRADIENTS.mean(axis=0)
    assert found @ mean / np.linalg.norm(found) / np.linalg.norm(mean) < 0.995


@pytest.mark.parametrize("exponent", [0.0, 0.4])
@pytest.mark.parametrize("name", SHARDED)
def test_below_full_correction_many_shards_are_one_table_that_draws_as_they_do(make_shards, name, exponent):
    """One table with the priorities P_i ** (1 / alpha): same weights, same expectation, whatever g_i."""
    sharding = SHARDINGS[name]
    one = Sharding((NUM_ITEMS,), sharding.batch_size)
    priorities = draw_probabilities(sharding) ** (1 / ALPHA)
    np.testing.assert_allclose(draw_probabilities(one, priorities), draw_probabilities(sharding), rtol=1e-12)
    weights = weight_of_every_item(draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES), sharding, exponent)
    weights_of_one = weight_of_every_item(draw_parts(make_shards(one, priorities), one, ENOUGH_BATCHES), one, exponent)
    np.testing.assert_allclose(weights, weights_of_one, rtol=1e-5)
    np.testing.assert_allclose(
        expected_gradient(sharding, weights), expected_gradient(one, weights_of_one, priorities), rtol=1e-4
    )


@pytest.mark.parametrize("exponent", [0.4])
@pytest.mark.parametrize("name", SHARDED)
def test_below_full_correction_masses_out_of_proportion_change_the_expectation(make_shards, name, exponent):
    """Not a fault of the weights: the shares are by number of shards, so items of a light shard are drawn more often.

    With masses in proportion to the shares the expectation is that of one table with the same priorities, exactly.
    """
    sharding, one = SHARDINGS[name], SHARDINGS["1_shard"]

    def both(priorities):
        found = []
        for each in (sharding, one):
            batches = draw_parts(make_shards(each, priorities), each, ENOUGH_BATCHES)
            found.append(expected_gradient(each, weight_of_every_item(batches, each, exponent), priorities))
        return found

    many, single = both(PRIORITIES)
    assert np.linalg.norm(many - single) > 0.02 * np.linalg.norm(single)
    in_proportion = draw_probabilities(sharding) ** (1 / ALPHA)
    many, single = both(in_proportion)
    np.testing.assert_allclose(many, single, rtol=1e-4)


def test_normalization_by_the_maximum_is_biased_in_one_table_too():
    """Two draws of three items, every pair counted: why the tests above multiply the maximum back. Sharding has no part in it."""
    probability = np.array([0.7, 0.2, 0.1])
    expected = np.zeros(3)
    for i in range(3):
        for j in range(3):
            weights = importance_weights(probability[[i, j]], 3, exponent=1.0)
            expected[[i]] += probability[i] * probability[j] * weights[0] / 2
            expected[[j]] += probability[i] * probability[j] * weights[1] / 2
    np.testing.assert_allclose(expected, [0.7 * (0.7 + 0.2 * 2 / 7 + 0.1 / 7), 0.2 * (0.9 + 0.1 / 2), 0.1], rtol=1e-6)
    assert expected.max() > 5 * expected.min()  # Without normalization each would be 1/3 times the same number.


# By draws: real batches, real gradients


def p_value_of_mean_zero(rows):
    """Hotelling's test of f64[n, d]; n is so large that its statistic is chi-square."""
    mean = rows.mean(axis=0)
    return stats.chi2.sf(len(rows) * mean @ np.linalg.solve(np.cov(rows.T), mean), rows.shape[1])


@pytest.mark.parametrize("name", SHARDINGS)
def test_drawn_gradients_agree_with_the_mean_of_all_items_and_naive_ones_do_not(make_shards, name):
    """Gradients of a linear model, less what the mean of all items gives for the same weights: their expectation is zero if
    and only if the direction is right. The naive weights are refused on the same draws, so the test has power."""
    sharding = SHARDINGS[name]
    batches = draw_parts(make_shards(sharding, seed=10), sharding, NUM_BATCHES)
    rows: dict[str, list[np.ndarray]] = {"ours": [], **{naive: [] for naive in NAIVE}}
    lengths = []
    for parts in batches:
        batch = merged(parts, 1.0)
        gradients = -(batch.r_t[:, None] * batch.s_tm1).numpy().astype(float)  # At params = 0, of each row.
        for weigh in (ours, *NAIVE.values()):
            weights, believed = weigh(parts, 1.0)
            centred = gradients - GRADIENTS.mean(axis=0)
            rows[weigh.__name__].append(believed.max() * (weights @ centred) / sharding.batch_size)
            if weigh is ours:
                lengths.append(believed.max() * weights.mean())
    p_values = {weights: p_value_of_mean_zero(np.array(found)) for weights, found in rows.items()}
    assert p_values["ours"] > P_REJECT
    assert stats.ttest_1samp(lengths, 1.0).pvalue > P_REJECT
    if name != "1_shard":
        assert max(p_values[naive] for naive in NAIVE) < P_REJECT, p_values
