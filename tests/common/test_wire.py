"""The wire format: what is packed comes back, and nothing else is ever accepted."""

from __future__ import annotations

import dataclasses
import itertools
import struct

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.errors import UserError, WireError
from common.messages import ParamsSnapshot, PriorityUpdate, SampleBatch, TransitionChunk

PREFIX = struct.Struct("<4sHHQQ")  # Magic, format version, kind, header bytes, checksum: written anew, not taken from wire.py.
ALIGNMENT = 8


def make_update(**fields):
    defaults = {
        "shard_index": 2,
        "shard_epoch": 5,
        "item_id": np.array([7, 1 << 40, 0]),
        "priority": np.array([0.5, 0.0, 1e30]),
    }
    return PriorityUpdate(**defaults | fields)


def make_snapshot(**fields):
    params = np.array([1.5, -0.0, 1e-40, 3e38, -2.0], np.float32)
    return ParamsSnapshot(**{"run": "run-\u00e9", "epoch": 3, "version": 1 << 40, "layout": "w(5,)", "params": params} | fields)


BF16 = np.array([0x3FC0, 0x8000, 0x0001, 0x7F7F, 0xC000], np.uint16)  # 1.5, -0, the least, the greatest and -2.


def make_batch(**fields):
    defaults = {
        "codec": "raw",
        "plane_dtype": "<f4",
        "planes_per_block": 1,
        "plane_shape": np.array([3]),
        "block_offsets": np.array([0, 12, 24]),
        "plane_data": np.arange(6, dtype=np.float32).view(np.uint8),
        "shard_index": 1,
        "shard_epoch": 2,
        "size": 10,
        "priority_mass": 12.5,
        "s_tm1": np.array([[0], [1], [0]]),
        "s_t": np.array([[1], [1], [0]]),
        "a_tm1": np.array([0, 3, 1]),
        "r_t": np.array([1.0, -1.0, 0.25]),
        "discount_t": np.array([0.0, 1.0, 0.5]),
        "item_id": np.array([5, 6, 5]),
        "probability": np.array([0.25, 1.0, 0.25]),
        "params_version": np.array([0, 1 << 40, 3]),
    }
    return SampleBatch(**defaults | fields)


@pytest.fixture
def make_messages(make_chunk):
    def make(seed=0):
        rng = np.random.default_rng(seed)
        chunk = make_chunk(rng, num_transitions=int(rng.integers(1, 6)), num_planes=int(rng.integers(1, 5)))
        vectors = make_chunk(rng, plane_dtype="<f4", plane_shape=(3,), frame_stack=1)
        return [chunk, vectors, make_batch(), make_update(), make_snapshot(), make_snapshot(params=BF16)]

    return make


