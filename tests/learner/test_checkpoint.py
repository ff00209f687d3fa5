import os

import msgpack
import numpy as np
import pytest

from common.errors import CheckpointError
from learner import checkpoint as checkpoints
from learner.checkpoint import Checkpoint


def some(value=1.0):
    tensors = {name: {"w": np.full((2, 3), value, np.float32)} for name in ("online", "target", "optimizer")}
    return Checkpoint(tensors=tensors, meta={"updates": 7, "nested": {"a": [1, 2]}})


def test_what_is_written_is_read(tmp_path):
    path = checkpoints.write(tmp_path, 7, some(3.0), kept=2)
    back = checkpoints.read(path)
    assert back.meta == some().meta
    np.testing.assert_array_equal(back.tensors["target"]["w"], np.full((2, 3), 3.0))


def test_only_the_newest_are_kept_in_numeric_order(tmp_path):
    for updates in (5, 10, 100, 20):
        checkpoints.write(tmp_path, updates, some(), kept=3)
    assert [path.name for path in checkpoints.paths(tmp_path)] == ["0000000010", "0000000020", "0000000100"]


def test_a_second_checkpoint_of_as_many_updates_is_the_newer_one(tmp_path):
    """Actors go on while the learner waits: the counters differ although the parameters do not."""
    for value in (1.0, 2.0, 3.0):
        checkpoints.write(tmp_path, 7, some(value), kept=2)
    newest = checkpoints.paths(tmp_path)[-1]
    assert [path.name for path in checkpoints.paths(tmp_path)] == ["0000000007-001", "0000000007-002"]
    assert checkpoints.read(newest).tensors["online"]["w"][0, 0] == 3.0


def test_a_write_that_was_cut_short_is_no_checkpoint_and_is_replaced(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            checkpoints.write(tmp_path, 7, some(), kept=2)
    assert checkpoints.paths(tmp_path) == []
    checkpoints.write(tmp_path, 7, some(2.0), kept=2)
    assert checkpoints.read(checkpoints.paths(tmp_path)[0]).tensors["online"]["w"][0, 0] == 2.0


@pytest.mark.parametrize("name", ["online.safetensors", "target.safetensors", "optimizer.safetensors", "manifest.msgpack"])
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, how):
    path = checkpoints.write(tmp_path, 7, some(), kept=2)
    file = path / name
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        checkpoints.read(path)


def test_a_newer_format_is_refused_with_both_numbers(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT_VERSION", 3)
        path = checkpoints.write(tmp_path, 7, some(), kept=2)
    with pytest.raises(CheckpointError, match="format 3, but this code reads 2"):
        checkpoints.read(path)


def test_a_checkpoint_of_the_first_format_is_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT_VERSION", 1)
        path = checkpoints.write(tmp_path, 7, some(3.0), kept=2)
    assert checkpoints.read(path).tensors["online"]["w"][0, 0] == 3.0


def test_newer_ones_are_set_aside_and_none_is_overwritten(tmp_path):
    for _ in range(2):
        for updates in (1, 2, 3):
            if updates > 1 or not (tmp_path / "0000000001").exists():
                checkpoints.write(tmp_path, updates, some(), kept=9)
        moved = checkpoints.set_aside_after(tmp_path / "0000000001")
    assert [path.name for path in checkpoints.paths(tmp_path)] == ["0000000001"]
    assert [path.name for path in moved] == ["0000000002.1", "0000000003.1"]
    assert sorted(path.name for path in (tmp_path / "aside").iterdir()) == [
        *["0000000002", "0000000002.1", "0000000003", "0000000003.1"]
    ]


def test_nothing_in_the_manifest_is_pickled(tmp_path):
    path = checkpoints.write(tmp_path, 7, some(), kept=2)
    manifest = msgpack.unpackb((path / checkpoints.MANIFEST).read_bytes()[32:])
    assert set(manifest) == {"format_version", "files", "meta"}
