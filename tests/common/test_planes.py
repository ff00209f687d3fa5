from __future__ import annotations

import tracemalloc

import lz4.block
import numpy as np
import pytest

from common.errors import WireError
from common.messages import Planes
from common.planes import codec_of, decode_planes, encode_plane, join_planes


def make_planes(blocks, *, codec="lz4", plane_dtype="|u1", plane_shape=(84, 84)):
    offsets, data = join_planes(blocks)
    return Planes(
        codec=codec, plane_dtype=plane_dtype, plane_shape=np.array(plane_shape), plane_offsets=offsets, plane_data=data
    )


def lz4_block(num_bytes):
    return lz4.block.compress(bytes(num_bytes), store_size=False)


def test_codec_of_pixels_is_lz4_and_of_vectors_raw():
    assert (codec_of("|u1"), codec_of("<f4")) == ("lz4", "raw")


def test_join_planes_lays_blocks_end_to_end():
    offsets, data = join_planes([b"abc", b"d", b"ef"])
    assert (offsets.dtype, offsets.tolist(), data.tobytes()) == (np.uint32, [0, 3, 3 + 1, 3 + 1 + 2], b"abcdef")


@pytest.mark.parametrize(
    ("codec", "dtype", "shape"),
    [("lz4", "|u1", (84, 84)), ("lz4", "|u1", (3, 5, 7)), ("lz4", "|u1", (1,)), ("lz4", "<f4", (7,)),
     ("raw", "|u1", (84, 84)), ("raw", "<f4", (4,)), ("raw", "<f4", (1,))],
)  # fmt: skip
def test_planes_round_trip(codec, dtype, shape):
    rng = np.random.default_rng(0)
    planes = rng.integers(256, size=(5, *shape)).astype(dtype)  # Noise, which LZ4 makes longer,
    planes[1] = 0  # and one that it makes short.
    planes[3] = planes[0]
    blocks = [encode_plane(plane, codec) for plane in planes]
    decoded = decode_planes(make_planes(blocks, codec=codec, plane_dtype=dtype, plane_shape=shape))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, planes)
    assert decoded.flags.writeable == (codec == "lz4")


def test_encode_plane_takes_a_view_that_is_not_contiguous():
    frames = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)
    for codec in ("lz4", "raw"):
        assert encode_plane(frames[:, ::2], codec) == encode_plane(frames[:, ::2].copy(), codec)
    assert encode_plane(frames.T, "raw") == frames.T.tobytes()


def test_a_compressed_plane_is_one_plain_lz4_block():
    """Kills a size prefix, with which every block would be four bytes longer and need another reader."""
    plane = np.zeros((84, 84), np.uint8)
    block = encode_plane(plane, "lz4")
    assert len(block) < 50
    assert lz4.block.decompress(block, uncompressed_size=84 * 84) == bytes(84 * 84)


@pytest.mark.parametrize("num_bytes", [0, 1, 84 * 84 - 1, 84 * 84 + 1, 2 * 84 * 84])
def test_a_block_of_another_length_is_refused_by_index(num_bytes):
    planes = make_planes([lz4_block(84 * 84), lz4_block(84 * 84), lz4_block(num_bytes)])
    with pytest.raises(WireError, match=r"^plane_data: plane 2 "):
        decode_planes(planes)


@pytest.mark.parametrize("block", [b"\x00" * 10, b"\xff" * 50, b"\x0f", lz4_block(7056)[:-1], lz4_block(7056) + b"\x00"])
def test_a_block_that_is_not_lz4_is_refused_by_index(block):
    with pytest.raises(WireError, match=r"^plane_data: plane 1 .*7056"):
        decode_planes(make_planes([lz4_block(7056), block]))


def test_a_bomb_is_refused_without_its_memory():
    """64 MiB in a block of 264 KiB, said to be one plane of 7 KiB."""
    bomb = make_planes([lz4_block(64 << 20)])
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=r"^plane_data: plane 0 "):
            decode_planes(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_raw_planes_are_read_without_a_copy():
    rng = np.random.default_rng(0)
    planes = make_planes([rng.bytes(12) for _ in range(3)], codec="raw", plane_dtype="<f4", plane_shape=(3,))
    assert np.shares_memory(decode_planes(planes), planes.plane_data)
