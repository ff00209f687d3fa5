"""A witness for what survives: every system call that changes a directory, and what the disk may hold if all ends at one of them.

The model is that of POSIX: a kill of the process takes nothing that a call has done. A power failure takes what was not synced: of a
file's bytes those since its last `fsync`, of a directory's names those since the directory's; any part of either may have got through,
a directory's in their order.
"""

import os
from pathlib import Path
from typing import NamedTuple


class Call(NamedTuple):
    """One system call. `key` is of the file or directory that it changes or syncs."""

    name: str
    key: int
    data: object = None
    """write: (offset, bytes); truncate: length; link: (name, child's key); unlink: name; rename: (name, new parent, new name)."""


class RecordedDisk:
    """Records what is done under `root`, which is really done too. Single-threaded."""

    def __init__(self, root, monkeypatch):
        self.root, self.calls = Path(root), []
        self._keys, self._directories, self._num_keys = {"": 0}, {0}, 1
        self._files, self._offsets = {}, {}  # Of open files, by descriptor: keys, and where the next write goes.
        for name in ("open", "close", "dup", "write", "writev", "fsync", "fdatasync", "ftruncate", "truncate", "lseek"):
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace"):
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))

    def _recording(self, name, call):
        record = getattr(self, f"_{name}")

        def recording(*args, **kwargs):
            before = (
                self._inside(args[0], kwargs) if name in ("rmdir", "unlink", "remove", "rename", "replace", "open") else None
            )
            existed = before is not None and os.path.lexists(self.root / before)
            result = call(*args, **kwargs)
            record(result, before, existed, *args, **kwargs)
            return result

        return recording

    def _inside(self, path, kwargs):
        """Returns the path relative to the root, or None where it is elsewhere."""
        if isinstance(path, int):
            return None
        directory = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
        path = os.path.join(
            os.readlink(f"/proc/self/fd/{directory}") if directory is not None else os.getcwd(), os.fspath(path)
        )
        relative = os.path.relpath(path, self.root)
        return None if relative.startswith("..") else ("" if relative == "." else relative)

    def _link(self, path):
        self._keys[path] = key = self._num_keys
        self._num_keys += 1
        parent, name = os.path.split(path)
        self.calls.append(Call("link", self._keys[parent], (name, key)))
        return key

    def _open(self, file, path, existed, _, flags, *args, **kwargs):
        if path is None:
            return
        if flags & os.O_CREAT and not existed:
            self._link(path)
        elif flags & os.O_TRUNC:
            self.calls.append(Call("truncate", self._keys[path], 0))
        self._files[file], self._offsets[file] = self._keys[path], 0

    def _close(self, result, path, existed, file):
        self._files.pop(file, None)

    def _dup(self, new, path, existed, file):
        if file in self._files:
            self._files[new] = self._files[file]

    def _write(self, num_bytes, path, existed, file, data):
        if file in self._files:
            self.calls.append(Call("write", self._files[file], (self._offsets[file], bytes(data[:num_bytes]))))
            self._offsets[file] += num_bytes

    def _writev(self, num_bytes, path, existed, file, parts):
        self._write(num_bytes, path, existed, file, b"".join(parts))

    def _fsync(self, result, path, existed, file):
        if file in self._files:
            self.calls.append(Call("sync", self._files[file]))

    _fdatasync = _fsync

    def _ftruncate(self, result, path, existed, file, length):
        if file in self._files:
            self.calls.append(Call("truncate", self._files[file], length))

    def _truncate(self, result, path, existed, file, length):
        path = self._inside(file, {})
        if path is not None:
            self.calls.append(Call("truncate", self._keys[path], length))

    def _lseek(self, offset, path, existed, file, *args):
        if file in self._files:
            self._offsets[file] = offset

    def _mkdir(self, result, path, existed, directory, *args, **kwargs):
        path = self._inside(directory, kwargs)
        if path is not None:
            self._directories.add(self._link(path))

    def _unlink(self, result, path, existed, *args, **kwargs):
        if path is not None:
            parent, name = os.path.split(path)
            self.calls.append(Call("unlink", self._keys[parent], name))
            del self._keys[path]

    _rmdir = _remove = _unlink

    def _rename(self, result, path, existed, source, target, **kwargs):
        if path is None:
            return
        target = self._inside(target, {})
        parent, name = os.path.split(path)
        new_parent, new_name = os.path.split(target)
        self.calls.append(Call("rename", self._keys[parent], (name, self._keys[new_parent], new_name)))
        moved = {old: key for old, key in self._keys.items() if old == path or old.startswith(f"{path}/")}
        for old in moved:
            del self._keys[old]
        self._keys |= {target + old[len(path) :]: key for old, key in moved.items()}

    _replace = _rename

    def killed(self, num_calls, target, rng):
        """Makes in `target` what a kill at the last of `num_calls` leaves: of that, where it writes, a part."""
        calls = list(self.calls[:num_calls])
        if calls and calls[-1].name == "write":
            offset, data = calls[-1].data
            calls[-1] = calls[-1]._replace(data=(offset, data[: rng.integers(len(data) + 1)]))
        self._write_tree(
            _names(calls, None), {key: _bytes(calls, key, None, rng) for key in range(self._num_keys)}, Path(target)
        )

    def failed(self, num_calls, target, rng, *, is_worst):
        """Makes in `target` what a power failure after `num_calls` leaves: only what was synced, or any part of the rest too."""
        calls = self.calls[:num_calls]
        synced = {call.key: i for i, call in enumerate(calls) if call.name == "sync"}
        cuts = {}
        for key in range(self._num_keys):
            first = synced.get(key, -1)
            cuts[key] = first if is_worst else int(rng.integers(first, num_calls)) if num_calls > first else first
        while True:  # A rename is done in both directories or in neither.
            raised = dict(cuts)
            for i, call in enumerate(calls):
                if call.name == "rename" and (i <= raised[call.key]) != (i <= raised[call.data[1]]):
                    raised[call.key], raised[call.data[1]] = max(raised[call.key], i), max(raised[call.data[1]], i)
            if raised == cuts:
                break
            cuts = raised
        contents = {key: _bytes(calls, key, synced.get(key, -1), None if is_worst else rng) for key in range(self._num_keys)}
        self._write_tree(_names(calls, cuts), contents, Path(target))

    def _write_tree(self, names, contents, target, key=0):
        target.mkdir()
        for name, child in names.get(key, {}).items():
            if child in self._directories:
                self._write_tree(names, contents, target / name, child)
            else:
                (target / name).write_bytes(contents[child])


