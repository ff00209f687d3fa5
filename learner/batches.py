"""From shards to tensors: asks every shard for its share, merges the answers, and keeps batches ready.

Sits between the shards and the update. Unpacking, decompression, importance weights and conversion happen here, on threads
of their own, so that the update finds tensors.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import wire
from common.errors import WireError
from common.messages import Array, PriorityUpdate, SampleBatch
from common.priorities import importance_weights
from common.protocols import ReplayReader
from common.timing import Latencies, PhaseClock, Usage, usage
from learner.augmentation import shift_randomly
from learner.inputs import Transfer
from learner.unpack import unpack_stacks

_SHORTEST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One merged batch, ready for the update; B transitions in the order of the shards."""

    s_tm1: Tensor
    """[B, K, ...] prepared by the network."""
    s_t: Tensor
    a_tm1: Tensor
    """i64[B]."""
    r_t: Tensor
    """f32[B]."""
    discount_t: Tensor
    """f32[B]."""
    importance_weight: Tensor
    """f32[B] in (0, 1]: over their maximum in this batch."""
    weight_scale: float
    """That maximum, in a unit which all shards and ranks share: what makes weights of several batches comparable."""
    shares: tuple[tuple[int, int, Array], ...]
    """(shard index, shard epoch, item_id i64[...]) of each shard's part, in order."""
    mean_params_version: float
    """Of the parameters that acted."""
    ready: torch.cuda.Event | None
    """What a GPU's stream must wait for before it reads the tensors."""
    pinned: Array | None
    """The memory that a GPU copies the observations from: held until the update is done, or another batch would be written over it."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns those of its fields that are tensors, by name."""
        return {name: value for name in self.__slots__ if isinstance(value := getattr(self, name), Tensor)}


