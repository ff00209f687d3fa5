"""Collects one environment's planes and transitions, and packs them as TransitionChunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.config import EnvSpec
from common.messages import Array
from common.planes import codec_of, encode_block, join_blocks, planes_per_block
from common.timing import PhaseClock

Row = tuple[int, int, int, int, float, float, float]
"""A transition: the planes of source and destination, the plane with which their episode began, a_tm1, r_t, discount_t, priority."""


class ChunkBuilder:
    """The planes of one environment, each encoded in its block, and the transitions that wait to be sent.

    Planes are numbered as they come; `begin_episode` adds one too, a zero plane. An observation is (plane, first): the stack of
    the K planes that end with `plane`, where those before `first`, with which the episode began, are the zero plane
    `first - 1`. A full block is encoded once, however many chunks carry it; the open one with each chunk that needs it.

    Invariant: every plane that a waiting transition or a window of the n-step builder refers to is held; `history` is how far
    back those reach.
    """

    def __init__(self, spec: EnvSpec, *, history: int, clock: PhaseClock | None = None) -> None:
        """`clock` counts as `compress` what encoding takes."""
        self._spec, self._codec = spec, codec_of(spec.plane_dtype)
        self._clock = clock or PhaseClock()
        self._history = history
        self._per_block = planes_per_block(spec.plane_shape, spec.plane_dtype)
        self._blocks: list[bytes] = []
        self._first_block = 0
        self._open = np.zeros((self._per_block, *spec.plane_shape), np.dtype(spec.plane_dtype))
        self._num_planes = 0
        self._num_planes_sent = 0
        self._rows: list[Row] = []

    @property
    def num_transitions(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of the planes that came since the last chunk, each taken to encode like those of the last full block.

        History counts for nothing: where planes are large it alone would call for a chunk at every step.
        """
        last = len(self._blocks[-1]) if self._blocks else 0
        return (self._num_planes - self._num_planes_sent) * last // self._per_block

    def begin_episode(self) -> None:
        """Adds the zero plane that stands for what was before the next plane."""
        self.add_plane(np.zeros_like(self._open[0]))

    def add_plane(self, plane: Array) -> None:
        """Takes in the next plane; its number is the count of those before it."""
        row = self._num_planes % self._per_block
        self._open[row] = plane
        self._num_planes += 1
        if row + 1 == self._per_block:
            self._blocks.append(self._encode())
            self._open[:] = 0

    def add_transition(self, row: Row) -> None:
        """Adds a transition between two observations of one episode."""
        self._rows.append(row)

    def take(self) -> dict[str, Any]:
        """Returns the fields of a TransitionChunk with all waiting transitions, and forgets what no later one needs."""
        rows = np.array([row[:4] for row in self._rows], np.int64)
        scalars = np.array([row[4:] for row in self._rows], np.float64)
        ages = np.arange(self._spec.frame_stack - 1, -1, -1)
        stacks = rows[:, :2, None] - ages  # [T, 2, K]
        first = rows[:, 2, None, None]
        stacks = np.where(stacks < first, first - 1, stacks)
        first_block, last_block = int(stacks.min()) // self._per_block, int(stacks.max()) // self._per_block
        held = self._blocks[first_block - self._first_block : last_block + 1 - self._first_block]
        if last_block == self._first_block + len(self._blocks):
            held.append(self._encode())
        offsets, data = join_blocks(held)
        references = stacks - first_block * self._per_block
        self._rows.clear()
        self._num_planes_sent = self._num_planes
        self._forget()
        return {
            "codec": self._codec,
            "plane_dtype": self._spec.plane_dtype,
            "planes_per_block": self._per_block,
            "plane_shape": np.array(self._spec.plane_shape),
            "block_offsets": offsets,
            "plane_data": data,
            "s_tm1": references[:, 0],
            "s_t": references[:, 1],
            "a_tm1": rows[:, 3],
            "r_t": scalars[:, 0],
            "discount_t": scalars[:, 1],
            "priority": scalars[:, 2],
        }

    def state(self) -> dict[str, Array]:
        """Returns what it holds, as arrays by name."""
        return {
            "blocks": np.frombuffer(b"".join(self._blocks), np.uint8),
            "block_lengths": np.array([len(block) for block in self._blocks], np.int64),
            "open": self._open.copy(),
            "rows": np.array([row[:4] for row in self._rows], np.int64).reshape(-1, 4),
            "scalars": np.array([row[4:] for row in self._rows], np.float64).reshape(-1, 3),
            "counts": np.array([self._first_block, self._num_planes, self._num_planes_sent], np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Takes what `state` returned."""
        ends = np.cumsum(state["block_lengths"]).tolist()
        data = state["blocks"].tobytes()
        self._blocks = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        self._open = np.array(state["open"])
        rows = zip(state["rows"].tolist(), state["scalars"].tolist(), strict=True)
        self._rows = [(*row, *scalars) for row, scalars in rows]
        self._first_block, self._num_planes, self._num_planes_sent = state["counts"].tolist()

    def _encode(self) -> bytes:
        with self._clock("compress"):
            return encode_block(self._open, self._codec)

    def _forget(self) -> None:
        oldest_block = max(self._num_planes - self._history, 0) // self._per_block
        num_old = max(oldest_block - self._first_block, 0)
        del self._blocks[:num_old]
        self._first_block += num_old
