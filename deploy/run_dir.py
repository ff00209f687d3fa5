"""The run directory: who may write there, what the run is, and how it ended.

run.json  workers.json  metrics.jsonl  events.*  checkpoints/  learning_curve.png  summary.json
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common import config as config_module
from common.config import EnvConfig, RunConfig
from common.errors import CheckpointError, UserError
from common.files import write_whole
from deploy import locks
from learner import checkpoint as checkpoints

FORMAT_VERSION = 1
_PACKAGES = ("torch", "ray", "gymnasium", "ale-py", "numpy", "lz4", "msgpack", "safetensors")
_MUST_AGREE = ("env", "network", "seed", "learner.optimizer")
_CHANGES_NOTHING = (
    "max_",
    "log_period_seconds",
    "evaluation.",
    "learner.checkpoint",
    "object_store_memory",
    "address",
    "metrics_port",
)
_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class RunDirectory:
    """An open run directory, locked against a second command until `close`."""

    path: Path
    run: str
    """The run's identity, in every message: chunks of another run are refused."""
    checkpoint: Path | None
    """The newest checkpoint, checked, from which this command goes on; None at the beginning."""
    meta: dict[str, Any]
    """The plain values of that checkpoint; empty at the beginning."""
    changed: list[str]
    """Settings that differ from those of the command before this one."""
    last_epoch: int
    """The greatest epoch that a command on the run has used; -1 at the beginning. A checkpoint may be of an earlier one."""
    set_aside: list[Path]
    """Checkpoints that are newer than the one that was asked for."""
    commit: str | None
    """Of the code, when this command began; see `commit`."""
    _info: dict[str, Any]
    _lock: TextIO

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary_path, summary)

    def write_config(self, config: RunConfig) -> None:
        """Writes settings that were changed while the run goes on, for those who continue it."""
        self._info["config"] = config_module.as_dict(config)
        write_json(self.path / "run.json", self._info)

    def write_epoch(self, epoch: int) -> None:
        """Notes that an epoch is used, before anything is done in it: none comes twice, whatever checkpoint a command goes on from."""
        self._info["epoch"] = max(epoch, self.last_epoch)
        write_json(self.path / "run.json", self._info)

    def may_go_on_exactly(self, config: RunConfig) -> bool:
        """Whether this command can go on to the bit from the checkpoint: a serial run of the same settings wrote it."""
        if not (config.serial and "serial" in self.meta and config.replay.sync_seconds is not None):
            return False
        # Not what run.json says: a command in between may have changed that, and ended before it did anything.
        try:
            saved = config_module.from_dict(self.meta["run_counters"]["config"])
        except (ValueError, TypeError):  # Of another version, with settings that this one does not know.
            return False
        before, now = _flat(config_module.as_dict(saved)), _flat(config_module.as_dict(config))
        changed = [name for name, value in now.items() if name != "run_dir" and before[name] != value]
        return all(name.startswith(_CHANGES_NOTHING) for name in changed)

    def close(self) -> None:
        self._lock.close()


def default_path(config: RunConfig, recipe_env: EnvConfig) -> Path:
    """Returns runs/RECIPE, with game and named protocol where they are not the recipe's, and the seed where it is not 0."""
    parts = [config.recipe]
    parts += [config.env.game] if config.env.game != recipe_env.game else []
    parts += [config.protocol] if config.protocol not in (None, recipe_env.protocol_name) else []
    parts += [f"seed{config.seed}"] if config.seed else []
    return Path("runs") / "-".join(parts)


def open_run(config: RunConfig, path: Path, checkpoint: str | None = None) -> RunDirectory:
    """Creates the run directory, or goes on with the run that is there: from its newest checkpoint, or from the one of this name,
    and then newer ones are moved to checkpoints/aside.

    Raises:
      UserError: where the run there is another one, or running, or its files cannot be trusted; nothing is written then.
    """
    _make_directory(path)
    lock = locks.hold(path, "--run-dir", busy="another qfleet is running there; stop it first, or choose another --run-dir")
    try:
        return _open_locked(config, path, lock, checkpoint)
    except BaseException:
        lock.close()
        raise


