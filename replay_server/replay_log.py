"""The durable log of one shard: inserted chunks, appended as received, in segment files that go when their last item has gone.

    <first item id, 16 hex digits>.log:   record, record, ...
    record:   magic 4s | num_items u32 | first_item_id u64 | oldest_item_id u64 | num_sampled u64 | num_bytes u64 | xxh3 u64 | message

A segment begins with a record of no items, whose message says how the shard stood then: what came before it may be gone. A record is there whole or it is not used: the checksum is of all of it. Appending writes into the operating system's memory and
never waits for the disk; a thread syncs at an interval. What a kill of the process takes is nothing that was appended, what a
power failure takes is at most what was appended since the last sync.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import xxhash

from common.files import make_directory, sealed, sync_directory, unsealed, write_synced
from common.messages import Array
from common.metrics import LogStats

_MAGIC = b"QFLR"
_HEADER = struct.Struct("<4sIQQQQQ")
_CHECKED = _HEADER.size - 8  # Bytes of the header before the checksum.
_SEGMENT_BYTES = 16 << 20
_RETRY_SECONDS = 5.0  # After a write that failed.


class Record(NamedTuple):
    """One inserted chunk; or, with no items, how the shard stood."""

    first_item_id: int
    num_items: int
    oldest_item_id: int
    """The oldest item that the shard had when the chunk came."""
    num_sampled: int
    """Items that the shard had given out when the chunk came."""
    message: Array
    """u8[num_bytes], the packed TransitionChunk, or the state."""

    @property
    def end_item_id(self) -> int:
        return self.first_item_id + self.num_items


class Priorities(NamedTuple):
    """Of successive items of one shard."""

    first_item_id: int
    exponent: float
    values: Array
    """f64[M], priority ** exponent."""

    @property
    def end_item_id(self) -> int:
        return self.first_item_id + len(self.values)

    def of(self, first: int, end: int) -> Array:
        """Returns those of items [first, end), all of which there must be."""
        return self.values[first - self.first_item_id : end - self.first_item_id]


class Damage(NamedTuple):
    """Bytes of a segment that are no record."""

    file: Path
    offset: int
    num_bytes: int
    is_tail: bool
    """Nothing whole comes after it: what a write that was cut short leaves."""

    def __str__(self) -> str:
        what = "end in the middle of a record" if self.is_tail else "are no record (altered)"
        return f"{self.file}: {self.num_bytes} bytes from {self.offset} on {what}"


@dataclass(slots=True)
class _Segment:
    path: Path
    end_item_id: int
    num_bytes: int
    unsynced_file: int | None = None
    """Of one that is full and not yet on the disk."""


class ReplayLog:
    """Appends records, deletes what is evicted, and reads it all back.

    `state` is asked for the message with which a segment begins: what the shard was before the record that is appended then.

    `append` and `release_before` are one thread's, and raise nothing: where the disk is full or gone, the run goes on, items from
    then on are in memory only, and `stats` says so until writing works again. `sync` may be any thread's.
    """

    def __init__(
        self,
        directory: Path,
        *,
        disk_budget: int | None = None,
        segment_bytes: int = _SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`disk_budget` in bytes: beyond it the oldest segments go, though their items are still in memory. None: no limit."""
        self.state: Callable[[], bytes] = bytes
        self.damages: list[Damage | str] = []
        """What could not be read when the shard began: for `stats`."""
        self.directory, self._disk_budget = directory, disk_budget
        self._segment_bytes = segment_bytes if disk_budget is None else max(min(segment_bytes, disk_budget // 4), 1)
        self._clock = clock
        self._segments: deque[_Segment] = deque()
        self._file: int | None = None  # Of the newest segment.
        self._lock = threading.Lock()  # For what `sync` shares: the segments and their files.
        self._sync_lock = threading.Lock()  # One sync at a time: each returns when what came before it is on the disk.
        self._has_new_files = False
        self._oldest_item_id = self._appended_end = self._synced_end = 0
        self._num_bytes = 0  # Of all segments.
        self._num_unlogged = self._num_dropped = 0
        self._faults: dict[str, str] = {}  # By what is at fault: write, sync, priorities.
        self._retry_at = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def records(self, damages: list[Damage | str]) -> Iterator[Record]:
        """Yields what the directory holds, oldest first, and notes in `damages` what it had to pass over; changes no file."""
        for path in segment_paths(self.directory):
            found: list[Damage] = []
            yield from _read_segment(path, found)
            damages += found

    def open(self, damages: list[Damage | str]) -> Iterator[Record]:
        """Yields like `records`, takes over the files and cuts torn tails off; to be used up before the first `append`."""
        make_directory(self.directory)
        for path in segment_paths(self.directory):
            end_item_id = 0
            found: list[Damage] = []
            for record in _read_segment(path, found):
                end_item_id = record.end_item_id if record.num_items else end_item_id
                yield record
            damages += found
            if found and found[-1].is_tail:
                os.truncate(path, found[-1].offset)
            if end_item_id:
                self._segments.append(_Segment(path, end_item_id, path.stat().st_size))
                self._num_bytes += self._segments[-1].num_bytes
                self._appended_end = self._synced_end = end_item_id
            else:
                path.unlink()

    def append(self, first_item_id: int, num_items: int, num_sampled: int, message: Array) -> None:
        """Writes one record, and deletes the segments whose items were evicted before. Keeps no view of `message`."""
        if "write" in self._faults and self._clock() < self._retry_at:
            self._num_unlogged += num_items
            self._delete_evicted()
            return
        try:
            self._make_room(_HEADER.size + message.nbytes, first_item_id, num_sampled)
            self._write(num_items, first_item_id, num_sampled, message.data)
        except OSError as error:
            self._num_unlogged += num_items
            self._faults["write"] = (
                f"{self.directory}: {error.strerror}: transitions are kept in memory only until writing works again"
            )
            self._retry_at = self._clock() + _RETRY_SECONDS
            return
        self._faults.pop("write", None)
        self._segments[-1].end_item_id = first_item_id + num_items
        with self._lock:
            self._appended_end = first_item_id + num_items
        self._delete_evicted()

    def release_before(self, oldest_item_id: int) -> None:
        """Notes that older items are evicted. The next record says so, and only then segments go: so what is missing in a log is
        known to have been evicted, or is lost.
        """
        self._oldest_item_id = oldest_item_id

    def write_priorities(self, priorities: Priorities, kept: Collection[str] = ()) -> str | None:
        """Writes them to a file of their own, beside which those named in `kept` stay; returns its name, or None where the disk is full."""
        values = np.ascontiguousarray(priorities.values, "<f8").tobytes()
        message = msgpack.packb([priorities.first_item_id, priorities.exponent, values])
        there = sorted(self.directory.glob(f"priorities-{'[0-9]' * 8}.msgpack"))
        path = self.directory / f"priorities-{int(there[-1].stem.split('-')[1]) + 1 if there else 0:08d}.msgpack"
        try:
            write_synced(path, sealed(message))
            sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            self._faults["priorities"] = f"{path}: {error.strerror}: priorities are not saved"
            return None
        self._faults.pop("priorities", None)
        for old in there:
            if old.name not in kept:
                with contextlib.suppress(OSError):
                    old.unlink()
        return path.name

    def read_priorities(self, name: str | None, damages: list[Damage | str]) -> Priorities | None:
        """Reads a file that `write_priorities` wrote; None where none is named, or where it is gone or altered, which is noted."""
        if name is None:
            return None
        path = self.directory / name
        message = unsealed(path.read_bytes()) if path.exists() else None
        if message is None:
            damages.append(
                f"{path}: {'altered' if path.exists() else 'gone'}: items have the priorities that their actors gave"
            )
            return None
        first_item_id, exponent, values = msgpack.unpackb(message)
        return Priorities(first_item_id, exponent, np.frombuffer(values, "<f8"))

    def start(self, sync_seconds: float) -> None:
        """Syncs every so many seconds from now on, on a thread."""
        self._thread = threading.Thread(target=self._sync_for_ever, args=(sync_seconds,), name="log sync", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Waits until all that was appended before this call is on the disk. Where that fails, the next one tries all of it again."""
        with self._sync_lock:
            try:
                self._sync()
            except OSError as error:
                self._faults["sync"] = f"{self.directory}: {error.strerror}: what was written may not survive a power failure"
            else:
                self._faults.pop("sync", None)

    def _sync(self) -> None:
        with self._lock:
            newest = [os.dup(self._file)] if self._file is not None else []
            full = [segment for segment in self._segments if segment.unsynced_file is not None]
            files = [file for segment in full if (file := segment.unsynced_file) is not None]
            for segment in full:
                segment.unsynced_file = None
            end, has_new_files, self._has_new_files = self._appended_end, self._has_new_files, False
        done = False
        try:
            for file in files + newest:
                os.fdatasync(file)
            if has_new_files:
                sync_directory(self.directory)
            done = True
        finally:
            with self._lock:
                for segment, file in zip(full, files, strict=True):
                    if done or segment not in self._segments:
                        os.close(file)
                    else:
                        segment.unsynced_file = file
                for file in newest:
                    os.close(file)
                self._has_new_files |= has_new_files and not done
                self._synced_end = max(self._synced_end, end) if done else self._synced_end

    def close(self) -> None:
        """Ends the thread and syncs."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._close_file()
        self.sync()

    @property
    def fault(self) -> str | None:
        """Why the disk does not take what comes now, or None."""
        return next(iter(self._faults.values()), None)

    def stats(self) -> LogStats:
        with self._lock:
            num_unsynced = self._appended_end - self._synced_end
        return LogStats(
            num_bytes=self._num_bytes,
            num_segments=len(self._segments),
            num_unsynced=num_unsynced,
            num_unlogged=self._num_unlogged,
            num_dropped=self._num_dropped,
            fault=self.fault,
            damages=list(dict.fromkeys(map(str, self.damages))),
        )

    def _make_room(self, num_bytes: int, first_item_id: int, num_sampled: int) -> None:
        """Begins a new segment where the newest is full, and keeps to the budget."""
        if self._file is None or self._segments[-1].num_bytes + num_bytes > self._segment_bytes:
            self._close_file()
            path = self.directory / f"{first_item_id:016x}.log"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            with self._lock:
                self._segments.append(_Segment(path, first_item_id, 0))
                self._file, self._has_new_files = file, True
            self._write(0, first_item_id, num_sampled, memoryview(self.state()))
        if self._disk_budget is None:
            return
        while len(self._segments) > 1 and self._num_bytes + num_bytes > self._disk_budget:
            following = self._segments[1].path
            self._num_dropped += int(following.stem, 16) - int(self._segments[0].path.stem, 16)
            self._delete_oldest()

    def _delete_evicted(self) -> None:
        while self._segments and self._segments[0].end_item_id <= self._oldest_item_id:
            if len(self._segments) == 1:
                self._close_file()
            self._delete_oldest()

    def _write(self, num_items: int, first_item_id: int, num_sampled: int, message: memoryview) -> None:
        """Writes a record at the newest segment's end; what a failed write has left there is taken away."""
        assert self._file is not None
        numbers = (num_items, first_item_id, self._oldest_item_id, num_sampled, len(message))
        header = _HEADER.pack(_MAGIC, *numbers, 0)[:_CHECKED]
        parts: list[bytes | memoryview] = [header, _checksum(header, message).to_bytes(8, "little"), message]
        segment, wanted = self._segments[-1], _HEADER.size + len(message)
        try:
            if os.writev(self._file, parts) != wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, segment.num_bytes)
                os.lseek(self._file, segment.num_bytes, os.SEEK_SET)
            raise
        segment.num_bytes += wanted
        self._num_bytes += wanted

    def _close_file(self) -> None:
        with self._lock:
            if self._file is not None:
                self._segments[-1].unsynced_file, self._file = self._file, None

    def _delete_oldest(self) -> None:
        with self._lock:
            segment = self._segments.popleft()
            self._num_bytes -= segment.num_bytes
            if segment.unsynced_file is not None:
                os.close(segment.unsynced_file)
        with contextlib.suppress(OSError):
            segment.path.unlink()

    def _sync_for_ever(self, sync_seconds: float) -> None:
        while not self._stopping.wait(sync_seconds):
            self.sync()


def segment_paths(directory: Path) -> list[Path]:
    """Returns the segment files of a log, oldest first."""
    return sorted(directory.glob("[0-9a-f]" * 16 + ".log"))


def _read_segment(path: Path, damages: list[Damage]) -> Iterator[Record]:
    data = path.read_bytes()
    offset = 0
    while offset < len(data):
        record = _record_at(data, offset)
        if record is not None:
            yield record
            offset += _HEADER.size + record.message.nbytes
            continue
        following = _next_record(data, offset + 1)
        end = len(data) if following is None else following
        damages.append(Damage(path, offset, end - offset, is_tail=following is None))
        offset = end


def _record_at(data: bytes, offset: int) -> Record | None:
    """Returns the record that begins there, or None where none does."""
    if data[offset : offset + 4] != _MAGIC or offset + _HEADER.size > len(data):
        return None
    _, num_items, first_item_id, oldest_item_id, num_sampled, num_bytes, checksum = _HEADER.unpack_from(data, offset)
    start = offset + _HEADER.size
    if num_bytes > len(data) - start:
        return None
    message = np.frombuffer(data, np.uint8, num_bytes, start)
    if _checksum(data[offset : offset + _CHECKED], message.data) != checksum:
        return None
    return Record(first_item_id, num_items, oldest_item_id, num_sampled, message)


def _next_record(data: bytes, offset: int) -> int | None:
    """Returns where the next whole record begins, or None."""
    while (offset := data.find(_MAGIC, offset)) >= 0:
        if _record_at(data, offset) is not None:
            return offset
        offset += 1
    return None


def _checksum(header: bytes, message: memoryview) -> int:
    digest = xxhash.xxh3_64(header)
    digest.update(message)
    return digest.intdigest()
