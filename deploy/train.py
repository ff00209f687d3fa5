"""`qfleet train` and `qfleet resume`: opens the run directory, runs the system, writes the summary."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.environments import probe
from common.config import EnvSpec, RunConfig
from common.errors import UserError
from deploy import run_dir as run_dirs
from deploy.human_scores import human_normalized_score
from deploy.outcome import Outcome
from deploy.plan import check_index, check_learner, check_memory, plan_cpus
from deploy.plots import draw_learning_curve, read_rows
from deploy.progress import Progress
from deploy.protocol_card import make_card
from deploy.recorder import Recorder
from deploy.stop_signal import StopSignal

EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED = 0, 1, 130


def train(config: RunConfig, path: Path, checkpoint: str | None = None) -> int:
    """Begins or continues the run at `path`, from its newest checkpoint or the one that is named; returns the exit status.

    Raises:
      UserError: before anything is written, where the configuration does not fit the environment, the machine or the
        run directory.
    """
    started = time.monotonic()
    spec = probe(config.env)
    if config.address is not None:
        _attach(config, spec, path)
    else:
        if not config.serial:
            plan_cpus(config, run_dirs.num_cpus())
        check_memory(config, spec)
        check_learner(config.learner)
        if config.metrics_port is not None:
            _check_metrics_port(config.metrics_port)
    run_dir = run_dirs.open_run(config, path, checkpoint)
    progress = Progress(config, run_dir.meta, last_epoch=run_dir.last_epoch, is_exact=run_dir.may_go_on_exactly(config))
    progress.started = started
    budget = progress.stopped_by()
    if budget is not None:
        run_dir.close()
        print(
            f"{path} has already reached its {budget} ({getattr(config, budget)}): raise --{budget.replace('_', '-')} to go on"
        )
        return EXIT_DONE
    stop = StopSignal()
    recorder = Recorder(run_dir, progress)
    _announce(recorder, run_dir, progress)
    outcome: Outcome | None = None
    try:
        run_dir.write_epoch(progress.epoch)
        if config.serial:
            from deploy.serial import run_serial

            outcome = run_serial(config, spec, run_dir, progress, recorder, stop)
        else:
            from deploy import ray_environment

            if config.address is None:
                ray_environment.prepare()
            from deploy.supervisor import Supervisor

            outcome = Supervisor(config, spec, run_dir, progress, recorder, stop).run()
    except OSError as error:  # A full disk, most likely.
        outcome = Outcome("fault", f"{error.filename or path}: {error.strerror}; the last checkpoint is kept", None, None)
    finally:
        if outcome is None:
            recorder.close()
            run_dir.close()
    return _close(config, spec, run_dir, progress, recorder, outcome)


def _attach(config: RunConfig, spec: EnvSpec, path: Path) -> None:
    """Connects to the cluster of `config.address`.

    Raises:
      UserError: where that cannot be, or the replay's budget is too small for its index; what nodes have room for is known later.
    """
    from deploy import ray_environment

    assert config.address is not None
    check_index(config, spec)
    ray_environment.prepare_to_attach(config.address)
    from deploy import ray_session

    if ray_session.runs_as_job() and not path.is_absolute():
        raise UserError(
            f"--run-dir {path}: this job runs in a copy of its working directory that Ray removes: give an absolute path on a disk that stays"
        )
    ray_session.attach(config.address)


def _check_metrics_port(port: int) -> None:
    """Raises UserError where this port of loopback cannot be listened on: Ray's agent would end of it, and the run with that."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"--metrics-port {port}: this port cannot be had ({why}): give one that is free") from error


def _close(
    config: RunConfig, spec: EnvSpec, run_dir: run_dirs.RunDirectory, progress: Progress, recorder: Recorder, outcome: Outcome
) -> int:
    """Writes what a run leaves, and says how it ended; returns the exit status."""
    try:
        recorder.close()
        run_dir.write_summary(_summary(config, progress, outcome) | _score(config, spec, run_dir, progress))
        draw_learning_curve([run_dir.path], run_dir.path / "learning_curve.png")
    except OSError as error:
        print(f"qfleet: {run_dir.path}: {error.strerror}: the summary could not be written", file=sys.stderr)
    run_dir.close()
    return _report(run_dir.path, progress, outcome)


