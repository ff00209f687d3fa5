"""Encoding of single observation planes: LZ4 blocks for images, raw bytes for small vectors.

Actors encode each plane once; learners (and shards, when they are set to send raw planes) decode them.
"""

from __future__ import annotations

import lz4.block
import numpy as np

from common.errors import WireError
from common.messages import Array, Planes


def codec_of(dtype: str) -> str:
    """Returns the codec for planes of this dtype: LZ4 pays for pixels, not for a handful of floats."""
    return "lz4" if dtype == "|u1" else "raw"


def encode_plane(plane: Array, codec: str) -> bytes:
    """Returns the bytes of one plane: an LZ4 block without a size prefix, or the raw bytes."""
    data = np.ascontiguousarray(plane).data
    if codec == "raw":
        return bytes(data)
    return bytes(lz4.block.compress(data, mode="fast", acceleration=1, store_size=False))


def join_planes(blocks: list[bytes]) -> tuple[Array, Array]:
    """Returns (plane_offsets u32[P+1], plane_data u8[D]) of blocks laid end to end."""
    offsets = np.zeros(len(blocks) + 1, np.uint32)
    np.cumsum([len(block) for block in blocks], out=offsets[1:])
    return offsets, np.frombuffer(b"".join(blocks), np.uint8)


def decode_planes(planes: Planes) -> Array:
    """Decodes every plane.

    Returns:
      [P, *plane_shape] of `plane_dtype`; a fresh array for LZ4, a read-only view for raw planes.

    Raises:
      WireError: where a block is not LZ4 or does not give exactly one plane. No block can make it allocate more.
    """
    shape = (planes.num_planes, *planes.plane_shape.tolist())
    if planes.codec == "raw":
        return np.frombuffer(planes.plane_data, np.dtype(planes.plane_dtype)).reshape(shape)
    num_bytes = planes.plane_num_bytes
    out = np.empty((planes.num_planes, num_bytes), np.uint8)
    data = planes.plane_data.data
    ends = planes.plane_offsets.tolist()
    decompress = lz4.block.decompress
    for index in range(len(ends) - 1):
        try:
            plane = decompress(data[ends[index] : ends[index + 1]], uncompressed_size=num_bytes)
        except lz4.block.LZ4BlockError as error:
            raise WireError(f"plane_data: plane {index} is not an LZ4 block of {num_bytes} bytes") from error
        if len(plane) != num_bytes:
            raise WireError(f"plane_data: plane {index} has {len(plane)} bytes, expected {num_bytes}")
        out[index] = np.frombuffer(plane, np.uint8)
    return out.view(np.dtype(planes.plane_dtype)).reshape(shape)
