"""`qfleet adjust RUN`: changes the limiter of a run that is under way. The command leaves a file, the run takes it up."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import UserError
from deploy import locks
from deploy.progress import Progress
from deploy.recorder import Recorder
from deploy.roles import limiter_shares
from deploy.run_dir import RunDirectory, read_config, write_json

_FILES = "adjust-*.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdjustFlags:
    """What to change of the limiter while the run goes on; what is not given stays."""

    samples_per_insert: float | None = None
    """Times that a transition is sampled on average, from now on. inf: no ratio."""
    min_size: int | None = None
    """Transitions, over all shards, before the learner goes on."""
    limiter_buffer_samples: int | None = None
    """Samples by which the ratio may be off on either side, over all shards."""


def adjust(path: Path, flags: AdjustFlags) -> int:
    """Checks the change and leaves it for the run; returns the exit status.

    Raises:
      UserError: where nothing runs there, nothing is to change, or somebody would wait for ever.
    """
    config = read_config(path)
    if all(value is None for value in asdict(flags).values()):
        raise UserError("qfleet adjust needs something to change: --samples-per-insert, --min-size or --limiter-buffer-samples")
    _adjusted(config, asdict(flags))
    if not locks.is_held(path):
        raise UserError(
            f"{path}: no qfleet is running there; give the flags to qfleet resume instead, as --replay.samples-per-insert"
        )
    file = path / f"adjust-{time.time_ns():020d}-{os.getpid()}.json"  # One a command: none takes another's place.
    try:
        write_json(file, asdict(flags))
    except OSError as error:
        file.with_name(f".{file.name}.part").unlink(missing_ok=True)
        raise UserError(
            f"{file} cannot be written ({error.strerror}): make room, or run qfleet adjust as the run's user"
        ) from error
    print(f"{path}: the run takes it up within {config.log_period_seconds:.0f} s and says so in its log")
    return 0


def take_up_adjustment(
    config: RunConfig,
    run_dir: RunDirectory,
    progress: Progress,
    recorder: Recorder,
    set_limiters: Callable[[dict[str, Any]], None],
) -> RunConfig:
    """Applies what commands have left for this run, each once and in their order; returns the configuration from now on.

    `set_limiters` gives every shard its shares. A change that cannot be read or would stop the run is told, and nothing done.
    """
    for file in sorted(run_dir.path.glob(_FILES)):
        try:
            adjusted = _adjusted(config, _take(file))
            set_limiters(limiter_shares(adjusted))
            run_dir.write_config(adjusted)
        except (UserError, OSError) as error:
            recorder.event(f"the limiters stay as they are: {error}")
            continue
        config = progress.config = adjusted
        replay = config.replay
        recorder.event(
            f"limiters changed: {replay.samples_per_insert or 'no'} samples per insert, min_size {replay.min_size}, buffer of "
            f"{config.limiter_buffer_samples} samples"
        )
    return config


def _take(file: Path) -> dict[str, Any]:
    """Returns what a command has left, and removes it. Raises UserError where that cannot be read."""
    try:
        data = file.read_bytes()
    finally:
        file.unlink()
    try:
        values = asdict(AdjustFlags(**json.loads(data)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a change that qfleet adjust wrote") from error
    if not all(value is None or type(value) in (int, float) for value in values.values()):
        raise UserError(f"{file}: not a change that qfleet adjust wrote")
    return values


def _adjusted(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("samples_per_insert") == math.inf:
        given["samples_per_insert"] = None
    try:
        return replace(config, replay=replace(config.replay, **given))
    except ValueError as error:
        raise UserError(str(error)) from error
