from __future__ import annotations

import numpy as np
import pytest

from replay_server.storage import SegmentStore


class NaiveStore:
    """Segments as lists of (bytes, end id), oldest first; the lowest free number is taken by looking at all."""

    def __init__(self, num_segments: int, segment_bytes: int) -> None:
        self.num_segments, self.segment_bytes = num_segments, segment_bytes
        self.live: list[tuple[int, list[tuple[int, int]]]] = []
        self.furthest: dict[int, int] = {}

    def allocate(self, num_bytes: int, end_item_id: int) -> int | None:
        num_bytes = (num_bytes + 3) // 4 * 4
        if not self.live or sum(n for n, _ in self.live[-1][1]) + num_bytes > self.segment_bytes:
            free = [n for n in range(self.num_segments) if n not in [number for number, _ in self.live]]
            if not free:
                return None
            self.live.append((min(free), []))
        number, records = self.live[-1]
        address = number * self.segment_bytes + sum(n for n, _ in records)
        records.append((num_bytes, end_item_id))
        self.furthest[number] = max(self.furthest.get(number, 0), sum(n for n, _ in records))
        return address

    def resident_bytes(self) -> int:
        return sum(self.furthest.values())

    def release_before(self, oldest_item_id: int) -> None:
        self.live = [(number, records) for number, records in self.live if records[-1][1] > oldest_item_id]


@pytest.mark.parametrize("seed", range(20))
def test_segment_store_agrees_with_naive(seed):
    rng = np.random.default_rng(seed)
    segment_bytes, num_segments = int(rng.integers(5, 20)) * 4, int(rng.integers(2, 9))
    store = SegmentStore(num_segments * segment_bytes + 3, segment_bytes + 3)  # Odd sizes are rounded down.
    naive = NaiveStore(num_segments, segment_bytes)
    assert store.record_limit == segment_bytes
    assert len(store.bytes) == num_segments * segment_bytes
    end = oldest = num_full = 0
    for _ in range(300):
        if rng.random() < 0.8:
            num_bytes = int(rng.integers(1, segment_bytes + 1))
            end_item_id = end + int(rng.integers(1, 4))
            address = store.allocate(num_bytes, end_item_id)
            assert address == naive.allocate(num_bytes, end_item_id)
            if address is None:
                num_full += 1
                assert store.oldest_segment_end() == naive.live[0][1][-1][1]
                oldest = store.oldest_segment_end()
                store.release_before(oldest)
                naive.release_before(oldest)
                assert store.allocate(num_bytes, end_item_id) == naive.allocate(num_bytes, end_item_id)
            end = end_item_id
        else:
            oldest = int(rng.integers(oldest, end + 1))
            store.release_before(oldest)
            naive.release_before(oldest)
        store.check_valid()
        assert store.resident_bytes == naive.resident_bytes()
    assert num_full > 0


@pytest.mark.parametrize("seed", range(10))
def test_live_records_never_overlap(seed):
    """Each record is filled with its own number; what a live one holds is still that number when it goes."""
    rng = np.random.default_rng(seed)
    store = SegmentStore(6 * 64, 64)
    live: list[tuple[int, int, int]] = []
    for number in range(400):
        num_bytes = int(rng.integers(1, 65))
        while (address := store.allocate(num_bytes, number + 1)) is None:
            gone = store.oldest_segment_end()
            store.release_before(gone)
            live = [record for record in live if record[0] >= gone]
        assert address % 4 == 0
        assert address // 64 == (address + num_bytes - 1) // 64, "a record lies in one segment"
        store.bytes[address : address + num_bytes] = number % 256
        live.append((number, address, num_bytes))
        for other, start, length in live:
            assert (store.bytes[start : start + length] == other % 256).all()
    assert len(live) >= 5


def test_release_frees_a_segment_only_when_its_last_item_has_gone():
    store = SegmentStore(2 * 16, 16)
    assert [store.allocate(8, 3), store.allocate(8, 6), store.allocate(16, 7)] == [0, 8, 16]
    store.release_before(5)
    assert store.allocate(4, 8) is None
    store.release_before(6)
    assert store.allocate(4, 8) == 0


def test_allocate_uses_the_lowest_free_segment_first():
    store = SegmentStore(4 * 16, 16)
    assert [store.allocate(16, end) for end in (1, 2, 3)] == [0, 16, 32]
    store.release_before(2)
    assert store.allocate(16, 4) == 0  # Not 48, which no byte was written to yet.
    assert store.resident_bytes == 48


def test_check_valid_finds_a_segment_that_is_lost_or_out_of_order():
    store = SegmentStore(4 * 16, 16)
    for end in (1, 2, 3):
        store.allocate(16, end)
    store.check_valid()
    store._live[1][2] = 9
    with pytest.raises(AssertionError):
        store.check_valid()
    store._live[1][2] = 2
    store._free.clear()
    with pytest.raises(AssertionError):
        store.check_valid()


def test_a_region_of_one_segment_is_refused():
    with pytest.raises(AssertionError):
        SegmentStore(16, 16)
