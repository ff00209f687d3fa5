"""Unpacks sampled stacks: decodes each block into a scratch buffer that stays in cache, and streams the planes wanted of it.

The loop is compiled (numba) and calls LZ4's own decoder, so it holds no lock of the interpreter: while one prefetch thread unpacks,
another one draws. A loop in Python takes five times as long and does not gain by a second thread
(docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import lz4.block._block
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.errors import WireError
from common.messages import Array, SampleBatch
from common.planes import decode_planes

_VECTOR_BYTES = 16


def unpack_stacks(batch: SampleBatch, out: Array, first: int) -> None:
    """Writes the stacks of `batch` to the items from `first` on. Any number of threads may call it at once.

    Args:
      batch: B' items.
      out: [2, B, K, *plane_shape] of the plane dtype, contiguous: the stacks s_tm1, then s_t.
      first: with first + B' <= B.

    Raises:
      WireError: where a block does not decode to the planes that are wanted of it, or its stacks are not those of `out`.
    """
    num_items, stack = batch.s_tm1.shape
    stack_shape = (stack, *batch.plane_shape.tolist())
    if stack_shape != out.shape[2:] or batch.plane_dtype != out.dtype.str:  # The compiled loop would write past the end.
        raise WireError(f"plane_shape: stacks {stack_shape} {batch.plane_dtype}, expected {out.shape[2:]} {out.dtype.str}")
    decoder = lz4_decoder()
    if batch.codec == "raw" or not decoder:
        planes = decode_planes(batch)
        out[0, first : first + num_items] = planes[batch.s_tm1]
        out[1, first : first + num_items] = planes[batch.s_t]
        return
    references = np.stack([batch.s_tm1, batch.s_t]).astype(np.int64)  # [2, B', K]
    rows = np.arange(2 * out.shape[1] * stack).reshape(2, out.shape[1], stack)[:, first : first + num_items]
    blocks, planes = np.divmod(references.reshape(-1), batch.planes_per_block)
    order = np.argsort(blocks, kind="stable")
    bad_block = _unpack(
        decoder,
        batch.plane_data,
        batch.block_offsets,
        blocks[order],
        planes[order],
        rows.reshape(-1)[order],
        batch.plane_num_bytes,
        np.empty(batch.block_num_bytes, np.uint8),
        out.reshape(-1).view(np.uint8),
    )
    if bad_block >= 0:
        raise WireError(f"plane_data: block {bad_block} is not an LZ4 block of {batch.block_num_bytes} bytes")


@functools.cache
def lz4_decoder() -> int:
    """Returns the address of LZ4_decompress_safe_partial in the library of python-lz4, or 0 where it cannot be reached."""
    try:
        function = ctypes.CDLL(lz4.block._block.__file__).LZ4_decompress_safe_partial
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@intrinsic  # type: ignore[untyped-decorator]
def _decompress(_context: Any, decoder: Any, source: Any, target: Any, num_bytes: Any, wanted: Any, capacity: Any) -> Any:
    """Calls the decoder: bytes decoded, at least `wanted` unless the block is bad; never more than `capacity`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        prototype = ir.FunctionType(i32, [pointer, pointer, i32, i32, i32])
        function = builder.inttoptr(args[0], prototype.as_pointer())
        source, target = (builder.inttoptr(address, pointer) for address in args[1:3])
        return builder.call(function, [source, target, *args[3:]])

    return types.int32(types.uintp, types.uintp, types.uintp, types.int32, types.int32, types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """memcpy: numba's own loop over slices takes three times as long."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, pointer) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _stream(_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """Copies past the caches, 16 bytes at a time: memory that is only written need not be read first. Addresses are aligned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(64), 2)
        nontemporal = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        target, source, num_bytes = args
        with cgutils.for_range(builder, builder.udiv(num_bytes, num_bytes.type(_VECTOR_BYTES))) as loop:
            offset = builder.mul(loop.index, loop.index.type(_VECTOR_BYTES))
            value = builder.load(builder.inttoptr(builder.add(source, offset), vector.as_pointer()), align=1)
            place = builder.inttoptr(builder.add(target, offset), vector.as_pointer())
            builder.store(value, place, align=_VECTOR_BYTES).set_metadata("nontemporal", nontemporal)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _fence(_context: Any) -> Any:
    """Makes what was streamed visible to all threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def compiled(function: Any) -> Any:
    """Compiles at the first call, and keeps the result beside this file or in the user's cache where one can be written to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # Nowhere to write: a read-only checkout of a user without a home.
        return numba.njit(nogil=True)(function)


@compiled
def _unpack(
    decoder: int,
    data: Array,
    offsets: Array,
    blocks: Array,
    planes: Array,
    rows: Array,
    plane_bytes: int,
    scratch: Array,
    out: Array,
) -> int:
    """Copies plane `planes[i]` of block `blocks[i]` to row `rows[i]` of `out`; `blocks` rises.

    Returns the first bad block, or -1.
    """
    streams = plane_bytes % _VECTOR_BYTES == 0 and out.ctypes.data % _VECTOR_BYTES == 0
    start, end = 0, 0
    while start < len(blocks):
        block, last_plane = blocks[start], planes[start]
        while end < len(blocks) and blocks[end] == block:
            last_plane = max(last_plane, planes[end])
            end += 1
        first_byte, wanted = offsets[block], (last_plane + 1) * plane_bytes
        num_bytes = offsets[block + 1] - first_byte
        source = data.ctypes.data + np.uintp(first_byte)
        if _decompress(decoder, source, scratch.ctypes.data, num_bytes, wanted, len(scratch)) < wanted:
            return block  # type: ignore[no-any-return]
        for i in range(start, end):
            target = out.ctypes.data + np.uintp(rows[i] * plane_bytes)
            source = scratch.ctypes.data + np.uintp(planes[i] * plane_bytes)
            if streams:
                _stream(target, source, plane_bytes)
            else:
                copy_bytes(target, source, plane_bytes)
        start = end
    _fence()
    return -1
