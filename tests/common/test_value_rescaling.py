"""Golden values, the inverse over a big range, the twin in float64."""

import math

import pytest
import torch

from common.value_rescaling import IDENTITY_PAIR, SIGNED_HYPERBOLIC_PAIR, signed_hyperbolic, signed_parabolic


def f32(values):
    return torch.tensor(values, dtype=torch.float32)


MAGNITUDES = torch.logspace(-30, 30, 601, dtype=torch.float64).float()
WIDE = torch.cat([-MAGNITUDES, f32([0.0]), MAGNITUDES])
TIGHT = {"rtol": 2e-6, "atol": 0.0}  # A few units in the last place of fp32, near 0 too.


def test_signed_hyperbolic_of_whole_roots():
    """Kills: no eps x, eps in the root, an even function, a missing -1 or +1."""
    expected = [2 - 1 + 0.01 * 3, -(4 - 1 + 0.01 * 15), 0.0, 10 - 1 + 0.01 * 99]
    torch.testing.assert_close(signed_hyperbolic(f32([3, -15, 0, 99]), eps=0.01), f32(expected))
    torch.testing.assert_close(signed_hyperbolic(f32([3])), f32([1 + 0.001 * 3]))


def test_signed_parabolic_is_the_inverse_of_whole_roots():
    """Kills: a sign that is lost, eps of another size than given."""
    torch.testing.assert_close(signed_parabolic(f32([1.03, -3.15, 0.0, 9.99]), eps=0.01), f32([3, -15, 0, 99]))
    torch.testing.assert_close(signed_parabolic(f32([2.0, -3.0]), eps=0.0), f32([3.0**2 - 1, -(4.0**2 - 1)]))


def test_the_pair_is_exact_both_ways_over_sixty_decades():
    """Kills: the papers' forms as they stand, which subtract nearly equal numbers near 0 and overflow in a square far out."""
    apply, apply_inv = SIGNED_HYPERBOLIC_PAIR
    torch.testing.assert_close(apply_inv(apply(WIDE)), WIDE, **TIGHT)
    torch.testing.assert_close(apply(apply_inv(WIDE)), WIDE, **TIGHT)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_signed_hyperbolic_agrees_with_the_formula_in_float64(eps):
    values = [-1e6, -123.4, -1.0, -0.25, 0.0, 0.5, 7.0, 2e4, 1e9]
    expected = [math.copysign(math.sqrt(abs(x) + 1) - 1, x) + eps * x for x in values]
    torch.testing.assert_close(signed_hyperbolic(f32(values), eps), f32(expected), **TIGHT)


def test_both_rise_everywhere_and_keep_the_sign():
    for function in SIGNED_HYPERBOLIC_PAIR:
        y = function(WIDE.sort().values)
        assert (y.diff() > 0).all() and (y.sign() == WIDE.sort().values.sign()).all()


def test_the_identity_pair_keeps_the_bits():
    x = f32([0.1, -1e30, 0.0])
    assert IDENTITY_PAIR.apply(x) is x and IDENTITY_PAIR.apply_inv(x) is x
