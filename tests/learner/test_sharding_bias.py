"""What sharding does to the gradient that the learner expects: nothing, whatever the correction.

Real shards of very unequal sizes and priority masses, `shares` and `merge`. An item i of shard s has

    q_i = priority_i / mass of all shards                            chance that a draw of one table of all items is item i
    P_i = (share of the batch asked of s) * priority_i / mass_s      chance that one row of the merged batch is item i
    w_i = (N * q_i) ** -exponent * q_i / P_i                         its importance weight, over the maximum of the batch

The maximum changes from batch to batch and depends on what was drawn, so the mean of normalized gradients is biased whatever
the sharding (Schaul et al. accept that: it only ever makes steps smaller). What can be exact is what it is divided out of:
with the batch's maximum multiplied back

    E[mean of w_i * g_i] = sum of P_i * w_i * g_i = sum of q_i * (N * q_i) ** -exponent * g_i

in which P_i, and so the sharding, does not appear: it is what one table of the same priorities gives, at every exponent; at
exponent 1 the plain mean of all g_i. In uniform replay q_i = 1 / N, and it is the plain mean at every exponent, though items
of a small shard are drawn more often.
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
from learner.inputs import Transfer
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
EXPONENTS = [0.0, 0.4, 1.0]


class Sharding(NamedTuple):
    sizes: tuple[int, ...]
    batch_size: int
    """Does not divide by the number of shards: shares are unequal."""


SHARDINGS = {"1_shard": Sharding((40,), 5), "2_shards": Sharding((12, 28), 3), "5_shards": Sharding((20, 3, 1, 12, 4), 7)}
SHARDED = [name for name in SHARDINGS if name != "1_shard"]


def table_probabilities(alpha=ALPHA):
    """q_i of every item, by the definition."""
    powers = PRIORITIES**alpha
    return powers / powers.sum()


def draw_probabilities(sharding, alpha=ALPHA):
    """P_i of every item, by the definition."""
    parts = np.split(PRIORITIES**alpha, np.cumsum(sharding.sizes)[:-1])
    asked = shares(sharding.batch_size, len(sharding.sizes))
    return np.concatenate([num / sharding.batch_size * part / part.sum() for num, part in zip(asked, parts, strict=True)])


def gradient_of_one_table(exponent, alpha=ALPHA):
    """sum of q_i * (N * q_i) ** -exponent * g_i, by the definition."""
    probability = table_probabilities(alpha)
    return (probability * (NUM_ITEMS * probability) ** -exponent) @ GRADIENTS


@pytest.fixture
def make_shards(make_chunk):
    """Shards that hold the items in order; item_id and place in the table differ by the first item's place."""

    def make(sharding, alpha=ALPHA, seed=0):
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
                priority_exponent=alpha,
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
                priority=PRIORITIES[rows],
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
    return merge(parts, importance_exponent=exponent, transfer=Transfer(CPU, lambda stacks: stacks[:, 0]))


# Weights of the merged batch: ours, and what one would write without a thought of sharding, or with half of one. Each gives
# f64[B] over the batch's maximum, and that maximum.


def of_the_batch(parts):
    """Returns what the parts report, for each row: probability in the shard, share asked of it, its size and mass."""
    rows = sum(len(part.item_id) for part in parts)
    columns = [(part.probability, len(part.item_id) / rows, part.size, part.priority_mass) for part in parts]
    full = [[np.broadcast_to(value, len(column[0])) for value in column] for column in columns]
    return (np.concatenate(column) for column in zip(*full, strict=True))


def normalized(weights):
    return weights / weights.max(), weights.max()


def ours(parts, exponent):
    """The maximum is by the definition: a batch whose rows do not have just these weights gives an item two of them."""
    within, share, _, mass = of_the_batch(parts)
    table = within * mass / sum(part.priority_mass for part in parts)
    num_items = sum(part.size for part in parts)
    weights = merged(parts, exponent).importance_weight.numpy().astype(float)
    return weights, ((num_items * table) ** -exponent * table / (share * within)).max()


def probability_within_the_shard(parts, exponent):
    within, _, _, _ = of_the_batch(parts)
    return normalized((sum(part.size for part in parts) * within) ** -exponent)


def size_of_the_shard(parts, exponent):
    within, _, size, _ = of_the_batch(parts)
    return normalized((size * within) ** -exponent)


def size_of_the_shard_with_shares(parts, exponent):
    within, share, size, _ = of_the_batch(parts)
    return normalized((size * share * within) ** -exponent)


