"""Turns steps into n-step transitions. The one owner of discount, n, reward clipping and termination.

They meet in `r_t` and `discount_t` and appear nowhere later:

    r_t        = sum over i < m of discount**i * clip(reward_i)
    discount_t = discount**m * (not terminated)             m <= n the steps really taken

A terminated or truncated episode leaves short tails (m < n), and they are kept; a truncated one bootstraps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import NonFiniteError
from common.messages import Array

_WINDOWS = ("returns", "source", "a_tm1", "extra", "count")


@dataclass(frozen=True, slots=True)
class Transitions:
    """M transitions, in the order of their environments and, within one, of their source steps.

    `source` and `destination` are the numbers that the caller gave to observations; the caller's `extra` of the source step
    comes back as `extra`.
    """

    env: Array
    """i64[M] which environment."""
    source: Array
    """i64[M] observation number of s_tm1."""
    destination: Array
    """i64[M] observation number of s_t."""
    a_tm1: Array
    """i64[M]."""
    r_t: Array
    """f64[M]."""
    discount_t: Array
    """f64[M]."""
    extra: Array
    """f64[M] what came with the source step: here the value of the action taken."""


class NStepBuilder:
    """A window of the last n steps of each of E environments, as arrays; column j holds the step taken n - j steps ago.

    Invariant: a window never holds steps of two episodes, nor of the two sides of a lost life.
    """

    def __init__(
        self, *, num_envs: int, n_step: int, discount: float, reward_clip: float | None, terminal_reward: float | None
    ) -> None:
        self._n = n_step
        self._reward_clip, self._terminal_reward = reward_clip, terminal_reward
        ages = np.arange(n_step - 1, -1, -1)
        self._factors = discount**ages  # Of the newest reward in the return that begins in column j.
        self._discounts = discount ** (ages + 1)
        self._columns = np.arange(n_step)
        self._is_oldest = self._columns == 0
        self._returns = np.zeros((num_envs, n_step))
        self._source = np.zeros((num_envs, n_step), np.int64)
        self._a_tm1 = np.zeros((num_envs, n_step), np.int64)
        self._extra = np.zeros((num_envs, n_step))
        self._count = np.zeros(num_envs, np.int64)

    def add(
        self,
        *,
        source: Array,
        a_tm1: Array,
        extra: Array,
        reward: Array,
        terminated: Array,
        truncated: Array,
        destination: Array,
        is_transition: Array,
    ) -> Transitions:
        """Adds one step of every environment where `is_transition`; all arguments are [E]. Returns what is complete.

        Raises:
          NonFiniteError: for a reward that is NaN or infinite.
        """
        if not np.isfinite(reward[is_transition]).all():
            bad = int(np.flatnonzero(is_transition & ~np.isfinite(reward))[0])
            raise NonFiniteError(f"environment {bad} gave the reward {reward[bad]}")
        rows = slice(None) if is_transition.all() else is_transition  # As it is in nearly every step: slices are no copies.
        for window, newest in ((self._source, source), (self._a_tm1, a_tm1), (self._extra, extra)):
            window[rows, :-1] = window[rows, 1:]
            window[rows, -1] = newest[rows]
        self._returns[rows, :-1] = self._returns[rows, 1:]
        self._returns[rows, -1] = 0.0
        self._returns[rows] += self._clipped(reward, terminated)[rows, None] * self._factors
        self._count[rows] = np.minimum(self._count[rows] + 1, self._n)

        ended = terminated | truncated
        held = self._columns >= self._n - self._count[:, None]
        complete = held & (ended[:, None] | self._is_oldest) & is_transition[:, None]  # [E, n]
        env, column = complete.nonzero()
        self._count[is_transition & ended] = 0
        return Transitions(
            env=env,
            source=self._source[env, column],
            destination=destination[env],
            a_tm1=self._a_tm1[env, column],
            r_t=self._returns[env, column],
            discount_t=self._discounts[column] * ~terminated[env],
            extra=self._extra[env, column],
        )

    def add_run(self, *, source: Array, a_tm1: Array, extra: Array, reward: Array, destination: Array) -> Transitions:
        """Adds T steps at once, in which no episode began or ended; all arguments are [T, E]. Returns what is complete.

        To the bit what T calls of `add` do; only the order is by step, and within a step by environment.
        """
        num_steps = len(reward)
        clipped = self._clipped(reward, np.zeros(reward.shape, bool))
        returns = np.concatenate([self._returns, np.zeros_like(clipped.T)], axis=1)
        for step in range(num_steps):
            returns[:, step + 1 : step + 1 + self._n] += clipped[step, :, None] * self._factors
        windows = [
            np.concatenate(pair, axis=1) for pair in ((self._source, source.T), (self._a_tm1, a_tm1.T), (self._extra, extra.T))
        ]
        column, env = np.nonzero(self._count + np.arange(1, num_steps + 1)[:, None] >= self._n)
        self._returns = returns[:, num_steps:].copy()
        self._source, self._a_tm1, self._extra = (window[:, num_steps:].copy() for window in windows)
        self._count = np.minimum(self._count + num_steps, self._n)
        of_source, of_a_tm1, of_extra = (window[env, column + 1] for window in windows)
        return Transitions(
            env=env,
            source=of_source,
            destination=destination[column, env],
            a_tm1=of_a_tm1,
            r_t=returns[env, column + 1],
            discount_t=np.full(len(env), self._discounts[0]),
            extra=of_extra,
        )

    def state(self) -> dict[str, Array]:
        """Returns copies of the windows, by name."""
        return {name: getattr(self, f"_{name}").copy() for name in _WINDOWS}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Takes what `state` returned."""
        for name in _WINDOWS:
            setattr(self, f"_{name}", np.array(state[name]))

    def _clipped(self, reward: Array, terminated: Array) -> Array:
        clip = self._reward_clip
        clipped = reward if clip is None else np.minimum(np.maximum(reward, -clip), clip)
        return clipped if self._terminal_reward is None else np.where(terminated, self._terminal_reward, clipped)
