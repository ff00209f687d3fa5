"""Bytes that no honest sender makes, thrown at the wire format and at the shard by a seeded generator.

Whatever comes is either refused with a WireError that names the field, or taken in, and then what is sampled is what a
second, plainer reader of the same bytes says. A twin of each shard keeps count; nothing else may be raised, and no memory
may be lost. Batches that are no shard's own go through both decoders of the learner, which must agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import lz4.block
import msgpack
import numpy as np
import psutil
import pytest

from common import messages, wire
from common.config import EnvSpec
from common.errors import WireError
from common.messages import ParamsSnapshot, Planes, PriorityUpdate, SampleBatch, TransitionChunk
from common.planes import decode_planes, encode_block, join_blocks
from learner.unpack import unpack_stacks
from replay_server import shard as shard_module
from replay_server.shard import ReplayShard

PIXELS = EnvSpec((4, 6), "|u1", 2, 4)
VECTORS = EnvSpec((3,), "<f4", 1, 4)
ALIGNMENT = 8
PREFIX_BYTES = wire._PREFIX.size
CLASSES = (TransitionChunk, PriorityUpdate, SampleBatch, ParamsSnapshot)
PARTS = {"prefix", "magic", "format version", "kind", "header", "checksum"}
FIELDS = PARTS | {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
MAX_RSS_GROWTH_BYTES = 8 << 20
MAX_REFUSAL_CHARACTERS = 300 + len("...")
MAX_DECODED_BYTES = 1 << 20  # Of the batches that are decoded here: what a shard sends has a few KiB.

ANY, ACCEPTED, REFUSED = "any", "accepted", "refused"  # Else an expectation is how the refusal must begin.

SCALARS = [None, True, False, -1, 0, 1, 127, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 0.0, -0.5, 1e308]
SCALARS += [math.nan, math.inf, -math.inf, "", "x", "lz4", "raw", "|O", "<f8", b"", b"\xff", [], {}, msgpack.Timestamp(5, 5)]
SCALARS += [msgpack.ExtType(7, b"abc"), [1, 2], {"a": 1}, "r" * 300]
LENGTHS = [-1, 0, 1, 2, 3, 7, 1 << 16, 1 << 32, (1 << 40) - 1, 1 << 40, 1 << 63, (1 << 64) - 1, True, None, 2.0, "2", [3], []]
OFFSETS = [-8, 0, 4, 8, 16, 64, 1 << 20, 1 << 32, (1 << 40) - 8, 1 << 40, (1 << 64) - 1, None, 8.0, "8", []]
FLOATS = [math.nan, math.inf, -math.inf, -1.0, -5e-324, -0.0, 0.0, 5e-324, 1e-310, 1.0, 1.0000002, 1e30, 1e40, 1.01e40, 1e308]
MAX_DEPTH = 300


# Messages as bytes


class Original(NamedTuple):
    """A message as its sender packed it, and where everything is in it."""

    cls: Any
    packed: bytes
    header: dict[str, Any]
    start: int
    """Of the buffers."""
    spans: dict[str, tuple[Any, int, int]]
    """Of each array: dtype, first element's byte in the message, number of elements."""


