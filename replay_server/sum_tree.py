"""A sum tree over a fixed number of leaves: sampling in proportion, vectorized over a batch."""

from __future__ import annotations

import numpy as np

from common.messages import Array

# Wide nodes make the tree shallow: few, larger numpy calls, and inner nodes that take a fifteenth of the leaves.
_FAN_OUT = 16
_ROOT_FAN_OUT = 4096


class SumTree:
    """f64 leaf values and the sums of subtrees, level by level; a node sums _FAN_OUT neighbours of the level below, the root all.

    Invariant (`check_valid`): every inner node is exactly the sum of its children, computed anew at each change, so that
    errors do not add up. Source: Schaul et al. 2016, https://arxiv.org/abs/1511.05952, appendix B.2.1.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._levels = [np.zeros(size, np.float64) for size in _level_sizes(capacity)]
        self._children = [level.reshape(-1, _FAN_OUT) for level in self._levels[:-1]]
        self._total = 0.0

    @property
    def values(self) -> Array:
        """f64[capacity] leaf values, a view."""
        return self._levels[0][: self._capacity]

    def total(self) -> float:
        return self._total

    def set(self, leaves: Array, values: Array) -> None:
        """Sets leaf values; where a leaf occurs more than once, the last value stays.

        Args:
          leaves: i64[B] in [0, capacity).
          values: f64[B], finite and not negative.

        Raises:
          ValueError: for a value that is NaN, infinite or negative; nothing is changed then.
        """
        self._levels[0][leaves] = _checked(values)
        nodes = np.asarray(leaves, np.int64)
        for children, parents in zip(self._children, self._levels[1:], strict=True):
            nodes = np.unique(nodes // _FAN_OUT)
            parents[nodes] = children[nodes].sum(axis=1)
        self._total = float(self._levels[-1].sum())

    def set_range(self, first: int, values: Array | float, num: int) -> None:
        """Sets the `num` >= 1 leaves from `first` on, like `set` but without looking for them."""
        self._levels[0][first : first + num] = _checked(values)
        end = first + num
        for children, parents in zip(self._children, self._levels[1:], strict=True):
            first, end = first // _FAN_OUT, (end - 1) // _FAN_OUT + 1
            parents[first:end] = children[first:end].sum(axis=1)
        self._total = float(self._levels[-1].sum())

    def find(self, targets: Array) -> Array:
        """Returns the leaf in whose span each target lies: i64[B] for f64[B] in [0, total()).

        The span of leaf i is [sum of all before it, that plus its value). A leaf of value zero is never returned while
        the total is positive, also where rounding puts a target at the very end.
        """
        ends = np.cumsum(self._levels[-1])
        last = np.searchsorted(ends, ends[-1])  # The last child that is not zero.
        nodes: Array = np.minimum(np.searchsorted(ends, targets, side="right"), last)
        rest = targets - np.where(nodes > 0, ends[nodes - 1], 0.0)
        rows = np.arange(len(targets))
        for children in reversed(self._children):
            ends = np.cumsum(children[nodes], axis=1)  # [B, _FAN_OUT]
            last = (ends < ends[:, -1:]).sum(axis=1)
            child = np.minimum((ends <= rest[:, None]).sum(axis=1), last)
            rest -= np.where(child > 0, ends[rows, child - 1], 0.0)
            nodes = nodes * _FAN_OUT + child
        return nodes

    @staticmethod
    def num_bytes(capacity: int) -> int:
        """Returns the bytes of a tree."""
        return 8 * sum(_level_sizes(capacity))

    def check_valid(self) -> None:
        for children, parents in zip(self._children, self._levels[1:], strict=True):
            assert (parents[: len(children)] == children.sum(axis=1)).all()
            assert (parents[len(children) :] == 0).all()
        assert self._total == self._levels[-1].sum()
        assert all((level >= 0).all() and np.isfinite(level).all() for level in self._levels)


def _level_sizes(capacity: int) -> list[int]:
    """Sizes from the leaves up, the last one the root's children; each is a multiple of _FAN_OUT."""
    sizes = [-(-capacity // _FAN_OUT) * _FAN_OUT]
    while sizes[-1] > _ROOT_FAN_OUT:
        num_nodes = sizes[-1] // _FAN_OUT
        sizes.append(-(-num_nodes // _FAN_OUT) * _FAN_OUT)
    return sizes


def _checked(values: Array | float) -> Array:
    values = np.asarray(values, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("priorities must be finite and not negative")
    return values
