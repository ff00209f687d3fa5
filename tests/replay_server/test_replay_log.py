"""The durable log against a list of what was appended: cut anywhere, altered anywhere, on a disk that is full."""

import errno
import os
import threading

import numpy as np
import pytest

from replay_server.replay_log import Priorities, ReplayLog, segment_paths

SEGMENT_BYTES = 400


def messages(num, seed=0):
    """Records as (first item id, items, samples, bytes), one after another from item 5 on."""
    rng = np.random.default_rng(seed)
    made, item_id = [], 5
    for i in range(num):
        num_items = int(rng.integers(1, 4))
        made.append((item_id, num_items, 7 * i, rng.integers(256, size=int(rng.integers(1, 90)), dtype=np.uint8)))
        item_id += num_items
    return made


def fill(directory, records, **settings):
    log = ReplayLog(directory, segment_bytes=SEGMENT_BYTES, **settings)
    log.state = lambda: b"the state"
    assert list(log.open([])) == []
    for record in records:
        log.append(*record)
    return log


def read(directory):
    damages = []
    records = [record for record in ReplayLog(directory).records(damages) if record.num_items]
    return [(r.first_item_id, r.num_items, r.num_sampled, r.message.tolist()) for r in records], damages


def plain(records):
    return [(*record[:3], record[3].tolist()) for record in records]


def test_what_was_appended_is_read_back_after_a_kill(tmp_path):
    """Nothing is closed: what a killed process leaves. Kills: bytes that wait in the process."""
    records = messages(60)
    log = fill(tmp_path, records)
    assert read(tmp_path) == (plain(records), [])
    assert len(segment_paths(tmp_path)) == log.stats().num_segments > 5
    assert log.stats().num_bytes == sum(path.stat().st_size for path in segment_paths(tmp_path))


def test_a_reopened_log_goes_on(tmp_path):
    """Kills: a first record that overwrites the last segment, and a directory that loses count of its old segments."""
    records = messages(40)
    fill(tmp_path, records[:17])
    log = ReplayLog(tmp_path, segment_bytes=SEGMENT_BYTES)
    damages = []
    assert [record.first_item_id for record in log.open(damages) if record.num_items] == [r[0] for r in records[:17]]
    for record in records[17:]:
        log.append(*record)
    assert read(tmp_path) == (plain(records), []) and damages == []


def test_a_segment_goes_with_its_last_item(tmp_path):
    """Kills: one that goes with its first item, or too late, or before the log says that its items were evicted."""
    records = messages(60)
    log = fill(tmp_path, records[:-2])
    starts = [int(path.stem, 16) for path in segment_paths(tmp_path)]
    log.release_before(starts[2] - 1)
    assert [int(path.stem, 16) for path in segment_paths(tmp_path)] == starts
    log.append(*records[-2])
    assert int(segment_paths(tmp_path)[0].stem, 16) == starts[1]
    log.release_before(starts[2])
    log.append(*records[-1])
    assert int(segment_paths(tmp_path)[0].stem, 16) == starts[2]
    assert read(tmp_path)[0] == [record for record in plain(records) if record[0] >= starts[2]]
    oldest = [record.oldest_item_id for record in ReplayLog(tmp_path).records([])]
    assert oldest[-2:] == [starts[2] - 1, starts[2]] and set(oldest[:-2]) == {0}


