"""The shard against a naive twin that keeps raw stacks in a list, and what it promises at its edges."""

from __future__ import annotations

import dataclasses
import itertools

import lz4.block
import numpy as np
import pytest
from scipy import stats

from common import wire
from common.config import EnvSpec
from common.errors import UserError, WireError
from common.messages import PriorityUpdate, SampleBatch
from common.metrics import SenderCount, WaitStatus
from common.planes import decode_planes, encode_block, join_blocks
from replay_server.shard import ReplayShard, min_memory

P_REJECT = 1e-6  # A correct sampler fails once in a million seeds.
PRIORITIES = np.array([0, 1, 2, 5, 0, 3], float)
NUM_DRAWS = 1_000_000
PIXELS = EnvSpec((4, 6), "|u1", 2, 4)
VECTORS = EnvSpec((3,), "<f4", 1, 4)
LARGE_PIXELS = EnvSpec((64, 64), "|u1", 2, 4)  # Noise of 4 KiB a plane fills the smallest store soon.
KIB = 1024


def make_shard(spec=PIXELS, **changes):
    settings = {
        "run": "run-a",
        "shard_index": 3,
        "shard_epoch": 7,
        "memory": 4 << 20,
        "capacity": 50,
        "min_size": 1,
        "samples_per_insert": None,
        "limiter_buffer_samples": 0,
        "priority_exponent": 1.0,
        "send_compressed": True,
        "seed": 0,
    }
    return ReplayShard(spec=spec, **settings | changes)


@pytest.fixture
def chunk_of(make_chunk):
    """Chunks that fit a spec: chunk_of(rng, spec, **fields)."""

    def make(rng, spec=PIXELS, **fields):
        shape = {"plane_shape": spec.plane_shape, "plane_dtype": spec.plane_dtype, "frame_stack": spec.frame_stack}
        return make_chunk(rng, **shape | {"num_actions": spec.num_actions} | fields)

    return make


def sample(shard, num_items):
    reply = shard.sample(num_items)
    assert reply.waits_for is None
    return wire.unpack(reply.batch, SampleBatch)


def update(shard, item_id, priority, *, shard_index=3, shard_epoch=7):
    message = PriorityUpdate(
        shard_index=shard_index, shard_epoch=shard_epoch, item_id=np.asarray(item_id), priority=np.asarray(priority, float)
    )
    return shard.update_priorities(wire.pack(message))


