"""Random shifts of sampled observations, so that the network learns where things are to each other and not where they were.

Source: Yarats, Kostrikov and Fergus 2021, "Image Augmentation Is All You Need" (DrQ), https://openreview.net/forum?id=GY6-6sTvGaf.
"""

from __future__ import annotations

import numpy as np

from common.messages import Array
from learner.unpack import compiled, copy_bytes


def shift_randomly(stacks: Array, rng: np.random.Generator, max_pixels: int) -> None:
    """Shifts each stack in place by up to `max_pixels` up or down and left or right; pixels at the border are repeated.

    As in DrQ: s_tm1 and s_t are shifted apart from each other, the planes of a stack together.

    Args:
      stacks: [2, B, K, H, W] of any dtype, contiguous.
      rng: drawn from once, whatever comes out.
      max_pixels: less than H and W.
    """
    height, width = stacks.shape[-2:]
    planes = stacks.reshape(-1, stacks.shape[2], height, width)
    shifts = rng.integers(-max_pixels, max_pixels + 1, size=(len(planes), 2))
    _shift(planes, shifts)


@compiled
def _shift(stacks: Array, shifts: Array) -> None:
    """Plane by plane: output (y, x) is input (y + dy, x + dx), or the pixel of the border next to it."""
    height, width = stacks.shape[2], stacks.shape[3]
    row_bytes, pixel_bytes = width * stacks.itemsize, stacks.itemsize
    before = np.empty((height, width), stacks.dtype)
    for item in range(len(stacks)):
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
