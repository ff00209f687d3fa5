"""Unpacked stacks against the plain way: decode every plane, then pick."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from common.errors import WireError
from common.messages import SampleBatch
from common.planes import decode_planes
from learner import unpack
from learner.batches import unpack_stacks
from learner.unpack import StackUnpacker

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


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_unpacked_stacks_are_the_planes_referred_to(name, num_threads, make_batch):
    """Kills: a range of one thread that ends within a block; rows of one shard's part over another's; s_tm1 for s_t."""
    rng = np.random.default_rng(0)
    shape, dtype = SHAPES[name]
    unpacker = StackUnpacker(num_threads)
    for num_parts in (1, 3):
        stack = int(rng.integers(1, 5))
        parts = [
            make_batch(rng, shape, dtype, num_items=int(rng.integers(1, 9)), num_planes=int(rng.integers(1, 20)), stack=stack)
            for _ in range(num_parts)
        ]
        stacks = unpack_stacks(parts, unpacker)
        assert stacks.dtype == dtype
        np.testing.assert_array_equal(stacks, plain_stacks(parts))
    unpacker.close()


def test_parts_may_come_in_different_codecs(make_batch):
    rng = np.random.default_rng(0)
    parts = [make_batch(rng, (6, 7), "|u1", num_items=4, num_planes=9, stack=2, codec=codec) for codec in ("raw", "lz4")]
    np.testing.assert_array_equal(unpack_stacks(parts, StackUnpacker(1)), plain_stacks(parts))


def test_without_the_compiled_decoder_the_stacks_are_the_same(make_batch, monkeypatch):
    assert unpack.lz4_decoder() != 0, "python-lz4 hides LZ4's functions: the slow way is in use"
    batch = make_batch(np.random.default_rng(0), (84, 84), "|u1", num_items=6, num_planes=20, stack=4)
    monkeypatch.setattr(unpack, "lz4_decoder", lambda: 0)
    np.testing.assert_array_equal(unpack_stacks([batch], StackUnpacker(2)), plain_stacks([batch]))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_bad_block_is_named(num_threads, make_batch):
    batch = make_batch(np.random.default_rng(0), (84, 84), "|u1", num_items=30, num_planes=24, stack=4)
    data = batch.plane_data.copy()
    data[batch.block_offsets[1] : batch.block_offsets[2]] = 0
    with pytest.raises(WireError, match=r"^plane_data: block 1 is not an LZ4 block of 56448 bytes"):
        unpack_stacks([dataclasses.replace(batch, plane_data=data)], StackUnpacker(num_threads))
