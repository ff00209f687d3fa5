"""The settings that `qfleet scale` sweeps, scale.csv, the table of all that it measured, and the lock of the directory that has it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from common.config import RunConfig
from common.errors import UserError
from common.files import write_whole
from deploy import locks
from deploy.scale_run import COLUMNS, RATES

_NAMES = ("round", "digest", "commit", "date", "fault")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One value for each axis."""

    actors: int
    envs_per_actor: int
    shards: int
    batch_size: int
    devices: int
    samples_per_insert: float | str
    """A number, or "none"."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, config: RunConfig) -> Settings:
        """Returns those of a configuration."""
        ratio = config.replay.samples_per_insert
        return cls(
            actors=config.actors.num_actors,
            envs_per_actor=config.actors.num_envs,
            shards=config.replay.num_shards,
            batch_size=config.learner.batch_size,
            devices=config.learner.num_devices,
            samples_per_insert="none" if ratio is None else ratio,
        )

    @property
    def ratio(self) -> float | None:
        return None if isinstance(self.samples_per_insert, str) else float(self.samples_per_insert)

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Returns a configuration with these settings; raises ValueError where they contradict themselves, or others of it."""
        return replace(
            config,
            actors=replace(config.actors, num_actors=self.actors, num_envs=self.envs_per_actor),
            replay=replace(config.replay, num_shards=self.shards, samples_per_insert=self.ratio),
            learner=replace(config.learner, batch_size=self.batch_size, num_devices=self.devices),
        )

    def flags(self) -> list[str]:
        """Returns the flags of `qfleet train` that say the same."""
        ratio = "None" if self.ratio is None else repr(self.ratio)
        words = [
            "--actors.num-actors",
            self.actors,
            "--actors.num-envs",
            self.envs_per_actor,
            "--replay.num-shards",
            self.shards,
        ]
        words += ["--learner.batch-size", self.batch_size, "--learner.num-devices", self.devices]
        return [str(word) for word in [*words, "--replay.samples-per-insert", ratio]]

    def name(self) -> str:
        """Returns a name for files."""
        ratio = "none" if self.ratio is None else f"{self.ratio:g}"
        return (
            f"actors{self.actors}-envs{self.envs_per_actor}-shards{self.shards}-batch{self.batch_size}-devices{self.devices}-ratio{ratio}"
        ).replace(".", "_")

    def text(self) -> str:
        """Returns it in words."""
        ratio = "no ratio" if self.ratio is None else f"ratio {self.ratio:g}"
        counts = ((self.actors, "actor"), (self.shards, "shard"), (self.devices, "device"))
        actors, shards, devices = (f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts)
        return f"{actors} x {self.envs_per_actor} envs, {shards}, batch {self.batch_size}, {devices}, {ratio}"

    def difference(self, base: Settings) -> str:
        """Returns in words what differs from `base`."""
        names = [name for name in self.names() if getattr(self, name) != getattr(base, name)]
        return ", ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in names)


Row = dict[str, Any]


class ScaleTable:
    """scale.csv: a row for each point and round. It is written whole, so that it is there as it was or as it is now."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self._path, self._rows = path, rows

    @classmethod
    def read(cls, path: Path) -> ScaleTable:
        """Reads the table; an empty one where there is no file.

        Raises:
          UserError: where the file is not such a table, or a row without a fault has no rates.
        """
        if not path.exists():
            return cls(path, [])
        wanted = {*Settings.names(), *_NAMES}
        try:
            with path.open(newline="") as file:
                reader = csv.DictReader(file, strict=True)
                if not wanted <= set(reader.fieldnames or ()):
                    raise ValueError("columns are missing")
                rows = []
                for words in reader:
                    rows.append(_parse(words))
                    _check_numbers(rows[-1], f"{path}, line {reader.line_num}")
                return cls(path, rows)
        except UserError:
            raise
        except (ValueError, TypeError, csv.Error, OSError) as error:
            raise UserError(f"{path}: not a table of qfleet scale ({error}); move it away, or choose another --out") from error

    def has(self, digest: str, commit: str | None, number: int) -> bool:
        """Whether this was measured, without a fault."""
        return any(_key(row) == (digest, commit or "", number) and not row["fault"] for row in self._rows)

    def measured(self, digests: Collection[str], commit: str | None) -> list[Row]:
        """Returns the rows of these points that have no fault."""
        return [row for row in self._rows if row["digest"] in digests and row["commit"] == (commit or "") and not row["fault"]]

    def add(self, row: Row) -> None:
        """Adds a row; it takes the place of one with a fault."""
        self._rows = [one for one in self._rows if _key(one) != _key(row)] + [row]

    def write(self) -> None:
        """Raises OSError where that cannot be; the file is as it was then."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [*Settings.names(), *_NAMES, *COLUMNS], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self._path, out.getvalue().encode())


def lock_directory(out: Path) -> TextIO:
    """Makes the directory; returns its lock, which holds until the file is closed here and in every process that has it.

    Raises:
      UserError: where it cannot be made, or another sweep is at work there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another directory") from error
    return locks.hold(
        out,
        "--out",
        busy="another qfleet scale is at work there, or a run of one that was killed is ending; stop it first, or choose another --out",
    )


def _key(row: Row) -> tuple[str, str, int]:
    return row["digest"], row["commit"], row["round"]


def _parse(words: dict[str, str]) -> Row:
    row: Row = {name: words[name] for name in _NAMES} | {"round": int(words["round"])}
    for name in Settings.names():
        row[name] = int(words[name]) if name != "samples_per_insert" else _ratio(words[name])
    return row | {name: float(words[name]) for name in COLUMNS if words.get(name)}


def _check_numbers(row: Row, where: str) -> None:
    """Raises UserError where what was measured without a fault is no number, or a rate that is not positive: no law is of such."""
    for name in COLUMNS if not row["fault"] else ():
        value = row.get(name, 0.0 if name in RATES else 1.0)
        if not math.isfinite(value) or (name in RATES and value <= 0):
            told = f"{value:g}" if name in row else "empty"
            raise UserError(f"{where}: {name} is {told}; delete the line, and the same command measures it again")


def _ratio(word: str) -> float | str:
    return word if word == "none" else float(word)
