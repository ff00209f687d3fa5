"""Where a shard keeps its bytes: segments of one region that is touched only as far as it is used."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np

from common.messages import Array

ALIGNMENT = 4


class SegmentStore:
    """Records laid end to end in fixed segments; a segment is free again when its last item has gone.

    The whole budget is one lazily committed array, so that an address is one number and a gather needs no Python loop over
    segments. The lowest free segment is used first, so resident memory is what the live records needed at their most.

    Invariants (`check_valid`): live segments are in the order of their items; free and live ones are disjoint and all.
    """

    def __init__(self, num_bytes: int, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes // ALIGNMENT * ALIGNMENT
        self._num_segments = num_bytes // self._segment_bytes
        assert self._num_segments >= 2, "the shard checks its budget before"
        self.bytes: Array = np.empty(self._num_segments * self._segment_bytes, np.uint8)
        self.words: Array = self.bytes.view(np.uint32)
        self._free = list(range(self._num_segments))
        self._live: deque[list[int]] = deque()  # [segment, bytes used, id after its last item], oldest first.
        self._touched_bytes = [0] * self._num_segments  # The furthest that each was ever written to.
        self.resident_bytes = 0
        """Bytes ever written to: what the region takes of the machine's memory, which it does not give back."""

    @property
    def record_limit(self) -> int:
        """Bytes of the largest record that fits."""
        return self._segment_bytes

    def allocate(self, num_bytes: int, end_item_id: int) -> int | None:
        """Returns the address of room for a record whose items end before `end_item_id`, or None where all is full."""
        assert num_bytes <= self._segment_bytes
        num_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if not self._live or self._live[-1][1] + num_bytes > self._segment_bytes:
            if not self._free:
                return None
            self._live.append([heapq.heappop(self._free), 0, 0])
        segment = self._live[-1]
        address = segment[0] * self._segment_bytes + segment[1]
        segment[1] += num_bytes
        segment[2] = end_item_id
        newly_touched = max(segment[1] - self._touched_bytes[segment[0]], 0)
        self._touched_bytes[segment[0]] += newly_touched
        self.resident_bytes += newly_touched
        return address

    def oldest_segment_end(self) -> int:
        """Returns the id after the last item of the oldest segment: evicting up to it frees the segment."""
        return self._live[0][2]

    def release_before(self, oldest_item_id: int) -> None:
        """Frees every segment all of whose items are older than `oldest_item_id`."""
        while self._live and self._live[0][2] <= oldest_item_id:
            heapq.heappush(self._free, self._live.popleft()[0])

    def check_valid(self) -> None:
        live = [segment[0] for segment in self._live]
        assert sorted(live + self._free) == list(range(self._num_segments))
        ends = [segment[2] for segment in self._live]
        assert ends == sorted(ends)
        assert self.resident_bytes == sum(self._touched_bytes) <= len(self.bytes)
