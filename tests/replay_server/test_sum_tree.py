from __future__ import annotations

import numpy as np
import pytest

from replay_server import sum_tree
from replay_server.sum_tree import SumTree


class NaiveSumTree:
    """The same questions, answered by walking over a list."""

    def __init__(self, capacity: int) -> None:
        self.values = [0.0] * capacity

    def set(self, leaves, values) -> None:
        for leaf, value in zip(leaves, values, strict=True):
            self.values[leaf] = float(value)

    def total(self) -> float:
        return sum(self.values)

    def find(self, targets) -> list[int]:
        return [self._find(target) for target in targets]

    def _find(self, target: float) -> int:
        before = 0.0
        for leaf, value in enumerate(self.values):
            if before <= target < before + value:
                return leaf
            before += value
        raise AssertionError("the target is past the end")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("root_fan_out", [16, 4096], ids=["deep", "flat"])
def test_sum_tree_agrees_with_naive(seed, root_fan_out, monkeypatch):
    """Kills: first of duplicate leaves wins; `rest > left_sum`; sums not carried to the root; leaves beyond the capacity."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(sum_tree, "_ROOT_FAN_OUT", root_fan_out)
    capacity = int(rng.integers(1, 700))  # Also not a power of two, and of one to three levels.
    tree, naive = SumTree(capacity), NaiveSumTree(capacity)
    largest = int(rng.choice([2, 3, 1000]))  # With 2 half of the leaves are zero.
    for _ in range(50):
        leaves = rng.integers(capacity, size=9)  # Duplicates happen: the last one wins in both.
        values = rng.integers(0, largest, size=9).astype(float)  # Whole numbers: sums are exact, so == may be asked.
        for t in (tree, naive):
            t.set(leaves, values)
        first, num = int(rng.integers(capacity)), int(rng.integers(1, 40))
        num = min(num, capacity - first)
        run = rng.integers(0, largest, size=num).astype(float)
        tree.set_range(first, run, num)
        naive.set(range(first, first + num), run)
        tree.check_valid()
        np.testing.assert_array_equal(tree.values, naive.values)
        assert tree.total() == naive.total()
        if tree.total() > 0:
            targets = rng.integers(0, int(tree.total()), size=20).astype(float)  # On the boundaries, on purpose.
            np.testing.assert_array_equal(tree.find(targets), naive.find(targets))
            np.testing.assert_array_equal(tree.find(targets + 0.5), naive.find(targets + 0.5))


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65])
def test_find_gives_every_leaf_its_span(capacity):
    values = np.arange(1, capacity + 1, dtype=float)
    tree = SumTree(capacity)
    tree.set(np.arange(capacity), values)
    assert tree.total() == capacity * (capacity + 1) / 2
    expected = np.repeat(np.arange(capacity), np.arange(1, capacity + 1))
    np.testing.assert_array_equal(tree.find(np.arange(int(tree.total()), dtype=float)), expected)


def test_set_with_duplicate_leaves_keeps_the_last():
    tree = SumTree(3)
    tree.set(np.array([1, 2, 1, 1]), np.array([10.0, 4.0, 20.0, 7.0]))
    np.testing.assert_array_equal(tree.values, [0, 7, 4])
    assert tree.total() == 7 + 4


@pytest.mark.parametrize("leaf", range(11))
def test_find_never_returns_a_leaf_of_value_zero(leaf):
    """Kills a descent without the guard: there a target that rounding put at the end reaches an empty right subtree."""
    tree = SumTree(11)
    tree.set(np.array([leaf]), np.array([0.3]))
    targets = np.array([0.0, 0.15, np.nextafter(0.3, 0), 0.3, 0.31])
    np.testing.assert_array_equal(tree.find(targets), [leaf] * 5)


@pytest.mark.parametrize("seed", range(5))
def test_find_at_the_very_end_returns_the_last_positive_leaf(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 40))
    values = rng.random(capacity) * (rng.random(capacity) < 0.5)
    values[0] = 0.1  # Not all are zero.
    tree = SumTree(capacity)
    tree.set(np.arange(capacity), values)
    last = int(np.flatnonzero(values)[-1])
    assert tree.find(np.array([tree.total(), np.nextafter(tree.total(), np.inf)])).tolist() == [last, last]
    found = tree.find(rng.random(1000) * tree.total())
    assert (values[found] > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, -1e-300])
def test_set_refuses_bad_priorities_and_changes_nothing(bad):
    tree = SumTree(5)
    tree.set(np.arange(5), np.arange(5, dtype=float))
    with pytest.raises(ValueError, match="finite and not negative"):
        tree.set(np.array([0, 3, 4]), np.array([9.0, bad, 9.0]))
    np.testing.assert_array_equal(tree.values, [0, 1, 2, 3, 4])
    assert tree.total() == 10
    tree.check_valid()


def test_errors_of_rounding_do_not_add_up():
    """Kills a tree that adds differences to its sums: after huge values have come and gone nothing of them is left."""
    rng = np.random.default_rng(0)
    tree = SumTree(37)
    for _ in range(500):
        leaves = rng.integers(37, size=8)
        tree.set(leaves, 10.0 ** rng.uniform(-12, 12, size=8))
    tree.set(np.arange(37), np.full(37, 0.25))
    assert tree.total() == 37 * 0.25


def test_check_valid_finds_a_wrong_sum_and_a_bad_leaf():
    tree = SumTree(6)
    tree.set(np.arange(6), np.ones(6))
    tree.check_valid()
    tree.values[2] = 5.0  # A view: its sums do not know.
    with pytest.raises(AssertionError):
        tree.check_valid()
    other = SumTree(1)  # No inner node: the leaf is the total.
    other.values[0] = -1.0
    with pytest.raises(AssertionError):
        other.check_valid()
