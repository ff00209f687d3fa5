"""`qfleet scale`: how a recipe's throughput grows with actors, environments, shards, batch, devices and ratio, and what limits it.

A point is one setting of these six; each is measured once a round by a training run of its own (`deploy/scale_run.py`). One axis is swept
at a time around the recipe's own settings. All that was measured is in scale.csv, one row a point and round, from which the same
command goes on; scale.json has the laws (`deploy/scaling_law.py`), the sentences (`deploy/scaling_advice.py`) and on what they hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from common import config as config_module
from common.config import EnvSpec, RunConfig
from common.errors import UserError
from deploy import plan, run_dir
from deploy.scale_run import Measurement, measure_run
from deploy.scale_table import Row, ScaleTable, Settings, lock_directory
from deploy.scaling_advice import counted
from deploy.stop_signal import StopSignal
from deploy.train import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED

_COMMAND = (sys.executable, "-m", "deploy")
_MOST_MINUTES = 60.0  # Of a run beyond what is measured: the bound of one whose sweep was killed.
_START_AND_END_SECONDS = 20.0  # Measured on two cores, for the plan.
_FLAGS_OF_RUN = ("--run-dir", "--log-period-seconds", "--max-minutes", "--address", "--serial")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleFlags:
    """Measures a recipe's throughput over one axis at a time, each point by training runs of its own; or one role alone.

    Flags of `qfleet train` may follow after --, and are those of every run: -- --env.game breakout --learner.device cpu.
    """

    actors: tuple[int, ...] = ()
    """Numbers of actors to measure. With no axis given: 1, 2, 4, ... up to the processors of this machine."""
    envs_per_actor: tuple[int, ...] = ()
    """Environments of each actor."""
    shards: tuple[int, ...] = ()
    """Replay shards."""
    batch_size: tuple[int, ...] = ()
    """Transitions of an update."""
    devices: tuple[int, ...] = ()
    """Learner workers that share a batch, one for each GPU (or, on CPUs, process)."""
    samples_per_insert: tuple[float | Literal["none"], ...] = ()
    """Times that a transition is sampled. none: no ratio, both sides go as fast as they can."""
    rounds: int = 3
    """Times that each point is measured: every round measures all of them, in an order of its own."""
    seconds: float = 30.0
    """Seconds of each run that are measured."""
    warm_up_seconds: float = 10.0
    """Seconds of each run before that, from when its learner has begun and all its actors act."""
    seed: int = 0
    """Of the orders, and of the intervals."""
    out: Path | None = None
    """Directory of CSV, JSON and pictures, and of the runs. The same command goes on there. None: runs/scale-RECIPE."""
    address: str | None = None
    """Ray cluster to run on, as `qfleet train --address`. None: a Ray of each run's own, here."""
    role: Literal["shard", "store", "learner"] | None = None
    """Loads this role alone, by synthetic peers, until it is full; no axis then."""
    rates: tuple[float, ...] = ()
    """With --role: what the peers ask of it, a second. None given: rising until it is full."""
    role_seconds: float = 2.0
    """With --role: seconds at each rate of each round."""

    def __post_init__(self) -> None:
        for name in ("actors", "envs_per_actor", "shards", "batch_size", "devices", "samples_per_insert", "rates"):
            for value in getattr(self, name):
                if value != "none" and not 0 < value < math.inf:
                    raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
        for name in ("rounds", "seconds", "role_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.warm_up_seconds < math.inf:
            raise ValueError(f"--warm-up-seconds must be finite and not negative, got {self.warm_up_seconds}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.rates and self.role is None:
            raise ValueError("--rates is what a role is loaded with: name it with --role")
        if self.role is not None and (axes := self.axes()):
            raise ValueError(f"--role loads one role alone: leave out --{next(iter(axes)).replace('_', '-')}")
        if self.role is not None and self.address is not None:
            raise ValueError("--role loads a role on a Ray of its own, on this machine: leave out --address")

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Returns the values of the axes that are given, by name."""
        names = Settings.names()
        return {name: tuple(dict.fromkeys(values)) for name in names if (values := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Point:
    """One setting, and the run that it is measured by."""

    settings: Settings
    config: RunConfig
    digest: str
    """Of all that its measurement depends on, but for the commit: by it a row of the table is known again."""


def scale(
    config: RunConfig,
    words: Sequence[str],
    flags: ScaleFlags,
    *,
    command: Sequence[str] = _COMMAND,
    spec: EnvSpec | None = None,
) -> int:
    """Sweeps, or loads one role; returns the exit status: 0 done, 1 some point had a fault, 130 interrupted.

    Args:
      config: the recipe with the flags that follow --, which are `words`.
      command: that runs `qfleet`.
      spec: of the environment; None: it is probed.

    Raises:
      UserError: where a setting contradicts itself or cannot be here; nothing is written then.
    """
    out = flags.out or Path("runs") / f"scale-{config.recipe}"
    if flags.role is not None:
        from deploy.scale_role import load_role

        return load_role(config, flags.role, rates=flags.rates, seconds=flags.role_seconds, rounds=flags.rounds, out=out)
    _check_words(words)
    try:
        config = replace(config, address=flags.address)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    axes = _chosen_axes(config, flags)
    if spec is None:
        from actors.environments import probe

        spec = probe(config.env)
    points, left_out = make_points(config, axes, flags, spec)
    with lock_directory(out) as lock:
        try:
            (out / "runs").mkdir(exist_ok=True)
            table = ScaleTable.read(out / "scale.csv")
            sweep = Sweep(config, flags, axes, points, out, table, [*command, "train", config.recipe, *words], lock)
            sweep.announce(left_out)
            return sweep.run(StopSignal())
        except OSError as error:
            raise UserError(
                f"{error.filename or out}: cannot be written ({error.strerror}); what was measured before is kept, and the same command goes on"
            ) from error


def _check_words(words: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0]
        if name in _FLAGS_OF_RUN:
            advice = "give --out to qfleet scale" if name == "--run-dir" else "leave it out"
            advice = "give it to qfleet scale, before the --" if name == "--address" else advice
            raise UserError(f"{name} is set for each run of a sweep: {advice}")


def _chosen_axes(config: RunConfig, flags: ScaleFlags) -> dict[str, tuple[Any, ...]]:
    axes = flags.axes()
    if not axes and config.address is not None:
        raise UserError("on a cluster say what to sweep, as --actors 1 2 4 8: its processors are known only to a run")
    return axes or {"actors": powers_of_two(run_dir.num_cpus())}


def powers_of_two(most: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and `most` itself."""
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return tuple(dict.fromkeys([*powers, most]))


def make_points(
    config: RunConfig, axes: dict[str, tuple[Any, ...]], flags: ScaleFlags, spec: EnvSpec
) -> tuple[list[Point], list[str]]:
    """Returns the points, each once though it may be of several axes, and a sentence for each that this machine has no room for.

    Raises:
      UserError: where a point contradicts itself, asks for more GPUs than there are, or there is room for none.
    """
    base = Settings.of(config)
    chosen = [replace(base, **{name: value}) for name, values in axes.items() for value in values]
    if config.address is None:
        _check_devices(config, max(settings.devices for settings in chosen))
    points, left_out = [], []
    uncommitted = run_dir.uncommitted()
    for settings in dict.fromkeys(chosen):
        try:
            one = settings.applied_to(config)
        except ValueError as error:
            raise UserError(f"{settings.difference(base) or 'the recipe'}: {error}") from error
        why = _no_room(one, spec)
        if why is None:
            points.append(Point(settings, one, _digest(one, flags, uncommitted)))
        else:
            left_out.append(f"{settings.difference(base) or 'the recipe itself'}: {why}")
    if not points:
        raise UserError(left_out[0])
    return points, left_out


def _no_room(config: RunConfig, spec: EnvSpec) -> str | None:
    """Says why this machine cannot run it; None where it can, and on a cluster, where the run finds out."""
    if config.address is not None:
        plan.check_index(config, spec)
        return None
    try:
        plan.plan_cpus(config, run_dir.num_cpus())
        plan.check_memory(config, spec)
    except UserError as error:
        return str(error)
    return None


def _check_devices(config: RunConfig, most: int) -> None:
    """Raises UserError where a GPU is asked for that is not there."""
    plan.check_learner(config.learner)
    if most > 1 and config.learner.device != "cpu":
        import torch

        num_gpus = torch.cuda.device_count()
        if most > max(num_gpus, 1) and num_gpus:
            raise UserError(f"--devices {most}: this machine has {num_gpus} GPU{'s' if num_gpus > 1 else ''}")


def _digest(config: RunConfig, flags: ScaleFlags, uncommitted: str | None) -> str:
    """Returns the digest of what a measurement depends on beside the commit: settings, times, hardware, versions, code without a commit."""
    parts = {
        "config": config_module.as_dict(config),
        "seconds": flags.seconds,
        "warm_up_seconds": flags.warm_up_seconds,
        "hardware": run_dir.hardware(),
        "num_cpus": run_dir.num_cpus(),
        "versions": run_dir.versions(),
        **({"uncommitted": uncommitted} if uncommitted is not None else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Sweep:
    """The runs of one command, one after another."""

    def __init__(
        self,
        config: RunConfig,
        flags: ScaleFlags,
        axes: dict[str, tuple[Any, ...]],
        points: Sequence[Point],
        out: Path,
        table: ScaleTable,
        command: Sequence[str],
        lock: TextIO,
    ) -> None:
        """`lock`: of `out`, which each run holds too."""
        self._config, self._flags, self._axes, self._points = config, flags, axes, points
        self._out, self._table, self._command, self._lock = out, table, list(command), lock
        self._commit = run_dir.commit()

    def announce(self, left_out: Sequence[str]) -> None:
        """Says what will be done, and how long that takes at least."""
        flags, config = self._flags, self._config
        swept = "; ".join(f"{name.replace('_', ' ')} {' '.join(map(_plain, values))}" for name, values in self._axes.items())
        todo = len(self.schedule())
        done = len(self._points) * flags.rounds - todo
        minutes = todo * (flags.seconds + flags.warm_up_seconds + _START_AND_END_SECONDS) / 60
        hardware, min_size = run_dir.hardware(), config.replay.min_size
        where = f"on {run_dir.num_cpus()} CPUs ({hardware['cpu']})" if config.address is None else f"on {config.address}"
        print(f"{config.recipe}, {config.env.game}, {where}: {swept}")
        print(
            f"{counted(len(self._points), 'points')} x {counted(flags.rounds, 'rounds')}: {counted(todo, 'runs')}"
            + (f" ({done} {'is' if done == 1 else 'are'} in {self._out / 'scale.csv'} already)" if done else "")
            + (
                f", about {max(minutes, 1):.0f} min, and in each run the time until replay has its {min_size:,} transitions"
                if todo
                else ""
            )
        )
        for sentence in left_out:
            print(f"left out: {sentence}")
        sys.stdout.flush()

    def schedule(self) -> list[tuple[int, Point]]:
        """Returns what is still to be measured, (round, point): round by round, each in an order of its own."""
        runs = []
        for number in range(1, self._flags.rounds + 1):
            order = np.random.default_rng([self._flags.seed, number]).permutation(len(self._points))
            runs += [(number, self._points[index]) for index in order]
        return [(number, point) for number, point in runs if not self._table.has(point.digest, self._commit, number)]

    def run(self, stop: Callable[[], bool]) -> int:
        """Measures what is missing and writes what came of it; returns the exit status."""
        schedule = self.schedule()
        status = EXIT_DONE
        for index, (number, point) in enumerate(schedule):
            if stop():
                break
            measured = self._measure(number, point, stop)
            if measured.is_interrupted:
                break
            if index == 0 and measured.status == 2:
                raise UserError(f"the first run was refused: {measured.fault}")
            self._table.add(self._row(number, point, measured))
            self._table.write()
            print(f"[{index + 1}/{len(schedule)}] round {number}, {point.settings.text()}: {_told(measured)}", flush=True)
            status = EXIT_FAULT if measured.fault is not None else status
        rows = self._table.measured({point.digest for point in self._points}, self._commit)
        if stop() and not rows:
            print("interrupted before anything was measured; the same command begins again")
            return EXIT_INTERRUPTED
        self._write_results(rows)
        if stop():
            print(f"interrupted; what was measured is in {self._out / 'scale.csv'}, and the same command goes on from there")
            return EXIT_INTERRUPTED
        return status

    def _measure(self, number: int, point: Point, stop: Callable[[], bool]) -> Measurement:
        path = _fresh(self._out / "runs", f"{point.settings.name()}-round{number}")
        config, flags = point.config, self._flags
        minutes = _MOST_MINUTES + (flags.seconds + flags.warm_up_seconds) / 60
        words = ["--run-dir", str(path), "--log-period-seconds", "1", "--max-minutes", f"{minutes:.1f}"]
        words += ["--seed", str(config.seed + number - 1), "--max-updates", "None", "--max-env-steps", "None"]
        words += ["--evaluation.period-seconds", "None", "--evaluation.target-return", "None"]
        words += ["--address", config.address] if config.address is not None else []
        measured = measure_run(
            [*self._command, *words, *point.settings.flags()],
            path,
            warm_up_seconds=flags.warm_up_seconds,
            seconds=flags.seconds,
            num_actors=config.actors.num_workers,
            on_this_host=config.address is None,
            lock=self._lock,
            stop=stop,
        )
        if measured.fault is None:
            for name in ("replay", "checkpoints"):  # Large, and nobody goes on with such a run.
                shutil.rmtree(path / name, ignore_errors=True)
        return measured

    def _row(self, number: int, point: Point, measured: Measurement) -> dict[str, Any]:
        return {
            **asdict(point.settings),
            "round": number,
            "digest": point.digest,
            "commit": self._commit or "",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "fault": measured.fault or "",
            **measured.figures,
        }

    def _write_results(self, rows: Sequence[Row]) -> None:
        from deploy.scale_results import write_results

        told = write_results(
            self._config,
            self._axes,
            rows,
            self._out,
            seed=self._flags.seed,
            warm_up_seconds=self._flags.warm_up_seconds,
            commit=self._commit,
        )
        for sentence in told:
            print(sentence)


def _fresh(directory: Path, name: str) -> Path:
    """Returns a path of this name where nothing is yet: what an earlier command left under it stays as it is."""
    names = [name, *(f"{name}-{k}" for k in range(2, 10_000))]
    return next(
        path for path in (directory / one for one in names) if not path.exists() and not path.with_suffix(".log").exists()
    )


def _told(measured: Measurement) -> str:
    if measured.fault is not None:
        return f"fault: {measured.fault}"
    figures = measured.figures
    parts = [
        f"{figures['actor/env_steps_per_second']:,.0f} env steps/s",
        f"{figures['learner/updates_per_second']:,.1f} updates/s",
    ]
    for name, words in (
        ("learner/busy_fraction", "learner busy"),
        ("shard/busy_fraction", "shard busy"),
        ("host/cpu_fraction", "cores"),
    ):
        parts += [f"{words} {figures[name]:.0%}"] if name in figures else []
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"
