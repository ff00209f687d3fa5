"""The lock of a directory that one command at a time may write to."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

from common.errors import UserError

_LOOK_SECONDS = 0.2  # Far longer than `is_held` holds the lock.


def hold(directory: Path, option: str, *, busy: str) -> TextIO:
    """Returns the lock of `directory`, which holds until the file is closed here and in every process that has it.

    Args:
      directory: there already.
      option: that named it, for the errors.
      busy: what to say, after the directory's name, where another process holds the lock.

    Raises:
      UserError: where another process holds it, or the directory cannot be written to or locked.
    """
    try:
        lock = (directory / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{option} {directory}: cannot be written to ({error.strerror}); choose another") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Perhaps `is_held`, for a moment.
            time.sleep(_LOOK_SECONDS)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"{option} {directory}: {busy}") from error
    except OSError as error:
        lock.close()
        raise UserError(
            f"{option} {directory}: its file system has no locks ({error.strerror}): mount it with them (Lustre: -o flock)"
        ) from error
    return lock


def is_held(directory: Path) -> bool:
    """Whether a process holds the lock of `directory`."""
    try:
        with (directory / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
