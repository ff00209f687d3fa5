"""The four messages: everything that crosses a process boundary, beside statistics.

A field's metadata is its contract (dtype, symbolic dimensions, range); `common/wire.py` checks it when it unpacks.
`check_valid` adds what spans several fields. Arrays may be read-only views of a received buffer: whoever keeps one copies it.

Dimensions: T transitions, B batch items, K stacked planes, J blocks of planes, D bytes of plane data, N parameters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import WireError

Array = npt.NDArray[Any]

CODECS = ("lz4", "raw")
MAX_PRIORITY = 1e40  # Above any float32 TD error; sums of these stay far from overflow.
MAX_CHUNK_BYTES = 1 << 26  # Of a chunk's planes when decoded: tiny blocks may stand for much memory.
MAX_PLANE_BYTES = 1 << 24  # A plane of 4096 x 4096 bytes: no game's observation is larger.
MAX_PLANE_RANK = 4
MAX_PLANES_PER_BLOCK = 64


def array(dtype: str, *dims: str, low: float | None = None, high: float | None = None, or_dtype: str | None = None) -> Any:
    """Declares an array field. `dims` are names that must agree over the message; floats must be finite.

    Where there is an `or_dtype`, an array of exactly that dtype travels as it is, and says so; any other becomes `dtype`.
    """
    return dataclasses.field(metadata={"dtype": dtype, "or_dtype": or_dtype, "dims": dims, "low": low, "high": high})


def scalar(kind: type, low: float | None = None, high: float | None = None) -> Any:
    """Declares a scalar field of type str, int or float."""
    return dataclasses.field(metadata={"kind": kind, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planes:
    """Observations, each held once, in encoded blocks of a few planes: the part that chunks and batches share.

    Block j is `plane_data[block_offsets[j] : block_offsets[j + 1]]`, an LZ4 block or raw bytes of
    `[planes_per_block, *plane_shape]` of `plane_dtype`; plane p is row `p % planes_per_block` of block
    `p // planes_per_block`. Successive frames of a game are nearly alike, so blocks of several are both smaller and faster to
    decode than single planes. An image observation of K stacked frames is K planes; any other is one.
    """

    codec: str = scalar(str)
    plane_dtype: str = scalar(str)
    planes_per_block: int = scalar(int, low=1, high=MAX_PLANES_PER_BLOCK)
    plane_shape: Array = array("<i4", "R", low=1, high=MAX_PLANE_BYTES)
    block_offsets: Array = array("<u4", "J+1")
    plane_data: Array = array("|u1", "D")

    @property
    def num_blocks(self) -> int:
        return len(self.block_offsets) - 1

    @property
    def num_planes(self) -> int:
        return self.num_blocks * self.planes_per_block

    @property
    def plane_num_bytes(self) -> int:
        """Bytes of one decoded plane."""
        elements = 1
        for size in self.plane_shape.tolist():  # Python integers: they cannot overflow.
            elements *= size
        return elements * np.dtype(self.plane_dtype).itemsize

    @property
    def block_num_bytes(self) -> int:
        """Bytes of one decoded block."""
        return self.planes_per_block * self.plane_num_bytes

    def check_planes(self) -> None:
        """Raises WireError unless codec, dtype and offsets describe `plane_data` exactly."""
        if self.codec not in CODECS:
            raise WireError(f"codec: {self.codec!r} is not one of {CODECS}")
        if self.plane_dtype not in ("|u1", "<f4"):
            raise WireError(f"plane_dtype: {self.plane_dtype!r} is neither |u1 nor <f4")
        if not 1 <= len(self.plane_shape) <= MAX_PLANE_RANK:
            raise WireError(f"plane_shape: {len(self.plane_shape)} dimensions, not 1 to {MAX_PLANE_RANK}")
        if self.plane_num_bytes > MAX_PLANE_BYTES:
            raise WireError(f"plane_shape: {self.plane_num_bytes} bytes a plane, more than {MAX_PLANE_BYTES}")
        if self.block_num_bytes > MAX_CHUNK_BYTES:
            raise WireError(f"planes_per_block: {self.block_num_bytes} bytes a block, more than {MAX_CHUNK_BYTES}")
        offsets = self.block_offsets.astype(np.int64)
        lengths = np.diff(offsets)
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(self.plane_data) or (lengths <= 0).any():
            raise WireError("block_offsets: must rise from 0 to the length of plane_data")
        if self.codec == "raw" and (lengths != self.block_num_bytes).any():
            raise WireError(f"block_offsets: raw blocks must have {self.block_num_bytes} bytes each")


def check_references(name: str, references: Array, num_planes: int) -> None:
    """Raises WireError unless every reference names a plane."""
    if references.size and int(references.max()) >= num_planes:
        raise WireError(f"{name}: refers to plane {int(references.max())} of {num_planes}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TransitionChunk(Planes):
    """Transitions of one environment of one actor, with every plane that they refer to. Actor -> shard.

    Self-contained: it carries the planes of history that its first stacks need, so a lost chunk loses itself only.
    """

    run: str = scalar(str)
    actor_slot: int = scalar(int, low=0)
    incarnation: int = scalar(int, low=0)
    seq: int = scalar(int, low=0)
    num_sent_before: int = scalar(int, low=0)
    """Transitions that this incarnation sent before this chunk: what the ledger needs when an actor is killed."""
    params_version: int = scalar(int, low=0)
    s_tm1: Array = array("<u2", "T", "K")
    s_t: Array = array("<u2", "T", "K")
    a_tm1: Array = array("<i4", "T", low=0)
    r_t: Array = array("<f4", "T")
    discount_t: Array = array("<f4", "T", low=0.0, high=1.0)
    priority: Array = array("<f8", "T", low=0.0, high=MAX_PRIORITY)

    @property
    def num_transitions(self) -> int:
        return len(self.a_tm1)

    def check_valid(self) -> None:
        self.check_planes()
        if not self.num_transitions or not self.s_tm1.shape[1]:
            raise WireError("s_tm1: a chunk holds at least one transition of at least one plane")
        if self.num_planes * self.plane_num_bytes > MAX_CHUNK_BYTES:
            raise WireError(f"block_offsets: {self.num_planes} planes of {self.plane_num_bytes} bytes decode to too much")
        check_references("s_tm1", self.s_tm1, self.num_planes)
        check_references("s_t", self.s_t, self.num_planes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleBatch(Planes):
    """Items drawn by one shard. Shard -> learner.

    `probability` is the chance that one draw of this shard gives the item (its priority over the shard's mass).
    """

    shard_index: int = scalar(int, low=0)
    shard_epoch: int = scalar(int, low=0)
    size: int = scalar(int, low=1)
    priority_mass: float = scalar(float, low=0.0)
    s_tm1: Array = array("<i4", "B", "K", low=0)
    s_t: Array = array("<i4", "B", "K", low=0)
    a_tm1: Array = array("<i4", "B", low=0)
    r_t: Array = array("<f4", "B")
    discount_t: Array = array("<f4", "B", low=0.0, high=1.0)
    item_id: Array = array("<i8", "B", low=0)
    probability: Array = array("<f8", "B", low=0.0, high=1.0)
    params_version: Array = array("<i8", "B", low=0)

    def check_valid(self) -> None:
        self.check_planes()
        check_references("s_tm1", self.s_tm1, self.num_planes)
        check_references("s_t", self.s_t, self.num_planes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PriorityUpdate:
    """New priorities of items that were sampled. Learner -> shard."""

    shard_index: int = scalar(int, low=0)
    shard_epoch: int = scalar(int, low=0)
    item_id: Array = array("<i8", "B", low=0)
    priority: Array = array("<f8", "B", low=0.0, high=MAX_PRIORITY)

    def check_valid(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ParamsSnapshot:
    """The online network's parameters. Learner -> store -> actors and evaluator.

    `(epoch, version)` rises lexicographically: epoch counts the learner's starts, version its updates.
    """

    run: str = scalar(str)
    epoch: int = scalar(int, low=0)
    version: int = scalar(int, low=0)
    layout: str = scalar(str)
    """Names and shapes in order, as `common.params.layout` writes them: both ends must agree on it."""
    params: Array = array("<f4", "N", or_dtype="<u2")
    """fp32, or the bits of bf16: the upper half of an fp32 number."""

    def check_valid(self) -> None:
        """Raises WireError where a parameter is not finite."""
        exponent = np.uint16(0x7F80)  # All of its bits are set in infinities and NaNs.
        bits = self.params.dtype == np.uint16
        if ((self.params & exponent) == exponent).any() if bits else not np.isfinite(self.params).all():
            raise WireError("params: holds NaN or infinity")


Message = TransitionChunk | SampleBatch | PriorityUpdate | ParamsSnapshot