class NaiveShard:
    """Items as whole stacks in a list, oldest first; segments as lists of [bytes used, id after its last item]."""

    def __init__(self, capacity, num_segments, segment_bytes):
        self.capacity, self.num_segments, self.segment_bytes = capacity, num_segments, segment_bytes
        self.items, self.segments = [], []
        self.num_inserted = self.num_evicted = self.num_stale = self.num_evicted_for_bytes = 0

    def insert(self, chunk, planes):
        while len(self.items) + chunk.num_transitions > self.capacity:
            self._evict_oldest()
        num_bytes = -(-(4 * len(chunk.block_offsets) + len(chunk.plane_data)) // 4) * 4
        while not self._has_room(num_bytes):
            end = self.segments[0][1]
            while self.num_evicted < end:
                self._evict_oldest()
                self.num_evicted_for_bytes += 1
        if not self.segments or self.segments[-1][0] + num_bytes > self.segment_bytes:
            self.segments.append([0, 0])
        for t in range(chunk.num_transitions):
            self.items.append(
                {
                    "item_id": self.num_inserted,
                    "s_tm1": planes[chunk.s_tm1[t]],
                    "s_t": planes[chunk.s_t[t]],
                    "a_tm1": chunk.a_tm1[t],
                    "r_t": chunk.r_t[t],
                    "discount_t": chunk.discount_t[t],
                    "params_version": chunk.params_version,
                    "priority": chunk.priority[t],
                }
            )
            self.num_inserted += 1
        self.segments[-1][0] += num_bytes
        self.segments[-1][1] = self.num_inserted

    def _has_room(self, num_bytes):
        fits = self.segments and self.segments[-1][0] + num_bytes <= self.segment_bytes
        return fits or len(self.segments) < self.num_segments

    def _evict_oldest(self):
        self.items.pop(0)
        self.num_evicted += 1
        while self.segments and self.segments[0][1] <= self.num_evicted:
            self.segments.pop(0)

    def update_priorities(self, item_ids, priorities):
        applied = 0
        for item_id, priority in zip(item_ids, priorities, strict=True):
            found = [item for item in self.items if item["item_id"] == item_id]
            self.num_stale += not found
            applied += len(found)
            for item in found:
                item["priority"] = priority
        return applied


def assert_batch_agrees(batch, naive, *, prioritized):
    planes = decode_planes(batch)
    by_id = {item["item_id"]: item for item in naive.items}
    mass = sum(item["priority"] for item in naive.items) if prioritized else len(naive.items)
    assert (batch.size, batch.priority_mass) == (len(naive.items), mass)
    assert (batch.shard_index, batch.shard_epoch) == (3, 7)
    for b, item_id in enumerate(batch.item_id.tolist()):
        item = by_id[item_id]  # Raises for an item that is not resident.
        np.testing.assert_array_equal(planes[batch.s_tm1[b]], item["s_tm1"])
        np.testing.assert_array_equal(planes[batch.s_t[b]], item["s_t"])
        for name in ("a_tm1", "r_t", "discount_t", "params_version"):
            assert getattr(batch, name)[b] == item[name], name
        assert batch.probability[b] == (item["priority"] if prioritized else 1) / mass  # Whole numbers: exact.


@pytest.mark.parametrize("spec", [PIXELS, VECTORS, LARGE_PIXELS], ids=["capacity", "capacity_vectors", "bytes"])
@pytest.mark.parametrize("seed", range(8))
def test_shard_agrees_with_naive(seed, spec, chunk_of):
    """Kills: eviction of the newest; a slot for an id; a plane from another record; priorities of the evicted left in the
    tree; updates that reach whoever has the slot now; a store that overwrites live records."""
    rng = np.random.default_rng(seed)
    by_bytes = spec is LARGE_PIXELS
    capacity = 1000 if by_bytes else int(rng.integers(12, 60))
    prioritized, send_compressed = bool(seed % 2), bool(seed % 3)
    memory = min_memory(capacity, spec.frame_stack, prioritized=prioritized)
    shard = make_shard(
        spec,
        memory=memory,
        capacity=capacity,
        priority_exponent=1.0 if prioritized else 0.0,
        send_compressed=send_compressed,
        seed=seed,
    )
    naive = NaiveShard(capacity, 8, 128 * KIB)
    for _ in range(100):
        if rng.random() < 0.6 or not naive.items:
            num_planes = int(rng.integers(1, 25 if by_bytes else 20))
            planes = rng.integers(256, size=(num_planes, *spec.plane_shape)).astype(spec.plane_dtype)
            chunk = chunk_of(rng, spec, planes=planes, num_planes=num_planes, num_transitions=int(rng.integers(1, 12)))
            reply = shard.insert(wire.pack(chunk))
            assert (reply.num_inserted, reply.num_refused, reply.refusal) == (chunk.num_transitions, 0, None)
            naive.insert(chunk, planes)
        if rng.random() < 0.4:
            item_id = rng.integers(naive.num_inserted + 3, size=6)  # Also evicted ones, duplicates, and not yet given ones.
            priority = rng.integers(0, 9, size=6)
            assert update(shard, item_id, priority) == naive.update_priorities(item_id, priority)
        counts = shard.stats()
        assert counts.num_inserted == naive.num_inserted
        assert counts.num_evicted == naive.num_evicted
        assert counts.size == shard.size == len(naive.items)
        assert counts.num_stale_priority_updates == naive.num_stale
        assert counts.resident_bytes <= memory
        shard.check_valid()
        if rng.random() < 0.4 and (not prioritized or any(item["priority"] for item in naive.items)):
            batch = sample(shard, 20)
            assert batch.codec == ("lz4" if send_compressed and spec.plane_dtype == "|u1" else "raw")
            assert_batch_agrees(batch, naive, prioritized=prioritized)
    assert naive.num_evicted > 0
    assert (naive.num_evicted_for_bytes > 0) == by_bytes


@pytest.mark.parametrize("priority_exponent", [0.0, 1.0])
def test_insert_at_capacity_evicts_oldest(priority_exponent, chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=10, priority_exponent=priority_exponent)
    for number in range(9):  # Items 0-26; 3 does not divide 10, so chunks lie across the ring's seam.
        shard.insert(wire.pack(chunk_of(rng, num_transitions=3, r_t=np.arange(3 * number, 3 * number + 3, dtype=np.float32))))
    batch = sample(shard, 1000)
    assert sorted(set(batch.item_id.tolist())) == list(range(17, 27))
    np.testing.assert_array_equal(batch.r_t, batch.item_id)
    assert (shard.stats().num_evicted, shard.size) == (17, 10)


def test_insert_at_memory_evicts_oldest(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(LARGE_PIXELS, memory=min_memory(1000, 2, prioritized=True), capacity=1000)
    for number in range(20):  # Each takes most of a segment of 128 KiB; there are 8.
        shard.insert(wire.pack(chunk_of(rng, LARGE_PIXELS, num_planes=20, r_t=np.full(3, number, np.float32))))
    batch = sample(shard, 1000)
    assert sorted(set(batch.item_id.tolist())) == list(range(3 * 12, 3 * 20))
    np.testing.assert_array_equal(batch.r_t, batch.item_id // 3)


@pytest.mark.parametrize("spec", [PIXELS, LARGE_PIXELS], ids=["capacity", "bytes"])
def test_item_id_is_never_reused(spec, chunk_of):
    """The r_t of every item is its number of insertion: it and the id stay equal over many turns of the ring."""
    rng = np.random.default_rng(0)
    capacity = 7 if spec is PIXELS else 1000
    shard = make_shard(spec, memory=min_memory(capacity, 2, prioritized=True), capacity=capacity)
    end = 0
    for _ in range(60):
        num = int(rng.integers(1, 8))
        r_t = np.arange(end, end + num, dtype=np.float32)
        end += shard.insert(wire.pack(chunk_of(rng, spec, num_planes=20, num_transitions=num, r_t=r_t))).num_inserted
        batch = sample(shard, 5)
        np.testing.assert_array_equal(batch.r_t, batch.item_id)
    assert shard.stats().num_inserted == end > 3 * shard.size


def test_insert_keeps_no_view_of_the_message(chunk_of):
    rng = np.random.default_rng(0)
    shard, untouched = make_shard(), make_shard()
    for _ in range(4):
        message = wire.pack(chunk_of(rng))
        untouched.insert(message.copy())
        shard.insert(message)
        message[:] = 0xFF
    batch = sample(shard, 50)
    expected = sample(untouched, 50)
    for field in dataclasses.fields(SampleBatch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name))
    shard.check_valid()


def test_insert_takes_read_only_messages(chunk_of):
    message = wire.pack(chunk_of(np.random.default_rng(0)))
    message.setflags(write=False)
    assert make_shard().insert(message).num_inserted == 3


def test_sample_sends_a_shared_plane_once(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard()
    references = np.array([[0, 1], [1, 2], [2, 3]], np.uint16)
    for _ in range(2):
        shard.insert(wire.pack(chunk_of(rng, num_planes=5, s_tm1=references, s_t=references + 1)))
    batch = sample(shard, 500)
    assert set(batch.item_id.tolist()) == set(range(6))
    assert batch.num_planes == 2 * 8  # One block of each chunk.


@pytest.mark.parametrize("spec", [PIXELS, VECTORS], ids=["pixels", "vectors"])
def test_send_compressed_off_gives_the_same_planes(spec, chunk_of):
    rng = np.random.default_rng(0)
    compressed, decoded = (make_shard(spec, send_compressed=setting, seed=5) for setting in (True, False))
    for _ in range(5):
        message = wire.pack(chunk_of(rng, spec))
        compressed.insert(message)
        decoded.insert(message)
    one, other = sample(compressed, 30), sample(decoded, 30)
    assert (one.codec, other.codec) == ("lz4" if spec is PIXELS else "raw", "raw")
    for name in ("s_tm1", "s_t"):
        stacks = [decode_planes(batch)[getattr(batch, name)] for batch in (one, other)]
        np.testing.assert_array_equal(*stacks)
    assert other.num_planes == len(np.unique([other.s_tm1, other.s_t])), "planes that no item needs were sent"
    different = {"codec", "planes_per_block", "block_offsets", "plane_data", "s_tm1", "s_t"} if spec is PIXELS else set()
    for name in {field.name for field in dataclasses.fields(SampleBatch)} - different:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# Sampling


def p_value_of_counts(draws, probabilities):
    counts = np.bincount(draws, minlength=len(probabilities))
    keep = probabilities > 0
    assert counts[~keep].sum() == 0, "drew an item of probability zero"
    return stats.chisquare(counts[keep], probabilities[keep] * len(draws)).pvalue


def draw(chunk_of, priorities, *, num_draws, priority_exponent=1.0, seed=0):
    """Returns the position of each drawn item in `priorities`; the ring has turned, so slot, id and position differ."""
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=len(priorities), priority_exponent=priority_exponent, seed=seed)
    for num, priority in ((4, np.ones(4)), (len(priorities), np.asarray(priorities, float))):
        assert shard.insert(wire.pack(chunk_of(rng, num_transitions=num, priority=priority))).num_inserted == num
    return np.concatenate([sample(shard, 100_000).item_id - 4 for _ in range(num_draws // 100_000)])


def power(wrong, right, num_draws):
    """Returns the chance that the test rejects a sampler of `wrong` priorities: chi-square, not central."""
    keep = right > 0
    right, wrong = right[keep] / right.sum(), wrong[keep] / wrong.sum()
    degrees = len(right) - 1
    noncentrality = num_draws * ((wrong - right) ** 2 / right).sum()
    return stats.ncx2.sf(stats.chi2.isf(P_REJECT, degrees), degrees, noncentrality)


def test_sample_follows_priorities(chunk_of):
    draws = draw(chunk_of, PRIORITIES, num_draws=NUM_DRAWS)
    assert p_value_of_counts(draws, PRIORITIES / PRIORITIES.sum()) > P_REJECT


def test_sample_applies_the_exponent(chunk_of):
    """Kills: the exponent applied twice, at the wrong end, or not at all."""
    draws = draw(chunk_of, PRIORITIES, num_draws=100_000, priority_exponent=0.6)
    powers = PRIORITIES**0.6
    assert p_value_of_counts(draws, powers / powers.sum()) > P_REJECT
    for wrong in (PRIORITIES, PRIORITIES**0.36, (PRIORITIES > 0) * 1.0):
        assert p_value_of_counts(draws, wrong / wrong.sum()) < P_REJECT


def test_sample_with_exponent_zero_is_uniform(chunk_of):
    draws = draw(chunk_of, PRIORITIES, num_draws=NUM_DRAWS, priority_exponent=0.0)
    assert p_value_of_counts(draws, np.full(6, 1 / 6)) > P_REJECT


WRONG = {
    "uniform": [0, 1, 1, 1, 0, 1],
    "one_off_by_5_percent": [0, 1.05, 2, 5, 0, 3],
    "half_off_by_5_percent": [0, 1.05, 2.1, 5, 0, 3],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_priorities_test_has_power(chunk_of, name):
    """With as many draws as ours had: the chance to miss one off by 5 % is 3e-19, and half of them 1e-61.

    (With 100,000 draws the test would see one that is off by 5 % in 21 of 100 seeds.)
    """
    wrong = np.array(WRONG[name], float)
    assert 1 - power(wrong, PRIORITIES, NUM_DRAWS) < 1e-9
    draws = draw(chunk_of, wrong, num_draws=NUM_DRAWS)
    assert p_value_of_counts(draws, PRIORITIES / PRIORITIES.sum()) < P_REJECT


def test_the_uniform_test_has_power(chunk_of):
    wrong = np.array([1.05, 1, 1, 1, 1, 1])
    assert 1 - power(wrong, np.ones(6), NUM_DRAWS) < 1e-9
    draws = draw(chunk_of, wrong, num_draws=NUM_DRAWS)
    assert p_value_of_counts(draws, np.full(6, 1 / 6)) < P_REJECT


def test_draws_of_one_batch_are_independent(chunk_of):
    """Kills stratified or systematic draws: pairs of neighbours in a batch follow the product law."""
    draws = draw(chunk_of, [1, 2, 0, 5], num_draws=200_000)
    one = np.array([1, 2, 0, 5]) / 8
    assert p_value_of_counts(draws[::2] * 4 + draws[1::2], np.outer(one, one).reshape(-1)) > P_REJECT


def test_updated_priority_changes_probability_exactly(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=4, priority_exponent=0.5)
    shard.insert(wire.pack(chunk_of(rng, num_transitions=2)))
    shard.insert(wire.pack(chunk_of(rng, num_transitions=4, priority=np.array([1.0, 4.0, 9.0, 16.0]))))  # Items 2-5.

    def reported():
        batch = sample(shard, 500)
        assert batch.priority_mass * batch.probability[0] == pytest.approx(powers[batch.item_id[0] - 2], rel=1e-12)
        return dict(sorted(zip(batch.item_id.tolist(), batch.probability.tolist(), strict=True)))

    powers = [1, 2, 3, 4]
    assert reported() == pytest.approx({2: 1 / 10, 3: 2 / 10, 4: 3 / 10, 5: 4 / 10}, rel=1e-12)
    assert update(shard, [5, 3, 5], [36.0, 0.0, 25.0]) == 3  # Of duplicates the last one stays.
    powers = [1, 0, 3, 5]
    assert reported() == pytest.approx({2: 1 / 9, 4: 3 / 9, 5: 5 / 9}, rel=1e-12)
    assert shard.stats().num_priority_updates == 3


def test_stale_priority_updates_are_dropped_and_counted(chunk_of):
    """Items 0-3 are gone; 4 and 5 have the slots of 0 and 1 now. Kills: `item_id % capacity` without a look at the id."""
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=4)
    for _ in range(2):
        shard.insert(wire.pack(chunk_of(rng, num_transitions=4, priority=np.array([1.0, 2.0, 3.0, 4.0]))))
    assert update(shard, [0, 1, 3, 8, 10**15], [100.0] * 5) == 0  # 8 and 10**15 were not given yet.
    assert shard.stats().num_stale_priority_updates == 5
    assert update(shard, [4, 5], [100.0, 100.0], shard_epoch=6) == 0  # Of another epoch: the same ids, other items.
    assert shard.stats().num_stale_priority_updates == 7
    assert sample(shard, 1).priority_mass == 1 + 2 + 3 + 4
    assert update(shard, [3, 4], [100.0, 5.0]) == 1
    assert sample(shard, 1).priority_mass == 5 + 2 + 3 + 4
    counts = shard.stats()
    assert (counts.num_stale_priority_updates, counts.num_priority_updates) == (8, 1)


def test_update_for_another_shard_is_refused_and_changes_nothing(chunk_of):
    shard = make_shard()
    shard.insert(wire.pack(chunk_of(np.random.default_rng(0), priority=np.array([1.0, 2.0, 3.0]))))
    with pytest.raises(WireError, match=r"^shard_index: 4, but this is shard 3"):
        update(shard, [0], [9.0], shard_index=4)
    with pytest.raises(WireError, match=r"^priority: holds NaN"):
        update(shard, [0, 1], [9.0, np.nan])
    with pytest.raises(WireError, match=r"^priority: -1.0 is below"):
        update(shard, [0, 1], [9.0, -1.0])
    assert sample(shard, 1).priority_mass == 6
    assert shard.stats().num_stale_priority_updates == shard.stats().num_priority_updates == 0


def test_sample_is_repeatable_by_seed(chunk_of):
    rng = np.random.default_rng(0)
    message = wire.pack(chunk_of(rng, num_transitions=40))
    drawn = []
    for seed in (1, 1, 2):
        shard = make_shard(seed=seed)
        shard.insert(message)
        drawn.append(sample(shard, 100).item_id.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# Refusals


def corrupt_block(chunk, index=1):
    data = chunk.plane_data.copy()
    data[chunk.block_offsets[index] : chunk.block_offsets[index + 1]] = 0
    return dataclasses.replace(chunk, plane_data=data)


def with_block(chunk, block):
    """The chunk with its block 1 replaced by another."""
    offsets = chunk.block_offsets.tolist()
    blocks = [bytes(chunk.plane_data[start:end]) for start, end in itertools.pairwise(offsets)]
    offsets, data = join_blocks([blocks[0], block, *blocks[2:]])
    return dataclasses.replace(chunk, block_offsets=offsets, plane_data=data)


def as_raw(chunk):
    offsets, data = join_blocks([encode_block(plane, "raw") for plane in decode_planes(chunk)])
    return dataclasses.replace(chunk, codec="raw", planes_per_block=1, block_offsets=offsets, plane_data=data)


def as_single_planes(chunk):
    offsets, data = join_blocks([encode_block(plane, "lz4") for plane in decode_planes(chunk)])
    return dataclasses.replace(chunk, planes_per_block=1, block_offsets=offsets, plane_data=data)


BAD_CHUNKS = {
    "corrupt_lz4": (corrupt_block, r"^plane_data: block 1 "),
    "short_lz4": (lambda c: with_block(c, lz4.block.compress(bytes(8 * 24 - 1), store_size=False)), r"^plane_data: block 1 "),
    "long_lz4": (lambda c: with_block(c, lz4.block.compress(bytes(8 * 24 + 1), store_size=False)), r"^plane_data: block 1 "),
    "transposed_planes": (lambda c: dataclasses.replace(c, plane_shape=np.array([6, 4])), r"^plane_shape: \(6, 4\)"),
    "float_planes": (lambda c: dataclasses.replace(c, plane_dtype="<f4"), r"^plane_shape: \(4, 6\) <f4"),
    "raw_codec": (as_raw, r"^codec: 'raw', expected 'lz4'"),
    "single_planes": (as_single_planes, r"^planes_per_block: 1, expected 8"),
    "action": (lambda c: dataclasses.replace(c, a_tm1=np.array([0, 4, 1])), r"^a_tm1: action 4 of 4"),
    "stack": (lambda c: dataclasses.replace(c, s_tm1=c.s_tm1[:, :1], s_t=c.s_t[:, :1]), r"^s_tm1: stacks of 1 "),
    "reference": (lambda c: dataclasses.replace(c, s_t=np.full((3, 2), 24)), r"^s_t: refers to plane 24 of 24"),
    "nan_priority": (lambda c: dataclasses.replace(c, priority=np.array([1, np.nan, 1])), r"^priority: holds NaN"),
    "infinite_priority": (lambda c: dataclasses.replace(c, priority=np.array([1, np.inf, 1])), r"^priority: holds NaN or inf"),
    "negative_priority": (lambda c: dataclasses.replace(c, priority=np.array([1.0, -1, 1])), r"^priority: -1.0 is below"),
    "nan_reward": (lambda c: dataclasses.replace(c, r_t=np.array([0, np.nan, 0])), r"^r_t: holds NaN"),
    "other_run": (lambda c: dataclasses.replace(c, run="run-b"), r"^run: the chunk is of run 'run-b', this is 'run-a'"),
    "huge_version": (lambda c: dataclasses.replace(c, params_version=1 << 63), r"^params_version: "),
}
# The header can be read, and the chunk is of this run: its transitions count as refused.
COUNTED = {"corrupt_lz4", "short_lz4", "long_lz4", "transposed_planes", "float_planes", "raw_codec", "single_planes"} | {
    "action",
    "stack",
}


def contents(shard):
    batch = sample(shard, 300)
    planes = decode_planes(batch)
    return {
        item_id: (planes[batch.s_tm1[b]].tobytes(), planes[batch.s_t[b]].tobytes(), batch.r_t[b], batch.probability[b])
        for b, item_id in enumerate(batch.item_id.tolist())
    }


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunk_is_refused_and_harms_nothing(name, chunk_of):
    spoil, text = BAD_CHUNKS[name]
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=10)
    for _ in range(4):  # Full: a chunk that is taken in part would evict.
        shard.insert(wire.pack(chunk_of(rng, actor_slot=1, incarnation=0)))
    before, counts = contents(shard), shard.stats()
    reply = shard.insert(wire.pack(spoil(chunk_of(rng, actor_slot=2, incarnation=5, num_sent_before=100))))
    assert reply.num_inserted == 0
    with pytest.raises(WireError, match=text):
        raise WireError(str(reply.refusal))
    assert contents(shard) == before
    shard.check_valid()
    after = shard.stats()
    assert (after.num_refused_chunks, after.last_refusal) == (1, reply.refusal)
    for unchanged in ("size", "num_inserted", "num_evicted", "resident_bytes"):
        assert getattr(after, unchanged) == getattr(counts, unchanged)
    assert after.senders[1, 0].inserted == 4 * 3
    refused = SenderCount(inserted=0, refused=3, sent=103)
    assert after.senders.get((2, 5)) == (refused if name in COUNTED else None)
    assert reply.num_refused == (3 if name in COUNTED | {"other_run"} else 0)
    assert shard.insert(wire.pack(chunk_of(rng))).num_inserted == 3  # And it goes on.


@pytest.mark.parametrize("priority_exponent", [0.5, 1.0])
def test_priorities_whose_sum_overflows_harm_nothing(priority_exponent, chunk_of):
    """Each is finite, their sum is not: taken in, no item could be drawn any more."""
    shard = make_shard(priority_exponent=priority_exponent)
    rng = np.random.default_rng(0)
    shard.insert(wire.pack(chunk_of(rng)))
    shard.insert(wire.pack(chunk_of(rng, priority=np.full(3, 1.7e308))))
    shard.check_valid()
    assert np.isfinite(sample(shard, 10).probability).all()


def test_unreadable_chunk_is_refused_and_counted(chunk_of):
    shard = make_shard()
    message = wire.pack(chunk_of(np.random.default_rng(0)))
    for bad in (message[:-1], message[:10], np.zeros(0, np.uint8), wire.pack(PriorityUpdate(
        shard_index=3, shard_epoch=7, item_id=np.array([0]), priority=np.array([1.0])
    ))):  # fmt: skip
        reply = shard.insert(bad)
        assert (reply.num_inserted, reply.num_refused) == (0, 0)
        assert reply.refusal
    assert shard.stats().num_refused_chunks == 4
    assert shard.stats().senders == {}


def test_chunk_larger_than_the_shard_is_refused_and_counted(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=10)
    reply = shard.insert(wire.pack(chunk_of(rng, num_transitions=11)))
    assert (reply.num_refused, reply.refusal) == (11, "a_tm1: 11 transitions, but this shard's capacity is 10")
    assert shard.insert(wire.pack(chunk_of(rng, num_transitions=10))).num_inserted == 10
    shard = make_shard(LARGE_PIXELS, memory=min_memory(50, 2, prioritized=True))
    reply = shard.insert(wire.pack(chunk_of(rng, LARGE_PIXELS, num_planes=32)))  # 32 * 4 KiB and a table.
    assert reply.num_refused == 3
    assert str(reply.refusal).endswith(f"but a record has at most {128 * KIB}")
    assert shard.insert(wire.pack(chunk_of(rng, LARGE_PIXELS, num_planes=31))).num_inserted == 3


def test_senders_are_counted_by_slot_and_incarnation(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(capacity=10)
    for slot, incarnation, num_sent_before, num in [(0, 0, 0, 4), (1, 0, 0, 5), (0, 0, 9, 6), (0, 1, 0, 2), (0, 0, 4, 5)]:
        shard.insert(
            wire.pack(
                chunk_of(rng, num_transitions=num, actor_slot=slot, incarnation=incarnation, num_sent_before=num_sent_before)
            )
        )
    counts = shard.stats()
    assert counts.senders == {
        (0, 0): SenderCount(inserted=4 + 6 + 5, refused=0, sent=9 + 6),  # A late chunk does not take it back.
        (1, 0): SenderCount(inserted=5, refused=0, sent=5),
        (0, 1): SenderCount(inserted=2, refused=0, sent=2),
    }
    assert counts.num_inserted == 22
    assert (counts.size, counts.num_evicted) == (10, 12)


# The limiter, as the shard asks it


def reasons(shard):
    return {status.who: status.reason for status in shard.stats().waits}


def test_shard_asks_its_limiter_and_names_itself(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(min_size=6, samples_per_insert=2.0, limiter_buffer_samples=4)
    assert shard.insert(wire.pack(chunk_of(rng))).waits_for is None
    reply = shard.sample(4)
    assert reply.batch is None
    assert reply.waits_for == "shard 3: the learner waits for actors: 3 of 6 transitions to start"
    assert shard.insert(wire.pack(chunk_of(rng))).waits_for is None
    assert shard.insert(wire.pack(chunk_of(rng))).waits_for == "shard 3: actors wait for the learner: 2 more samples due"
    assert shard.ask_to_insert() == "shard 3: actors wait for the learner: 2 more samples due"  # (9 - 6) * 2 - 4
    assert reasons(shard) == {"actors": shard.ask_to_insert(), "learner": None}
    assert shard.insert(wire.pack(chunk_of(rng))).num_inserted == 3  # What is under way is never refused.
    for _ in range(4):
        sample(shard, 4)
    assert shard.stats().num_sampled == 16
    assert shard.ask_to_insert() is None
    assert shard.sample(4).waits_for == "shard 3: the learner waits for actors: 2 more transitions due"  # (20 - 16) / 2
    assert shard.stats().num_sampled == 16
    assert reasons(shard) == {"actors": None, "learner": "shard 3: the learner waits for actors: 2 more transitions due"}


def test_stats_say_who_waits_and_for_how_long(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(min_size=6, samples_per_insert=2.0, limiter_buffer_samples=4)
    now = 100.0
    shard._limiter.clock = lambda: now

    def waits():
        return shard.stats().waits

    may_go_on = {who: WaitStatus(who=who, reason=None, seconds=0, total_seconds=0) for who in ("actors", "learner")}
    assert waits() == [may_go_on["actors"], may_go_on["learner"]]
    shard.sample(4)
    now += 5
    shard.insert(wire.pack(chunk_of(rng)))  # An insert does not end it: 3 of 6.
    now += 2
    reason = "shard 3: the learner waits for actors: 3 of 6 transitions to start"
    assert waits()[1] == WaitStatus(who="learner", reason=reason, seconds=7, total_seconds=7)
    shard.insert(wire.pack(chunk_of(rng)))
    assert waits() == [may_go_on["actors"], WaitStatus(who="learner", reason=None, seconds=0, total_seconds=7)]
    shard.insert(wire.pack(chunk_of(rng)))  # (9 - 6) * 2 - 4 = 2 samples due: its reply tells actors to wait.
    now += 10
    reason = "shard 3: actors wait for the learner: 2 more samples due"
    assert waits()[0] == WaitStatus(who="actors", reason=reason, seconds=10, total_seconds=10)
    sample(shard, 4)
    assert waits()[0] == WaitStatus(who="actors", reason=None, seconds=0, total_seconds=10)


def test_a_shard_that_its_memory_starves_says_what_to_change(chunk_of):
    """Chunks of 20 planes of noise take most of a segment; 8 segments hold 24 items, and 30 are asked for."""
    rng = np.random.default_rng(0)
    shard = make_shard(LARGE_PIXELS, memory=min_memory(1000, 2, prioritized=True), capacity=1000, min_size=30)
    for _ in range(12):
        waits_for = shard.sample(4).waits_for
        shard.insert(wire.pack(chunk_of(rng, LARGE_PIXELS)))
    assert waits_for == (
        "shard 3: the learner waits for actors: 24 of 30 transitions to start, which its memory cannot hold: raise "
        "--replay.memory or lower --replay.min-size"
    )
    assert reasons(shard) == {"actors": None, "learner": waits_for}
    shard.set_limiter(min_size=24, samples_per_insert=None, limiter_buffer_samples=0)
    assert sample(shard, 4).size == 24
    assert reasons(shard) == {"actors": None, "learner": None}


# Settings changed while the run goes on


def make_limited_shard(chunk_of, num_inserted=9):
    shard = make_shard(capacity=10, min_size=6, samples_per_insert=2.0, limiter_buffer_samples=4)
    shard._limiter.clock = lambda: 0.0
    rng = np.random.default_rng(0)
    for _ in range(num_inserted // 3):
        shard.insert(wire.pack(chunk_of(rng)))
    return shard


def test_set_limiter_takes_effect_at_once(chunk_of):
    shard = make_limited_shard(chunk_of)  # due = (9 - 6) * 2 = 6, and nothing sampled.
    assert shard.ask_to_insert() == "shard 3: actors wait for the learner: 2 more samples due"  # 6 - 4
    shard.set_limiter(min_size=6, samples_per_insert=2.0, limiter_buffer_samples=8)
    assert reasons(shard) == {"actors": None, "learner": None}
    assert shard.ask_to_insert() is None
    sample(shard, 8)  # The four that were owed, and four of the new buffer: a wrong account would refuse it.
    shard.set_limiter(min_size=10, samples_per_insert=2.0, limiter_buffer_samples=8)
    assert shard.sample(2).waits_for == "shard 3: the learner waits for actors: 9 of 10 transitions to start"
    shard.set_limiter(min_size=1, samples_per_insert=None, limiter_buffer_samples=0)
    assert reasons(shard) == {"actors": None, "learner": None}
    sample(shard, 1000)
    shard.set_limiter(min_size=1, samples_per_insert=5.0, limiter_buffer_samples=500)
    sample(shard, 500)  # What was drawn without a ratio is not held against the learner.
    assert shard.sample(6).waits_for == "shard 3: the learner waits for actors: 2 more transitions due"  # ceil(6 / 5)
    assert shard.insert(wire.pack(chunk_of(np.random.default_rng(1)))).num_inserted == 3
    sample(shard, 15)
    assert shard.stats().num_sampled == 8 + 1000 + 500 + 15


def test_set_limiter_to_more_samples_per_insert_makes_actors_wait(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_limited_shard(chunk_of, num_inserted=6)
    shard.set_limiter(min_size=6, samples_per_insert=3.0, limiter_buffer_samples=4)
    assert (
        shard.insert(wire.pack(chunk_of(rng))).waits_for == "shard 3: actors wait for the learner: 5 more samples due"
    )  # 9 - 4
    shard = make_limited_shard(chunk_of, num_inserted=6)
    shard.set_limiter(min_size=6, samples_per_insert=1.0, limiter_buffer_samples=4)
    assert shard.insert(wire.pack(chunk_of(rng))).waits_for is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"min_size": 11}, r"a shard of 10 transitions never reaches its min_size of 11"),
        ({"min_size": 0}, r"min_size of 0 lets the learner sample from nothing"),
        ({"samples_per_insert": 0.0}, r"0\.0 samples per insert nothing moves"),
        ({"samples_per_insert": -1.0}, r"-1\.0 samples per insert nothing moves"),
        ({"samples_per_insert": float("inf")}, r"inf samples per insert nothing moves"),
        ({"limiter_buffer_samples": 1}, r"4 samples at a time need a buffer of at least 2 on each shard, not 1"),
        ({"limiter_buffer_samples": -4}, r"4 samples at a time need a buffer of at least 2 on each shard, not -4"),
    ],
    ids=["capacity", "no_minimum", "zero", "negative", "infinite", "buffer", "negative_buffer"],
)
def test_set_limiter_refuses_a_deadlock_and_changes_nothing(chunk_of, change, text):
    """Everything else is changed with it, and must not be taken in either."""
    shard, untouched = (make_limited_shard(chunk_of) for _ in range(2))
    for each in (shard, untouched):
        sample(each, 4)
    good = {"min_size": 5, "samples_per_insert": 7.0, "limiter_buffer_samples": 40}
    before = shard.stats()
    with pytest.raises(UserError, match=text):
        shard.set_limiter(**good | change)
    assert shard.stats() == before
    rng = np.random.default_rng(2)
    for _ in range(20):  # And it goes on as the one that was not asked.
        message = wire.pack(chunk_of(rng))
        turns = [
            (each.sample(4).waits_for, each.ask_to_insert() or each.insert(message), each.stats())
            for each in (shard, untouched)
        ]
        assert turns[0] == turns[1]
    shard.set_limiter(**good)
    sample(shard, 30)
    assert untouched.sample(30).batch is None


def test_refused_chunks_do_not_pay_for_samples(chunk_of):
    rng = np.random.default_rng(0)
    shard = make_shard(min_size=3, samples_per_insert=1.0, limiter_buffer_samples=2)
    shard.insert(wire.pack(chunk_of(rng)))
    shard.insert(wire.pack(corrupt_block(chunk_of(rng))))
    sample(shard, 2)
    assert shard.sample(1).batch is None


def test_sample_waits_where_every_priority_is_zero(chunk_of):
    shard = make_shard()
    shard.insert(wire.pack(chunk_of(np.random.default_rng(0), priority=np.zeros(3))))
    reply = shard.sample(1)
    assert (reply.batch, shard.stats().num_sampled) == (None, 0)
    assert "priority is not zero" in str(reply.waits_for)
    update(shard, [1], [2.0])
    assert sample(shard, 5).item_id.tolist() == [1] * 5


# Memory


@pytest.mark.parametrize("capacity", [1, 2, 5, 1000, 1025, 100_000])
@pytest.mark.parametrize("priority_exponent", [0.0, 0.6])
@pytest.mark.parametrize("spare", [0, 12_345, 40 << 20])
def test_memory_holds_index_tree_and_planes(capacity, priority_exponent, spare):
    memory = min_memory(capacity, 2, prioritized=priority_exponent > 0) + spare
    shard = make_shard(memory=memory, capacity=capacity, priority_exponent=priority_exponent)
    tree_bytes = sum(level.nbytes for level in shard._tree._levels) if shard._tree else 0
    assert shard._items.nbytes + tree_bytes + shard._store.bytes.nbytes <= memory
    assert shard._store.bytes.nbytes >= 0.85 * (8 * 128 * KIB + spare)  # And it does not leave the budget lying.


def test_resident_bytes_reaches_and_never_exceeds_memory(chunk_of):
    rng = np.random.default_rng(0)
    memory = min_memory(100, 2, prioritized=True)
    shard = make_shard(LARGE_PIXELS, memory=memory, capacity=100)
    assert shard.stats().resident_bytes == 0
    used = []
    for _ in range(150):
        num_planes, num_transitions = rng.integers(1, 25), rng.integers(1, 20)
        shard.insert(wire.pack(chunk_of(rng, LARGE_PIXELS, num_planes=num_planes, num_transitions=num_transitions)))
        used.append(shard.stats().resident_bytes)
    assert 0.9 * memory < max(used) <= memory


@pytest.mark.parametrize("prioritized", [False, True])
def test_too_little_memory_is_a_user_error(prioritized):
    least = min_memory(5000, 2, prioritized=prioritized)
    settings = {"capacity": 5000, "priority_exponent": float(prioritized)}
    make_shard(memory=least, **settings)
    with pytest.raises(UserError, match=r"raise --replay\.memory or lower --replay\.capacity"):
        make_shard(memory=least - 1, **settings)


def test_check_valid_finds_a_priority_of_an_evicted_item(chunk_of):
    shard = make_shard()
    shard.insert(wire.pack(chunk_of(np.random.default_rng(0))))
    shard.check_valid()
    shard._tree.set(np.array([10]), np.array([1.0]))
    with pytest.raises(AssertionError):
        shard.check_valid()
