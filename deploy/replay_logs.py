"""Where the logs of a run's shards are, and what a run that goes on takes of them.

    RUN/replay/layout.msgpack   <shard>/*.log   <shard>/priorities-*.msgpack

Logs belong to a number of shards; on another one, they are written anew. The layout file tells which writing this is, and how the
shards stood in it: the checkpoint that a run goes on from may be of the writing before.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from common.config import RunConfig
from common.errors import CheckpointError, UserError
from common.files import make_directory, sealed, unsealed, write_whole
from learner import checkpoint as checkpoints
from replay_server.recovery import GONE, NO_LOG, SavedShard, catch_up, emptied, finish_move, move_into_place, rewrite, share
from replay_server.replay_log import Damage, ReplayLog

_LAYOUT = "layout.msgpack"


class ShardStart(NamedTuple):
    """What a shard begins with."""

    directory: str | None
    """Of its log; None: it keeps none."""
    state: Mapping[str, Any] | None
    """How it stood; None: it is new."""
    keeps_samples: bool
    """Whether what was drawn since stays drawn: the shard alone was away."""


class ReplayLogs:
    """The logs of one run."""

    def __init__(self, run_path: Path, config: RunConfig) -> None:
        self._root, self._config = run_path / "replay", config
        self.layout = ""
        """Which writing of the logs this is; a part of every checkpoint."""
        self._layout_states: Sequence[Mapping[str, Any]] = ()  # What the layout says; an older checkpoint goes on from that.
        self.notes: list[str] = []
        """What a person should know of how the logs were found."""

    def begin(self, meta: Mapping[str, Any], *, is_exact: bool = False) -> list[ShardStart]:
        """Prepares the logs for the shards of this command; returns what each begins with.

        Args:
          meta: of the checkpoint that the run goes on from; empty for a new run.
          is_exact: what came after the checkpoint is left out, so that it can come again.

        Raises:
          UserError: where the logs were written by a version whose format this one does not know, or cannot be written anew.
        """
        num_shards, is_logged = self._config.replay.num_shards, self._config.replay.sync_seconds is not None
        finish_move(self._aside, self._root)
        states, is_there = self._saved_states(meta)
        if is_there and not is_logged:
            raise UserError(
                f"replay.sync_seconds None keeps no log, and {self._root} holds the replay: delete it to go on without"
            )
        if not is_there:
            states = [emptied(state, GONE if is_logged else NO_LOG) for state in states]
            if len(states) not in (0, num_shards):
                states = share(states, self._capacities)
            shutil.rmtree(self._root, ignore_errors=True)
            if is_logged:
                self._make_new(states)
            if meta:
                self.notes.append(
                    f"the replay begins empty: {f'there is no log in {self._root}' if is_logged else 'replay.sync_seconds None keeps no log'}"
                )
        elif len(states) != num_shards or (is_exact and self._has_more(states)):
            states = self._rewrite(states, is_exact=is_exact)
        return [ShardStart(self.start_of(i), states[i] if states else None, keeps_samples=False) for i in range(num_shards)]

    def priorities_in_use(self, states: Sequence[Mapping[str, Any] | None]) -> list[set[str]]:
        """Returns by shard the files of priorities that checkpoints and layout name: those that are written, and the one of these states."""
        found: list[set[str]] = [set() for _ in range(self._config.replay.num_shards)]
        if self._config.replay.sync_seconds is None:
            return found
        saved: list[Sequence[Mapping[str, Any] | None]] = [states, self._layout_states or states]
        for path in checkpoints.paths(self._root.with_name("checkpoints")):
            with contextlib.suppress(CheckpointError):
                meta = checkpoints.read_meta(path)
                saved += [meta["shards"]] if meta.get("replay_layout") == self.layout else []
        for shards in saved:
            for names, state in zip(found, shards, strict=True):
                if state is not None and state["priorities"] is not None:
                    names.add(state["priorities"])
        return found

    def directory(self, index: int) -> Path:
        """Returns where the log of a shard is."""
        return self._root / str(index)

    def start_of(self, index: int) -> str | None:
        """Returns the directory of a shard's log, or None where none is kept."""
        return str(self.directory(index)) if self._config.replay.sync_seconds is not None else None

    @property
    def _aside(self) -> Path:
        return self._root.with_name("replay.new")

    @property
    def _capacities(self) -> list[int]:
        replay = self._config.replay
        return [-(-replay.capacity // replay.num_shards)] * replay.num_shards

    def _saved_states(self, meta: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        """Returns how the shards stood, and whether their logs are there: as the checkpoint says, or where the logs were written
        anew since, as the layout does."""
        saved = list(meta.get("shards", []))
        path = self._root / _LAYOUT
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if saved and any(self._root.glob("*/*.log")):
                raise UserError(f"{path} is missing: restore it, or delete {self._root} to go on without the replay") from None
            return saved, False
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        if (body := unsealed(data)) is None:
            raise UserError(f"{path}: its checksum is wrong: restore it, or delete {self._root} to go on without the replay")
        layout = msgpack.unpackb(body)
        self.layout, self._layout_states = layout["layout"], layout["shards"]
        return list(saved if layout["layout"] == meta.get("replay_layout") else layout["shards"]), bool(saved)

    def _make_new(self, states: list[dict[str, Any]]) -> None:
        for index in range(self._config.replay.num_shards):
            make_directory(self.directory(index))
        self._write_layout(self._root, states)

    def _write_layout(self, root: Path, states: list[dict[str, Any]]) -> None:
        self.layout, self._layout_states = secrets.token_hex(4), states
        write_whole(root / _LAYOUT, sealed(msgpack.packb({"layout": self.layout, "shards": states})))

    def _has_more(self, states: list[dict[str, Any]]) -> bool:
        """Whether a log holds items that came after the checkpoint."""
        ends = [[record.end_item_id for record in ReplayLog(self.directory(i)).records([])] for i in range(len(states))]
        return any(end and end[-1] > state["next_item_id"] for end, state in zip(ends, states, strict=True))

    def _rewrite(self, states: list[dict[str, Any]], *, is_exact: bool) -> list[dict[str, Any]]:
        """Writes all logs anew for this number of shards; returns how these stand."""
        damages: list[Damage | str] = []
        sources = []
        for index, state in enumerate(states):
            directory = self.directory(index)
            caught_up = state if is_exact else catch_up(directory, state, damages, keeps_samples=False)[0]
            priorities = ReplayLog(directory).read_priorities(state["priorities"], damages)
            sources.append(SavedShard(directory, caught_up, priorities))
        num_shards = self._config.replay.num_shards
        try:
            new_states = rewrite(sources, self._aside, self._capacities, damages)
            self._write_layout(self._aside, new_states)
            move_into_place(self._aside, self._root)
        except OSError as error:
            shutil.rmtree(self._aside, ignore_errors=True)
            raise UserError(
                f"{self._root}: its logs cannot be written anew for {num_shards} shards ({error.strerror}): free as much disk as they "
                f"take, or go on with --replay.num-shards {len(states)}"
            ) from error
        self.notes += dict.fromkeys(map(str, damages))
        if len(states) != num_shards:
            self.notes.append(f"the replay of {len(states)} shards is shared out to {num_shards}")
        return new_states