def original(message):
    packed = wire.pack(message).tobytes()
    header_bytes = wire._PREFIX.unpack_from(packed)[3]
    header = msgpack.unpackb(packed[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    start = -(-(PREFIX_BYTES + header_bytes) // ALIGNMENT) * ALIGNMENT
    spans = {
        field.name: (np.dtype(field.metadata["dtype"]), start + offset, math.prod(shape))
        for field in dataclasses.fields(message)
        if "dtype" in field.metadata
        for shape, offset in [header["arrays"][field.name]]
    }
    return Original(type(message), packed, header, start, spans)


def seal(data):
    """Writes the right checksum of what the message holds now, in place."""
    prefix = wire._PREFIX.unpack_from(data)
    wire._PREFIX.pack_into(data, 0, *prefix[:-1], wire._checksum(np.frombuffer(data, np.uint8)))
    return data


def with_header(source, header):
    """Returns the message with another header, given as bytes, and a right checksum."""
    prefix = list(wire._PREFIX.unpack_from(source.packed))
    prefix[3] = len(header)
    padding = bytes(-(PREFIX_BYTES + len(header)) % ALIGNMENT)
    return seal(bytearray(wire._PREFIX.pack(*prefix) + header + padding + source.packed[source.start :]))


def honest_reading(data, cls):
    """Reads a message by the page that describes the format, with no code of wire.py; asserts the contract of each field."""
    header_bytes = int.from_bytes(data[8:12], "little")
    header = msgpack.unpackb(data[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    start = -(-(PREFIX_BYTES + header_bytes) // ALIGNMENT) * ALIGNMENT
    reading = {}
    for field in dataclasses.fields(cls):
        low, high = (field.metadata[end] for end in ("low", "high"))
        if "kind" in field.metadata:
            value = header["scalars"][field.name]
            assert type(value) is field.metadata["kind"], field.name
            numbers = np.array(value if isinstance(value, int | float) else 0)
        else:
            shape, offset = header["arrays"][field.name]
            value = numbers = np.frombuffer(data, field.metadata["dtype"], math.prod(shape), start + offset).reshape(shape)
        assert np.isfinite(numbers).all(), field.name
        assert low is None or (numbers >= low).all(), field.name
        assert high is None or (numbers <= high).all(), field.name
        reading[field.name] = value
    return reading


def assert_reads_as(message, reading):
    for name, value in reading.items():
        got = getattr(message, name)
        if isinstance(value, np.ndarray):
            assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes()), name
        else:
            assert (type(got), got) == (type(value), value), name


def unpack_or_refusal(data, cls):
    try:
        return wire.unpack(np.frombuffer(data, np.uint8), cls), None
    except WireError as error:
        return None, str(error)


def lacks_planes(batch, references):
    """Whether a block ends, as good LZ4, before a plane that an item refers to."""
    for block, plane in {divmod(reference, batch.planes_per_block) for reference in references.reshape(-1).tolist()}:
        data = batch.plane_data[batch.block_offsets[block] : batch.block_offsets[block + 1]].tobytes()
        try:
            decoded = lz4.block.decompress(data, uncompressed_size=batch.block_num_bytes)
        except lz4.block.LZ4BlockError:
            continue
        if len(decoded) < (plane + 1) * batch.plane_num_bytes:
            return True
    return False


# What is done to them: each takes (rng, Original) and returns (bytes, what is expected)


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def untouched(rng, source):
    return bytearray(source.packed), ACCEPTED


def random_bytes(rng, source):
    data = bytearray(rng.bytes(int(rng.integers(200))))
    if rng.random() < 0.5:
        data = bytearray(source.packed[: int(rng.integers(PREFIX_BYTES + 1))]) + data
    if len(data) > PREFIX_BYTES and rng.random() < 0.5:
        seal(data)
    return data, REFUSED


def truncated(rng, source):
    data = bytearray(source.packed[: int(rng.integers(len(source.packed)))])
    if len(data) > PREFIX_BYTES and rng.random() < 0.5:
        return seal(data), ANY  # Only bytes of the last padding may be missing.
    return data, REFUSED


def lengthened(rng, source):
    data = bytearray(source.packed) + rng.bytes(int(rng.integers(1, 40)))
    return (seal(data), ANY) if rng.random() < 0.5 else (data, REFUSED)


def flipped(rng, source):
    data = bytearray(source.packed)
    bits = np.unique(rng.integers(8 * len(data), size=int(rng.integers(1, 5))))
    for bit in bits.tolist():
        data[bit >> 3] ^= 1 << (bit & 7)
    return data, REFUSED


def flipped_and_sealed(rng, source):
    data = bytearray(source.packed)
    first = PREFIX_BYTES if rng.random() < 0.5 else source.start
    for bit in np.unique(rng.integers(8 * first, 8 * len(data), size=int(rng.integers(1, 4)))).tolist():
        data[bit >> 3] ^= 1 << (bit & 7)
    return seal(data), ANY


def prefix_changed(rng, source):
    data = bytearray(source.packed)
    prefix = list(wire._PREFIX.unpack_from(data))
    index = int(rng.integers(4))
    if index == 0:
        prefix[0] = rng.bytes(4)
    elif index == 3:
        prefix[3] = pick(rng, [0, 1, prefix[3] - 1, prefix[3] + 1, prefix[3] + 8, len(data), 1 << 20, (1 << 32) - 1])
    else:
        prefix[index] = (prefix[index] + int(rng.integers(1, 1 << 16))) % (1 << 16)
    wire._PREFIX.pack_into(data, 0, *prefix)
    return seal(data), REFUSED


def header_copy(source):
    header = source.header
    return {"scalars": dict(header["scalars"]), "arrays": {name: list(entry) for name, entry in header["arrays"].items()}}


def kind_of(source, name):
    return next(field.metadata["kind"] for field in dataclasses.fields(source.cls) if field.name == name)


def scalar_replaced(rng, source):
    header = header_copy(source)
    name, value = pick(rng, list(header["scalars"])), pick(rng, SCALARS)
    header["scalars"][name] = value
    expected = ANY if type(value) is kind_of(source, name) else f"{name}: expected "
    return with_header(source, msgpack.packb(header)), expected


def field_removed(rng, source):
    header = header_copy(source)
    part = pick(rng, ["scalars", "arrays"])
    name = pick(rng, list(header[part]))
    del header[part][name]
    return with_header(source, msgpack.packb(header)), f"{name}: "


def field_added(rng, source):
    header = header_copy(source)
    part = pick(rng, [header, header["scalars"], header["arrays"]])
    part[pick(rng, ["zzz", "", "R_t", "r_t ", "a" * 40, b"run"])] = pick(rng, SCALARS)
    return with_header(source, msgpack.packb(header)), "header: unknown "


def field_doubled(rng, source):
    """A map with a key twice: what msgpack reads, the last one, is the message."""
    part = pick(rng, ["scalars", "arrays"])
    name, old = pick(rng, list(source.header[part].items()))
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(2)
    for section, entries in source.header.items():
        pairs = list(entries.items())
        if section == part:
            pairs.insert(int(rng.integers(len(pairs) + 1)), (name, pick(rng, [old, *SCALARS])))
        packer.pack(section)
        packer.pack_map_pairs(pairs)
    return with_header(source, packer.bytes()), ANY


def entry_replaced(rng, source):
    header = header_copy(source)
    name, value = pick(rng, list(header["arrays"])), pick(rng, [*SCALARS, [[1]], [[1], 0, 0], [0, [1]], ["1", 0]])
    header["arrays"][name] = value
    return with_header(source, msgpack.packb(header)), f"{name}: "


def shape_changed(rng, source):
    header = header_copy(source)
    name = pick(rng, list(header["arrays"]))
    shape = list(header["arrays"][name][0])
    choice = int(rng.integers(4))
    if choice == 0:
        shape.append(pick(rng, LENGTHS))
    elif choice == 1:
        shape.pop()
    else:
        shape[int(rng.integers(len(shape)))] = pick(rng, LENGTHS)
    header["arrays"][name][0] = shape
    return with_header(source, msgpack.packb(header)), ANY


def offset_changed(rng, source):
    header = header_copy(source)
    name, offset = pick(rng, list(header["arrays"])), pick(rng, [*OFFSETS, "4 on", "8 on", "8 back"])
    entry = header["arrays"][name]
    old = entry[1]
    entry[1] = {"4 on": old + 4, "8 on": old + 8, "8 back": old - 8}.get(offset, offset) if isinstance(offset, str) else offset
    return with_header(source, msgpack.packb(header)), ANY if entry[1] == old else f"{name}: "


def nested(rng, source):
    header = header_copy(source)
    value: Any = pick(rng, [0, "x", []])
    for _ in range(int(rng.integers(2, MAX_DEPTH))):
        value = [value] if rng.random() < 0.8 else {"k": value}
    part = pick(rng, ["scalars", "arrays", "shape"])
    name = pick(rng, list(header["scalars" if part == "scalars" else "arrays"]))
    if part == "shape":
        header["arrays"][name][0] = [value]
    else:
        header[part][name] = value
    return with_header(source, msgpack.packb(header)), f"{name}: "


def header_garbled(rng, source):
    header = pick(
        rng, [b"", b"\xc1", b"\x91" * 3000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    )
    header += rng.bytes(int(rng.integers(8)))
    if rng.random() < 0.3:
        header = msgpack.packb(pick(rng, [*SCALARS, {"scalars": {}, "arrays": {}}, {"scalars": [], "arrays": {}}, {1: 2}]))
    return with_header(source, header), REFUSED


def value_replaced(rng, source):
    """One extreme element in one array, with a right checksum: refused exactly where the field's contract is broken."""
    data = bytearray(source.packed)
    name = pick(rng, [name for name, (_, _, count) in source.spans.items() if count])
    dtype, first, count = source.spans[name]
    if dtype.kind == "f":
        with np.errstate(over="ignore", under="ignore"):
            value = np.array(pick(rng, FLOATS)).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        value = np.array(pick(rng, [limits.min, limits.max, limits.max // 2 + 1, 0, 1, 4]), dtype)
    where = first + int(rng.integers(count)) * dtype.itemsize
    data[where : where + dtype.itemsize] = value.tobytes()
    metadata = next(field.metadata for field in dataclasses.fields(source.cls) if field.name == name)
    breaks = not np.isfinite(value) or any(
        [metadata["low"] is not None and value < metadata["low"], metadata["high"] is not None and value > metadata["high"]]
    )
    return seal(data), f"{name}: " if breaks else ANY


# What is done to blocks of planes: each takes (rng, Original of a chunk or a batch)


def repacked(source, **fields):
    """Returns the message with other fields, its header and checksum as an honest sender writes them."""
    message = wire.unpack(np.frombuffer(source.packed, np.uint8), source.cls)
    return bytearray(wire.pack(dataclasses.replace(message, **fields)).tobytes())


def expected_of_blocks(source, *, per_block, offsets):
    """How a message of honest blocks must be judged that says it has others; only a shard looks into them."""
    message = wire.unpack(np.frombuffer(source.packed, np.uint8), source.cls)
    rises = len(offsets) >= 2 and offsets[0] == 0 and all(one < other for one, other in itertools.pairwise(offsets))
    if not rises or offsets[-1] != len(message.plane_data):
        return "block_offsets: must rise "
    block_bytes = per_block * message.plane_num_bytes
    if message.codec == "raw" and any(end - start != block_bytes for start, end in itertools.pairwise(offsets)):
        return f"block_offsets: raw blocks must have {block_bytes} bytes each"
    num_planes = (len(offsets) - 1) * per_block
    for name in ("s_tm1", "s_t"):
        if getattr(message, name).max() >= num_planes:
            return f"{name}: refers to plane {getattr(message, name).max()} of {num_planes}"
    if source.cls is SampleBatch:
        return ACCEPTED
    return f"planes_per_block: {per_block}, expected " if per_block != message.planes_per_block else "plane_data: block "


def planes_per_block_changed(rng, source):
    old = source.header["scalars"]["planes_per_block"]
    value = pick(rng, [-1, 0, 1, 2, 3, 4, old - 1, old + 1, 2 * old, 63, 64, 65, 255, 256, 1 << 32, (1 << 63) - 1, 1 << 63])
    if not 1 <= value <= 64:
        expected = f"planes_per_block: {value} is outside [1, 64]"
    elif value == old:
        expected = ACCEPTED
    else:
        offsets = wire.unpack(np.frombuffer(source.packed, np.uint8), source.cls).block_offsets.tolist()
        expected = expected_of_blocks(source, per_block=value, offsets=offsets)
    header = header_copy(source)
    header["scalars"]["planes_per_block"] = value
    return with_header(source, msgpack.packb(header)), expected


def block_offsets_changed(rng, source):
    message = wire.unpack(np.frombuffer(source.packed, np.uint8), source.cls)
    offsets, num_bytes = message.block_offsets.tolist(), len(message.plane_data)
    where = int(rng.integers(len(offsets)))
    change = pick(rng, ["move", "huge", "double", "drop", "insert", "swap", "shift", "none", "zero"])
    if change == "move":
        offsets[where] = max(offsets[where] + pick(rng, [-8, -1, 1, 2, 8]), 0)
    elif change == "huge":
        offsets[where] = pick(rng, [num_bytes + 1, 1 << 31, (1 << 32) - 1])
    elif change == "double":
        offsets.insert(where, offsets[where])
    elif change == "drop":
        del offsets[where]
    elif change == "insert":
        offsets = sorted([*offsets, int(rng.integers(num_bytes))])
    elif change == "swap":
        other = int(rng.integers(len(offsets)))
        offsets[where], offsets[other] = offsets[other], offsets[where]
    elif change == "shift":
        offsets = [offset + 4 for offset in offsets]
    else:
        offsets = [] if change == "none" else [0] * len(offsets)
    if offsets == message.block_offsets.tolist():
        return bytearray(source.packed), ACCEPTED
    expected = expected_of_blocks(source, per_block=message.planes_per_block, offsets=offsets)
    return repacked(source, block_offsets=np.array(offsets, np.uint32)), expected


def planes_overwritten(rng, source):
    """Bytes that are no LZ4 block, or claim a long one, in the place of the planes' data. Raw planes may be anything."""
    data = bytearray(source.packed)
    _, first, count = source.spans["plane_data"]
    junk = pick(rng, [b"\x00" * count, b"\xff" * count, b"\xff\xff\xff\x7f", b"\x1f\x00\x01\x00" + b"\xff" * (count - 4)])
    data[first : first + min(len(junk), count)] = junk[:count]
    is_decoded = source.cls is TransitionChunk and source.header["scalars"]["codec"] == "lz4"
    return seal(data), "plane_data: block 0 " if is_decoded else ACCEPTED


BLOCK_MUTATORS: list[Callable[..., Any]] = [planes_per_block_changed, block_offsets_changed, planes_overwritten]
MUTATORS: list[Callable[..., Any]] = [
    untouched,
    untouched,
    untouched,
    random_bytes,
    truncated,
    lengthened,
    flipped,
    flipped_and_sealed,
    flipped_and_sealed,
    prefix_changed,
    scalar_replaced,
    scalar_replaced,
    field_removed,
    field_added,
    field_doubled,
    entry_replaced,
    shape_changed,
    offset_changed,
    nested,
    header_garbled,
    value_replaced,
    value_replaced,
    value_replaced,
]


# A shard and its twin


class Twin:
    """What a shard must hold and have counted, after what it took: items as whole stacks, in a ring."""

    def __init__(self, spec, capacity, priority_exponent):
        self.spec, self.capacity, self.priority_exponent = spec, capacity, priority_exponent
        stacks = (capacity, spec.frame_stack, *spec.plane_shape)
        self.s_tm1, self.s_t = (np.zeros(stacks, spec.plane_dtype) for _ in range(2))
        self.columns = {
            "a_tm1": np.zeros(capacity, np.int32),
            "r_t": np.zeros(capacity, np.float32),
            "discount_t": np.zeros(capacity, np.float32),
            "params_version": np.zeros(capacity, np.int64),
        }
        self.powers = np.zeros(capacity)
        self.num_inserted = self.num_refused_chunks = self.num_applied = self.num_stale = 0
        self.num_readable = 0
        """Transitions of all chunks of this run that could be read: each is inserted or refused."""
        self.senders: dict[tuple[int, int], list[int]] = {}

    @property
    def oldest(self):
        return max(self.num_inserted - self.capacity, 0)

    def insert(self, reading, planes):
        num = len(reading["a_tm1"])
        slots = np.arange(self.num_inserted, self.num_inserted + num) % self.capacity
        self.s_tm1[slots], self.s_t[slots] = planes[reading["s_tm1"]], planes[reading["s_t"]]
        for name, column in self.columns.items():
            column[slots] = reading[name]
        self.powers[slots] = reading["priority"] ** self.priority_exponent
        self.num_inserted += num

    def count(self, chunk, *, inserted, refused):
        sender = self.senders.setdefault((chunk.actor_slot, chunk.incarnation), [0, 0, 0])
        self.num_readable += len(chunk.a_tm1)
        sender[0] += inserted
        sender[1] += refused
        sender[2] = max(sender[2], chunk.num_sent_before + len(chunk.a_tm1))

    def update(self, item_id, priority):
        resident = (item_id >= self.oldest) & (item_id < self.num_inserted)
        self.powers[item_id[resident] % self.capacity] = priority[resident] ** self.priority_exponent
        self.num_applied += int(resident.sum())
        self.num_stale += int((~resident).sum())
        return int(resident.sum())

    def check_batch(self, batch):
        assert (batch.item_id >= self.oldest).all() and (batch.item_id < self.num_inserted).all()
        slots = batch.item_id % self.capacity
        planes = decode_planes(batch)
        assert planes[batch.s_tm1].tobytes() == self.s_tm1[slots].tobytes()  # Bytes: floats may be NaN.
        assert planes[batch.s_t].tobytes() == self.s_t[slots].tobytes()
        for name, column in self.columns.items():
            assert getattr(batch, name).tobytes() == column[slots].tobytes(), name
        size = self.num_inserted - self.oldest
        powers = self.powers if self.priority_exponent else np.where(np.arange(self.capacity) < size, 1.0, 0.0)
        assert batch.size == size
        assert math.isclose(batch.priority_mass, powers.sum(), rel_tol=1e-9)
        np.testing.assert_allclose(batch.probability, powers[slots] / powers.sum(), rtol=1e-9, atol=1e-300)

    def check_counts(self, counts):
        assert counts.num_inserted == self.num_inserted
        assert counts.num_inserted == counts.size + counts.num_evicted
        assert counts.size == self.num_inserted - self.oldest <= counts.capacity
        assert counts.num_refused_chunks == self.num_refused_chunks
        assert (counts.num_priority_updates, counts.num_stale_priority_updates) == (self.num_applied, self.num_stale)
        senders = {sender: [count.inserted, count.refused, count.sent] for sender, count in counts.senders.items()}
        assert senders == self.senders
        assert sum(inserted for inserted, _, _ in senders.values()) == counts.num_inserted
        assert sum(inserted + refused for inserted, refused, _ in senders.values()) == self.num_readable


class Target(NamedTuple):
    shard: ReplayShard
    twin: Twin
    chunks: list[Original]
    aliens: list[tuple[bytes, str]]
    """Packed chunks that this shard cannot take, and how it must say so."""
    updates: list[Original]


@pytest.fixture
def make_target(make_chunk):
    def make(shard_class, seed, *, spec, capacity, priority_exponent, send_compressed):
        rng = np.random.default_rng([seed, capacity])
        shard = shard_class(
            run="run-a",
            spec=spec,
            shard_index=3,
            shard_epoch=7,
            memory=4 << 20,
            capacity=capacity,
            min_size=1,
            samples_per_insert=None,
            limiter_buffer_samples=0,
            priority_exponent=priority_exponent,
            send_compressed=send_compressed,
            seed=seed,
        )
        shape = {"plane_shape": spec.plane_shape, "plane_dtype": spec.plane_dtype, "frame_stack": spec.frame_stack}

        def chunk(**fields):
            return make_chunk(rng, **shape | {"num_transitions": int(rng.integers(1, 7))} | fields)

        def of_blocks(blocks, **fields):
            offsets, data = join_blocks(blocks)
            return dataclasses.replace(chunk(), block_offsets=offsets, plane_data=data, **fields)

        def bomb(num_bytes):
            """Three LZ4 blocks, as many as it needs, that give far more than their planes, or too little."""
            return of_blocks([lz4.block.compress(bytes(num_bytes), store_size=False)] * 3)

        def recoded(codec, per_block):
            """24 planes in honest blocks that are not this shard's; where they are raw, they must be one to a block."""
            planes = rng.integers(256, size=(24, *spec.plane_shape)).astype(spec.plane_dtype)
            blocks = [encode_block(planes[first : first + per_block], codec) for first in range(0, 24, per_block)]
            return of_blocks(blocks, codec=codec, planes_per_block=per_block)

        num_planes = chunk().num_planes
        stack = (3, spec.frame_stack)
        aliens = [
            (chunk(run="run-b"), "run: "),
            (chunk(plane_shape=(*spec.plane_shape, 1)), "plane_shape: "),
            (chunk(plane_shape=tuple(n + 1 for n in spec.plane_shape)), "plane_shape: "),
            (chunk(plane_dtype="<f4" if spec is PIXELS else "|u1"), "plane_shape: "),
            (chunk(frame_stack=spec.frame_stack + 1), "s_tm1: "),
            (chunk(num_transitions=capacity + 1), "a_tm1: "),
            (chunk(num_transitions=3, a_tm1=np.array([0, 4, 1])), "a_tm1: action 4 of 4"),
            (
                chunk(num_transitions=3, s_tm1=np.full(stack, num_planes)),
                f"s_tm1: refers to plane {num_planes} of {num_planes}",
            ),
            (chunk(num_transitions=3, s_t=np.full(stack, 65535)), "s_t: refers to plane 65535"),
            (
                chunk(num_transitions=3, s_t=np.full(stack, num_planes - 1)),
                ACCEPTED,
            ),  # The last one; with pixels, of the padding.
            (chunk(num_transitions=0), "s_tm1: a chunk holds at least one"),
        ]
        if spec is PIXELS:
            block_bytes = 8 * 24
            for num_bytes in (0, 1, 24, block_bytes - 1, block_bytes + 1, 2 * block_bytes, 1 << 20):
                aliens.append((bomb(num_bytes), "plane_data: block 0 "))
            aliens += [(recoded("lz4", count), f"planes_per_block: {count}, expected 8") for count in (1, 2, 4, 12, 24)]
            aliens.append((recoded("lz4", 8), ACCEPTED))
            aliens += [(recoded("raw", count), "codec: 'raw', expected 'lz4'") for count in (1, 8)]
        else:
            aliens += [(recoded("raw", count), f"planes_per_block: {count}, expected 1") for count in (2, 8, 24)]
            aliens.append((recoded("raw", 1), ACCEPTED))
            aliens.append((recoded("lz4", 1), "codec: 'lz4', expected 'raw'"))
        items = {"item_id": np.zeros(6, np.int64), "priority": np.ones(6)}
        updates = [PriorityUpdate(**{"shard_index": 3, "shard_epoch": 7} | items | change) for change in (
            {}, {}, {}, {"shard_epoch": 6}, {"shard_index": 4}, {"shard_index": 1 << 40},
        )]  # fmt: skip
        return Target(
            shard,
            Twin(spec, capacity, priority_exponent),
            [original(chunk()) for _ in range(40)],
            [(wire.pack(alien).tobytes(), text) for alien, text in aliens],
            [original(update) for update in updates],
        )

    return make


class Fuzzer:
    """Throws messages at three shards, asking of every single one whether it was dealt with as it must be."""

    def __init__(self, make_target, seed, shard_class=ReplayShard, *, decodes=True):
        self.rng = np.random.default_rng(seed)
        self.decodes = decodes
        self.targets = [
            make_target(shard_class, seed, spec=PIXELS, capacity=64, priority_exponent=0.6, send_compressed=True),
            make_target(shard_class, seed, spec=PIXELS, capacity=50, priority_exponent=0.0, send_compressed=False),
            make_target(shard_class, seed, spec=VECTORS, capacity=33, priority_exponent=1.0, send_compressed=True),
        ]
        params = np.arange(5, dtype=np.float32)
        snapshot = original(ParamsSnapshot(run="run-a", epoch=1, version=2, layout="w(5,)", params=params))
        batches = [self._first_batch(target) for target in self.targets]
        compressed = [wire.unpack(self.targets[0].shard.sample(6).batch, SampleBatch) for _ in range(3)]
        self.others = [original(message) for message in (*batches, *compressed)] + [snapshot] * 2
        self.num_decoded: Counter[bool] = Counter()
        self.refusals: Counter[str] = Counter()
        self.num_sent: Counter[str] = Counter()
        self.num_taken: Counter[str] = Counter()

    def run(self, num_messages, *, check_every=200, sample_every=16):
        """Each fault is an AssertionError that says which message it was."""
        for number in range(num_messages):
            target = self.targets[number % len(self.targets)]
            what = self._step(target)
            try:
                if number % sample_every < len(self.targets):
                    self._check_sample(target)
                if number % check_every < len(self.targets):
                    target.shard.check_valid()
                    target.twin.check_counts(target.shard.stats())
            except AssertionError as error:
                raise AssertionError(f"after message {number} ({what}): {error}") from error
        for target in self.targets:
            target.shard.check_valid()
            target.twin.check_counts(target.shard.stats())

    def _first_batch(self, target):
        for source in target.chunks[:5]:
            self._insert(target, bytearray(source.packed), ACCEPTED)
        return wire.unpack(target.shard.sample(6).batch, SampleBatch)

    def _step(self, target):
        rng = self.rng
        choice = rng.random()
        mutate = pick(rng, MUTATORS)
        if choice < 0.2:
            deal, source, name = self._update, self._fresh_update(target), "update"
        elif choice < 0.3:
            deal, source, name = self._unpack, pick(rng, self.others), "other"
        else:
            deal, source, name = self._insert, pick(rng, target.chunks), "chunk"
        if deal == self._insert and choice > 0.9:
            packed, expected = pick(rng, target.aliens)
            data, what = bytearray(packed), "alien chunk"
        else:
            if issubclass(source.cls, Planes) and rng.random() < 0.15:
                mutate = pick(rng, BLOCK_MUTATORS)
            data, expected = mutate(rng, source)
            what = f"{name} {mutate.__name__}"
            if deal == self._update and expected == ACCEPTED and source.header["scalars"]["shard_index"] != 3:
                expected = "shard_index: "
        self.num_sent[name] += 1
        try:
            refusal = deal(target, data, expected) if deal != self._unpack else self._unpack(source.cls, data)
        except Exception as error:
            raise AssertionError(f"{what}, message {sum(self.num_sent.values())}: {type(error).__name__}: {error}") from error
        self._judge(refusal, expected, what)
        if refusal is None:
            self.num_taken[name] += 1
        return what

    def _judge(self, refusal, expected, what):
        assert expected != ACCEPTED or refusal is None, f"{what}: refused: {refusal}"
        assert expected in (ANY, ACCEPTED) or refusal is not None, f"{what}: taken, though it should be refused: {expected}"
        if refusal is not None:
            named = re.match(r"([a-z_0-9 ]+): .", refusal)
            assert named and named.group(1) in FIELDS, f"{what}: no field is named: {refusal[:200]}"
            assert refusal.isprintable() and len(refusal) <= MAX_REFUSAL_CHARACTERS, f"{what}: not one short line: {refusal!r}"
            self.refusals[named.group(1)] += 1
            assert expected in (ANY, REFUSED) or refusal.startswith(expected), f"{what}: expected {expected!r}: {refusal[:200]}"

    def _insert(self, target, data, expected):
        array = np.frombuffer(data, np.uint8)
        reply = target.shard.insert(array)
        chunk, unread = unpack_or_refusal(data, TransitionChunk)
        ours = chunk is not None and chunk.run == "run-a"
        if reply.refusal is not None:
            target.twin.num_refused_chunks += 1
            assert (reply.num_inserted, reply.num_refused) == (0, 0 if chunk is None else len(chunk.a_tm1))
            assert unread is None or unread == reply.refusal
            if ours:
                target.twin.count(chunk, inserted=0, refused=len(chunk.a_tm1))
            return reply.refusal
        reading = honest_reading(data, TransitionChunk)
        assert_reads_as(chunk, reading)
        planes = decode_planes(chunk)
        assert planes.shape[1:] == target.twin.spec.plane_shape and planes.dtype == target.twin.spec.plane_dtype
        assert max(reading["s_tm1"].max(), reading["s_t"].max()) < len(planes)
        assert ours and reading["a_tm1"].max() < target.twin.spec.num_actions
        assert (reply.num_inserted, reply.num_refused) == (len(reading["a_tm1"]), 0)
        target.twin.insert(reading, planes)
        target.twin.count(chunk, inserted=len(reading["a_tm1"]), refused=0)
        return None

    def _update(self, target, data, expected):
        try:
            applied = target.shard.update_priorities(np.frombuffer(data, np.uint8))
        except WireError as error:
            return str(error)
        reading = honest_reading(data, PriorityUpdate)
        assert reading["shard_index"] == 3
        item_id = reading["item_id"] if reading["shard_epoch"] == 7 else np.full_like(reading["item_id"], -1)
        assert applied == target.twin.update(item_id, reading["priority"])
        return None

    def _unpack(self, cls, data):
        message, refusal = unpack_or_refusal(data, cls)
        if message is not None:
            assert_reads_as(message, honest_reading(data, cls))
        if isinstance(message, SampleBatch) and self.decodes:
            self._decode(message)
        return refusal

    def _decode(self, batch):
        """The learner's compiled decoder must give what the plain one gives. Where that refuses, it may not have looked so far;
        but it must not give a plane that is not there."""
        if batch.num_planes * batch.plane_num_bytes > MAX_DECODED_BYTES or not batch.s_tm1.size:
            return
        references = np.stack([batch.s_tm1, batch.s_t])
        guarded = np.full((3, references.size * batch.plane_num_bytes), 0xA5, np.uint8)
        out = guarded[1].view(batch.plane_dtype).reshape(*references.shape, *batch.plane_shape.tolist())
        try:
            unpack_stacks(batch, out, 0)
            unpacked = True
        except WireError:
            unpacked = False
        assert (guarded[[0, 2]] == 0xA5).all(), "written past the end"
        try:
            stacks = decode_planes(batch)[references]
        except WireError:
            assert not (unpacked and lacks_planes(batch, references)), "a plane that is not there"
            self.num_decoded[False] += 1
            return
        assert unpacked and out.tobytes() == stacks.tobytes()
        self.num_decoded[True] += 1

    def _fresh_update(self, target):
        """An update for items that are there, have gone, or were never given; some of the priorities are extreme."""
        source = pick(self.rng, target.updates)
        packed = bytearray(source.packed)
        low, high = max(target.twin.oldest - 3, 0), target.twin.num_inserted + 2
        ids, values = self.rng.integers(low, high, size=6), self.rng.integers(1, 9, size=6).astype(float)
        if self.rng.random() < 0.1:
            values[int(self.rng.integers(6))] = pick(self.rng, [0.0, -0.0, 5e-324, 1e-310, 1e30])
        for name, array in (("item_id", ids.astype(np.int64)), ("priority", values)):
            first = source.spans[name][1]
            packed[first : first + array.nbytes] = array.tobytes()
        return source._replace(packed=bytes(seal(packed)))

    def _check_sample(self, target):
        reply = target.shard.sample(32)
        if reply.batch is None:
            assert target.twin.powers.sum() == 0, reply.waits_for
        else:
            target.twin.check_batch(wire.unpack(reply.batch, SampleBatch))

    def assert_it_went_everywhere(self):
        """A generator that never gets past the door proves nothing."""
        taken = {name: self.num_taken[name] / self.num_sent[name] for name in ("chunk", "update", "other")}
        assert all(0.1 < share < 0.6 for share in taken.values()), taken
        unseen = FIELDS - set(self.refusals)
        assert not unseen, f"no message was refused for {sorted(unseen)}"
        assert min(self.num_decoded[True], self.num_decoded[False]) > 0
        for target in self.targets:
            counts = target.shard.stats()
            assert min(counts.num_evicted, counts.num_priority_updates, counts.num_stale_priority_updates) > 0


def rss_bytes():
    return psutil.Process().memory_info().rss


def fuzz(make_target, num_messages, *, seed=0, warm_up=4_000):
    """Runs the fuzzer; returns it and by how many bytes the process grew after the warm-up."""
    fuzzer = Fuzzer(make_target, seed)
    fuzzer.run(warm_up)
    before = rss_bytes()
    fuzzer.run(num_messages - warm_up)
    return fuzzer, rss_bytes() - before


def test_hostile_bytes_are_refused_by_name_or_read_as_they_are(make_target):
    fuzzer, growth = fuzz(make_target, 20_000)
    fuzzer.assert_it_went_everywhere()
    assert growth < MAX_RSS_GROWTH_BYTES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_hostile_messages(make_target, capsys):
    start = time.perf_counter()
    fuzzer, growth = fuzz(make_target, 1_000_000, seed=1, warm_up=200_000)  # Until the shards have used two segments each.
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{sum(fuzzer.num_sent.values())} messages in {seconds:.0f} s, resident memory grew by {growth / 1024:.0f} KiB")
        print(
            f"taken in: {dict(fuzzer.num_taken)} of {dict(fuzzer.num_sent)}; refused by field: {fuzzer.refusals.most_common()}"
        )
    fuzzer.assert_it_went_everywhere()
    assert growth < MAX_RSS_GROWTH_BYTES


# The proof that the fuzzer sees faults


class CountsRefusedChunks(ReplayShard):
    """A ledger that takes a refused chunk for an inserted one."""

    def stats(self):
        counts = super().stats()
        return dataclasses.replace(counts, num_inserted=counts.num_inserted + counts.num_refused_chunks)


class RepliesBeforeItChecks(ReplayShard):
    """Says of a refused chunk that it was taken in."""

    def insert(self, message):
        reply = super().insert(message)
        return dataclasses.replace(reply, num_inserted=reply.num_inserted + reply.num_refused, num_refused=0)


class ForgetsAnUpdate(ReplayShard):
    """Counts priorities that it does not apply."""

    def update_priorities(self, message):
        update = wire.unpack(message, PriorityUpdate)
        return super().update_priorities(wire.pack(dataclasses.replace(update, priority=np.ones(len(update.item_id)))))


class KeepsTheNewestActions(ReplayShard):
    """Sends an action that is not the item's."""

    def sample(self, num_items):
        reply = super().sample(num_items)
        if reply.batch is None:
            return reply
        batch = wire.unpack(reply.batch, SampleBatch)
        return dataclasses.replace(reply, batch=wire.pack(dataclasses.replace(batch, a_tm1=np.roll(batch.a_tm1, 1))))


class TakesAnyBlocks(ReplayShard):
    """Does not ask how many planes share a block, though it reads all records alike."""

    def _check_fits(self, chunk):
        super()._check_fits(dataclasses.replace(chunk, planes_per_block=self._planes_per_block))


@pytest.mark.parametrize(
    "shard_class", [CountsRefusedChunks, RepliesBeforeItChecks, ForgetsAnUpdate, KeepsTheNewestActions, TakesAnyBlocks]
)
def test_the_fuzzer_finds_a_faulty_shard(make_target, shard_class):
    with pytest.raises(AssertionError):
        Fuzzer(make_target, 0, shard_class).run(1_000)


def blind_to_the_checksum(data, cls, unpack=wire.unpack):
    return unpack(np.frombuffer(seal(bytearray(data)), np.uint8) if len(data) > PREFIX_BYTES else data, cls)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (wire, "_check_range", lambda *_: None),
        (messages, "check_references", lambda *_: None),
        (Planes, "check_planes", lambda _: None),
        (shard_module, "check_blocks", lambda _: None),
        (wire, "unpack", blind_to_the_checksum),
    ],
    ids=["no_range_check", "no_reference_check", "no_planes_check", "no_block_check", "no_checksum"],
)
def test_the_fuzzer_finds_a_missing_check(make_target, monkeypatch, module, name, fault):
    fuzzer = Fuzzer(make_target, 0, decodes=False)  # The compiled decoder relies on what `unpack` checked.
    fuzzer.run(300)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        fuzzer.run(3_000)


# Single messages


@pytest.mark.parametrize("num_bytes", [5 << 20, 10 << 20], ids=["5_MiB", "10_MiB"])
def test_a_block_that_claims_much_more_than_its_planes_costs_no_memory(make_target, num_bytes):
    """Some KiB of LZ4, as much as a record may have, stand for megabytes of zeros; a block of the shard has 8 planes of 24
    bytes."""
    target = make_target(ReplayShard, 0, spec=PIXELS, capacity=20, priority_exponent=1.0, send_compressed=True)
    block = lz4.block.compress(bytes(num_bytes), store_size=False)
    bomb = repacked(target.chunks[0], block_offsets=np.arange(4) * len(block), plane_data=np.frombuffer(3 * block, np.uint8))
    honest, bomb = target.chunks[0].packed, np.frombuffer(bomb, np.uint8)
    tracemalloc.start()
    try:
        assert target.shard.insert(np.frombuffer(honest, np.uint8)).refusal is None
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        reply = target.shard.insert(bomb)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert reply.refusal == "plane_data: block 0 is not an LZ4 block of 192 bytes"
    assert peak < 2 * len(bomb) + 100_000


@pytest.mark.parametrize(
    ("per_block", "size", "num_blocks"), [(64, 4096, 1), (64, 1024, 2), (1, 4096, 5)], ids=["1_GiB", "128_MiB", "80_MiB"]
)
def test_a_chunk_that_claims_many_large_planes_is_refused_before_it_is_decoded(make_target, per_block, size, num_blocks):
    """Each plane is within its limit; together they are not, be it those of one block or of all."""
    target = make_target(ReplayShard, 0, spec=PIXELS, capacity=20, priority_exponent=1.0, send_compressed=True)
    fields = {"planes_per_block": per_block, "plane_shape": np.array([size, size]), "block_offsets": np.arange(num_blocks + 1)}
    message = repacked(target.chunks[0], **fields, plane_data=np.zeros(num_blocks, np.uint8))
    tracemalloc.start()
    try:
        reply = target.shard.insert(np.frombuffer(message, np.uint8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    of_a_block = f"planes_per_block: {per_block * size * size} bytes a block, more than {1 << 26}"
    of_all = f"block_offsets: {per_block * num_blocks} planes of {size * size} bytes decode to too much"
    assert reply.refusal == (of_a_block if per_block * size * size > 1 << 26 else of_all)
    assert peak < 100_000


@pytest.mark.parametrize(
    "spoil",
    [bytes, lambda data: data.astype(np.float64), lambda data: data.reshape(1, -1), lambda data: None],
    ids=["bytes", "float64", "2d", "none"],
)
def test_a_shard_refuses_what_is_no_array_of_bytes(make_target, spoil):
    target = make_target(ReplayShard, 0, spec=PIXELS, capacity=20, priority_exponent=1.0, send_compressed=True)
    chunk, update = (np.frombuffer(sources[0].packed, np.uint8) for sources in (target.chunks, target.updates))
    assert target.shard.insert(chunk).refusal is None
    before = target.shard.stats()
    reply = target.shard.insert(spoil(chunk))
    assert (reply.num_inserted, reply.num_refused) == (0, 0)
    assert str(reply.refusal).startswith("prefix: ")
    with pytest.raises(WireError, match=r"^prefix: "):
        target.shard.update_priorities(spoil(update))
    after = target.shard.stats()
    assert dataclasses.replace(after, num_refused_chunks=0, last_refusal=None) == before
    assert after.num_refused_chunks == 1


def nested_shape(depth):
    """A PriorityUpdate in whose header the shape of `priority` is a list in a list in a list."""
    source = original(PriorityUpdate(shard_index=3, shard_epoch=7, item_id=np.zeros(1, np.int64), priority=np.ones(1)))
    plain = msgpack.packb({**source.header, "arrays": {**source.header["arrays"], "priority": ["@", 8]}})
    return np.frombuffer(with_header(source, plain.replace(b"\xa1@", b"\x91" * depth + b"\x90")), np.uint8)


def test_a_header_nested_a_hundred_deep_is_refused():
    with pytest.raises(WireError, match=r"^priority: its shape or offset is not valid$"):
        wire.unpack(nested_shape(100), PriorityUpdate)


def test_a_header_nested_a_thousand_deep_is_refused():
    with pytest.raises(WireError, match=r"^priority: "):
        wire.unpack(nested_shape(1000), PriorityUpdate)


def test_a_plane_shape_of_a_thousand_dimensions_is_refused(make_chunk):
    message = make_chunk(np.random.default_rng(0))
    message = dataclasses.replace(message, plane_shape=np.full(1000, 1 << 24, np.int32))
    with pytest.raises(WireError, match=r"^plane_shape: "):
        wire.unpack(wire.pack(message), TransitionChunk)


def test_a_refusal_is_one_short_line(make_target):
    """The text goes into the shard's statistics, the log and summary.json."""
    target = make_target(ReplayShard, 0, spec=PIXELS, capacity=20, priority_exponent=1.0, send_compressed=True)
    header = header_copy(target.chunks[0])
    header["scalars"]["run"] = "r" * 500_000
    reply = target.shard.insert(np.frombuffer(with_header(target.chunks[0], msgpack.packb(header)), np.uint8))
    assert str(reply.refusal).startswith("run: ")
    assert len(str(reply.refusal)) == MAX_REFUSAL_CHARACTERS
    assert target.shard.stats().last_refusal == reply.refusal
