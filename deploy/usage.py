"""From what each process says of its time to what a row of metrics says: parts of the time between two rows, by role."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from common.timing import Usage

Key = tuple[int, ...]


class UsageRates:
    """Remembers what each process of a role had said at the row before."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, Key], Usage] = {}
        psutil.cpu_percent()  # The next call tells of the time since this one.

    def of_role(self, role: str, usages: Mapping[Key, Usage | None]) -> dict[str, float]:
        """Returns `<role>/<phase>_fraction` of each phase, mean over the processes' threads; `<role>/cpu_cores`, summed over processes;
        and `<role>/delay_fraction`, mean. Nothing of a process that is told of for the first time.

        Args:
          usages: by a key that is another one for each process that the role ever had.
        """
        intervals = self.intervals(role, usages)
        if not intervals:
            return {}
        num_threads = sum(interval.num_threads for interval in intervals.values())
        row: dict[str, float] = {}
        for interval in intervals.values():
            for phase, seconds in interval.phases.items():
                name = f"{role}/{phase}_fraction"
                row[name] = row.get(name, 0.0) + seconds / interval.at / num_threads
        row[f"{role}/cpu_cores"] = sum(interval.cpu_seconds / interval.at for interval in intervals.values())
        delays = [i.delay_seconds / i.at for i in intervals.values() if i.delay_seconds is not None]
        return row | ({f"{role}/delay_fraction": sum(delays) / len(delays)} if delays else {})

    def intervals(self, role: str, usages: Mapping[Key, Usage | None]) -> dict[Key, Usage]:
        """Returns, for each process that has told something new, what came since the row before; `at` is then the seconds between."""
        found = {}
        for key, now in usages.items():
            before = self._before.get((role, key))
            if now is None:
                continue
            if before is None or now.at > before.at:
                self._before[role, key] = now
            if before is not None and now.at > before.at:
                found[key] = _difference(before, now)
        return found

    def host_cpu_fraction(self) -> float:
        """Returns how busy this host's processors were since the row before, whoever used them; in [0, 1]."""
        return psutil.cpu_percent() / 100


def _difference(before: Usage, now: Usage) -> Usage:
    has_delays = before.delay_seconds is not None and now.delay_seconds is not None
    return Usage(
        at=now.at - before.at,
        phases={phase: seconds - before.phases.get(phase, 0.0) for phase, seconds in now.phases.items()},
        num_threads=now.num_threads,
        cpu_seconds=now.cpu_seconds - before.cpu_seconds,
        delay_seconds=now.delay_seconds - before.delay_seconds if has_delays else None,  # type: ignore[operator]
    )
