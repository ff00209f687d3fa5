from __future__ import annotations

import itertools

import pytest

from common import schedules


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 1.0), (1, 1 - 0.9 / 1000), (250, 1 - 0.9 * 0.25), (500, 0.55), (999, 1 - 0.9 * 0.999), (1000, 0.1), (10**9, 0.1)],
)
def test_linear_goes_straight_from_initial_to_final_and_stays(count, expected):
    """Kills: final and initial exchanged; no clamp at the end; off by one at `num`."""
    assert schedules.linear(count, initial=1.0, final=0.1, num=1000) == pytest.approx(expected, rel=1e-12)


def test_linear_is_exact_at_its_ends_and_may_rise():
    assert schedules.linear(0, initial=0.3, final=0.7, num=10) == 0.3
    assert schedules.linear(5, initial=0.25, final=0.75, num=10) == 0.5
    assert schedules.linear(-5, initial=0.25, final=0.75, num=10) == 0.25


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.8), (1, 0.8 * 0.5), (3, 0.8 * 0.125), (4, 0.8 * 0.0625), (5, 0.04), (10**6, 0.04)]
)
def test_multiplicative_shrinks_by_its_rate_and_not_below_final(count, expected):
    """0.8 * 0.5 ** 5 = 0.025 is below 0.04. Kills: `initial ** count`; the rate applied to `final`; min for max."""
    assert schedules.multiplicative(count, initial=0.8, final=0.04, rate=0.5) == pytest.approx(expected, rel=1e-12)


def test_ladder_has_the_ends_of_ape_x():
    """Horgan et al. 2018: 360 actors, base 0.4, exponent 7. Kills: N for N - 1; index from 1; `base ** exponent`."""
    assert schedules.ladder(0, 360) == 0.4
    assert schedules.ladder(359, 360) == pytest.approx(0.4**8, rel=1e-12)  # 0.00065536
    assert schedules.ladder(359, 360) == pytest.approx(0.00065536, rel=1e-9)
    assert schedules.ladder(100, 360) == pytest.approx(0.4 ** (1 + 700 / 359), rel=1e-12)


def test_ladder_steps_by_one_factor_downwards():
    values = [schedules.ladder(index, 8) for index in range(8)]
    assert values == pytest.approx([0.4 ** (1 + index) for index in range(8)], rel=1e-12)  # Exponent 7 over 7 steps.
    assert all(one > other for one, other in itertools.pairwise(values))


def test_ladder_with_other_base_and_exponent():
    assert schedules.ladder(1, 3, base=0.25, exponent=2.0) == 0.25**2
    assert schedules.ladder(2, 3, base=0.25, exponent=2.0) == 0.25**3


def test_ladder_of_one_is_its_base():
    assert schedules.ladder(0, 1, base=0.3, exponent=7.0) == 0.3


@pytest.mark.parametrize(("index", "num"), [(-1, 4), (4, 4), (0, 0)])
def test_ladder_refuses_an_index_outside(index, num):
    with pytest.raises(ValueError, match=rf"index must be in \[0, {num}\), got {index}"):
        schedules.ladder(index, num)
