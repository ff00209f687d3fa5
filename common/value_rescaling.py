"""Value rescaling: the network learns apply(return), which is small where returns are large. Pure, elementwise.

The learner rescales its targets with it, and the actor the targets of first priorities.

Source: Pohlen et al. 2018, "Observe and Look Further", https://arxiv.org/abs/1805.11593.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class TxPair(NamedTuple):
    """A strictly increasing function of values and its inverse: apply_inv(apply(x)) = x, apply(0) = 0."""

    apply: Callable[[Tensor], Tensor]
    """From a return to what the network learns."""
    apply_inv: Callable[[Tensor], Tensor]
    """From what the network gives to a return."""


def identity(x: Tensor) -> Tensor:
    """Returns x, the same tensor."""
    return x


def signed_hyperbolic(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Returns h(x) of x's shape, x in units of return.

        h(x) = sign(x) (sqrt(abs(x) + 1) - 1) + eps x

    It is computed as x / (sqrt(abs(x) + 1) + 1) + eps x, which loses no digits near 0.

    Args:
      x: f32[...] returns.
      eps: at least 0; above 0 the inverse is Lipschitz continuous.
    """
    return x / ((x.abs() + 1.0).sqrt() + 1.0) + eps * x


def signed_parabolic(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Returns the inverse of `signed_hyperbolic` at x, of x's shape.

        h_inv(x) = sign(x) (((sqrt(1 + 4 eps (abs(x) + 1 + eps)) - 1) / (2 eps)) ** 2 - 1)

    With u = sqrt(abs(y) + 1) - 1, abs(h(y)) is eps u**2 + (1 + 2 eps) u, and abs(y) is u (u + 2). The root of the quadratic is
    taken in the form that subtracts nothing: the one above has lost every digit at x = 1e-3 in fp32.

    Args:
      x: f32[...] values of h.
      eps: as given to `signed_hyperbolic`; may be 0 here.
    """
    b = 1.0 + 2.0 * eps
    u = 2.0 * x / (b + (b * b + 4.0 * eps * x.abs()).sqrt())  # With the sign of x.
    return u * (u.abs() + 2.0)


IDENTITY_PAIR = TxPair(identity, identity)
SIGNED_HYPERBOLIC_PAIR = TxPair(signed_hyperbolic, signed_parabolic)
