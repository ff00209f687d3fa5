"""What the scripts of this folder share: the data, the clock, the memory, the check and the report. Needs only NumPy.

Every script takes `--data DIR --items N --batch B --batches M --mode MODE --json F` and measures, in a process of its own:

* insert: N transitions, only the calls of the replay buffer. The observations stand ready in the buffer's own layout, as in
  an actor that has just acted on them; building stacks of planes is not on the clock unless the buffer does it.
* sample: M rounds after 10 that are not counted. A round ends when the states of B transitions lie as arrays in the
  consumer's memory, with actions, rewards, discounts, and new priorities are written back (where there are priorities).
* memory: by how much the proportional set size of the script and all its descendants grew from before the buffer was made
  until all is inserted.
* that what was sampled is what was inserted, at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

STACK = 4
CHUNK = 256
WARM_UP = 10
NUM_ENVS = 8
DISCOUNT = 0.99


@dataclass(frozen=True)
class Transitions:
    """Rows of transitions; `s_tm1` and `s_t` are i4[T, 4] planes."""

    s_tm1: np.ndarray
    s_t: np.ndarray
    a_tm1: np.ndarray
    r_t: np.ndarray
    discount_t: np.ndarray
    priority: np.ndarray

    def __len__(self) -> int:
        return len(self.a_tm1)

    def __getitem__(self, rows: slice | np.ndarray) -> Transitions:
        return Transitions(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Episode:
    """Consecutive steps of one environment: they lead from plane `begin` to plane `end`, which is the last observation."""

    begin: int
    end: int
    terminated: bool
    truncated: bool

    @property
    def num_steps(self) -> int:
        return self.end - self.begin


class Data:
    """One game's files, in memory."""

    def __init__(self, directory: Path, num_items: int) -> None:
        self._files = {path.stem: np.load(path) for path in directory.glob("*.npy")}
        self.num_items = num_items
        if num_items > len(self._files["a_tm1"]):
            raise ValueError(f"{directory} has {len(self._files['a_tm1'])} transitions, asked for {num_items}")

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_files"][name]
        except KeyError:
            raise AttributeError(name) from None

    def n_step(self) -> Transitions:
        """Returns the first N transitions of 3 steps."""
        return self.all_n_step()[: self.num_items]

    def all_n_step(self) -> Transitions:
        """Returns all transitions of 3 steps that the files have, also where N is less."""
        return Transitions(**{name: self._files[name] for name in Transitions.__dataclass_fields__})

    def episodes(self) -> list[Episode]:
        """Returns episodes with N steps in all, N / 8 of each environment; the last of an environment may be cut short."""
        found = []
        for env in range(NUM_ENVS):
            rows = np.flatnonzero(self.step_env == env)
            begins = rows[self.step_is_first[rows]]
            ends = np.append(begins[1:], rows[-1] + 1) - 1
            num_left = self.num_items // NUM_ENVS + (env < self.num_items % NUM_ENVS)
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                end = min(end, begin + num_left)
                num_left -= end - begin
                found.append(Episode(begin, end, bool(self.step_terminated[end - 1]), bool(self.step_truncated[end - 1])))
                if num_left == 0:
                    break
        return found

    def one_step(self) -> Transitions:
        """Returns N transitions of one step, episode after episode."""
        return Transitions(*map(np.concatenate, zip(*map(self._steps_of, self.episodes()), strict=True)))

    def stacks(self, planes: np.ndarray) -> np.ndarray:
        """Returns u8[B, 4, 84, 84]."""
        return self.planes.take(planes, axis=0)

    def stack_indices(self, episode: Episode) -> np.ndarray:
        """Returns i4[num_steps + 1, 4], the stack of each of the episode's observations."""
        planes = np.arange(episode.begin, episode.end + 1)[:, None] + np.arange(1 - STACK, 1)
        return np.where(planes >= episode.begin, planes, 0).astype(np.int32)

    def _steps_of(self, episode: Episode) -> tuple[np.ndarray, ...]:
        rows = slice(episode.begin, episode.end)
        stacks = self.stack_indices(episode)
        discount_t = np.where(self.step_terminated[rows], 0, DISCOUNT).astype(np.float32)
        priority = self.priority[np.arange(episode.begin, episode.end) % len(self.priority)]
        return stacks[:-1], stacks[1:], self.step_action[rows], self.step_reward[rows], discount_t, priority


def new_priorities(size: int) -> Iterator[np.ndarray]:
    """Yields f64[size] positive random priorities, the same in every script."""
    rng = np.random.default_rng(1)
    while True:
        yield rng.gamma(2.0, 0.5, size=size) + 0.01


def chunks(num: int, size: int = CHUNK) -> Iterator[slice]:
    """Yields slices that cover range(num)."""
    for begin in range(0, num, size):
        yield slice(begin, min(begin + size, num))


def process_tree(root: int) -> dict[int, float]:
    """Returns the CPU seconds of a process and of all its descendants by pid; what ended children took counts with their parent."""
    parents: dict[int, int] = {}
    cpu_seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # The process has just ended.
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        cpu_seconds[pid] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    tree = {root}
    while new := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= new
    return {pid: cpu_seconds[pid] for pid in tree if pid in cpu_seconds}


def memory_bytes(root: int | None = None) -> int:
    """Returns the proportional set size of a process (None: this one) and all its descendants; shared pages count once."""
    return sum(map(pss_bytes, process_tree(os.getpid() if root is None else root)))