def probability_in_one_table(parts, exponent):
    """The paper's formula as if one table had drawn."""
    within, _, _, mass = of_the_batch(parts)
    return normalized(
        (sum(part.size for part in parts) * within * mass / sum(part.priority_mass for part in parts)) ** -exponent
    )


def chance_of_the_draw(parts, exponent):
    """The paper's formula with the real chance: right at exponent 1, and only there."""
    within, share, _, _ = of_the_batch(parts)
    return normalized((sum(part.size for part in parts) * share * within) ** -exponent)


NAIVE = {
    weigh.__name__: weigh
    for weigh in (
        probability_within_the_shard,
        size_of_the_shard,
        size_of_the_shard_with_shares,
        probability_in_one_table,
        chance_of_the_draw,
    )
}
REFUSED = [(naive, exponent) for naive in NAIVE for exponent in EXPONENTS if (naive, exponent) != ("chance_of_the_draw", 1.0)]


def weight_of_every_item(batches, sharding, exponent, weigh=ours):
    """Returns f64[N], each batch's maximum multiplied back; asserts that an item has one weight, whatever it is drawn with."""
    least, most = np.full(NUM_ITEMS, np.inf), np.zeros(NUM_ITEMS)
    for parts in batches:
        weights, maximum = weigh(parts, exponent)
        assert weights.max() == 1
        rows, weights = places(parts, sharding), weights * maximum
        np.minimum.at(least, rows, weights)
        np.maximum.at(most, rows, weights)
    assert (most > 0).all(), "an item was never drawn"
    np.testing.assert_allclose(least, most, rtol=1e-5)  # The weights are float32.
    return (least + most) / 2