def repack(packed, *, edit=None, version=2, kind=None, header=None, tail=b""):
    """Returns the message with an edited header and a right checksum: what a faulty or hostile sender could send.

    `edit` changes the header in place; `header` replaces it; the buffers stay as they are.
    """
    data = packed.tobytes()
    _, _, old_kind, header_bytes, _ = PREFIX.unpack(data[: PREFIX.size])
    old = data[PREFIX.size : PREFIX.size + header_bytes]
    start = -(-(PREFIX.size + header_bytes) // ALIGNMENT) * ALIGNMENT
    if header is None:
        values = msgpack.unpackb(old)
        if edit is not None:
            edit(values)
        header = msgpack.packb(values)
    body = header + bytes(-(PREFIX.size + len(header)) % ALIGNMENT) + data[start:] + tail
    prefix = PREFIX.pack(b"QFLT", version, old_kind if kind is None else kind, len(header), xxhash.xxh3_64_intdigest(body))
    return np.frombuffer(prefix + body, np.uint8)


def assert_equal(one, other):
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if "dtype" in field.metadata:
            dtype = "<u2" if field.metadata["or_dtype"] == left.dtype == "<u2" else field.metadata["dtype"]
            expected = np.asarray(left, dtype)
            assert right.dtype == dtype
            assert (expected.shape, expected.tobytes()) == (right.shape, right.tobytes()), field.name
        else:
            assert (type(left), left) == (type(right), right), field.name


# What comes back


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_of_every_message(make_messages, seed):
    for message in make_messages(seed):
        packed = wire.pack(message)
        assert packed.dtype == np.uint8 and packed.ndim == 1 and packed.flags.writeable and packed.flags.c_contiguous
        unpacked = wire.unpack(packed, type(message))
        assert type(unpacked) is type(message)
        assert_equal(message, unpacked)
        np.testing.assert_array_equal(wire.pack(unpacked), packed)  # One message, one sequence of bytes.


def test_unpacked_arrays_are_read_only_aligned_views(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        unpacked = wire.unpack(packed, type(message))
        for field in dataclasses.fields(message):
            if "dtype" in field.metadata:
                value = getattr(unpacked, field.name)
                assert np.shares_memory(value, packed), f"{field.name} is a copy"
                assert not value.flags.writeable, field.name
                assert (value.__array_interface__["data"][0] - packed.__array_interface__["data"][0]) % ALIGNMENT == 0
        assert packed.flags.writeable


def test_unpack_takes_read_only_and_unaligned_buffers(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        shifted = np.empty(len(packed) + 1, np.uint8)
        shifted[1:] = packed
        shifted.setflags(write=False)
        assert_equal(message, wire.unpack(shifted[1:], type(message)))


def test_pack_takes_strided_and_wider_arrays():
    item_id = np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1]
    unpacked = wire.unpack(wire.pack(make_update(item_id=item_id)), PriorityUpdate)
    assert unpacked.item_id.tolist() == [1, 5, 9]
    assert unpacked.item_id.dtype == np.int64


def test_empty_arrays_come_back():
    update = make_update(item_id=np.zeros(0, np.int64), priority=np.zeros(0))
    assert_equal(update, wire.unpack(wire.pack(update), PriorityUpdate))
    snapshot = make_snapshot(params=np.zeros(0, np.float32), layout="")
    assert_equal(snapshot, wire.unpack(wire.pack(snapshot), ParamsSnapshot))


def test_an_untouched_repacked_message_is_accepted(make_messages):
    """The proof that what the tests below refuse is refused for the edit, not for how they pack."""
    for message in make_messages():
        packed = wire.pack(message)
        np.testing.assert_array_equal(repack(packed), packed)
        assert_equal(message, wire.unpack(repack(packed), type(message)))


# Damage on the way


def test_every_truncation_is_refused(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        for length in range(len(packed)):
            with pytest.raises(WireError):
                wire.unpack(packed[:length], type(message))


def test_every_single_bit_flip_is_refused(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        for position in range(len(packed)):
            for bit in range(8):
                packed[position] ^= 1 << bit
                with pytest.raises(WireError):
                    wire.unpack(packed, type(message))
                packed[position] ^= 1 << bit
        assert_equal(message, wire.unpack(packed, type(message)))


def test_bytes_after_the_end_are_refused(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        with pytest.raises(WireError, match=r"^checksum:"):
            wire.unpack(np.append(packed, np.zeros(8, np.uint8)), type(message))


def test_a_newer_format_version_is_refused_by_number():
    packed = wire.pack(make_update())
    with pytest.raises(WireError, match=r"^format version: 731, but this code reads 2\b"):
        wire.unpack(repack(packed, version=731), PriorityUpdate)
    packed[4:6] = np.frombuffer(struct.pack("<H", 731), np.uint8)  # Also where a newer version has another checksum.
    with pytest.raises(WireError, match=r"^format version: 731\b"):
        wire.unpack(packed, PriorityUpdate)


def test_a_wrong_kind_is_refused(make_messages):
    messages = make_messages()
    for message in messages:
        for other in messages:
            if type(other) is not type(message):
                with pytest.raises(WireError, match=rf"^kind: \d is not a {type(other).__name__}"):
                    wire.unpack(wire.pack(message), type(other))
    with pytest.raises(WireError, match=r"^kind: 9 is not a PriorityUpdate"):
        wire.unpack(repack(wire.pack(make_update()), kind=9), PriorityUpdate)


def test_what_is_no_message_is_refused():
    for data in (np.zeros(0, np.uint8), np.zeros(15, np.uint8)):
        with pytest.raises(WireError, match=rf"^prefix: {len(data)} bytes"):
            wire.unpack(data, PriorityUpdate)
    with pytest.raises(WireError, match=r"^magic:"):
        wire.unpack(np.zeros(100, np.uint8), PriorityUpdate)


@pytest.mark.parametrize(
    "spoil",
    [
        bytes,
        lambda packed: bytearray(packed.tobytes()),
        lambda packed: packed.data,
        lambda packed: packed.tolist(),
        lambda packed: packed.astype(np.float64),
        lambda packed: packed.view(np.int8),
        lambda packed: packed.astype(">u2"),
        lambda packed: packed.astype(object),
        lambda packed: packed.reshape(1, -1),
        lambda packed: packed.reshape(-1, 8),
        lambda packed: packed[0],
        lambda packed: packed[:1].reshape(()),
        lambda packed: None,
    ],
    ids=["bytes", "bytearray", "memoryview", "list", "float64", "int8", "uint16", "object", "one_row", "2d", "scalar", "0d", "none"],
)  # fmt: skip
def test_what_is_no_array_of_bytes_is_refused(make_messages, spoil):
    for message in make_messages():
        with pytest.raises(WireError, match=r"^prefix: a message is a one-dimensional array of uint8$"):
            wire.unpack(spoil(wire.pack(message)), type(message))


def test_unpack_takes_strided_bytes(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        assert_equal(message, wire.unpack(np.repeat(packed, 2)[::2], type(message)))


def test_wire_errors_are_user_errors():
    with pytest.raises(UserError):
        wire.unpack(np.zeros(100, np.uint8), PriorityUpdate)


def test_a_refusal_is_cut_at_300_characters():
    assert str(WireError("x" * 300)) == "x" * 300
    assert str(WireError("x" * 301)) == "x" * 300 + "..."
    for fields in ({"codec": "z" * 1_000_000}, {"plane_dtype": "\n" * 1_000_000}):
        with pytest.raises(WireError) as refusal:
            wire.unpack(wire.pack(make_batch(**fields)), SampleBatch)
        assert len(str(refusal.value)) == 303
        assert str(refusal.value).isprintable()


# Headers that lie, with a right checksum


@pytest.mark.parametrize(
    "header",
    [b"", b"\xc1", b"\x81", msgpack.packb([1, 2]), msgpack.packb({}), msgpack.packb({"scalars": {}, "arrays": []}),
     msgpack.packb({1: 2}), msgpack.packb({"scalars": {1: 2}, "arrays": {}}), b"\x91" * 3000, b"\xa1\xff",
     msgpack.packb({"scalars": {}, "arrays": {}}) + b"\x00"],
    ids=["empty", "reserved_byte", "cut", "list", "no_parts", "parts_of_wrong_type", "integer_key", "inner_integer_key",
         "deep", "bad_utf8", "extra"],
)  # fmt: skip
def test_a_header_that_is_no_header_is_refused(header):
    with pytest.raises(WireError, match=r"^header: "):
        wire.unpack(repack(wire.pack(make_update()), header=header), PriorityUpdate)


def test_a_header_length_past_the_end_is_refused():
    packed = wire.pack(make_update())
    for length in (len(packed) - PREFIX.size + 1, 1 << 20, (1 << 32) - 1):
        packed[8:12] = np.frombuffer(struct.pack("<I", length), np.uint8)
        with pytest.raises(WireError, match=rf"^header: {length} bytes announced"):
            wire.unpack(packed, PriorityUpdate)


def set_shape(shape):
    return lambda arrays, name: arrays[name].__setitem__(0, shape)


def set_offset(offset):
    return lambda arrays, name: arrays[name].__setitem__(1, offset)


def shift_offset(by):
    return lambda arrays, name: arrays[name].__setitem__(1, arrays[name][1] + by)


NOT_VALID = "its shape or offset is not valid$"  # The values are not shown: they may be as long as the message.
ARRAY_EDITS = {
    "rank_too_high": (set_shape([1, 1, 1, 1]), "rank 4, expected"),
    "rank_zero": (set_shape([]), "rank 0, expected"),
    "longer_than_the_buffer": (set_shape([1 << 39]), "rank|ends at|dimension"),
    "absurd_length": (set_shape([1 << 40]), NOT_VALID),
    "length_of_64_bits": (set_shape([(1 << 64) - 1]), NOT_VALID),
    "negative_length": (set_shape([-1]), NOT_VALID),
    "boolean_length": (set_shape([True]), NOT_VALID),
    "fractional_length": (set_shape([3.0]), NOT_VALID),
    "shape_is_no_list": (set_shape(3), "missing$"),
    "misaligned": (shift_offset(4), NOT_VALID),
    "negative_offset": (set_offset(-8), NOT_VALID),
    "offset_past_the_end": (set_offset(1 << 30), "ends at byte|offset"),
    "absurd_offset": (set_offset(1 << 40), NOT_VALID),
    "offset_is_no_number": (set_offset("0"), NOT_VALID),
    "entry_is_no_pair": (lambda arrays, name: arrays[name].append(0), "missing$"),
    "entry_is_null": (lambda arrays, name: arrays.__setitem__(name, None), "missing$"),
    "missing": (lambda arrays, name: arrays.pop(name), "missing"),
}
ARRAYS_OF = {
    cls: [field.name for field in dataclasses.fields(cls) if "dtype" in field.metadata]
    for cls in (TransitionChunk, SampleBatch, PriorityUpdate, ParamsSnapshot)
}
SCALARS_OF = {
    cls: [(field.name, field.metadata["kind"]) for field in dataclasses.fields(cls) if "kind" in field.metadata]
    for cls in ARRAYS_OF
}


@pytest.mark.parametrize("edit", ARRAY_EDITS)
def test_a_lie_about_any_array_is_refused_by_name(make_messages, edit):
    change, text = ARRAY_EDITS[edit]
    for message in make_messages():
        packed = wire.pack(message)
        for name in ARRAYS_OF[type(message)]:
            bad = repack(packed, edit=lambda header, name=name: change(header["arrays"], name))
            with pytest.raises(WireError, match=rf"^{name}: .*({text})"):
                wire.unpack(bad, type(message))


def test_an_array_over_another_one_is_refused_by_name(make_messages):
    """Each buffer belongs to one field: an offset that points into another one's is a lie, though it is within the message."""
    for message in make_messages():
        packed = wire.pack(message)
        names = ARRAYS_OF[type(message)]
        for first, second in itertools.pairwise(names):

            def overlap(header, first=first, second=second):
                header["arrays"][second][1] = header["arrays"][first][1]

            with pytest.raises(WireError, match=rf"^{second}: "):
                wire.unpack(repack(packed, edit=overlap), type(message))


def test_lengths_that_disagree_are_refused_by_name():
    def shorten(header):
        header["arrays"]["priority"][0] = [2]

    with pytest.raises(WireError, match=r"^priority: dimension B is 2, elsewhere 3"):
        wire.unpack(repack(wire.pack(make_update()), edit=shorten), PriorityUpdate)

    def shorten_stack(header):
        header["arrays"]["s_t"][0] = [3, 0]

    with pytest.raises(WireError, match=r"^s_t: dimension K is 0, elsewhere 1"):
        wire.unpack(repack(wire.pack(make_batch()), edit=shorten_stack), SampleBatch)


@pytest.mark.parametrize("part", ["scalars", "arrays"])
def test_an_unknown_field_is_refused_by_name(make_messages, part):
    for message in make_messages():

        def add(header):
            header[part]["surprise"] = [[0], 0]

        with pytest.raises(WireError, match=r"^header: unknown field 'surprise'"):
            wire.unpack(repack(wire.pack(message), edit=add), type(message))


def test_an_unknown_part_of_the_header_is_refused():
    with pytest.raises(WireError, match=r"^header: .*surprise"):
        wire.unpack(repack(wire.pack(make_update()), edit=lambda header: header.update(surprise={})), PriorityUpdate)


def test_a_missing_or_mistyped_scalar_is_refused_by_name(make_messages):
    for message in make_messages():
        packed = wire.pack(message)
        for name, kind in SCALARS_OF[type(message)]:
            bad = repack(packed, edit=lambda header, name=name: header["scalars"].pop(name))
            with pytest.raises(WireError, match=rf"^{name}: expected {kind.__name__}, got NoneType"):
                wire.unpack(bad, type(message))
            for value in ("text", 3, 3.0, True, None, [3], {}, b"bytes"):
                if type(value) is not kind:
                    bad = repack(packed, edit=lambda header, name=name, value=value: header["scalars"].update({name: value}))
                    with pytest.raises(WireError, match=rf"^{name}: expected {kind.__name__}, got {type(value).__name__}"):
                        wire.unpack(bad, type(message))


def test_integers_out_of_range_are_refused_by_name(make_messages):
    """Below zero, and past what an int64 holds: the receiver stores them in one."""
    for message in make_messages():
        packed = wire.pack(message)
        for name, kind in SCALARS_OF[type(message)]:
            if kind is int:
                for value in (-1, -(1 << 63), 1 << 63, (1 << 64) - 1):
                    bad = repack(packed, edit=lambda header, name=name, value=value: header["scalars"].update({name: value}))
                    with pytest.raises(WireError, match=rf"^{name}: {value} is outside"):
                        wire.unpack(bad, type(message))


BAD_BATCHES = [
    ({"size": 0}, r"^size: 0 is outside"),
    ({"planes_per_block": 0}, r"^planes_per_block: 0 is outside \[1, 64\]"),
    ({"planes_per_block": 65}, r"^planes_per_block: 65 is outside \[1, 64\]"),
    ({"planes_per_block": (1 << 63) - 1}, r"^planes_per_block: 9223372036854775807 is outside \[1, 64\]"),
    ({"planes_per_block": 2}, r"^block_offsets: raw blocks must have 24 bytes each"),
    ({"priority_mass": -0.5}, r"^priority_mass: -0.5 is outside"),
    ({"priority_mass": float("nan")}, r"^priority_mass: nan is not finite"),
    ({"priority_mass": float("inf")}, r"^priority_mass: inf is not finite"),
    ({"r_t": np.array([0, np.nan, 0])}, r"^r_t: holds NaN or infinity"),
    ({"r_t": np.array([0, 0, -np.inf])}, r"^r_t: holds NaN or infinity"),
    ({"discount_t": np.array([0, 0, 1.5])}, r"^discount_t: 1.5 is above 1"),
    ({"discount_t": np.array([0, -0.5, 1])}, r"^discount_t: -0.5 is below 0"),
    ({"probability": np.array([0, 0, 1.0001])}, r"^probability: 1.0001 is above 1"),
    ({"probability": np.array([0, np.nan, 1])}, r"^probability: holds NaN"),
    ({"a_tm1": np.array([0, -1, 1])}, r"^a_tm1: -1 is below 0"),
    ({"item_id": np.array([0, -7, 1])}, r"^item_id: -7 is below 0"),
    ({"params_version": np.array([0, -7, 1])}, r"^params_version: -7 is below 0"),
    ({"s_tm1": np.array([[0], [-1], [0]])}, r"^s_tm1: -1 is below 0"),
    ({"s_tm1": np.array([[0], [2], [0]])}, r"^s_tm1: refers to plane 2 of 2"),
    ({"s_t": np.array([[0], [2], [0]])}, r"^s_t: refers to plane 2 of 2"),
    ({"codec": "zip"}, r"^codec: 'zip'"),
    ({"plane_dtype": "<f8"}, r"^plane_dtype: '<f8'"),
    ({"plane_dtype": "|O"}, r"^plane_dtype: '\|O'"),
    ({"plane_shape": np.array([0])}, r"^plane_shape: 0 is below 1"),
    ({"plane_shape": np.array([-3])}, r"^plane_shape: -3 is below 1"),
    ({"plane_shape": np.array([4])}, r"^block_offsets: raw blocks must have 16 bytes each"),
    ({"plane_shape": np.array([1 << 22, 2])}, r"^plane_shape: 33554432 bytes a plane"),
    ({"plane_shape": np.array([1 << 22] * 4)}, r"^plane_shape: \d{20,} bytes a plane"),  # 2**90: overflows an int64.
    ({"block_offsets": np.array([0])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([], np.int64)}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([4, 12, 24])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([0, 12, 23])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([0, 12, 28])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([0, 12, 12, 24])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([0, 24, 12, 24])}, r"^block_offsets: must rise"),
    ({"block_offsets": np.array([0, 8, 24])}, r"^block_offsets: raw blocks must have 12 bytes each"),
]


@pytest.mark.parametrize(("fields", "text"), BAD_BATCHES, ids=[f"{n}-{next(iter(b[0]))}" for n, b in enumerate(BAD_BATCHES)])
def test_a_value_out_of_its_range_is_refused_by_name(fields, text):
    with pytest.raises(WireError, match=text):
        wire.unpack(wire.pack(make_batch(**fields)), SampleBatch)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"priority": np.array([1, np.nan, 1])}, r"^priority: holds NaN or infinity"),
        ({"priority": np.array([1, np.inf, 1])}, r"^priority: holds NaN or infinity"),
        ({"priority": np.array([1, -1e-9, 1])}, r"^priority: -1e-09 is below 0"),
        ({"item_id": np.array([1, -1, 1])}, r"^item_id: -1 is below 0"),
    ],
    ids=["nan", "infinity", "negative", "negative_id"],
)
def test_a_bad_priority_update_is_refused_by_name(fields, text):
    with pytest.raises(WireError, match=text):
        wire.unpack(wire.pack(make_update(**fields)), PriorityUpdate)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_snapshot_that_is_not_finite_is_refused(bad):
    with pytest.raises(WireError, match=r"^params: holds NaN or infinity"):
        wire.unpack(wire.pack(make_snapshot(params=np.array([0, bad], np.float32))), ParamsSnapshot)


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF])
def test_a_bf16_snapshot_that_is_not_finite_is_refused(bad):
    """Both infinities and NaNs of every kind; 0x7F7F, the greatest finite number, is among the good messages."""
    with pytest.raises(WireError, match=r"^params: holds NaN or infinity"):
        wire.unpack(wire.pack(make_snapshot(params=np.array([0, bad], np.uint16))), ParamsSnapshot)


