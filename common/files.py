"""Files that are there whole, or as they were, whatever ends the process or the machine; each step is one system call."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until its bytes are on the disk; its name is, after `sync_directory`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes aside and renames, so that the file is there whole or, where that fails, as it was."""
    aside = path.with_name(f".{path.name}.part")
    try:
        write_synced(aside, data)
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sealed(body: bytes) -> bytes:
    """Returns the bytes of a file that begins with its checksum."""
    return hashlib.sha256(body).digest() + body


def unsealed(data: bytes) -> bytes | None:
    """Returns what `sealed` was given, or None where a byte is gone or altered."""
    digest, body = data[:32], data[32:]
    return body if hashlib.sha256(body).digest() == digest else None


def make_directory(path: Path) -> None:
    """Makes a directory, where there is none, with its parents; waits until their names are on the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
