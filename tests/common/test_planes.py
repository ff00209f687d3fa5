from __future__ import annotations

import tracemalloc

import lz4.block
import numpy as np
import pytest

from common.errors import WireError
from common.messages import Planes
from common.planes import check_blocks, codec_of, decode_planes, encode_block, join_blocks, planes_per_block


def make_planes(blocks, *, codec="lz4", plane_dtype="|u1", plane_shape=(84, 84), per_block=1):
    offsets, data = join_blocks(blocks)
    return Planes(
        codec=codec,
        plane_dtype=plane_dtype,
        planes_per_block=per_block,
        plane_shape=np.array(plane_shape),
        block_offsets=offsets,
        plane_data=data,
    )


def lz4_block(num_bytes):
    return lz4.block.compress(bytes(num_bytes), store_size=False)


def test_codec_of_pixels_is_lz4_and_of_vectors_raw():
    assert (codec_of("|u1"), codec_of("<f4")) == ("lz4", "raw")


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((84, 84), "|u1", 8), ((64, 64), "|u1", 8), ((128, 128), "|u1", 4), ((200, 160), "|u1", 2), ((210, 160, 3), "|u1", 1),
     ((4,), "<f4", 1), ((4,), "|u1", 8)],
)  # fmt: skip
def test_a_block_spans_what_the_window_of_lz4_reaches_over(shape, dtype, expected):
    """Eight frames at most, since a draw decodes more planes than it needs; one where a plane fills the 64 KiB alone."""
    assert planes_per_block(shape, dtype) == expected


def test_blocks_of_frames_that_are_alike_are_far_smaller_than_their_frames():
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(256, size=(1, 84, 84)).astype(np.uint8), 8, axis=0)
    frames[np.arange(8), 10, np.arange(8)] = 0
    assert len(encode_block(frames, "lz4")) < 1.1 * 84 * 84


def test_join_blocks_lays_blocks_end_to_end():
    offsets, data = join_blocks([b"abc", b"d", b"ef"])
    assert (offsets.dtype, offsets.tolist(), data.tobytes()) == (np.uint32, [0, 3, 3 + 1, 3 + 1 + 2], b"abcdef")


@pytest.mark.parametrize(
    ("codec", "dtype", "shape"),
    [("lz4", "|u1", (84, 84)), ("lz4", "|u1", (3, 5, 7)), ("lz4", "|u1", (1,)), ("lz4", "<f4", (7,)),
     ("raw", "|u1", (84, 84)), ("raw", "<f4", (4,)), ("raw", "<f4", (1,))],
)  # fmt: skip
def test_planes_round_trip(codec, dtype, shape):
    rng = np.random.default_rng(0)
    planes = rng.integers(256, size=(6, *shape)).astype(dtype)  # Noise, which LZ4 makes longer,
    planes[1] = 0  # and one that it makes short.
    planes[3] = planes[0]
    for per_block in (1, 2, 6):
        blocks = [encode_block(block, codec) for block in planes.reshape(-1, per_block, *shape)]
        message = make_planes(blocks, codec=codec, plane_dtype=dtype, plane_shape=shape, per_block=per_block)
        decoded = decode_planes(message)
        check_blocks(message)
        assert (decoded.dtype, message.num_planes) == (dtype, 6)
        np.testing.assert_array_equal(decoded, planes)
        assert decoded.flags.writeable == (codec == "lz4")


def test_encode_block_takes_a_view_that_is_not_contiguous():
    frames = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)
    for codec in ("lz4", "raw"):
        assert encode_block(frames[:, ::2], codec) == encode_block(frames[:, ::2].copy(), codec)
    assert encode_block(frames.T, "raw") == frames.T.tobytes()


def test_a_compressed_block_is_one_plain_lz4_block():
    """Kills a size prefix, with which every block would be four bytes longer and need another reader."""
    plane = np.zeros((84, 84), np.uint8)
    block = encode_block(plane, "lz4")
    assert len(block) < 50
    assert lz4.block.decompress(block, uncompressed_size=84 * 84) == bytes(84 * 84)


@pytest.mark.parametrize("num_bytes", [0, 1, 84 * 84 - 1, 84 * 84 + 1, 2 * 84 * 84])
def test_a_block_of_another_length_is_refused_by_index(num_bytes):
    planes = make_planes([lz4_block(84 * 84), lz4_block(84 * 84), lz4_block(num_bytes)])
    for read in (decode_planes, check_blocks):
        with pytest.raises(WireError, match=r"^plane_data: block 2 "):
            read(planes)


@pytest.mark.parametrize("block", [b"\x00" * 10, b"\xff" * 50, b"\x0f", lz4_block(7056)[:-1], lz4_block(7056) + b"\x00"])
def test_a_block_that_is_not_lz4_is_refused_by_index(block):
    with pytest.raises(WireError, match=r"^plane_data: block 1 .*7056"):
        decode_planes(make_planes([lz4_block(7056), block]))


def test_a_bomb_is_refused_without_its_memory():
    """64 MiB in a block of 264 KiB, said to be one plane of 7 KiB."""
    bomb = make_planes([lz4_block(64 << 20)])
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=r"^plane_data: block 0 "):
            decode_planes(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_raw_planes_are_read_without_a_copy():
    rng = np.random.default_rng(0)
    planes = make_planes([rng.bytes(12) for _ in range(3)], codec="raw", plane_dtype="<f4", plane_shape=(3,))
    assert np.shares_memory(decode_planes(planes), planes.plane_data)
