"""From unpacked stacks to what the network's first layer computes with, on the learner's device.

This is the prefetch threads' work. On a GPU it happens on a stream of its own, from pinned memory, while the update before it runs:
pixels travel as bytes and are converted there. On a CPU a compiled loop converts them, eight times as fast as PyTorch
does (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from common.messages import Array
from common.networks import QNetwork
from learner.unpack import compiled

_INTERLEAVED_PLANES = 4  # Four bfloat16 numbers fill the word that the compiled loop writes.


class Transfer:
    """Brings arrays to the device and has observations prepared there. Used by any number of threads at once."""

    def __init__(self, device: torch.device, prepare: Callable[[Tensor], Tensor]) -> None:
        """`prepare` makes what the network takes of [B, K, *plane_shape] on the device; see `make_prepare`."""
        self._device, self._prepare = device, prepare
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def is_late(self) -> bool:
        """Whether what is brought arrives later, see `ready`: its source must stay as it is until then."""
        return self._stream is not None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Returns an array to unpack into, in pinned memory where there is a GPU."""
        if self._stream is None:
            return np.empty(shape, dtype)
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        return np.asarray(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape))

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which the methods below are called."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def scalars(self, array: Array) -> Tensor:
        """Returns [B] numbers on the device."""
        tensor = torch.from_numpy(array)
        return tensor if self._stream is None else tensor.pin_memory().to(self._device, non_blocking=True)

    def observations(self, stacks: Array) -> Tensor:
        """Returns what `prepare` makes of [B, K, *plane_shape], part of an array of `empty`."""
        tensor = torch.from_numpy(stacks)
        return self._prepare(tensor if self._stream is None else tensor.to(self._device, non_blocking=True))

    def ready(self) -> torch.cuda.Event | None:
        """Returns what a stream must wait for before it reads what was brought; None where there is nothing to wait for."""
        return None if self._stream is None else self._stream.record_event()


def make_prepare(network: QNetwork, device: torch.device, dtype: torch.dtype, memory_format: str) -> Callable[[Tensor], Tensor]:
    """Returns a function of stacks [B, K, *plane_shape] on the device that gives what the network's first layer takes.

    Args:
      network: whose `prepare` it stands for.
      device: the learner's.
      dtype: what the first layer computes in.
      memory_format: contiguous, channels_last or space_to_depth (channels last, in blocks).
    """
    is_fast = (device.type, dtype, memory_format) == ("cpu", torch.bfloat16, "channels_last") and network.is_convolutional
    order = torch.contiguous_format if memory_format == "contiguous" else torch.channels_last

    def prepare(stacks: Tensor) -> Tensor:
        if is_fast and stacks.dtype == torch.uint8 and stacks.shape[1] == _INTERLEAVED_PLANES:
            return _interleaved(stacks.numpy())
        prepared = network.prepare(stacks, dtype, in_blocks=memory_format == "space_to_depth")
        return prepared.contiguous(memory_format=order) if network.is_convolutional else prepared

    return prepare


def _interleaved(stacks: Array) -> Tensor:
    """Returns bf16[B, 4, H, W] in channels-last order for u8[B, 4, H, W]; every pixel is a whole number that bfloat16 holds."""
    num_items, num_planes, height, width = stacks.shape
    out = np.empty((num_items, height * width), np.uint64)
    _interleave(np.ascontiguousarray(stacks).reshape(num_items, num_planes, -1), out)
    pixels = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    return pixels.view(num_items, height, width, num_planes).permute(0, 3, 1, 2)


@compiled
def _interleave(stacks: Array, out: Array) -> None:
    """Writes the four planes' pixels side by side: the upper half of a float32 is the bfloat16."""
    for item in range(len(stacks)):
        plane0, plane1, plane2, plane3 = stacks[item, 0], stacks[item, 1], stacks[item, 2], stacks[item, 3]
        words = out[item]
        for i in range(len(words)):
            word0 = numba.uint64(np.float32(plane0[i]).view(np.uint32) >> 16)
            word1 = numba.uint64(np.float32(plane1[i]).view(np.uint32) >> 16)
            word2 = numba.uint64(np.float32(plane2[i]).view(np.uint32) >> 16)
            word3 = numba.uint64(np.float32(plane3[i]).view(np.uint32) >> 16)
            words[i] = word0 | (word1 << numba.uint64(16)) | (word2 << numba.uint64(32)) | (word3 << numba.uint64(48))