def _announce(recorder: Recorder, run_dir: run_dirs.RunDirectory, progress: Progress) -> None:
    if run_dir.checkpoint is None:
        recorder.event(f"new run in {run_dir.path}")
        return
    rows = read_rows(run_dir.path) if (run_dir.path / "metrics.jsonl").exists() else []
    last = rows[-1] if rows else {}
    progress.after_checkpoint = (
        max(last.get("updates", 0) - progress.updates, 0),
        max(last.get("env_steps", 0) - progress.env_steps, 0),
    )
    recorder.event(f"continuing {run_dir.path} from update {progress.updates:,} and env step {progress.env_steps:,}")
    if run_dir.set_aside:
        recorder.event(
            f"newer checkpoints are in {run_dir.set_aside[0].parent} now: {', '.join(p.name for p in run_dir.set_aside)}"
        )
    for change in run_dir.changed:
        recorder.event(f"changed since the last command: {change}")


def _summary(config: RunConfig, progress: Progress, outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": config.recipe,
        "env": config.env.game,
        "seed": config.seed,
        "stopped_by": outcome.stopped_by,
        "fault": outcome.fault,
        "wall_seconds": progress.wall_seconds,
        "total_wall_seconds": progress.earlier_seconds + progress.wall_seconds,
        "env_steps": progress.env_steps,
        "frames": progress.frames,
        "updates": progress.updates,
        "samples": progress.samples,
        "params_digest": outcome.params_digest,
        "evaluation": progress.evaluation_dict(),
        "ledger": outcome.ledger,
    }


def _score(config: RunConfig, spec: EnvSpec, run_dir: run_dirs.RunDirectory, progress: Progress) -> dict[str, Any]:
    """Returns what makes the evaluation comparable with others; None where there was none."""
    result = progress.evaluation
    if result is None:
        return {"human_normalized_score": None, "protocol_card": None}
    card = make_card(
        config,
        result,
        env=config.env,
        num_actions=spec.num_actions,
        training_frames=progress.evaluated_frames,
        commit=run_dir.commit,
    )
    score = human_normalized_score(config.env.game, result.mean_return)
    return {"human_normalized_score": score, "protocol_card": asdict(card)}


def _report(path: Path, progress: Progress, outcome: Outcome) -> int:
    """Says in a few lines how it ended; returns the exit status."""
    evaluation = progress.evaluation
    result = f"mean return {evaluation.mean_return:.1f} over {evaluation.episodes} episodes" if evaluation else "no evaluation"
    print(
        f"ended by {outcome.stopped_by} after {progress.wall_seconds:.0f} s: {progress.env_steps:,} env steps, "
        f"{progress.updates:,} updates, {result}"
    )
    if outcome.params_digest:
        print(f"parameters sha256 {outcome.params_digest}")
    print(f"see {path / 'summary.json'}, {path / 'learning_curve.png'}; the same command goes on from here")
    if outcome.fault is not None:
        print(f"qfleet: {outcome.fault}", file=sys.stderr)
        return EXIT_FAULT
    return EXIT_INTERRUPTED if outcome.stopped_by == "interrupted" else EXIT_DONE


def resume(path: Path, overrides: Any, checkpoint: str | None = None) -> int:
    """Continues the run at `path` with its own configuration, changed by `overrides(config)`; from a checkpoint that is named, or
    the newest.
    """
    stored = run_dirs.read_config(path)
    config: RunConfig = overrides(stored)
    if config.run_dir != stored.run_dir:
        raise UserError(f"--run-dir cannot be set here: qfleet resume goes on in {path}")
    if run_dirs.newest_checkpoint_path(path) is None:
        raise UserError(f"{path} has no checkpoint to resume from; start it again with qfleet train {config.recipe}")
    return train(config, path, checkpoint)