def _names(calls, cuts):
    """{directory: {name: key}} of those calls that come before their directory's cut."""
    names = {}
    for i, call in enumerate(calls):
        if call.name not in ("link", "unlink", "rename") or (cuts is not None and i > cuts[call.key]):
            continue
        of_parent = names.setdefault(call.key, {})
        if call.name == "link":
            of_parent[call.data[0]] = call.data[1]
        elif call.name == "unlink":
            del of_parent[call.data]
        else:
            name, new_parent, new_name = call.data
            names.setdefault(new_parent, {})[new_name] = of_parent.pop(name)
    return names


def _bytes(calls, key, synced, rng):
    """A file's bytes: all where `synced` is None; else what was there at that call, and of later ones some where there is an rng."""
    mine = [(i, call) for i, call in enumerate(calls) if call.key == key and call.name in ("write", "truncate")]
    if synced is not None:
        safe = [call for i, call in mine if i < synced]
        later = [call for i, call in mine if i > synced]
        later = [] if rng is None else later[: rng.integers(len(later) + 1)]
        if later and later[-1].name == "write":
            offset, data = later[-1].data
            part = data[: rng.integers(len(data) + 1)]
            # A file may have got its new length before its bytes.
            later[-1] = later[-1]._replace(data=(offset, part + bytes(len(data) - len(part)) if rng.integers(2) else part))
    else:
        safe, later = [call for _, call in mine], []
    data = bytearray()
    for call in safe + later:
        if call.name == "truncate":
            data = data[: call.data] + bytes(max(call.data - len(data), 0))
        else:
            offset, written = call.data
            data = data + bytes(max(offset - len(data), 0))
            data[offset : offset + len(written)] = written
    return bytes(data)
