"""Random shifts of sampled observations, so that the network learns where things are to each other and not where they were.

Sources: Yarats, Kostrikov and Fergus 2021, "Image Augmentation Is All You Need" (DrQ), https://openreview.net/forum?id=GY6-6sTvGaf,
for the shifts; Hansen, Su and Wang 2021, "Stabilizing Deep Q-Learning with ConvNets and Vision Transformers under Data Augmentation"
(SVEA), https://arxiv.org/abs/2107.00644, for targets of observations that were not augmented, and for learning from such ones too;
Ko and Ok 2022, "Efficient Scheduling of Data Augmentation for Deep Reinforcement Learning", https://arxiv.org/abs/2206.00518, for
augmentation that is put off.
"""

from __future__ import annotations

import numpy as np

from common.messages import Array
from learner.unpack import compiled, copy_bytes


def shift_randomly(stacks: Array, rng: np.random.Generator, max_pixels: int, fraction: float) -> None:
    """Shifts a part of the stacks in place by up to `max_pixels` up or down and left or right; pixels at the border are repeated.

    The planes of a stack are shifted together, stacks apart from each other.

    Args:
      stacks: [B, ..., H, W] of any dtype, contiguous.
      rng: drawn from for every stack, whatever comes out.
      max_pixels: less than H and W.
      fraction: of the stacks, in expectation; each is shifted or left alone by itself.
    """
    shifts = rng.integers(-max_pixels, max_pixels + 1, size=(len(stacks), 2))
    (chosen,) = np.nonzero(rng.random(len(stacks)) < fraction)
    _shift(stacks.reshape(len(stacks), -1, *stacks.shape[-2:]), shifts, chosen)


@compiled
def _shift(stacks: Array, shifts: Array, chosen: Array) -> None:
    """Plane by plane of the chosen stacks: output (y, x) is input (y + dy, x + dx), or the pixel of the border next to it."""
    height, width = stacks.shape[2], stacks.shape[3]
    row_bytes, pixel_bytes = width * stacks.itemsize, stacks.itemsize
    before = np.empty((height, width), stacks.dtype)
    for item in chosen:
        dy, dx = shifts[item]
        left, right = max(-dx, 0), width - max(dx, 0)  # Columns of the output that come from within.
        for k in range(stacks.shape[1]):
            plane = stacks[item, k]
            copy_bytes(before.ctypes.data, plane.ctypes.data, height * row_bytes)
            for y in range(height):
                source, target = min(max(y + dy, 0), height - 1), plane[y]
                within = before.ctypes.data + np.uintp(source * row_bytes + (left + dx) * pixel_bytes)
                copy_bytes(
                    plane.ctypes.data + np.uintp(y * row_bytes + left * pixel_bytes), within, (right - left) * pixel_bytes
                )
                for x in range(left):
                    target[x] = before[source, 0]
                for x in range(right, width):
                    target[x] = before[source, width - 1]
