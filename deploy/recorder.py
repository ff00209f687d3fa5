"""Where metrics go: metrics.jsonl, TensorBoard events, and the terminal (a live display, or one line an interval)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from common.config import ByteSize
from deploy.progress import Progress
from deploy.run_dir import RunDirectory

_numbers = itertools.count()  # Of the event files of this process.


class _SteadyConsole(Console):
    """A console whose reader may go away (`| head`, a dropped connection): then it falls silent and the run goes on. What the full disk
    of a log file does not take is not shown.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Files:
    """metrics.jsonl and the TensorBoard events of one command."""

    def __init__(self, run_path: Path) -> None:
        self._rows = (run_path / "metrics.jsonl").open("ab+", buffering=0)
        if self._rows.seek(0, os.SEEK_END) and (self._rows.seek(-1, os.SEEK_END), self._rows.read(1))[1] != b"\n":
            self._rows.write(b"\n")  # After a row that was torn.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (run_path / name).open("ab", buffering=0)
        # TensorBoard's own writer has a thread, which on a full disk ends with a traceback.
        self._events = RecordWriter(self._file)
        self._events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, row: dict[str, Any], degraded: list[tuple[str, str]]) -> None:
        """`degraded`, what the run does without at this moment as (kind, sentence), is in metrics.jsonl only."""
        line = json.dumps(row | ({"degraded": degraded} if degraded else {})).encode() + b"\n"
        if self._rows.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in row.items()]
        event = Event(wall_time=time.time(), step=row["env_steps"], summary=Summary(value=values))
        self._events.write(event.SerializeToString())

    def close(self) -> None:
        self._rows.close()
        self._file.close()


class Recorder:
    """Writes the rows of one command; used by the driver's one thread. rich's display refreshes on a thread of its own."""

    def __init__(self, run_dir: RunDirectory, progress: Progress, console: Console | None = None) -> None:
        self._progress = progress
        self._path = run_dir.path
        self._files: _Files | None = _Files(run_dir.path)
        self._console = console or _SteadyConsole(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live: Live | None = None
        self._row: dict[str, Any] = {}
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)
            self._live.start()

    def event(self, text: str) -> None:
        """Tells a person something that happened once."""
        self._progress.events.append(f"{_clock(self._progress.wall_seconds)} {text}")
        self._console.print(f"{_clock(self._progress.wall_seconds)}  {text}", markup=False)

    def row(self) -> dict[str, Any]:
        """Writes one row of metrics everywhere, and returns it."""
        row = self._row = self._progress.row()
        try:
            self._files = self._files or _Files(self._path)
            self._files.write(row, self._progress.degraded_by_kind())
        except OSError as error:  # A full disk costs the rows, not the run.
            if self._files is not None:
                self.event(f"{self._path}: {error.strerror}: rows of metrics are dropped until writing works again")
                self._files.close()
                self._files = None
        if self._live is None:
            self._console.print(self._line(), markup=False)
        return row

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self._files is not None:
            self._files.close()

    def _line(self) -> str:
        row = self._row
        parts = [
            _clock(self._progress.wall_seconds),
            f"steps {row['env_steps']:,} ({row.get('actor/env_steps_per_second', 0):,.0f}/s)",
            f"updates {row['updates']:,} ({row.get('learner/updates_per_second', 0):,.1f}/s)",
            f"eval {self._evaluated()}",
            f"train {_return(row.get('actor/training_return_mean'))}",
            f"eps {row.get('actor/epsilon_mean', 1.0):.2f}",
            f"samples/insert {row.get('shard/samples_per_insert', 0.0):.2f}",
            f"lag {row.get('actor/params_lag_updates_max', 0)}",
            f"replay {row.get('shard/size_transitions', 0):,} in {ByteSize(row.get('shard/resident_bytes', 0))}",
        ]
        told = [f"degraded: {sentence}" for sentence in self._progress.degraded()] + self._progress.waits()[:1]
        return "  ".join(parts) + "".join(f"  [{sentence}]" for sentence in told)

    def _evaluated(self) -> str:
        evaluation = self._progress.evaluation
        return _return(evaluation.mean_return if evaluation else None)

    def _render(self) -> RenderableType:
        progress, row = self._progress, self._row
        config = progress.config
        done = progress.fraction_done()
        left = progress.wall_seconds * (1 - done) / done if done > 0.01 else None
        head = Table.grid(padding=(0, 2))
        left_text = f"{_clock(left)} left at most" if left is not None and done < 1 else ""
        title = Text(f"{config.recipe}  {config.env.game}", style="bold")
        head.add_row(
            title, ProgressBar(total=1.0, completed=done, width=36), f"{done:.0%}", _clock(progress.wall_seconds), left_text
        )
        table = Table.grid(padding=(0, 3))
        table.add_row(
            "greedy evaluation",
            self._evaluated(),
            "training return",
            _return(row.get("actor/training_return_mean")),
        )
        table.add_row(
            "env steps",
            f"{progress.env_steps:,}  ({row.get('actor/env_steps_per_second', 0):,.0f}/s)",
            "updates",
            f"{progress.updates:,}  ({row.get('learner/updates_per_second', 0):,.1f}/s)",
        )
        table.add_row(
            "samples per insert",
            f"{row.get('shard/samples_per_insert', 0.0):.2f} of {config.replay.samples_per_insert or float('inf'):g}",
            "params lag",
            f"{row.get('actor/params_lag_updates', 0):.0f} updates, at most {row.get('actor/params_lag_updates_max', 0)}",
        )
        table.add_row(
            "replay",
            f"{row.get('shard/size_transitions', 0):,} in {ByteSize(row.get('shard/resident_bytes', 0))} of {config.replay.memory}",
            "epsilon",
            f"{row.get('actor/epsilon_mean', 1.0):.3f}",
        )
        table.add_row(
            "actors alive",
            f"{len(progress.actors)} of {config.actors.num_workers}",
            "learner busy",
            f"{row.get('learner/busy_fraction', 0.0):.0%}",
        )
        told = [Text(f"degraded: {sentence}", style="bold red") for sentence in progress.degraded()[:5]]
        told += [Text(f"waits: {sentence}", style="yellow") for sentence in progress.waits()[:3]]
        return Group(head, table, *told, Text(f"Ctrl-C writes a checkpoint and ends; run files: {self._path}", style="dim"))


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _return(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
