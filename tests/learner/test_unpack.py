"""Unpacked stacks against the plain way: decode every plane, then pick."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np
import pytest

from common.errors import WireError
from common.messages import SampleBatch
from common.planes import decode_planes
from learner import unpack
from learner.batches import merge_stacks
from learner.unpack import unpack_stacks

SHAPES = {"frames": ((84, 84), "|u1"), "odd": ((3, 5, 7), "|u1"), "large": ((300, 300), "|u1"), "vectors": ((5,), "<f4")}


@pytest.fixture
def make_batch(encode_planes):
    """Returns a batch of random planes; its stacks refer to them in any order, again and again."""

    def make(rng, shape, dtype, *, num_items, num_planes, stack, codec=None):
        planes = rng.integers(256, size=(num_planes, *shape)).astype(dtype)
        planes[1:] = np.where(rng.random(planes[1:].shape) < 0.9, planes[:1], planes[1:])  # Alike, as frames are.
        references = rng.integers(num_planes, size=(2, num_items, stack))
        return SampleBatch(
            **encode_planes(planes, codec),
            shard_index=0,
            shard_epoch=0,
            size=num_items,
            priority_mass=1.0,
            s_tm1=references[0],
            s_t=references[1],
            a_tm1=np.zeros(num_items),
            r_t=np.zeros(num_items),
            discount_t=np.zeros(num_items),
            item_id=np.arange(num_items),
            probability=np.ones(num_items),
            params_version=np.zeros(num_items),
        )

    return make


def plain_stacks(parts):
    decoded = [decode_planes(part) for part in parts]
    picked = [[planes[getattr(part, name)] for planes, part in zip(decoded, parts, strict=True)] for name in ("s_tm1", "s_t")]
    return np.stack([np.concatenate(name) for name in picked])


@pytest.mark.parametrize("name", SHAPES)
def test_unpacked_stacks_are_the_planes_referred_to(name, make_batch):
    """Kills: a block that is decoded no further than its first plane; rows of one shard's part over another's; s_tm1 for s_t."""
    rng = np.random.default_rng(0)
    shape, dtype = SHAPES[name]
    for num_parts in (1, 3):
        stack = int(rng.integers(1, 5))
        parts = [
            make_batch(rng, shape, dtype, num_items=int(rng.integers(1, 9)), num_planes=int(rng.integers(1, 20)), stack=stack)
            for _ in range(num_parts)
        ]
        stacks = merge_stacks(parts)
        assert stacks.dtype == dtype
        np.testing.assert_array_equal(stacks, plain_stacks(parts))


def test_parts_may_come_in_different_codecs(make_batch):
    rng = np.random.default_rng(0)
    parts = [make_batch(rng, (6, 7), "|u1", num_items=4, num_planes=9, stack=2, codec=codec) for codec in ("raw", "lz4")]
    np.testing.assert_array_equal(merge_stacks(parts), plain_stacks(parts))


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize(
    ("shape", "dtype", "stack"),
    [((6, 8), "|u1", 2), ((5, 7), "|u1", 2), ((42,), "|u1", 2), ((6, 7), "<f4", 2), ((6, 7), "|u1", 3), ((6, 7), "|u1", 1)],
    ids=["larger", "smaller", "flat", "floats", "more_stacked", "fewer_stacked"],
)
def test_a_part_of_other_stacks_is_refused_and_writes_nothing(shape, dtype, stack, codec, make_batch):
    """Found: blocks of a larger plane, or stacks of more, were written past the end of the batch's array."""
    rng = np.random.default_rng(0)
    batch = make_batch(rng, shape, dtype, num_items=4, num_planes=9, stack=stack, codec=codec)
    room = np.full((3, 2 * 8 * 2 * 6 * 7), 99, np.uint8)  # The middle row is the batch's; the others are their neighbours'.
    out = room[1].reshape(2, 8, 2, 6, 7)
    with pytest.raises(WireError, match=r"^plane_shape: stacks "):
        unpack_stacks(batch, out, 4)
    assert (room == 99).all()
    first = make_batch(rng, (6, 7), "|u1", num_items=4, num_planes=9, stack=2)
    with pytest.raises(WireError, match=r"^plane_shape: stacks "):
        merge_stacks([first, batch])


def test_without_the_compiled_decoder_the_stacks_are_the_same(make_batch, monkeypatch):
    assert unpack.lz4_decoder() != 0, "python-lz4 hides LZ4's functions: the slow way is in use"
    batch = make_batch(np.random.default_rng(0), (84, 84), "|u1", num_items=6, num_planes=20, stack=4)
    monkeypatch.setattr(unpack, "lz4_decoder", lambda: 0)
    np.testing.assert_array_equal(merge_stacks([batch]), plain_stacks([batch]))


def test_a_bad_block_is_named(make_batch):
    batch = make_batch(np.random.default_rng(0), (84, 84), "|u1", num_items=30, num_planes=24, stack=4)
    data = batch.plane_data.copy()
    data[batch.block_offsets[1] : batch.block_offsets[2]] = 0
    with pytest.raises(WireError, match=r"^plane_data: block 1 is not an LZ4 block of 56448 bytes"):
        merge_stacks([dataclasses.replace(batch, plane_data=data)])


def test_a_block_that_ends_before_a_plane_that_is_wanted_is_refused(make_batch):
    """Good LZ4, of 8 planes: what is said to be the ninth would be whatever the buffer held before. Planes before it are read."""
    batch = make_batch(np.random.default_rng(0), (84, 84), "|u1", num_items=30, num_planes=24, stack=4)
    assert batch.planes_per_block == 8
    longer = dataclasses.replace(batch, planes_per_block=9)
    references = np.where(np.arange(30)[:, None] == 17, 17, np.array([0, 7, 9, 16]))  # 17 is the ninth of block 1.
    with pytest.raises(WireError, match=r"^plane_data: block 1 is not an LZ4 block of 63504 bytes"):
        merge_stacks([dataclasses.replace(longer, s_tm1=references, s_t=references)])
    references[17] = 0
    stacks = merge_stacks([dataclasses.replace(longer, s_tm1=references, s_t=references)])
    planes = decode_planes(batch)
    np.testing.assert_array_equal(stacks, [planes[references - (references >= 9)]] * 2)


def test_the_loop_compiles_where_nothing_can_be_cached(monkeypatch):
    """A read-only checkout of a user without a home: numba finds no place for its cache, and says so when it decorates."""
    njit, caches = numba.njit, []

    def without_a_place(*, nogil, cache=False):
        caches.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(nogil=nogil)

    monkeypatch.setattr(numba, "njit", without_a_place)
    assert unpack.compiled(lambda x: x + 1)(2) == 3
    assert caches == [True, False]