def _open_locked(config: RunConfig, path: Path, lock: TextIO, name: str | None) -> RunDirectory:
    info_path = path / "run.json"
    changed: list[str] = []
    checkpoint: Path | None = None
    meta: dict[str, Any] = {}
    set_aside: list[Path] = []
    if info_path.exists():
        info = read_run_json(path)
        # Through `read_config`: a setting that the version which wrote it did not have is what its default says.
        changed = _differences(read_config(path), config, path)
        checkpoint = newest_checkpoint_path(path) if name is None else _checkpoint_named(path, name)
        meta = dict(checkpoints.read(checkpoint).meta) if checkpoint else {}
        if meta and meta["run"] != info["run"]:
            raise CheckpointError(f"checkpoint {checkpoint}: it is of another run than {info_path}; move it away")
        if checkpoint is not None and name is not None:
            set_aside = checkpoints.set_aside_after(checkpoint)
    else:
        info = {"format_version": FORMAT_VERSION, "run": secrets.token_hex(8), "versions": versions(), "hardware": hardware()}
    info["config"] = config_module.as_dict(config)
    write_json(info_path, info)
    for left in path.glob("adjust-*.json"):  # For a command that has ended: this one's flags are newer.
        left.unlink()
    return RunDirectory(
        path=path,
        run=info["run"],
        checkpoint=checkpoint,
        meta=meta,
        changed=changed,
        last_epoch=max(info.get("epoch", -1), meta.get("epoch", -1)),
        set_aside=set_aside,
        commit=commit(),
        _info=info,
        _lock=lock,
    )


def _checkpoint_named(path: Path, name: str) -> Path:
    found = checkpoints.paths(path / "checkpoints")
    for checkpoint in found:
        if name == checkpoint.name or Path(name).resolve() == checkpoint.resolve():
            return checkpoint
    raise UserError(
        f"--from {name}: there is no such checkpoint in {path}; there are {', '.join(p.name for p in found) or 'none'}"
    )


def read_run_json(path: Path) -> dict[str, Any]:
    """Reads run.json; raises UserError where it is not there or cannot be read by this version."""
    file = path / "run.json"
    try:
        info = json.loads(file.read_text())
        version = info["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{file}: format {version}, but this code reads {FORMAT_VERSION}: use the qfleet that wrote it")
        assert isinstance(info["run"], str) and isinstance(info["config"], dict)
    except OSError as error:
        raise UserError(f"{path} is not a run directory: {file.name} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file}: not a run's description (truncated or altered); restore it, or choose another --run-dir"
        ) from error
    return dict(info)


def read_config(path: Path) -> RunConfig:
    """Returns the configuration of the run at `path`; raises UserError where there is none that this version knows."""
    values = read_run_json(path)["config"]
    try:
        return config_module.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'run.json'}: {error}; it was written by another version of qfleet") from error


def newest_checkpoint_path(path: Path) -> Path | None:
    """Returns where the newest checkpoint of a run is, or None."""
    found = checkpoints.paths(path / "checkpoints")
    return found[-1] if found else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented JSON; the file is there whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {path}: cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--run-dir {path}: no permission to write there")
    foreign = [entry.name for entry in path.iterdir() if entry.name != ".lock"]
    if foreign and not (path / "run.json").exists():
        raise UserError(f"--run-dir {path}: has files ({foreign[0]}) but no run; choose an empty or new directory")


def _differences(old: RunConfig, new: RunConfig, path: Path) -> list[str]:
    """Returns what changed; raises UserError where the run could not go on with it."""
    if old.recipe != new.recipe:
        raise UserError(f"{path} holds a run of recipe {old.recipe!r}, not {new.recipe!r}: choose another --run-dir")
    if new.protocol not in (None, old.env.protocol_name):
        raise UserError(
            f"{path} holds a run of protocol {old.env.protocol_name}, which it keeps: begin another one with "
            f"qfleet train {new.recipe} --protocol {new.protocol} and another --run-dir"
        )
    changed = []
    flat_old, flat_new = _flat(config_module.as_dict(old)), _flat(config_module.as_dict(new))
    for name, value in flat_new.items():
        before = flat_old.get(name)
        if before == value or name == "run_dir":
            continue
        if name in _MUST_AGREE or name.split(".")[0] in _MUST_AGREE:
            raise UserError(f"{path} holds a run with {name} {before}, not {value}: choose another --run-dir")
        changed.append(f"{name} {before} -> {value}")
    return changed


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit(checkout: Path = _CHECKOUT) -> str | None:
    """Returns the git commit of the checkout, with -dirty where a tracked file was changed; None where it is none, or without git."""
    told = _git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return told.decode().strip() if told is not None else None


def uncommitted(checkout: Path = _CHECKOUT) -> str | None:
    """Returns a digest of what tracked files have beyond the commit; None where they have nothing, and where `commit` is None."""
    changes = _git(checkout, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color")
    return hashlib.sha256(changes).hexdigest()[:12] if changes else None


def _git(checkout: Path, *words: str) -> bytes | None:
    if not (checkout / ".git").exists():  # Installed elsewhere: a repository around it is not ours.
        return None
    command = ["git", f"--git-dir={checkout / '.git'}", f"--work-tree={checkout}", *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "num_cpus": os.cpu_count(), "system": platform.system()}


def num_cpus() -> int:
    """Returns the processors that this process may use."""
    return len(os.sched_getaffinity(0))
