"""How an actor picks actions. Pure."""

from __future__ import annotations

import numpy as np

from common.messages import Array


def epsilon_greedy(rng: np.random.Generator, values: Array, epsilon: Array | float) -> Array:
    """Returns i64[E]: a uniformly random action with probability epsilon, else the first action of greatest value.

    Args:
      rng: drawn from twice a call, whatever epsilon is, so that the stream does not depend on it.
      values: f32[E, A] action values.
      epsilon: f64[E] or one number, in [0, 1].
    """
    num_envs, num_actions = values.shape
    explore = rng.random(num_envs) < epsilon
    random_action = rng.integers(num_actions, size=num_envs)
    return np.where(explore, random_action, values.argmax(axis=1)).astype(np.int64)
