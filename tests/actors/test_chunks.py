"""Chunks: every full block of planes encoded once and sent with those it belongs to; old ones are forgotten."""

from __future__ import annotations

import numpy as np
import pytest

import actors.chunks
from actors.chunks import ChunkBuilder
from common.config import EnvSpec
from common.messages import TransitionChunk
from common.planes import decode_planes

PIXELS = EnvSpec((6, 5), "|u1", 4, 3)
VECTOR = EnvSpec((3,), "<f4", 1, 3)
VECTOR_BYTES = 12


def plane_of(spec, number):
    """A plane that names itself; never zero, and too mixed for LZ4 to shrink."""
    plane = np.random.default_rng(number).integers(1, 256, spec.plane_shape).astype(np.dtype(spec.plane_dtype))
    plane.flat[:3] = [number % 255 + 1, number // 255 + 1, 7]
    return plane


def chunk_of(spec, fields):
    chunk = TransitionChunk(
        run="run",
        actor_slot=0,
        incarnation=0,
        seq=0,
        num_sent_before=0,
        params_version=0,
        **fields,
    )
    chunk.check_valid()
    return chunk


def fill(builder, spec, numbers):
    for number in numbers:
        builder.add_plane(plane_of(spec, number))


def test_chunk_stacks_are_zero_before_the_episode_and_never_reach_over_its_start(rows_of):
    """Kills: a stack that repeats the first plane, one that reaches into the last episode, one that is off by a plane."""
    builder = ChunkBuilder(PIXELS, history=9)
    fill(builder, PIXELS, range(6))
    builder.begin_episode()  # Plane 6 is zero.
    fill(builder, PIXELS, range(7, 12))
    builder.add_transition((8, 10, 7, 2, 1.5, 0.81, 3.0))  # The episode began at plane 7.
    ((s_tm1, a_tm1, r_t, discount_t, s_t),) = rows_of(chunk_of(PIXELS, builder.take()))
    zero = np.zeros((6, 5), np.uint8)
    np.testing.assert_array_equal(s_tm1, [zero, zero, plane_of(PIXELS, 7), plane_of(PIXELS, 8)])
    np.testing.assert_array_equal(s_t, [plane_of(PIXELS, n) for n in (7, 8, 9, 10)])
    assert (a_tm1, r_t) == (2, 1.5)
    assert discount_t == pytest.approx(0.81)


def test_chunk_encodes_each_full_block_once(monkeypatch):
    encoded = []
    encode = actors.chunks.encode_block
    monkeypatch.setattr(actors.chunks, "encode_block", lambda planes, codec: encoded.append(0) or encode(planes, codec))
    builder = ChunkBuilder(PIXELS, history=9)
    fill(builder, PIXELS, range(20))  # Two full blocks, and four planes of the third.
    assert len(encoded) == 2
    for source in range(11, 15):
        builder.add_transition((source, source + 1, 0, 0, 0.0, 1.0, 1.0))
    assert len(builder.take()["block_offsets"]) - 1 == 1  # Planes 8 to 15: not the open block, nor the first.
    assert len(encoded) == 2
    for _ in range(2):
        builder.add_transition((15, 18, 0, 0, 0.0, 1.0, 1.0))
        fields = builder.take()
    assert len(fields["block_offsets"]) - 1 == 2
    assert len(encoded) == 4  # The open block with each chunk that needs it.
    fill(builder, PIXELS, range(20, 24))
    assert len(encoded) == 5


def test_chunk_open_block_is_filled_up_with_zeros(rows_of):
    """Kills planes of the last block that show through in the next one, which would make it longer."""
    builder = ChunkBuilder(PIXELS, history=9)
    fill(builder, PIXELS, range(9))
    builder.add_transition((7, 8, 0, 0, 0.0, 1.0, 1.0))
    planes = decode_planes(chunk_of(PIXELS, builder.take()))
    np.testing.assert_array_equal(planes[8], plane_of(PIXELS, 8))
    assert len(planes) == 16
    assert not planes[9:].any()


def test_chunk_num_bytes_counts_what_is_held():
    builder = ChunkBuilder(VECTOR, history=5)
    assert builder.num_bytes == 0
    fill(builder, VECTOR, range(8))
    assert builder.num_bytes == 8 * VECTOR_BYTES
    builder.add_transition((6, 7, 0, 0, 0.0, 1.0, 1.0))
    assert builder.num_transitions == 1
    fields = builder.take()
    assert len(fields["plane_data"]) == 2 * VECTOR_BYTES
    assert (builder.num_bytes, builder.num_transitions) == (0, 0)  # History counts for nothing.
    fill(builder, VECTOR, [8])
    assert builder.num_bytes == VECTOR_BYTES


def test_chunk_of_planes_that_do_not_compress_is_smaller_than_their_stacks():
    """Kills a size that counts history: with it, noise is sent a transition at a time, each with all its history."""
    spec = EnvSpec((84, 84), "|u1", 4, 3)
    rng, builder, sizes = np.random.default_rng(0), ChunkBuilder(spec, history=11), []
    builder.begin_episode()
    for number in range(1, 400):
        builder.add_plane(rng.integers(256, size=(84, 84)).astype(np.uint8))
        if number > 3:
            builder.add_transition((number - 3, number, 1, 0, 0.0, 1.0, 1.0))
        if builder.num_bytes >= 90_000:
            sizes.append((len(builder._rows), len(builder.take()["plane_data"])))
    transitions, num_bytes = np.sum(sizes[1:], axis=0)
    assert transitions / len(sizes[1:]) > 11
    assert num_bytes / transitions < 0.5 * 2 * 4 * 84 * 84
    assert max(size for _, size in sizes) < 512 << 10  # What a segment of a shard of 4 MiB holds.


def test_chunk_take_keeps_exactly_the_history(rows_of):
    builder = ChunkBuilder(VECTOR, history=5)
    fill(builder, VECTOR, range(20))
    builder.add_transition((18, 19, 0, 0, 0.0, 1.0, 1.0))
    builder.take()
    builder.add_transition((15, 19, 0, 1, 0.0, 1.0, 1.0))  # 15 to 19 are the last five.
    ((s_tm1, a_tm1, _, _, s_t),) = rows_of(chunk_of(VECTOR, builder.take()))
    np.testing.assert_array_equal([s_tm1[0], s_t[0]], [plane_of(VECTOR, 15), plane_of(VECTOR, 19)])
    assert a_tm1 == 1


@pytest.mark.parametrize("spec", [PIXELS, VECTOR], ids=["pixels", "vector"])
def test_chunk_long_run_does_not_grow(spec, rows_of):
    """3000 planes through a builder that takes every seventh: what it holds stays, and what comes out is still right."""
    history, most = 12, 0
    builder = ChunkBuilder(spec, history=history)
    builder.begin_episode()  # Plane 0.
    fill(builder, spec, [1])
    for number in range(2, 3000):
        fill(builder, spec, [number])
        builder.add_transition((number - 1, number, 1, 0, 0.0, 1.0, 1.0))
        most = max(most, sum(map(len, builder._blocks)))
        if number % 7 == 0:
            rows = rows_of(chunk_of(spec, builder.take()))
            np.testing.assert_array_equal(rows[-1][4][-1], plane_of(spec, number))
    plane_bytes = VECTOR_BYTES if spec is VECTOR else 6 * 5 + 1  # LZ4 of noise is a few bytes longer than the noise.
    whole_blocks = 0 if spec is VECTOR else 7
    assert most <= (history + 7 + whole_blocks) * plane_bytes
