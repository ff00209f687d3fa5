"""Where the time of a role goes: seconds by phase, and how much of a processor it had."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # Nanoseconds on a processor, nanoseconds ready for one, slices.
_NUM_LATENCIES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Where the time of one process of a role went since its start."""

    at: float
    """When this was read, on the process's own monotonic clock, in seconds."""
    phases: dict[str, float]
    """Seconds in each phase; no second is in two, and what is in none is time between phases."""
    num_threads: int
    """Threads whose phases are summed."""
    cpu_seconds: float
    """Of the whole process, all its threads."""
    delay_seconds: float | None
    """For how long the thread that tells this was ready to run and had no processor; None where the system does not say."""


class PhaseClock:
    """Counts the seconds that one thread spends in named phases.

    A phase that begins within another one interrupts it, so that phases never overlap. Entering and leaving one takes half a microsecond.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._phase: str | None = None
        self._since = now()
        self._seconds: dict[str, float] = {}

    def __call__(self, phase: str) -> _Span:
        """Returns the context of a phase."""
        return _Span(self, phase)

    def switch(self, phase: str | None) -> str | None:
        """Ends the phase under way and begins another; returns the one that ended. None: no phase."""
        now, before = self._now(), self._phase
        if before is not None:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return before

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by phase so far, a copy; from any thread, then without those of the phase under way."""
        return dict(self._seconds)


class _Span:
    """One stay in a phase."""

    __slots__ = ("_before", "_clock", "_phase")

    def __init__(self, clock: PhaseClock, phase: str) -> None:
        self._clock, self._phase = clock, phase
        self._before: str | None = None

    def __enter__(self) -> None:
        self._before = self._clock.switch(self._phase)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clock.switch(self._before)


def usage(clocks: Iterable[PhaseClock]) -> Usage:
    """Returns where the time of this process went, by these clocks; the calling thread is the one whose delay is told."""
    phases: dict[str, float] = {}
    num_threads = 0
    for clock in clocks:
        num_threads += 1
        for phase, seconds in clock.seconds().items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return Usage(
        at=time.monotonic(),
        phases=phases,
        num_threads=num_threads,
        cpu_seconds=time.process_time(),
        delay_seconds=_delay_seconds(),
    )


def _delay_seconds() -> float | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(_SCHEDSTAT.read_text().split()[1]) * 1e-9
    return None


class Latencies:
    """The newest latencies of one kind of call, in seconds; added by one thread, read by any."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NUM_LATENCIES)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def take_p95(self) -> float:
        """Returns what one in twenty exceeds of those since the last call, and forgets them; NaN where there were none."""
        seconds, self._seconds = self._seconds, deque(maxlen=_NUM_LATENCIES)
        return float(np.percentile(list(seconds), 95)) if seconds else float("nan")
