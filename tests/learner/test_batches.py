"""Prefetch threads over real shards: nothing is lost or mixed up, and a batch that cannot be unpacked is dropped and counted."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import wire
from common.config import EnvSpec
from common.messages import SampleBatch
from common.protocols import SampleReply
from learner import batches
from learner.batches import BatchSource, merge, shares
from learner.inputs import Transfer
from replay_server.shard import ReplayShard

SPEC = EnvSpec((6, 7), "|u1", 2, 4)
NUM_ITEMS = 60


class Reader:
    """Answers requests from a real shard, and notes what was sent; says so where two threads call it at once."""

    def __init__(self, shard):
        self.shard, self.sent, self.requests, self.overlaps = shard, [], deque(), 0
        self._inside = threading.Lock()

    def request(self, num_items):
        self.requests.append(num_items)

    def num_requested(self):
        return len(self.requests)

    def collect(self, timeout_seconds):
        if not self._inside.acquire(blocking=False):
            self.overlaps += 1
            self._inside.acquire()
        try:
            reply = self.shard.sample(self.requests.popleft())
            self.sent.append(wire.unpack(reply.batch, SampleBatch).item_id.tolist())
            return reply
        finally:
            self._inside.release()

    def update_priorities(self, message):
        self.shard.update_priorities(message)


@pytest.fixture
def make_readers(make_chunk):
    """Returns readers of shards whose items tell their shard and id by their reward: 1000 * shard + id."""

    def make(num_shards):
        readers = []
        for index in range(num_shards):
            shard = ReplayShard(
                run="run-a",
                spec=SPEC,
                shard_index=index,
                shard_epoch=0,
                memory=4 << 20,
                capacity=NUM_ITEMS,
                min_size=1,
                samples_per_insert=None,
                limiter_buffer_samples=0,
                priority_exponent=1.0,
                send_compressed=True,
                seed=index,
            )
            chunk = make_chunk(
                np.random.default_rng(index),
                num_transitions=NUM_ITEMS,
                plane_shape=SPEC.plane_shape,
                r_t=1000 * index + np.arange(NUM_ITEMS),
            )
            assert shard.insert(wire.pack(chunk)).refusal is None
            readers.append(Reader(shard))
        return readers

    return make


def make_source(readers, num_threads, batch_size=12):
    return BatchSource(
        readers,
        num_items=shares(batch_size, len(readers)),
        importance_exponent=0.4,
        prefetch_batches=3,
        prefetch_threads=num_threads,
        transfer=Transfer(torch.device("cpu"), lambda stacks: stacks),
    )


def test_shifts_follow_from_the_items_that_were_drawn(make_readers):
    """Kills: a generator that is the same for every batch, or not for the same one."""
    readers = make_readers(2)
    for reader in readers:
        reader.request(6)
    parts = [wire.unpack(reader.collect(1.0).batch, SampleBatch) for reader in readers]
    others = [replace(part, item_id=part.item_id[::-1].copy()) for part in parts]
    transfer = Transfer(torch.device("cpu"), lambda stacks: stacks)

    def merged(parts, pixels, fraction=1.0):
        return merge(
            parts, importance_exponent=0.4, transfer=transfer, random_shift_pixels=pixels, random_shift_fraction=fraction
        )

    as_they_are, shifted, again = merged(parts, 0), merged(parts, 2), merged(parts, 2)
    assert torch.equal(merged(others, 0).s_tm1, as_they_are.s_tm1)
    assert not torch.equal(shifted.s_tm1, as_they_are.s_tm1)
    assert torch.equal(shifted.s_tm1, again.s_tm1)
    assert not torch.equal(shifted.s_tm1, merged(others, 2).s_tm1)
    assert not torch.equal(shifted.s_tm1, merged(parts, 2, 0.5).s_tm1)
    for batch in (shifted, merged(others, 2)):
        assert torch.equal(batch.s_t, as_they_are.s_t), "targets are made of what was seen"


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_batch_that_was_sent_comes_out_once_and_whole(make_readers, num_shards, num_threads):
    """Kills: parts of two draws merged into one batch, a part that two threads take, readers that are called at once."""
    readers = make_readers(num_shards)
    source = make_source(readers, num_threads)
    source.start()
    taken = [source.next_batch(10.0) for _ in range(60)]
    source.close()
    drawn = [tuple(tuple(item_id.tolist()) for _, _, item_id in batch.shares) for batch in taken]
    sent = set(zip(*(map(tuple, reader.sent) for reader in readers), strict=False))  # The n-th part of every shard.
    assert len(set(drawn)) == 60
    assert set(drawn) <= sent
    assert len(readers[0].sent) <= 60 + 3 + 2 * num_threads + 3  # No more than what is ready, in work, and asked for.
    for batch in taken:
        rows = np.concatenate([1000 * shard + item_id for shard, _, item_id in batch.shares])
        np.testing.assert_array_equal(batch.r_t, rows)
    assert [reader.overlaps for reader in readers] == [0] * num_shards


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_a_batch_that_cannot_be_unpacked_is_dropped_and_counted(make_readers, monkeypatch, num_threads):
    """A shard's memory that was altered: the learner goes on with the next batch, and says what happened."""
    (reader,) = make_readers(1)
    good, calls = reader.shard.sample, []

    def sample(num_items):
        reply = good(num_items)
        calls.append(0)
        if len(calls) % 3 == 0:
            batch = wire.unpack(reply.batch, SampleBatch)
            altered = wire.pack(batch, blocks=[memoryview(b"\xff" * len(batch.plane_data))])
            return SampleReply(batch=altered, waits_for=None)
        return reply

    monkeypatch.setattr(reader.shard, "sample", sample)
    source = make_source([reader], max(num_threads, 1))
    if num_threads:
        source.start()
    taken = [batch for _ in range(30) if (batch := source.next_batch(10.0)) is not None]
    source.close()
    assert len(taken) >= 20
    assert source.num_dropped_batches >= 9
    assert source.last_fault.startswith("a batch cannot be unpacked: plane_data: block 0")


def test_a_fault_of_one_thread_ends_all_and_is_raised(make_readers, monkeypatch):
    def fail(*_args, **_settings):
        raise MemoryError("no room")

    source = make_source(make_readers(1), 3)
    monkeypatch.setattr(batches, "merge", fail)
    source.start()
    with pytest.raises(MemoryError, match="no room"):
        source.next_batch(10.0)
    source.close()
