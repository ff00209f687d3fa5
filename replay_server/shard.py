"""The replay shard: keeps transitions as compressed planes within a budget of bytes, and draws batches of them.

Actors insert packed TransitionChunks, the learner samples packed SampleBatches and sends PriorityUpdates. One thread calls
it; it never sleeps, and imports neither torch nor ray nor an environment.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgpack
import numpy as np

from common import random_state, wire
from common.config import ByteSize, EnvSpec
from common.errors import UserError, WireError
from common.messages import Array, PriorityUpdate, SampleBatch, TransitionChunk
from common.metrics import SenderCount, ShardStats
from common.planes import check_blocks, codec_of, decode_planes, planes_per_block
from common.protocols import InsertReply, SampleReply
from common.timing import PhaseClock, usage
from replay_server.limiter import RateLimiter
from replay_server.replay_log import Priorities, Record, ReplayLog
from replay_server.storage import SegmentStore
from replay_server.sum_tree import SumTree

_MIN_SEGMENTS = 8
_MOST_SEGMENTS = 64  # Where they may be smaller: to make room, the items of a whole segment go.
_MAX_SEGMENT_BYTES = 4 << 20
_MIN_SEGMENT_BYTES = 128 << 10
_GOOD_SEGMENT_BYTES = 512 << 10  # Holds the largest chunk of planes that do not compress, with its history.
_NUM_RECENT = 64  # More than an actor has in flight.
_COUNTS = ("_num_refused_chunks", "_num_stale_priority_updates", "_num_priority_updates")


class ReplayShard:
    """One shard of the replay.

    It holds, for each item, two stacks of references into a record of planes, and the scalars; a record is the blocks of one
    chunk with their table of offsets, as received. `item_id` rises by one per insert and is never reused;
    `(shard_epoch, item_id)` names an item for ever; its slot is `item_id % capacity`.

    Invariants (`check_valid`): `num_inserted = size + num_evicted`; size <= capacity; the tree's leaves are positive only
    for resident items.
    """

    def __init__(
        self,
        *,
        run: str,
        spec: EnvSpec,
        shard_index: int,
        shard_epoch: int,
        memory: int,
        capacity: int,
        min_size: int,
        samples_per_insert: float | None,
        limiter_buffer_samples: int,
        priority_exponent: float,
        send_compressed: bool,
        seed: int,
        log: ReplayLog | None = None,
    ) -> None:
        """All quantities are this shard's own share; `memory` in bytes. Raises UserError where the budget is too small.

        With a `log`, what is inserted is appended to it, and what is evicted goes from it; see `restore`.
        """
        self._run, self._spec = run, spec
        self._codec = codec_of(spec.plane_dtype)
        self._planes_per_block = planes_per_block(spec.plane_shape, spec.plane_dtype)
        self._shard_index, self._shard_epoch = shard_index, shard_epoch
        self._capacity = capacity
        self._priority_exponent = priority_exponent
        self._send_compressed = send_compressed
        self._limiter = RateLimiter(min_size, samples_per_insert, limiter_buffer_samples, capacity=capacity)
        self._rng = np.random.default_rng(seed)
        self._clock = PhaseClock()
        self._log = log
        if log is not None:
            log.state = lambda: msgpack.packb(self.state())
        self._items = np.zeros(capacity, _item_dtype(spec.frame_stack))
        self._tree = SumTree(capacity) if priority_exponent > 0 else None
        self._store = _make_store(memory, capacity, spec.frame_stack, prioritized=priority_exponent > 0)
        self._oldest_item_id = 0
        self._next_item_id = 0
        self._lost: dict[str, int] = {}
        self._num_refused_chunks = 0
        self._num_stale_priority_updates = 0
        self._num_priority_updates = 0
        self._last_refusal: str | None = None
        self._starves = False  # Whether the budget evicted items before there were enough to sample.
        self._senders: dict[tuple[int, int], SenderCount] = defaultdict(SenderCount)
        self._recent: dict[tuple[int, int], deque[int]] = defaultdict(partial(deque, maxlen=_NUM_RECENT))

    @property
    def size(self) -> int:
        return self._next_item_id - self._oldest_item_id

    def insert(self, message: Array) -> InsertReply:
        """Stores the transitions of one packed chunk, evicting the oldest where it must; or refuses it whole.

        Keeps no view of `message`. The limiter does not refuse: the reply says where actors should pause.
        """
        with self._clock("insert"):
            return self._insert(message)

    def _insert(self, message: Array) -> InsertReply:
        chunk: TransitionChunk | None = None
        try:
            chunk = wire.unpack(message, TransitionChunk)
            self._check_fits(chunk)
        except WireError as error:
            self._num_refused_chunks += 1
            self._last_refusal = str(error)
            refused = chunk.num_transitions if chunk else 0
            if chunk and chunk.run == self._run:
                self._count(chunk, inserted=0, refused=refused)
            return InsertReply(num_inserted=0, num_refused=refused, refusal=str(error), waits_for=self.ask_to_insert())
        if self._log is not None:
            self._log.append(self._next_item_id, chunk.num_transitions, self._limiter.num_sampled, message)
        self._append(chunk)
        self._count(chunk, inserted=chunk.num_transitions, refused=0)
        self._limiter.num_inserted += chunk.num_transitions
        return InsertReply(num_inserted=chunk.num_transitions, num_refused=0, refusal=None, waits_for=self.ask_to_insert())

    def has_chunks(self, identities: Sequence[tuple[int, int, int]]) -> list[bool]:
        """Returns whether this shard inserted each chunk of (actor slot, incarnation, seq); it knows the last 64 of each sender."""
        return [seq in self._recent[slot, incarnation] for slot, incarnation, seq in identities]

    def ask_to_insert(self) -> str | None:
        """Returns None where actors may push, else the sentence whom they wait for; from then on they count as waiting."""
        return self._named(self._limiter.ask_to_insert(self.size))

    def sample(self, num_items: int) -> SampleReply:
        """Draws items with replacement, by priority or uniformly, where the limiter allows it."""
        with self._clock("sample"):
            return self._sample(num_items)

    def _sample(self, num_items: int) -> SampleReply:
        waits_for = self._named(self._explained(self._limiter.ask_to_sample(num_items, self.size)))
        if waits_for is None and self._tree is not None and self._tree.total() <= 0:
            waits_for = self._named("the learner waits for a transition whose priority is not zero")
        if waits_for is not None:
            return SampleReply(batch=None, waits_for=waits_for)
        item_id, probability = self._draw(num_items)
        self._limiter.num_sampled += num_items
        batch, blocks = self._gather(item_id, probability)
        if self._codec == "lz4" and not self._send_compressed:
            return SampleReply(batch=wire.pack(_decoded(batch, blocks)), waits_for=None)
        return SampleReply(batch=wire.pack(batch, blocks=blocks), waits_for=None)

    def update_priorities(self, message: Array) -> int:
        """Applies a packed PriorityUpdate and returns how many of its items were applied.

        Items of another epoch or already evicted are dropped and counted. Raises WireError, changing nothing, for an
        update that cannot be read.
        """
        with self._clock("priorities"):
            return self._update_priorities(message)

    def _update_priorities(self, message: Array) -> int:
        update = wire.unpack(message, PriorityUpdate)
        if update.shard_index != self._shard_index:
            raise WireError(f"shard_index: {update.shard_index}, but this is shard {self._shard_index}")
        resident = (update.item_id >= self._oldest_item_id) & (update.item_id < self._next_item_id)
        if update.shard_epoch != self._shard_epoch:
            resident[:] = False
        self._num_stale_priority_updates += int((~resident).sum())
        self._num_priority_updates += int(resident.sum())
        if self._tree is not None and resident.any():
            slots = update.item_id[resident] % self._capacity
            self._tree.set(slots, update.priority[resident] ** self._priority_exponent)
        return int(resident.sum())

    def set_limiter(self, *, min_size: int, samples_per_insert: float | None, limiter_buffer_samples: int) -> None:
        """Changes the limiter while the run goes on, as `RateLimiter.set` does; this shard's own shares.

        Raises UserError, changing nothing, for settings under which somebody would wait for ever.
        """
        self._limiter.set(
            size=self.size, min_size=min_size, samples_per_insert=samples_per_insert, buffer_samples=limiter_buffer_samples
        )

    def stats(self) -> ShardStats:
        """Returns the shard's counters, a copy."""
        size = self.size
        return ShardStats(
            shard_index=self._shard_index,
            shard_epoch=self._shard_epoch,
            size=size,
            capacity=self._capacity,
            num_inserted=self._next_item_id,
            num_evicted=self._oldest_item_id,
            num_sampled=self._limiter.num_sampled,
            num_refused_chunks=self._num_refused_chunks,
            last_refusal=self._last_refusal,
            num_priority_updates=self._num_priority_updates,
            num_stale_priority_updates=self._num_stale_priority_updates,
            resident_bytes=self._store.resident_bytes + self._index_resident_bytes(),
            waits=[replace(wait, reason=self._named(self._explained(wait.reason))) for wait in self._limiter.waits(size)],
            senders={sender: replace(count) for sender, count in self._senders.items()},
            lost=dict(self._lost),
            log=self._log.stats() if self._log is not None else None,
            usage=usage([self._clock]),
        )

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside log and priorities: plain values, a few kilobytes."""
        return {
            "oldest_item_id": self._oldest_item_id,
            "next_item_id": self._next_item_id,
            "limiter": self._limiter.state(),
            "rng": random_state.state_of(self._rng),
            "capacity": self._capacity,
            "priority_exponent": self._priority_exponent,
            "lost": self._lost,
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "senders": [[*sender, count.inserted, count.refused, count.sent] for sender, count in self._senders.items()],
        }

    def priorities(self) -> Priorities:
        """Returns the priorities of all items; ones where sampling is uniform."""
        values = np.ones(self.size)
        if self._tree is not None and self.size:
            for slot, start, num in self._slot_ranges(self._oldest_item_id, self._next_item_id):
                values[start : start + num] = self._tree.values[slot : slot + num]
        return Priorities(self._oldest_item_id, self._priority_exponent, values)

    def save(self, kept: Collection[str] = ()) -> dict[str, Any]:
        """Waits until the log is on the disk, with the priorities beside it; returns what a checkpoint keeps: `state`, and the name
        of that file as `priorities`.

        Args:
          kept: files of priorities that checkpoints name, and that stay.
        """
        with self._clock("save"):
            state = self.state() | {"priorities": None}
            if self._log is not None:
                if self._tree is not None:
                    state["priorities"] = self._log.write_priorities(self.priorities(), kept)
                self._log.sync()
            return state

    def close(self) -> None:
        """Syncs the log for the last time."""
        if self._log is not None:
            self._log.close()

    def restore(self, records: Iterable[Record], state: Mapping[str, Any], priorities: Priorities | None) -> int:
        """Takes in a log, before anything else is done with this shard; returns how many transitions it then holds.

        Args:
          records: one after another, without a gap between their item ids, up to the state's `next_item_id`.
          state: what `state` returned, with all that came after it: see `recovery.catch_up`.
          priorities: what `priorities` returned when `state` did; None: those that the actors gave.

        Raises:
          WireError: for a record that does not fit this shard.
        """
        assert self._next_item_id == 0, "a shard is restored before anything else"
        is_first = True
        for record in records:
            if not record.num_items:
                continue
            if is_first:
                self._oldest_item_id = self._next_item_id = record.first_item_id
                is_first = False
            assert record.first_item_id == self._next_item_id, "logs with gaps are rewritten before"
            chunk = wire.unpack(record.message, TransitionChunk)
            self._check_fits(chunk)
            self._append(chunk)
            self._recent[chunk.actor_slot, chunk.incarnation].append(chunk.seq)
        if is_first:
            self._oldest_item_id = self._next_item_id = state["next_item_id"]
        self._evict_before(min(state["oldest_item_id"], self._next_item_id))
        if priorities is not None:
            self._restore_priorities(priorities)
        self._limiter.restore(state["limiter"], self.size)
        if "rng" in state:
            random_state.restore(self._rng, state["rng"])
        self._senders |= {(slot, incarnation): SenderCount(*counts) for slot, incarnation, *counts in state["senders"]}
        self._lost = dict(state["lost"])
        for name in _COUNTS:
            setattr(self, name, state["counts"][name])
        return self.size

    def check_valid(self) -> None:
        assert 0 <= self.size <= self._capacity
        self._store.check_valid()
        if self._tree is not None:
            self._tree.check_valid()
            slots = np.arange(self._oldest_item_id, self._next_item_id) % self._capacity
            gone = np.setdiff1d(np.arange(self._capacity), slots)
            assert (self._tree.values[gone] == 0).all()

    def _explained(self, reason: str | None) -> str | None:
        """Adds what to do where the minimum size cannot be reached."""
        if reason is not None and self._starves and self.size < self._limiter.min_size:
            reason += ", which its memory cannot hold: raise --replay.memory or lower --replay.min-size"
        return reason

    def _named(self, waits_for: str | None) -> str | None:
        return waits_for and f"shard {self._shard_index}: {waits_for}"

    def _check_fits(self, chunk: TransitionChunk) -> None:
        """Raises WireError where the chunk is of another run, game or shape, or its planes do not decode."""
        spec = self._spec
        if chunk.run != self._run:
            raise WireError(f"run: the chunk is of run {chunk.run!r}, this is {self._run!r}")
        if tuple(chunk.plane_shape.tolist()) != spec.plane_shape or chunk.plane_dtype != spec.plane_dtype:
            raise WireError(f"plane_shape: {tuple(chunk.plane_shape.tolist())} {chunk.plane_dtype}, expected {spec}")
        if chunk.codec != self._codec:
            raise WireError(f"codec: {chunk.codec!r}, expected {self._codec!r}")
        if chunk.planes_per_block != self._planes_per_block:
            raise WireError(f"planes_per_block: {chunk.planes_per_block}, expected {self._planes_per_block}")
        if chunk.s_tm1.shape[1] != spec.frame_stack:
            raise WireError(f"s_tm1: stacks of {chunk.s_tm1.shape[1]} planes, expected {spec.frame_stack}")
        if int(chunk.a_tm1.max()) >= spec.num_actions:
            raise WireError(f"a_tm1: action {int(chunk.a_tm1.max())} of {spec.num_actions}")
        if chunk.num_transitions > self._capacity:
            raise WireError(f"a_tm1: {chunk.num_transitions} transitions, but this shard's capacity is {self._capacity}")
        if _record_bytes(chunk) > self._store.record_limit:
            raise WireError(f"plane_data: {_record_bytes(chunk)} bytes, but a record has at most {self._store.record_limit}")
        check_blocks(chunk)

    def _append(self, chunk: TransitionChunk) -> None:
        first, end = self._next_item_id, self._next_item_id + chunk.num_transitions
        self._evict_before(end - self._capacity)
        while (address := self._store.allocate(_record_bytes(chunk), end)) is None:
            self._starves |= self.size < self._limiter.min_size
            self._evict_before(self._store.oldest_segment_end())
        table_bytes = chunk.block_offsets.nbytes
        words = self._store.words[address // 4 : (address + table_bytes) // 4]
        np.add(chunk.block_offsets, table_bytes, out=words)  # Offsets from the start of the record.
        self._store.bytes[address + table_bytes : address + _record_bytes(chunk)] = chunk.plane_data
        for slot, start, num in self._slot_ranges(first, end):
            items = self._items[slot : slot + num]
            items["address"] = address
            items["params_version"] = chunk.params_version
            for name in ("s_tm1", "s_t", "a_tm1", "r_t", "discount_t"):
                items[name] = getattr(chunk, name)[start : start + num]
            if self._tree is not None:
                self._tree.set_range(slot, chunk.priority[start : start + num] ** self._priority_exponent, num)
        self._next_item_id = end

    def _evict_before(self, item_id: int) -> None:
        """Evicts every item older than `item_id`."""
        if item_id <= self._oldest_item_id:
            return
        if self._tree is not None:
            for slot, _, num in self._slot_ranges(self._oldest_item_id, item_id):
                self._tree.set_range(slot, 0.0, num)
        self._oldest_item_id = item_id
        self._store.release_before(item_id)
        if self._log is not None:
            self._log.release_before(item_id)

    def _slot_ranges(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Returns the runs of slots of items [first, end), at most two: (first slot, items before it, its length)."""
        slot = first % self._capacity
        num = min(end - first, self._capacity - slot)
        ranges = [(slot, 0, num)]
        if num < end - first:
            ranges.append((0, num, end - first - num))
        return ranges

    def _restore_priorities(self, saved: Priorities) -> None:
        """Sets those of the items that are still here; with another exponent, as it would have made them."""
        first, end = max(saved.first_item_id, self._oldest_item_id), min(saved.end_item_id, self._next_item_id)
        if self._tree is None or saved.exponent == 0 or end <= first:
            return
        values = saved.of(first, end) ** (self._priority_exponent / saved.exponent)
        for slot, start, num in self._slot_ranges(first, end):
            self._tree.set_range(slot, values[start : start + num], num)

    def _draw(self, num_items: int) -> tuple[Array, Array]:
        """Returns (item_id i64[B], probability f64[B])."""
        if self._tree is None:
            item_id = self._rng.integers(self._oldest_item_id, self._next_item_id, size=num_items)
            return item_id, np.full(num_items, 1.0 / self.size)
        total = self._tree.total()
        slots = self._tree.find(self._rng.random(num_items) * total)
        age = (slots - self._oldest_item_id) % self._capacity
        return self._oldest_item_id + age, self._tree.values[slots] / total

    def _gather(self, item_id: Array, probability: Array) -> tuple[SampleBatch, Sequence[memoryview]]:
        """Returns the batch without its `plane_data`, and the blocks that make it, where they lie."""
        items = self._items[item_id % self._capacity]
        references = np.concatenate([items["s_tm1"], items["s_t"]], axis=1).astype(np.int64)  # [B, 2K]
        blocks, rows = np.divmod(references, self._planes_per_block)
        # A block is named by where its entry in a record's table is; one that several stacks share is sent once.
        words = items["address"][:, None] // 4 + blocks
        unique_words, where = np.unique(words, return_inverse=True)
        where = where.reshape(words.shape)
        record = np.empty(len(unique_words), np.int64)
        record[where] = items["address"][:, None]
        starts = record + self._store.words[unique_words]
        ends = record + self._store.words[unique_words + 1]
        view = self._store.bytes.data
        held = [view[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        offsets = np.zeros(len(held) + 1, np.int64)
        np.cumsum(ends - starts, out=offsets[1:])
        stacks = where * self._planes_per_block + rows
        stack = self._spec.frame_stack
        batch = SampleBatch(
            codec=self._codec,
            plane_dtype=self._spec.plane_dtype,
            planes_per_block=self._planes_per_block,
            plane_shape=np.array(self._spec.plane_shape),
            block_offsets=offsets,
            plane_data=np.empty(0, np.uint8),
            shard_index=self._shard_index,
            shard_epoch=self._shard_epoch,
            size=self.size,
            priority_mass=self._tree.total() if self._tree is not None else float(self.size),
            s_tm1=stacks[:, :stack],
            s_t=stacks[:, stack:],
            a_tm1=items["a_tm1"],
            r_t=items["r_t"],
            discount_t=items["discount_t"],
            item_id=item_id,
            probability=probability,
            params_version=items["params_version"],
        )
        return batch, held

    def _index_resident_bytes(self) -> int:
        """Bytes of index and tree that were ever written to; slots are used in turn."""
        num_touched = min(self._next_item_id, self._capacity)
        tree = SumTree.num_bytes(num_touched) if self._tree is not None else 0
        return num_touched * self._items.itemsize + tree

    def _count(self, chunk: TransitionChunk, *, inserted: int, refused: int) -> None:
        count = self._senders[chunk.actor_slot, chunk.incarnation]
        count.inserted += inserted
        count.refused += refused
        count.sent = max(count.sent, chunk.num_sent_before + chunk.num_transitions)
        if inserted:
            self._recent[chunk.actor_slot, chunk.incarnation].append(chunk.seq)


def min_memory(capacity: int, frame_stack: int, *, prioritized: bool) -> int:
    """Returns the least bytes of one shard of this capacity: its index, and the smallest store of planes."""
    return index_bytes(capacity, frame_stack, prioritized=prioritized) + _MIN_SEGMENTS * _MIN_SEGMENT_BYTES


def index_bytes(capacity: int, frame_stack: int, *, prioritized: bool) -> int:
    """Returns the bytes of one shard beside its planes: the items' rows and the tree."""
    return capacity * _item_dtype(frame_stack).itemsize + (SumTree.num_bytes(capacity) if prioritized else 0)


def _item_dtype(frame_stack: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("address", "<i8"),
            ("params_version", "<i8"),
            ("s_tm1", "<u2", (frame_stack,)),
            ("s_t", "<u2", (frame_stack,)),
            ("a_tm1", "<i4"),
            ("r_t", "<f4"),
            ("discount_t", "<f4"),
        ]
    )


def _make_store(memory: int, capacity: int, frame_stack: int, *, prioritized: bool) -> SegmentStore:
    least = min_memory(capacity, frame_stack, prioritized=prioritized)
    if memory < least:
        raise UserError(
            f"replay.memory gives a shard {ByteSize(memory)}, but its capacity of {capacity} transitions needs at least "
            f"{ByteSize(least)}: raise --replay.memory or lower --replay.capacity"
        )
    num_bytes = memory - index_bytes(capacity, frame_stack, prioritized=prioritized)
    num_segments = min(num_bytes // _GOOD_SEGMENT_BYTES, _MOST_SEGMENTS)
    num_segments = max(num_segments, _MIN_SEGMENTS, -(-num_bytes // _MAX_SEGMENT_BYTES))
    return SegmentStore(num_bytes, num_bytes // num_segments)


def _record_bytes(chunk: TransitionChunk) -> int:
    return int(chunk.block_offsets.nbytes + chunk.plane_data.nbytes)


def _decoded(batch: SampleBatch, blocks: Sequence[memoryview]) -> SampleBatch:
    """Returns the batch with the planes that it refers to decoded, one to a block, and no others."""
    batch = replace(batch, plane_data=np.frombuffer(b"".join(blocks), np.uint8))
    used, where = np.unique(np.stack([batch.s_tm1, batch.s_t]), return_inverse=True)
    planes = np.ascontiguousarray(decode_planes(batch)[used]).view(np.uint8).reshape(len(used), -1)
    s_tm1, s_t = where.reshape(2, *batch.s_tm1.shape)
    return replace(
        batch,
        codec="raw",
        planes_per_block=1,
        block_offsets=np.arange(len(used) + 1) * planes.shape[1],
        plane_data=planes.reshape(-1),
        s_tm1=s_tm1,
        s_t=s_t,
    )