def test_on_a_full_disk_segments_go_at_once(tmp_path, monkeypatch):
    """Kills: a disk that stays full, because what would free it waits for a record that cannot be written."""
    records = messages(60)
    log = fill(tmp_path, records[:-1])
    num_segments = len(segment_paths(tmp_path))
    monkeypatch.setattr(os, "writev", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    log.append(*records[-1])
    log.release_before(records[-1][0] + records[-1][1])
    log.append(*records[-1])
    assert num_segments > 5 and segment_paths(tmp_path) == [] and log.stats().num_bytes == 0


def test_a_log_cut_at_any_byte_keeps_every_whole_record(tmp_path):
    """The torn tail is cut off, and what comes after it is read back too."""
    records = messages(6)
    fill(tmp_path / "whole", records[:5])
    (path,) = segment_paths(tmp_path / "whole")[-1:]
    older = [record for record in plain(records[:5]) if record[0] < int(path.stem, 16)]
    data = path.read_bytes()
    for length in range(len(data)):
        directory = tmp_path / str(length)
        directory.mkdir()
        for segment in segment_paths(tmp_path / "whole"):
            (directory / segment.name).write_bytes(segment.read_bytes())
        os.truncate(directory / path.name, length)
        log, damages = ReplayLog(directory, segment_bytes=SEGMENT_BYTES), []
        kept = [record.first_item_id for record in log.open(damages) if record.num_items]
        assert kept == [record[0] for record in records[: len(kept)]] and len(kept) >= len(older)
        assert all(damage.is_tail and damage.file.name == path.name for damage in damages)
        log.append(*records[5])
        assert read(directory)[0] == [*plain(records[: len(kept)]), *plain(records[5:])]
        assert read(directory)[1] == []


def test_an_altered_byte_costs_its_record_alone(tmp_path):
    """Every byte of a segment in turn. Kills: a length that is believed, and a checksum that leaves out the header."""
    records = messages(8)
    fill(tmp_path, records)
    path = segment_paths(tmp_path)[0]
    data = path.read_bytes()
    whole = plain(records)
    for offset in range(len(data)):
        altered = bytearray(data)
        altered[offset] ^= 1 << (offset % 8)
        path.write_bytes(altered)
        found, damages = read(tmp_path)
        is_in_state = offset < 48 + len("the state")
        assert len(found) == len(whole) - (not is_in_state) and [record for record in whole if record in found] == found
        (damage,) = damages
        assert damage.offset <= offset < damage.offset + damage.num_bytes and str(path) in str(damage)


@pytest.mark.parametrize("is_short", [False, True], ids=["refused", "cut short"])
def test_a_full_disk_costs_durability_and_nothing_else(tmp_path, monkeypatch, is_short):
    """Kills: half a record that stays, an exception, a fault that is never told or never taken back."""
    now = [0.0]
    records = messages(30)
    log = fill(tmp_path, records[:10], clock=lambda: now[0])
    writev = os.writev

    def full(file, parts):
        if is_short:
            return writev(file, [b"".join(parts)[:20]])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    for record in records[10:20]:
        log.append(*record)
    assert "No space left on device" in log.stats().fault and str(tmp_path) in log.stats().fault
    assert log.stats().num_unlogged == sum(record[1] for record in records[10:20])
    monkeypatch.setattr(os, "writev", writev)
    log.append(*records[20])
    assert log.stats().fault is not None, "it does not try at every record"
    now[0] += 6.0
    for record in records[21:]:
        log.append(*record)
    assert log.stats().fault is None
    assert read(tmp_path) == (plain(records[:10] + records[21:]), [])


def test_the_budget_holds_and_the_oldest_go(tmp_path):
    records = messages(200)
    log = fill(tmp_path, records, disk_budget=1500)
    found, _ = read(tmp_path)
    assert sum(path.stat().st_size for path in segment_paths(tmp_path)) == log.stats().num_bytes <= 1500
    assert found == plain(records)[-len(found) :] and len(found) > 5
    assert log.stats().num_dropped == found[0][0] - records[0][0]


def test_a_sync_reaches_every_file_and_every_name(tmp_path, monkeypatch):
    """Kills: a segment that became full between two syncs and is never synced, a file whose name is not."""
    synced, names = [], []
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "fsync", lambda file: names.append(os.readlink(f"/proc/self/fd/{file}")))
    records = messages(60)
    log = fill(tmp_path, records[:30])
    assert log.stats().num_unsynced > 0
    log.sync()
    assert sorted(synced) == [str(path) for path in segment_paths(tmp_path)] and names == [str(tmp_path)]
    assert log.stats().num_unsynced == 0
    synced.clear()
    before = set(segment_paths(tmp_path)[:-1])
    for record in records[30:]:
        log.append(*record)
    log.close()
    assert sorted(synced) == [str(path) for path in segment_paths(tmp_path) if path not in before]
    files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [file for file in files if file.startswith(str(tmp_path))]


