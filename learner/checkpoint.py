"""Checkpoints on disk: safetensors files and a msgpack manifest with their checksums. Nothing is ever unpickled.

    checkpoints/<updates, 10 digits>[-<n>]/   online.safetensors target.safetensors optimizer.safetensors ... manifest.msgpack

Written aside, fsynced and renamed, so a checkpoint is there whole or not at all. Tensors are numpy arrays here, so that the
driver can check a checkpoint without PyTorch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from common.errors import CheckpointError
from common.files import make_directory, sealed, sync_directory, unsealed, write_synced
from common.messages import Array

FORMAT_VERSION = 2
_READABLE = (1, 2)  # Format 1 had nothing of shards and actors: what reads their part finds it missing.
MANIFEST = "manifest.msgpack"
_NEEDED = ("online", "target", "optimizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint holds."""

    tensors: Mapping[str, Mapping[str, Array]]
    """`online`, `target`, `optimizer` and what else there is, each a map of named arrays and a file."""
    meta: Mapping[str, Any]
    """Plain values: counters, the run's identity, the optimizer's hyperparameters."""


def write(directory: Path, updates: int, checkpoint: Checkpoint, *, kept: int) -> Path:
    """Writes `directory/<updates>` atomically, then deletes all but the newest `kept`; returns its path.

    A second checkpoint of as many updates (actors may have gone on) stands beside the first as `<updates>-001` and so on.
    """
    make_directory(directory)
    final, number = directory / f"{updates:010d}", 0
    while final.exists():
        number += 1
        final = directory / f"{updates:010d}-{number:03d}"
    for torn in directory.glob(".*.part"):
        shutil.rmtree(torn)
    aside = directory / f".{final.name}.part"
    try:
        _write_aside(aside, checkpoint)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # On a full disk it takes what others need.
        raise
    aside.rename(final)
    sync_directory(directory)
    for old in paths(directory)[:-kept]:
        shutil.rmtree(old)
    return final


def _write_aside(aside: Path, checkpoint: Checkpoint) -> None:
    aside.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in checkpoint.tensors.items():
        # Of an array that is not contiguous, safetensors would write the wrong bytes.
        data = safetensors.numpy.save({key: np.ascontiguousarray(array) for key, array in tensors.items()})
        write_synced(aside / f"{name}.safetensors", data)
        files[f"{name}.safetensors"] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = msgpack.packb({"format_version": FORMAT_VERSION, "files": files, "meta": dict(checkpoint.meta)})
    write_synced(aside / MANIFEST, sealed(body))
    sync_directory(aside)


def paths(directory: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"\d{10}(-\d{3})?", path.name))


def set_aside_after(path: Path) -> list[Path]:
    """Moves the checkpoints that are newer than this one into a directory `aside` beside it; returns where they are."""
    newer = [other for other in paths(path.parent) if other.name > path.name]
    aside = path.parent / "aside"
    moved = []
    for other in newer:
        make_directory(aside)
        place, number = aside / other.name, 0
        while place.exists():
            number += 1
            place = aside / f"{other.name}.{number}"
        other.rename(place)
        moved.append(place)
    if moved:
        sync_directory(aside)
        sync_directory(path.parent)
    return moved


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks every byte of it.

    Raises:
      CheckpointError: naming the file, where one is missing, truncated, altered or of a newer format.
    """
    manifest = _read_manifest(path)
    tensors = {}
    for name in dict.fromkeys((*_NEEDED, *(Path(name).stem for name in manifest["files"]))):
        file = path / f"{name}.safetensors"
        expected = manifest["files"].get(file.name)
        data = _read_bytes(file)
        if expected is None or len(data) != expected["num_bytes"]:
            raise _fault(file, f"it has {len(data)} bytes, not what the manifest says: truncated")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise _fault(file, "its checksum is wrong: it was altered")
        try:
            tensors[name] = safetensors.numpy.load(data)
        except SafetensorError as error:
            raise _fault(file, str(error)) from error
    return Checkpoint(tensors=tensors, meta=manifest["meta"])


def read_meta(path: Path) -> dict[str, Any]:
    """Reads the plain values of a checkpoint, and checks these alone; raises CheckpointError as `read` does."""
    return dict(_read_manifest(path)["meta"])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    data = _read_bytes(file)
    if (body := unsealed(data)) is None:
        raise _fault(file, "its checksum is wrong: truncated or altered")
    manifest = msgpack.unpackb(body, strict_map_key=False)
    if manifest["format_version"] not in _READABLE:
        text = f"format {manifest['format_version']}, but this code reads {FORMAT_VERSION}: use the qfleet that wrote it"
        raise CheckpointError(f"checkpoint {file}: {text}")
    assert isinstance(manifest, dict)
    return manifest


def _fault(file: Path, text: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {file}: {text}; move {file.parent} away to go on from the one before it")


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _fault(file, f"it cannot be read ({error.strerror})") from error
