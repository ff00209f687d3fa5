"""A directory's lock: who waits for it, who only looks, and a file system that has none."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from deploy import locks


def test_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    assert not locks.is_held(tmp_path), "no lock file yet"
    with locks.hold(tmp_path, "--out", busy="somebody is there"):
        assert locks.is_held(tmp_path)
        with pytest.raises(UserError, match=r"^--out .+: somebody is there$"):
            locks.hold(tmp_path, "--out", busy="somebody is there")
    assert not locks.is_held(tmp_path)
    locks.hold(tmp_path, "--out", busy="somebody is there").close()


def test_lock_is_taken_though_somebody_looks(tmp_path: Path) -> None:
    """`is_held` takes it for a moment itself. Kills: one try only."""
    (tmp_path / ".lock").touch()
    looking = (tmp_path / ".lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, looking.close).start()
    began = time.monotonic()
    locks.hold(tmp_path, "--out", busy="somebody is there").close()
    assert time.monotonic() - began > 0.04, "it was held at first"


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"its file system has no locks \(No locks available\): mount it with them"):
        locks.hold(tmp_path, "--out", busy="somebody is there")


def test_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # Permissions do not hold for root.
    with pytest.raises(UserError, match=r"cannot be written to .+ choose another"):
        locks.hold(tmp_path, "--out", busy="somebody is there")