def test_a_bf16_snapshot_takes_half_the_bytes_and_fp32_is_sent_as_ever():
    """The second dtype is named in the header, the first is not: senders of fp32 and their receivers may be of either version."""
    messages = [wire.pack(make_snapshot(params=np.zeros(1000, dtype))) for dtype in (np.float32, np.uint16)]
    assert 2000 - 16 <= len(messages[0]) - len(messages[1]) <= 2000
    entries = []
    for message in messages:
        repack(message, edit=lambda header: entries.append(header["arrays"]["params"]))
    assert entries == [[[1000], 0], [[1000], 0, "<u2"]]


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "|O", "", None, 0, ["<u2"], "<u2x"], ids=str)
def test_an_array_of_another_dtype_is_refused_by_name(make_messages, dtype):
    """Nobody chooses a dtype but among the field's two, and a field of one has none to choose."""
    for message in make_messages():
        packed = wire.pack(message)
        for name in ARRAYS_OF[type(message)]:

            def announce(header, name=name):
                header["arrays"][name][2:] = [dtype]

            with pytest.raises(WireError, match=rf"^{name}: missing"):
                wire.unpack(repack(packed, edit=announce), type(message))
    for message in make_messages()[:4]:
        for name in ARRAYS_OF[type(message)]:
            bad = repack(wire.pack(message), edit=lambda header, name=name: header["arrays"][name].append("<u2"))
            with pytest.raises(WireError, match=rf"^{name}: missing"):
                wire.unpack(bad, type(message))


