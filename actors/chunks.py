"""Collects one environment's planes and transitions, and packs them as TransitionChunks."""

from __future__ import annotations

import numpy as np

from common.config import EnvSpec
from common.messages import Array
from common.planes import codec_of, encode_plane, join_planes


class ChunkBuilder:
    """The planes of one environment, each encoded once, and the transitions that wait to be sent.

    Planes are numbered as they come. An observation is (plane, first): the stack of the K planes that end with `plane`, of
    which those before `first`, where the episode began, are zero. Invariant: every plane that a waiting transition or a
    window of the n-step builder refers to is held; `history` is how far back those reach.
    """

    def __init__(self, spec: EnvSpec, *, history: int) -> None:
        self._spec, self._codec = spec, codec_of(spec.plane_dtype)
        self._history = history
        self._zero = encode_plane(np.zeros(spec.plane_shape, np.dtype(spec.plane_dtype)), self._codec)
        self._blocks: list[bytes] = []
        self._first_block = 0
        self._rows: list[tuple[int, int, int, int, float, float, float]] = []
        self.num_bytes = 0

    @property
    def num_transitions(self) -> int:
        return len(self._rows)

    def add_plane(self, plane: Array) -> None:
        """Encodes the next plane; its number is the count of those before it."""
        block = encode_plane(plane, self._codec)
        self._blocks.append(block)
        self.num_bytes += len(block)

    def add_transition(
        self, source: int, destination: int, first: int, a_tm1: int, scalars: tuple[float, float, float]
    ) -> None:
        """Adds a transition between two observations of the episode that began at plane `first`.

        `scalars` are r_t, discount_t and priority.
        """
        self._rows.append((source, destination, first, a_tm1, *scalars))

    def take(self) -> dict[str, Array]:
        """Returns the array fields of a TransitionChunk with all waiting transitions, and forgets what no later one needs."""
        rows = np.array([row[:4] for row in self._rows], np.int64)
        scalars = np.array([row[4:] for row in self._rows], np.float64)
        ages = np.arange(self._spec.frame_stack - 1, -1, -1)
        stacks = rows[:, :2, None] - ages  # [T, 2, K]
        stacks = np.where(stacks < rows[:, 2, None, None], -1, stacks)  # -1: the zero plane.
        numbers, references = np.unique(stacks, return_inverse=True)
        references = references.reshape(stacks.shape)
        blocks = [self._zero if n < 0 else self._blocks[n - self._first_block] for n in numbers.tolist()]
        offsets, data = join_planes(blocks)
        self._rows.clear()
        self._forget()
        return {
            "plane_shape": np.array(self._spec.plane_shape),
            "plane_offsets": offsets,
            "plane_data": data,
            "s_tm1": references[:, 0],
            "s_t": references[:, 1],
            "a_tm1": rows[:, 3],
            "r_t": scalars[:, 0],
            "discount_t": scalars[:, 1],
            "priority": scalars[:, 2],
        }

    def _forget(self) -> None:
        num_old = max(len(self._blocks) - self._history, 0)
        del self._blocks[:num_old]
        self._first_block += num_old
        self.num_bytes = sum(map(len, self._blocks))