def test_the_thread_syncs_while_records_come(tmp_path):
    """Kills: a file that is closed under the thread's hands."""
    log = fill(tmp_path, [])
    log.start(0.001)
    records = messages(2_000)
    for record in records:
        log.append(*record)
        log.release_before(max(record[0] - 50, 0))
    log.close()
    assert log.stats().num_unsynced == 0 and log.stats().fault is None
    assert read(tmp_path)[0] == plain(records)[-len(read(tmp_path)[0]) :]


def fails(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("broken", ["fdatasync", "fsync", "dup"])
def test_a_sync_that_failed_is_told_and_tried_again_whole(tmp_path, monkeypatch, broken):
    """Kills: files that are forgotten with the error, a fault that the next record takes back, a thread that ends by it."""
    records = messages(40)
    log = fill(tmp_path, records[:30])
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fails(errno.EIO))
        log.sync()
        log.append(*records[30])
        assert "may not survive a power failure" in log.stats().fault and log.stats().num_unsynced > 0
    synced, names = set(), []
    fdatasync, fsync = os.fdatasync, os.fsync
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.add(os.readlink(f"/proc/self/fd/{file}")) or fdatasync(file))
    monkeypatch.setattr(os, "fsync", lambda file: names.append(file) or fsync(file))
    log.sync()
    assert synced == {str(path) for path in segment_paths(tmp_path)} and names
    assert log.stats().fault is None and log.stats().num_unsynced == 0


def test_a_sync_waits_for_one_that_is_under_way(tmp_path, monkeypatch):
    """Kills: a checkpoint that says what is on the disk while the log's own thread is still about it."""
    log = fill(tmp_path, messages(30))
    began, may_go = threading.Event(), threading.Event()
    synced, fdatasync = [], os.fdatasync

    def slow(file):
        began.set()
        assert may_go.wait(10)
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fdatasync(file)

    monkeypatch.setattr(os, "fdatasync", slow)
    first = threading.Thread(target=log.sync)
    first.start()
    assert began.wait(10)
    threading.Timer(0.1, may_go.set).start()
    log.sync()
    assert set(synced) == {str(path) for path in segment_paths(tmp_path)}
    first.join()


def test_a_deleted_segment_holds_no_disk_and_no_descriptor(tmp_path):
    """A budget for three segments, and no sync. Kills: files that are deleted and stay open, so that the budget bounds nothing."""
    before = len(os.listdir("/proc/self/fd"))
    fill(tmp_path, messages(2_000), disk_budget=1_200)
    assert len(os.listdir("/proc/self/fd")) - before <= len(segment_paths(tmp_path)) <= 5


def test_priorities_stay_while_somebody_names_them_and_damage_is_told(tmp_path):
    log = fill(tmp_path, messages(3))
    saved = Priorities(5, 0.5, np.array([1.0, 2.0]))
    names = [log.write_priorities(saved)]
    for _ in range(3):
        names.append(log.write_priorities(saved, {names[0]}))
    assert sorted(path.name for path in tmp_path.glob("priorities-*")) == [names[0], names[3]]
    damages = []
    np.testing.assert_array_equal(log.read_priorities(names[3], damages).values, saved.values)
    assert log.read_priorities(None, damages) is None and not damages
    data = bytearray((tmp_path / names[0]).read_bytes())
    data[-1] ^= 1
    (tmp_path / names[0]).write_bytes(data)
    assert log.read_priorities(names[0], damages) is None and log.read_priorities(names[1], damages) is None
    assert "altered" in damages[0] and names[0] in damages[0] and "gone" in damages[1]