def expected_gradient(sharding, weights, alpha=ALPHA):
    """sum of P_i * w_i * g_i: exact, no draw in it."""
    return (draw_probabilities(sharding, alpha) * weights) @ GRADIENTS


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("alpha", [ALPHA, 0.0], ids=["prioritized", "uniform"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_reported_probabilities_and_shares_make_the_draw_probabilities(make_shards, name, alpha):
    sharding = SHARDINGS[name]
    probability = draw_probabilities(sharding, alpha)
    assert probability.sum() == pytest.approx(1)
    for parts in draw_parts(make_shards(sharding, alpha), sharding, 200):
        reported = np.concatenate([part.probability * (len(part.item_id) / sharding.batch_size) for part in parts])
        np.testing.assert_allclose(reported, probability[places(parts, sharding)], rtol=1e-9)
        assert [len(part.item_id) for part in parts] == shares(sharding.batch_size, len(parts))


# Exact: the weights that `merge` gives, and the expectation by its sum


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("alpha", [ALPHA, 0.0], ids=["prioritized", "uniform"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_the_expected_gradient_is_that_of_one_table(make_shards, name, alpha, exponent):
    """For any g_i: P_i * w_i is q_i * (N * q_i) ** -exponent for every item, however the items lie in shards."""
    sharding = SHARDINGS[name]
    weights = weight_of_every_item(draw_parts(make_shards(sharding, alpha), sharding, ENOUGH_BATCHES), sharding, exponent)
    table = table_probabilities(alpha)
    np.testing.assert_allclose(
        draw_probabilities(sharding, alpha) * weights, table * (NUM_ITEMS * table) ** -exponent, rtol=1e-5
    )
    found = expected_gradient(sharding, weights, alpha)
    np.testing.assert_allclose(found, gradient_of_one_table(exponent, alpha), rtol=1e-5)
    if exponent == 1 or alpha == 0:
        np.testing.assert_allclose(found, GRADIENTS.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", SHARDED)
def test_many_shards_expect_what_one_shard_of_the_same_priorities_does(make_shards, name, exponent):
    """The claim without a formula: both sides are shards and `merge`."""
    found = []
    for sharding in (SHARDINGS[name], SHARDINGS["1_shard"]):
        batches = draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES)
        found.append(expected_gradient(sharding, weight_of_every_item(batches, sharding, exponent)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_weights_of_uniform_replay_over_two_shards_by_hand(make_shards, exponent):
    """12 items asked for 2 of 3 and 28 asked for 1: P = 2/3 / 12 and 1/3 / 28, q = 1/40, so q / P = 18/40 and 84/40."""
    sharding = SHARDINGS["2_shards"]
    (parts,) = draw_parts(make_shards(sharding, 0.0), sharding, 1)
    weights = merged(parts, exponent).importance_weight.numpy()
    np.testing.assert_allclose(weights, [18 / 84, 18 / 84, 1], rtol=1e-6)


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize(("naive", "exponent"), REFUSED)
def test_naive_weights_expect_another_direction(make_shards, naive, exponent, name):
    """Another direction, not only another length, which the normalization would take away.

    Where all shares are equal, leaving them out is only such a factor; here they are 2 : 1 and 2 : 2 : 1 : 1 : 1.
    """
    sharding = SHARDINGS[name]
    batches = draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES)
    weights = weight_of_every_item(batches, sharding, exponent, NAIVE[naive])
    assert cosine(expected_gradient(sharding, weights), gradient_of_one_table(exponent)) < 0.97


@pytest.mark.parametrize("name", SHARDED)
def test_naive_weights_at_full_correction_by_hand(make_shards, name):
    """The proof that the naive weights are what their names say: P_i * w_i of each at exponent 1."""
    sharding = SHARDINGS[name]
    batches = draw_parts(make_shards(sharding), sharding, ENOUGH_BATCHES)
    share = np.repeat(np.array(shares(sharding.batch_size, len(sharding.sizes))) / sharding.batch_size, sharding.sizes)
    size = np.repeat(sharding.sizes, sharding.sizes)
    by_hand = {
        "probability_within_the_shard": share / NUM_ITEMS,
        "size_of_the_shard": share / size,
        "size_of_the_shard_with_shares": 1 / size,
        "probability_in_one_table": draw_probabilities(sharding) / table_probabilities() / NUM_ITEMS,
        "chance_of_the_draw": np.full(NUM_ITEMS, 1 / NUM_ITEMS),
    }
    for naive, weigh in NAIVE.items():
        weights = weight_of_every_item(batches, sharding, 1.0, weigh)
        np.testing.assert_allclose(draw_probabilities(sharding) * weights, by_hand[naive], rtol=1e-5)


def test_normalization_by_the_maximum_is_biased_in_one_table_too():
    """Two draws of three items, every pair counted: why the tests above multiply the maximum back. Sharding has no part in it."""
    probability = np.array([0.7, 0.2, 0.1])
    expected = np.zeros(3)
    for i in range(3):
        for j in range(3):
            weights = importance_weights(probability[[i, j]], probability[[i, j]], 3, exponent=1.0)[0]
            expected[[i]] += probability[i] * probability[j] * weights[0] / 2
            expected[[j]] += probability[i] * probability[j] * weights[1] / 2
    np.testing.assert_allclose(expected, [0.7 * (0.7 + 0.2 * 2 / 7 + 0.1 / 7), 0.2 * (0.9 + 0.1 / 2), 0.1], rtol=1e-6)
    assert expected.max() > 5 * expected.min()  # Without normalization each would be 1/3 times the same number.


# By draws: real batches, real gradients


def p_value_of_mean_zero(rows):
    """Hotelling's test of f64[n, d]; n is so large that its statistic is chi-square."""
    mean = rows.mean(axis=0)
    return stats.chi2.sf(len(rows) * mean @ np.linalg.solve(np.cov(rows.T), mean), rows.shape[1])


@pytest.mark.parametrize("exponent", [0.4, 1.0])
@pytest.mark.parametrize("name", SHARDINGS)
def test_drawn_gradients_agree_with_one_table_and_naive_ones_do_not(make_shards, name, exponent):
    """Gradients of a linear model, less what one table expects for the same weights: their expectation is zero if and only if
    the direction is right. The naive weights are refused on the same draws, so the test has power."""
    sharding = SHARDINGS[name]
    table = table_probabilities()
    length = (table * (NUM_ITEMS * table) ** -exponent).sum()
    batches = draw_parts(make_shards(sharding, seed=10), sharding, NUM_BATCHES)
    rows: dict[str, list[np.ndarray]] = {"ours": [], **{naive: [] for naive in NAIVE}}
    lengths = []
    for parts in batches:
        batch = merged(parts, exponent)
        gradients = -(batch.r_t[:, None] * batch.s_tm1).numpy().astype(float)  # At params = 0, of each row.
        centred = gradients - gradient_of_one_table(exponent) / length
        for weigh in (ours, *NAIVE.values()):
            weights, maximum = weigh(parts, exponent)
            rows[weigh.__name__].append(maximum * (weights @ centred) / sharding.batch_size)
            if weigh is ours:
                lengths.append(maximum * weights.mean())
    p_values = {weights: p_value_of_mean_zero(np.array(found)) for weights, found in rows.items()}
    assert p_values["ours"] > P_REJECT
    assert stats.ttest_1samp(lengths, length).pvalue > P_REJECT
    if name != "1_shard":
        assert max(p_values[naive] for naive in NAIVE if (naive, exponent) in REFUSED) < P_REJECT, p_values
