"""Priorities and importance weights of prioritized replay. Pure, float64.

Source: Schaul et al. 2016, "Prioritized Experience Replay", https://arxiv.org/abs/1511.05952.
"""

from __future__ import annotations

import numpy as np

from common.messages import Array


def priority(td_error: Array, *, floor: float) -> Array:
    """Returns f64[B] `abs(td_error) + floor`, before the exponent alpha, which is the shard's."""
    return np.abs(td_error.astype(np.float64)) + floor


def importance_weights(probability: Array, draw_probability: Array, num_items: int, *, exponent: float) -> tuple[Array, float]:
    """Corrects for drawing items with unequal probability, and for drawing them from several shards.

        importance_weight = (1 / (num_items * probability)) ** exponent * probability / draw_probability

    over its maximum in the batch. The first factor is the paper's, with the probability that one table of all items would
    draw with; the second one makes up for shards that are asked for more, or less, than their part of the priorities. It is 1
    where there is one shard. So sharding changes no expectation, whatever the exponent.

    Args:
      probability: f64[B] in [0, 1]: priority / mass of all shards; 0 where that is too small for a float64.
      draw_probability: f64[B] in (0, 1]: (share of the batch asked of the shard) * (priority / mass of the shard).
      num_items: items of all shards. It cancels in the normalization, and stands here as in the paper's formula.
      exponent: beta, 0 no correction, 1 full correction.

    Returns:
      f32[B] in [0, 1], and the maximum that they were divided by.
    """
    # Not (num_items * probability) ** -exponent * probability, which is infinity * 0 for a shard of tiny priorities.
    correction = float(num_items) ** -exponent * probability ** (1 - exponent) / draw_probability
    maximum = correction.max()
    return np.asarray(correction / maximum, dtype=np.float32), float(maximum)
