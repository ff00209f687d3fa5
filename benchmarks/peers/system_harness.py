"""What the scripts `*_system.py` of this folder share: the work that all systems do, and how they tell of it.

A script takes the work (`Work`) as JSON and does it until SIGTERM ends it. It writes lines of JSON, first one about itself (again where
it knows more) and then, at most twice a second, how far it is:

    {"version": ..., "note": ..., "root": the process whose tree is the system, "names": of its processes, by pid}
    {"seconds": of the monotonic clock, "env_steps": ..., "updates": ..., "samples": ..., "is_steady": ...}

`env_steps` counts from wherever the system begins to count. `is_steady` says that nothing goes on any more that belongs
to the start. Needs the standard library, and for `make_game` ale-py and Gymnasium.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from harness import open_answers

REPORT_SECONDS = 0.5
LEARNING_RATE = 1e-4
DISCOUNT = 0.99
MAX_GRAD_NORM = 10.0
EPSILON = 0.05
TARGET_PERIOD_UPDATES = 1_000


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every system does; see docs/benchmarks.md."""

    game: str
    """As its ROM is named: pong."""
    network: str
    """nature or dqn2013."""
    batch: int
    samples_per_step: int
    """Times that a transition is sampled: batch x updates / env steps."""
    num_envs: int
    capacity: int
    """Transitions that the replay holds."""
    learning_starts: int
    """Env steps before the first update; epsilon falls to its final value meanwhile."""
    fill: bool
    """The replay is full before the first update."""
    cores: int
    mode: str = ""
    """Which of its ordinary settings a script takes; each has its own."""
    threads: int = 1
    """Of PyTorch, in the process that learns."""

    @property
    def rhythm(self) -> tuple[int, int]:
        """Steps of all environments, and the updates that follow them: the smallest whole numbers that keep the ratio."""
        updates = Fraction(self.num_envs * self.samples_per_step, self.batch)
        return updates.denominator, updates.numerator


def read_work() -> Work:
    """Returns the work that the command line asks for."""
    return Work(**json.loads(sys.argv[1]))


def interrupt_on_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, so that what ends a script ends its processes and files too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class Reports:
    """The lines that a script writes."""

    def __init__(self, work: Work, *, version: str, note: str, root: int | None = None) -> None:
        self._answers = open_answers()
        self._batch = work.batch
        self._last = 0.0
        self._about = {"version": version, "note": note, "root": root or os.getpid()}
        self.name_processes({})

    def name_processes(self, names: dict[int, str]) -> None:
        self._write(self._about | {"names": names})

    def step(self, env_steps: int, updates: int) -> None:
        """Tells how far it is, where the last line is old enough. Call it at the same place of every round of the loop."""
        seconds = time.monotonic()
        if seconds - self._last >= REPORT_SECONDS:
            self._last = seconds
            self.tell(seconds, env_steps, updates, updates * self._batch, is_steady=updates > 0)

    def tell(self, seconds: float, env_steps: int, updates: int, samples: int, *, is_steady: bool) -> None:
        self._write(
            {"seconds": seconds, "env_steps": env_steps, "updates": updates, "samples": samples, "is_steady": is_steady}
        )

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._answers, flush=True)


def make_game(game: str) -> Any:
    """Returns the Gymnasium environment of a ROM, single frames in colour, without sticky actions."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    (name,) = [name for name, spec in gymnasium.registry.items() if name.startswith("ALE/") and spec.kwargs.get("game") == game]
    return gymnasium.make(name, frameskip=1, repeat_action_probability=0.0)


def add_until_full(buffer: Any, steps: Sequence[tuple[Any, ...]]) -> None:
    """Adds recorded steps of all environments again and again to a buffer of Stable-Baselines3, whose arrays are dense."""
    number = 0
    while not buffer.full:
        buffer.add(*steps[number % len(steps)])
        number += 1
