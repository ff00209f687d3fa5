"""The shapes of the torsos' convolutions, without PyTorch: the networks are built from them and the plan counts them."""

from __future__ import annotations

from common.errors import UserError

# (channels out, kernel, stride) of each convolution.
CONVOLUTIONS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "dqn2013": ((16, 8, 4), (32, 4, 2)),
    "nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
}
IMPALA_CHANNELS = (16, 32, 32)
"""Of each section, before they are multiplied by the width."""
IMPALA_BLOCKS = 2
"""Residual blocks of a section, of two convolutions each."""


def check_pool(adaptive_pool: int, height: int, columns: int, name: str) -> None:
    """Raises UserError where a torso gives fewer rows or columns than its output is to be pooled to."""
    if adaptive_pool > min(height, columns):
        raise UserError(
            f"network.adaptive_pool {adaptive_pool} is more than the {height} x {columns} that torso {name} gives: lower it"
        )


def halved(size: int) -> int:
    """Returns the rows or columns that a 3 x 3 max-pool of stride 2 and padding 1 leaves."""
    return (size - 1) // 2 + 1