def test_a_lie_about_which_of_two_dtypes_is_refused():
    """fp32 numbers announced as bf16 leave bytes over; bf16 ones announced as fp32 are too few."""
    numbers, bits = (wire.pack(make_snapshot(params=np.ones(8, dtype))) for dtype in (np.float32, np.uint16))
    as_numbers = repack(bits, edit=lambda header: header["arrays"]["params"].pop())
    as_bits = repack(numbers, edit=lambda header: header["arrays"]["params"].append("<u2"))
    with pytest.raises(WireError, match=r"^params: ends at byte 32 of 16"):
        wire.unpack(as_numbers, ParamsSnapshot)
    with pytest.raises(WireError, match=r"^header: 32 bytes of buffers, 16 of them described"):
        wire.unpack(as_bits, ParamsSnapshot)


def test_a_chunk_of_nothing_is_refused(make_chunk):
    rng = np.random.default_rng(0)
    for sizes in ({"num_transitions": 0}, {"frame_stack": 0}):
        with pytest.raises(WireError, match=r"^s_tm1: a chunk holds at least one"):
            wire.unpack(wire.pack(make_chunk(rng, **sizes)), TransitionChunk)


def test_a_chunk_with_a_reference_past_its_planes_is_refused(make_chunk):
    rng = np.random.default_rng(0)
    for name in ("s_tm1", "s_t"):
        references = np.array([[0, 4], [24, 1], [23, 2]])  # 20 planes fill three blocks of 8.
        with pytest.raises(WireError, match=rf"^{name}: refers to plane 24 of 24"):
            wire.unpack(wire.pack(make_chunk(rng, **{name: references})), TransitionChunk)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_header_makes_unpack_fail_in_another_way(data):
    """One value of a good header is replaced by anything: the message is read or a WireError says why not."""
    message = data.draw(st.sampled_from([make_batch(), make_update(), make_snapshot(), make_snapshot(params=BF16)]))
    packed = wire.pack(message)

    def spoil(header):
        part = data.draw(st.sampled_from(["scalars", "arrays"]))
        name = data.draw(st.sampled_from(sorted(header[part])))
        if part == "arrays" and data.draw(st.booleans()):
            lengths = st.integers(-1, 9) | st.integers(0, 1 << 64).map(lambda n: min(n, (1 << 64) - 1))
            header[part][name] = [data.draw(st.lists(lengths, max_size=3)), data.draw(lengths)]
        else:
            header[part][name] = data.draw(JUNK)

    refusal = "field: as good as ever"
    try:
        wire.pack(wire.unpack(repack(packed, edit=spoil), type(message)))
    except WireError as error:
        refusal = str(error)
    assert ": " in refusal


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(header=st.binary(max_size=40) | JUNK.map(msgpack.packb))
def test_no_bytes_for_a_header_make_unpack_fail_in_another_way(header):
    with pytest.raises(WireError):
        wire.unpack(repack(wire.pack(make_update()), header=header), PriorityUpdate)