def pss_bytes(pid: int) -> int:
    """Returns the proportional set size of one process; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def open_answers() -> TextIO:
    """Returns the standard output for lines of JSON alone; what libraries print there from now on goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class Bench:
    """The measurement of one script's run; its parts are called in the order in which they stand here."""

    def __init__(self, peer: str, modes: tuple[str, ...] = ("default",)) -> None:
        parser = argparse.ArgumentParser(description=f"Measures the replay buffer of {peer}.")
        parser.add_argument("--data", type=Path, required=True)
        parser.add_argument("--items", type=int, default=60_000)
        parser.add_argument("--batch", type=int, default=512)
        parser.add_argument("--batches", type=int, default=200)
        parser.add_argument("--mode", choices=modes, default=modes[0])
        parser.add_argument("--json", type=Path, required=True)
        arguments = parser.parse_args()
        self._peer, self._json, self._num_batches = peer, arguments.json, arguments.batches
        self.mode: str = arguments.mode
        self.batch: int = arguments.batch
        self.data = Data(arguments.data, arguments.items)
        self.priorities = new_priorities(self.batch)
        self._insert_seconds: list[float] = []
        self._sample_seconds: list[float] = []
        self._num_inserted = 0
        self._bytes_before = self._bytes_grown = 0

    def start(self) -> None:
        """Notes the memory in use. Call it before the buffer is made.

        Memory that two stacks an item need is touched and given back first: in a virtual machine the first touch of a page
        that the host has not yet backed costs ten times an ordinary page fault, and would be billed to whoever comes first.
        """
        np.ones(self.data.num_items * 2 * STACK * 84 * 84, np.uint8)
        self._bytes_before = memory_bytes()

    def insert(self, call: Callable[[], Any], num_transitions: int) -> Any:
        """Times one call that inserts `num_transitions`."""
        began = time.perf_counter()
        result = call()
        self._insert_seconds.append(time.perf_counter() - began)
        self._num_inserted += num_transitions
        return result

    def inserted(self) -> None:
        """Notes the memory. Call it when all is inserted."""
        self._bytes_grown = memory_bytes() - self._bytes_before

    def sample(self, call: Callable[[np.ndarray], Any]) -> Any:
        """Times rounds of `call`, which samples a batch and writes back the priorities it is given; returns the last batch."""
        batch = None
        for i in range(WARM_UP + self._num_batches):
            priorities = next(self.priorities)
            began = time.perf_counter()
            batch = call(priorities)
            if i >= WARM_UP:
                self._sample_seconds.append(time.perf_counter() - began)
        return batch

    def check(self, inserted: Transitions, sampled: dict[str, np.ndarray], *, s_t_counts: np.ndarray | bool = True) -> None:
        """Raises AssertionError unless every sampled row is one that was inserted.

        `sampled` has s_tm1 and s_t as u8[B, 4, 84, 84], a_tm1, r_t and discount_t. `s_t_counts`, bool[B], says where s_t must
        be right: a buffer may leave anything there after a terminal state.
        """
        assert len(sampled["a_tm1"]) == self.batch, f"a batch of {len(sampled['a_tm1'])}"
        rows: dict[int, list[int]] = {}
        for row, plane in enumerate(inserted.s_tm1[:, -1].tolist()):
            rows.setdefault(zlib.crc32(self.data.planes[plane]), []).append(row)
        counts = np.broadcast_to(s_t_counts, self.batch)
        for b in range(self.batch):
            candidates = rows.get(zlib.crc32(np.ascontiguousarray(sampled["s_tm1"][b, -1])), [])
            found = any(self._is_row(inserted, row, sampled, b, s_t_counts=bool(counts[b])) for row in candidates)
            assert found, f"row {b} was never inserted"

    def report(self, *, version: str, note: str = "") -> None:
        """Writes the JSON file."""
        insert, sample = np.array(self._insert_seconds), np.array(self._sample_seconds)
        result = {
            "peer": self._peer,
            "version": version,
            "mode": self.mode,
            "insert_transitions_per_second": self._num_inserted / insert.sum(),
            "sample_transitions_per_second": self.batch / sample.mean(),
            "insert_p99_ms": 1e3 * np.quantile(insert, 0.99),
            "insert_call_transitions": self._num_inserted / len(insert),
            "sample_p99_ms": 1e3 * np.quantile(sample, 0.99),
            "bytes_per_transition": self._bytes_grown / self._num_inserted,
            "items": self._num_inserted,
            "note": note,
        }
        self._json.write_text(json.dumps(result, indent=2) + "\n")

    def _is_row(self, inserted: Transitions, row: int, sampled: dict[str, np.ndarray], b: int, *, s_t_counts: bool) -> bool:
        return (
            int(sampled["a_tm1"][b]) == inserted.a_tm1[row]
            and np.isclose(float(sampled["r_t"][b]), inserted.r_t[row], atol=1e-5)
            and np.isclose(float(sampled["discount_t"][b]), inserted.discount_t[row], atol=1e-5)
            and np.array_equal(sampled["s_tm1"][b], self.data.planes[inserted.s_tm1[row]])
            and (not s_t_counts or np.array_equal(sampled["s_t"][b], self.data.planes[inserted.s_t[row]]))
        )
