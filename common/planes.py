"""Encoding of observation planes: LZ4 blocks of a few images, raw bytes for small vectors.

Actors encode each plane once; learners (and shards, when they are set to send raw planes) decode them. A block holds as many
planes as LZ4's window of 64 KiB reaches over, at most 8: a frame is then mostly copies of the frame before it. Against blocks of
one plane, memory is 2.3 (Pong) to 3.5 times (Ms. Pac-Man) less, and a plane is decoded three times as fast; larger blocks save
little more, and a draw must decode more planes that it does not need (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lz4.block
import numpy as np

from common.errors import WireError
from common.messages import Array, Planes

_LZ4_WINDOW_BYTES = 1 << 16
_MAX_PLANES_PER_BLOCK = 8
# 12 microseconds a plane more than LZ4's fast mode, 1 to 2 % of what an actor takes for a step; for them replay and network carry
# a tenth to a third less, and the learner decodes up to a third faster.
_LZ4_LEVEL = 3


def codec_of(dtype: str) -> str:
    """Returns the codec for planes of this dtype: LZ4 pays for pixels, not for a handful of floats."""
    return "lz4" if dtype == "|u1" else "raw"


def planes_per_block(plane_shape: tuple[int, ...], dtype: str) -> int:
    """Returns how many planes share a block: what LZ4's window reaches over; raw planes gain nothing from company."""
    if codec_of(dtype) == "raw":
        return 1
    num_bytes = int(np.prod(plane_shape)) * np.dtype(dtype).itemsize
    return min(max(_LZ4_WINDOW_BYTES // num_bytes, 1), _MAX_PLANES_PER_BLOCK)


def encode_block(planes: Array, codec: str) -> bytes:
    """Returns the bytes of [planes_per_block, *plane_shape]: an LZ4 block without a size prefix, or the raw bytes."""
    data = np.ascontiguousarray(planes).data
    if codec == "raw":
        return bytes(data)
    return bytes(lz4.block.compress(data, mode="high_compression", compression=_LZ4_LEVEL, store_size=False))


def join_blocks(blocks: Sequence[bytes | memoryview]) -> tuple[Array, Array]:
    """Returns (block_offsets u32[J+1], plane_data u8[D]) of blocks laid end to end."""
    offsets = np.zeros(len(blocks) + 1, np.uint32)
    np.cumsum([len(block) for block in blocks], out=offsets[1:])
    return offsets, np.frombuffer(b"".join(blocks), np.uint8)


def decode_planes(planes: Planes) -> Array:
    """Decodes every plane.

    Returns:
      [P, *plane_shape] of `plane_dtype`; a fresh array for LZ4, a read-only view for raw planes.

    Raises:
      WireError: where a block is not LZ4 or does not give exactly its planes. No block can make it allocate more.
    """
    shape = (planes.num_planes, *planes.plane_shape.tolist())
    dtype = np.dtype(planes.plane_dtype)
    if planes.codec == "raw":
        return np.frombuffer(planes.plane_data, dtype).reshape(shape)
    out = np.empty((planes.num_blocks, planes.block_num_bytes), np.uint8)
    for row, block in zip(out, _decoded_blocks(planes), strict=True):
        row[:] = np.frombuffer(block, np.uint8)
    return out.view(dtype).reshape(shape)


def check_blocks(planes: Planes) -> None:
    """Decodes every block and keeps nothing. Raises WireError like `decode_planes`."""
    if planes.codec == "lz4":
        for _ in _decoded_blocks(planes):
            pass


def _decoded_blocks(planes: Planes) -> Iterator[bytes]:
    num_bytes = planes.block_num_bytes
    data = planes.plane_data.data
    offsets = planes.block_offsets.tolist()
    decompress = lz4.block.decompress
    for index in range(len(offsets) - 1):
        try:
            block = decompress(data[offsets[index] : offsets[index + 1]], uncompressed_size=num_bytes)
        except lz4.block.LZ4BlockError as error:
            raise WireError(f"plane_data: block {index} is not an LZ4 block of {num_bytes} bytes") from error
        if len(block) != num_bytes:
            raise WireError(f"plane_data: block {index} has {len(block)} bytes, expected {num_bytes}")
        yield block
