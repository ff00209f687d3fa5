"""A sum tree over a fixed number of leaves: sampling in proportion, vectorized over a batch."""

from __future__ import annotations

import numpy as np

from common.messages import Array


class SumTree:
    """f64 leaf values and the sums of every subtree, as one implicit binary heap.

    Invariant (`check_valid`): every inner node is exactly its left plus its right child, computed anew at each change, so
    that errors do not add up. Source: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, appendix B.2.1.
    """

    def __init__(self, capacity: int) -> None:
        self._depth = max(capacity - 1, 0).bit_length()
        self._first_leaf = 1 << self._depth
        self._capacity = capacity
        self._nodes = np.zeros(2 * self._first_leaf, np.float64)

    @property
    def values(self) -> Array:
        """f64[capacity] leaf values, a view."""
        return self._nodes[self._first_leaf : self._first_leaf + self._capacity]

    def total(self) -> float:
        return float(self._nodes[1])

    def set(self, leaves: Array, values: Array) -> None:
        """Sets leaf values; where a leaf occurs more than once, the last value stays.

        Args:
          leaves: i64[B] in [0, capacity).
          values: f64[B], finite and not negative.

        Raises:
          ValueError: for a value that is NaN, infinite or negative; nothing is changed then.
        """
        values = np.asarray(values, np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("priorities must be finite and not negative")
        nodes = np.asarray(leaves, np.int64) + self._first_leaf
        self._nodes[nodes] = values
        for _ in range(self._depth):
            nodes = np.unique(nodes >> 1)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, targets: Array) -> Array:
        """Returns the leaf in whose span each target lies: i64[B] for f64[B] in [0, total()).

        The span of leaf i is [sum of all before it, that plus its value). A leaf of value zero is never returned while
        the total is positive, also where rounding puts a target at the very end.
        """
        nodes = np.ones(len(targets), np.int64)
        rest = np.array(targets, np.float64)
        for _ in range(self._depth):
            left = 2 * nodes
            left_sum = self._nodes[left]
            right = (rest >= left_sum) & (self._nodes[left + 1] > 0)
            rest -= np.where(right, left_sum, 0.0)
            nodes = left + right
        return nodes - self._first_leaf

    def check_valid(self) -> None:
        inner = np.arange(1, self._first_leaf)
        assert (self._nodes[inner] == self._nodes[2 * inner] + self._nodes[2 * inner + 1]).all()
        assert (self._nodes >= 0).all() and np.isfinite(self._nodes).all()
