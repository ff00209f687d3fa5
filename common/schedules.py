"""Schedules. Pure: a function of a count."""

from __future__ import annotations


def linear(count: float, *, initial: float, final: float, num: float) -> float:
    """Goes from `initial` at count 0 to `final` at count `num` in a straight line, and stays there.

    Source: Mnih et al. 2015, "Human-level control", https://doi.org/10.1038/nature14236 (exploration 1 -> 0.1).
    """
    fraction = min(max(count / num, 0.0), 1.0)
    return initial + fraction * (final - initial)


def multiplicative(count: float, *, initial: float, final: float, rate: float) -> float:
    """Returns `initial * rate ** count`, never below `final`."""
    return max(final, float(initial * rate**count))


def ladder(index: int, num: int, *, base: float = 0.4, exponent: float = 7.0) -> float:
    """Returns the constant epsilon of explorer `index` of `num`: base ** (1 + exponent * i / (num - 1)).

    With one explorer it is `base`. Source: Horgan et al. 2018, "Ape-X", https://arxiv.org/abs/1803.00933, section 4.1.
    """
    if not 0 <= index < num:
        raise ValueError(f"index must be in [0, {num}), got {index}")
    return base if num == 1 else float(base ** (1 + exponent * index / (num - 1)))