def shares(batch_size: int, num_shards: int) -> list[int]:
    """Returns how many items each shard is asked for: equal shares, the first shards one more where it does not divide."""
    return [batch_size // num_shards + (i < batch_size % num_shards) for i in range(num_shards)]


def merge(
    parts: Sequence[SampleBatch],
    *,
    importance_exponent: float,
    transfer: Transfer,
    random_shift_pixels: int = 0,
    random_shift_fraction: float = 0.0,
    clock: PhaseClock | None = None,
) -> Batch:
    """Merges the shards' parts into one batch; `clock` counts as `transfer` what bringing it to the device takes.

    An item of shard s is drawn with (share of the batch asked of s) * (its probability there), and one table of all items
    would draw it with (its priority over the mass of all shards); the importance weights know both, use the items of all shards
    and are normalized over the merged batch, so sharding changes no expectation.
    """
    batch_size = sum(len(part.item_id) for part in parts)
    mass = sum(part.priority_mass for part in parts)
    probability = np.concatenate([part.probability * (part.priority_mass / mass) for part in parts])
    draw_probability = np.concatenate([part.probability * (len(part.item_id) / batch_size) for part in parts])
    num_items = sum(part.size for part in parts)
    weights, maximum = importance_weights(probability, draw_probability, num_items, exponent=importance_exponent)
    stacks = merge_stacks(parts, transfer.empty)
    if random_shift_pixels:  # Drawn by the items' own names: nothing to save, whichever thread it is.
        rng = np.random.default_rng(np.concatenate([part.item_id for part in parts]).view(np.uint32))
        shift_randomly(stacks[0], rng, random_shift_pixels, random_shift_fraction)

    def joined(name: str, dtype: type) -> Tensor:
        return transfer.scalars(np.concatenate([getattr(part, name) for part in parts]).astype(dtype))

    with (clock or PhaseClock())("transfer"), transfer.on_stream():
        s_tm1, s_t = (transfer.observations(half) for half in stacks)
        return Batch(
            s_tm1=s_tm1,
            s_t=s_t,
            a_tm1=joined("a_tm1", np.int64),
            r_t=joined("r_t", np.float32),
            discount_t=joined("discount_t", np.float32),
            importance_weight=transfer.scalars(weights),
            # Without the items and the mass of these shards, and the number of draws: other ranks have others.
            weight_scale=maximum * num_items**importance_exponent * mass ** (1 - importance_exponent) / batch_size,
            shares=tuple((part.shard_index, part.shard_epoch, part.item_id.copy()) for part in parts),
            mean_params_version=float(np.mean(np.concatenate([part.params_version for part in parts]))),
            ready=transfer.ready(),
            pinned=stacks if transfer.is_late else None,
        )


def merge_stacks(parts: Sequence[SampleBatch], empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty) -> Array:
    """Returns [2, B, K, *plane_shape] of the planes' dtype, made by `empty`: s_tm1 and s_t of all parts, in their order."""
    one = parts[0]
    batch_size = sum(len(part.item_id) for part in parts)
    shape = (2, batch_size, one.s_tm1.shape[1], *one.plane_shape.tolist())
    stacks = empty(shape, np.dtype(one.plane_dtype))
    first = 0
    for part in parts:
        unpack_stacks(part, stacks, first)
        first += len(part.item_id)
    return stacks


class BatchSource:
    """Draws merged batches from all shards, and carries priorities back.

    With `start()`, threads keep `prefetch_batches` batches ready and as many requests under way: one at a time collects the
    shards' parts, while the others unpack theirs. Without it, each `next_batch` draws one itself (the serial run). An exception of
    a thread is raised by the next `next_batch`.
    """

    def __init__(
        self,
        readers: Sequence[ReplayReader],
        *,
        num_items: Sequence[int],
        importance_exponent: float,
        prefetch_batches: int,
        prefetch_threads: int,
        transfer: Transfer,
        random_shift_pixels: int = 0,
        random_shift_fraction: float = 0.0,
    ) -> None:
        """`num_items` is how many each reader's shard is asked for."""
        self._readers = readers
        self._num_items = num_items
        self._random_shift_pixels = random_shift_pixels
        self.importance_exponent, self.random_shift_fraction = importance_exponent, random_shift_fraction
        self._transfer = transfer
        self._prefetch_batches, self._prefetch_threads = prefetch_batches, prefetch_threads
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch_batches)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._collecting = threading.Lock()  # For the readers, the parts and what is told below.
        self._parts: list[SampleBatch | None] = [None] * len(readers)
        self._asked: list[deque[float]] = [deque() for _ in readers]  # When, for each request under way.
        self._latencies = [Latencies() for _ in readers]
        self._clocks = [PhaseClock() for _ in range(max(prefetch_threads, 1))]
        self.num_dropped_batches = 0
        self.last_fault: str | None = None
        self.waits_for: str | None = None
        """Why there is no batch now, or None."""

    def start(self) -> None:
        self._threads = [
            threading.Thread(target=self._fill, args=(self._clocks[i],), name=f"prefetch{i}", daemon=True)
            for i in range(self._prefetch_threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            while thread.is_alive():
                self._drain()
                thread.join(0.05)

    def num_ready(self) -> int:
        return self._queue.qsize()

    def usage(self) -> Usage:
        """Returns where the time of the prefetch threads went."""
        return usage(self._clocks)

    def answer_p95_seconds(self) -> dict[int, float]:
        """Returns, by reader, the time from a request until its answer is collected, since the last call; NaN: no answers."""
        return {index: latencies.take_p95() for index, latencies in enumerate(self._latencies)}

    def next_batch(self, timeout_seconds: float) -> Batch | None:
        """Returns a batch, or None where none came within the timeout; `waits_for` says why."""
        if not self._threads:
            return self._draw(timeout_seconds, self._clocks[0])
        try:
            item = self._queue.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def state(self) -> list[Array | None]:
        """Returns the shards' parts that wait for those of other shards, packed; without threads, between two batches."""
        return [wire.pack(part) if part is not None else None for part in self._parts]

    def restore(self, parts: Sequence[Array | None]) -> None:
        """Takes what `state` returned."""
        self._parts = [wire.unpack(part, SampleBatch) if part is not None else None for part in parts]

    def update_priorities(self, batch: Batch, priority: Array) -> None:
        """Sends f64[B] priorities back to the shards that the items came from."""
        start = 0
        for reader, (shard_index, shard_epoch, item_id) in zip(self._readers, batch.shares, strict=True):
            part = priority[start : start + len(item_id)]
            start += len(item_id)
            update = PriorityUpdate(shard_index=shard_index, shard_epoch=shard_epoch, item_id=item_id, priority=part)
            reader.update_priorities(wire.pack(update))

    def _fill(self, clock: PhaseClock) -> None:
        try:
            while not self._stopping.is_set():
                batch = self._draw(0.2, clock)
                while batch is not None and not self._stopping.is_set():
                    try:
                        self._queue.put(batch, timeout=0.2)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:  # The thread's edge: the learner's thread raises it again.
            self._drain()
            self._queue.put(error)

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _draw(self, timeout_seconds: float, clock: PhaseClock) -> Batch | None:
        with clock("turn"):
            self._collecting.acquire()
        try:
            with clock("collect"):
                parts = self._collect_all(timeout_seconds, clock)
        finally:
            self._collecting.release()
        if parts is None:
            return None
        try:
            with clock("unpack"):
                return merge(
                    parts,
                    importance_exponent=self.importance_exponent,
                    transfer=self._transfer,
                    random_shift_pixels=self._random_shift_pixels,
                    random_shift_fraction=self.random_shift_fraction,
                    clock=clock,
                )
        except WireError as error:
            with self._collecting:
                self._drop(f"a batch cannot be unpacked: {error}")
            return None

    def _collect_all(self, timeout_seconds: float, clock: PhaseClock) -> list[SampleBatch] | None:
        """Returns every shard's part, asking again where a shard had none, or None after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        pause = _SHORTEST_PAUSE_SECONDS
        depth = self._prefetch_batches if self._threads else 1
        while True:
            for index, reader in enumerate(self._readers):
                if self._parts[index] is None:
                    self._collect(index, reader, depth, max(deadline - time.monotonic(), 0.0))
            if all(part is not None for part in self._parts):
                parts = [part for part in self._parts if part is not None]
                self._parts = [None] * len(self._readers)
                self.waits_for = None
                return parts
            if time.monotonic() + pause > deadline or self._stopping.is_set():
                return None
            with clock("held"):
                time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _collect(self, index: int, reader: ReplayReader, depth: int, timeout_seconds: float) -> None:
        while reader.num_requested() < depth:
            reader.request(self._num_items[index])
            self._asked[index].append(time.monotonic())
        reply = reader.collect(timeout_seconds)
        if reply is None:
            self.waits_for = f"the learner waits for shard {index} to answer"
            return
        self._latencies[index].add(time.monotonic() - self._asked[index].popleft())
        if reply.batch is None:
            self.waits_for = reply.waits_for
        else:
            try:
                self._parts[index] = wire.unpack(reply.batch, SampleBatch)
            except WireError as error:
                self._drop(f"shard {index} sent a batch that cannot be read: {error}")

    def _drop(self, fault: str) -> None:
        self.num_dropped_batches += 1
        self.last_fault = fault
