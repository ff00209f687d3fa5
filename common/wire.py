"""Packs a message as a msgpack header and raw buffers, and unpacks it without copying.

    magic 4s | format version u16 | kind u16 | header bytes u64 | xxh3 u64 | msgpack header | buffers, 8-byte aligned

The header is `{"scalars": {name: value}, "arrays": {name: [shape, offset]}}`; dtypes are not sent, they are the message's. Only
where a field may have either of two dtypes and has the second, its entry is `[shape, offset, dtype]`.
The same bytes go through Ray (as one uint8 array), into the durable log and onto disk. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgpack
import numpy as np
import xxhash

from common.errors import WireError
from common.messages import Array, Message, ParamsSnapshot, PriorityUpdate, SampleBatch, TransitionChunk

FORMAT_VERSION = 2
MAGIC = b"QFLT"
_PREFIX = struct.Struct("<4sHHQQ")
_ALIGNMENT = 8
_KINDS: dict[int, type[Any]] = {1: TransitionChunk, 2: SampleBatch, 3: PriorityUpdate, 4: ParamsSnapshot}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}
_MAX_HEADER_BYTES = 1 << 20
_MAX_INT = (1 << 63) - 1

M = TypeVar("M", bound=Message)


def pack(message: Message, *, blocks: Sequence[memoryview] | None = None) -> Array:
    """Returns u8[num_bytes], contiguous and owned by the caller.

    Args:
      message: to be packed as it is, not checked.
      blocks: what takes the place of `plane_data`, laid end to end: a shard's blocks are copied once, from where they lie.
    """
    scalars: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    buffers: list[Any] = []
    end = 0
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if "kind" in field.metadata:
            scalars[field.name] = field.metadata["kind"](value)
            continue
        if blocks is not None and field.name == "plane_data":
            num_bytes = sum(map(len, blocks))
            shapes[field.name] = [[num_bytes], end]
            buffers.extend(blocks)
        else:
            other = field.metadata["or_dtype"]
            is_other = other is not None and value.dtype == other
            data = np.ascontiguousarray(value, dtype=other if is_other else field.metadata["dtype"])
            num_bytes = data.nbytes
            shapes[field.name] = [list(data.shape), end, other] if is_other else [list(data.shape), end]
            buffers.append(data.reshape(-1).view(np.uint8).data)
        padding = -num_bytes % _ALIGNMENT
        buffers.append(bytes(padding))
        end += num_bytes + padding
    header = msgpack.packb({"scalars": scalars, "arrays": shapes})
    padding = _buffers_start(len(header)) - _PREFIX.size - len(header)
    out = np.frombuffer(bytearray().join([bytes(_PREFIX.size), header, bytes(padding), *buffers]), np.uint8)
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, _KIND_OF[type(message)], len(header), _checksum(out))
    out[: _PREFIX.size] = np.frombuffer(prefix, np.uint8)
    return out


def unpack(data: Array, cls: type[M]) -> M:
    """Reads one message of class `cls`; its arrays are read-only views of `data`.

    Args:
      data: u8[num_bytes] as `pack` made them.

    Raises:
      WireError: naming the field, where anything is not exactly as the class declares it.
    """
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        raise WireError("prefix: a message is a one-dimensional array of uint8")
    buffer = np.ascontiguousarray(data).data.toreadonly()
    header, start = _read_header(buffer, cls)
    values: dict[str, Any] = {}
    dims: dict[str, int] = {}
    end = 0
    for field in dataclasses.fields(cls):
        if "kind" in field.metadata:
            values[field.name] = _read_scalar(field.name, field.metadata, header["scalars"])
        else:
            values[field.name] = _read_array(field.name, field.metadata, header["arrays"], buffer[start:], dims, end)
            end += -(-values[field.name].nbytes // _ALIGNMENT) * _ALIGNMENT
    unknown = (set(header["scalars"]) | set(header["arrays"])) - set(values)
    if unknown:
        raise WireError(f"header: unknown field {sorted(map(str, unknown))[0]!r}")
    if end != len(buffer) - start:
        raise WireError(f"header: {len(buffer) - start} bytes of buffers, {end} of them described")
    message = cls(**values)
    message.check_valid()
    return message


def _buffers_start(header_bytes: int) -> int:
    return -(-(_PREFIX.size + header_bytes) // _ALIGNMENT) * _ALIGNMENT


def _checksum(packed: Array) -> int:
    """XXH3 (64 bits) of all that follows the prefix: an altered message is refused, whichever bit it was."""
    return xxhash.xxh3_64_intdigest(packed[_PREFIX.size :].data)


def _read_header(buffer: memoryview, cls: type[Any]) -> tuple[dict[str, Any], int]:
    if len(buffer) < _PREFIX.size:
        raise WireError(f"prefix: {len(buffer)} bytes, fewer than {_PREFIX.size}: truncated")
    magic, version, kind, header_bytes, checksum = _PREFIX.unpack(buffer[: _PREFIX.size])
    if magic != MAGIC:
        raise WireError("magic: not a qfleet message")
    if version != FORMAT_VERSION:
        raise WireError(f"format version: {version}, but this code reads {FORMAT_VERSION}: use the same version on all sides")
    if _KINDS.get(kind) is not cls:
        raise WireError(f"kind: {kind} is not a {cls.__name__}")
    if header_bytes > _MAX_HEADER_BYTES or _buffers_start(header_bytes) > len(buffer):
        raise WireError(f"header: {header_bytes} bytes announced, {len(buffer) - _PREFIX.size} there: truncated")
    if xxhash.xxh3_64_intdigest(buffer[_PREFIX.size :]) != checksum:
        raise WireError("checksum: the message was truncated or altered on its way")
    try:
        header = msgpack.unpackb(buffer[_PREFIX.size : _PREFIX.size + header_bytes], strict_map_key=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"header: not msgpack ({type(error).__name__})") from error
    if isinstance(header, dict) and (strange := set(header) - {"scalars", "arrays"}):
        raise WireError(f"header: unknown part {sorted(map(str, strange))[0]!r}")
    if not isinstance(header, dict) or not all(isinstance(header.get(part), dict) for part in ("scalars", "arrays")):
        raise WireError("header: must hold scalars and arrays")
    return header, _buffers_start(header_bytes)


def _read_scalar(name: str, metadata: Any, scalars: dict[str, Any]) -> Any:
    value, kind = scalars.get(name), metadata["kind"]
    if type(value) is not kind:
        raise WireError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    low, high = metadata["low"], metadata["high"]
    if kind is int and high is None:
        high = _MAX_INT
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{name}: {value} is not finite")
    if (low is not None and value < low) or (high is not None and value > high):
        raise WireError(f"{name}: {value} is outside [{low}, {high}]")
    return value


def _read_array(
    name: str, metadata: Any, arrays: dict[str, Any], buffers: memoryview, dims: dict[str, int], expected: int
) -> Array:
    entry, other = arrays.get(name), metadata["or_dtype"]
    is_other = isinstance(entry, list) and other is not None and entry[2:] == [other]
    if not (isinstance(entry, list) and len(entry) == 2 + is_other and isinstance(entry[0], list)):
        raise WireError(f"{name}: missing")
    shape, offset = entry[:2]
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in [*shape, offset]) or offset % _ALIGNMENT:
        raise WireError(f"{name}: its shape or offset is not valid")
    if len(shape) != len(metadata["dims"]):
        raise WireError(f"{name}: rank {len(shape)}, expected {len(metadata['dims'])}")
    for dim, length in zip(metadata["dims"], shape, strict=True):
        if dims.setdefault(dim, length) != length:
            raise WireError(f"{name}: dimension {dim} is {length}, elsewhere {dims[dim]}")
    if offset != expected:
        raise WireError(f"{name}: offset {offset}, expected {expected}")
    dtype = np.dtype(other if is_other else metadata["dtype"])
    count = 1
    for length in shape:
        count *= length
    if offset + count * dtype.itemsize > len(buffers):
        raise WireError(f"{name}: ends at byte {offset + count * dtype.itemsize} of {len(buffers)}: truncated")
    value = np.frombuffer(buffers, dtype, count=count, offset=offset if count else 0).reshape(shape)
    _check_range(name, value, metadata["low"], metadata["high"])
    return value


def _check_range(name: str, value: Array, low: float | None, high: float | None) -> None:
    if not value.size:
        return
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise WireError(f"{name}: holds NaN or infinity")
    if low is not None and value.min() < low:
        raise WireError(f"{name}: {value.min()} is below {low}")
    if high is not None and value.max() > high:
        raise WireError(f"{name}: {value.max()} is above {high}")
