"""What processes of this host take of its processors."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


def cpu_seconds(process: psutil.Process) -> float:
    """Returns the processor time of a process so far, user and system; 0 where it has gone."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def machine_busy_seconds() -> float:
    """Returns the processor time of this host so far that was not idle, what its hypervisor took included."""
    machine = psutil.cpu_times()
    return float(sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice)


@dataclass(frozen=True, slots=True)
class Reading:
    """Processor seconds so far."""

    when: float
    """On this host's monotonic clock."""
    processes: tuple[float, ...]
    main_threads: tuple[float, ...]
    """Of the thread of each process that runs what a Ray worker is asked for."""
    machine: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Between two readings, in processors: 1 is one of them, all the time."""

    processes: tuple[float, ...]
    main_threads: tuple[float, ...]
    machine: float
    """As a fraction of all processors of the host."""


def read(processes: Sequence[psutil.Process]) -> Reading:
    """Reads the clocks; resolution 10 ms."""
    threads = [{thread.id: thread.user_time + thread.system_time for thread in process.threads()} for process in processes]
    return Reading(
        time.monotonic(),
        tuple(cpu_seconds(process) for process in processes),
        tuple(by_id.get(process.pid, 0.0) for by_id, process in zip(threads, processes, strict=True)),
        machine_busy_seconds(),
    )


def between(before: Reading, after: Reading) -> Usage:
    seconds = after.when - before.when

    def rates(earlier: tuple[float, ...], later: tuple[float, ...]) -> tuple[float, ...]:
        return tuple((b - a) / seconds for a, b in zip(earlier, later, strict=True))

    return Usage(
        rates(before.processes, after.processes),
        rates(before.main_threads, after.main_threads),
        (after.machine - before.machine) / seconds / (os.cpu_count() or 1),
    )
