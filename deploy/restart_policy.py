"""When what died begins again: at once, later, or not any more. Pure: whoever asks says what time it is."""

from __future__ import annotations

from collections import defaultdict, deque

MAX_DEATHS, WINDOW_SECONDS = 5, 60.0
"""A slot that dies so often within so long crash-loops."""
PROBE_SECONDS = 60.0
"""How long one that crash-loops rests until it is tried again."""


class RestartPolicy:
    """Of all slots of one role.

    The first death is answered at once, further ones of the same slot after 1, 2 and 4 seconds. A slot that dies five times within a
    minute, or, however long its start takes, five times without a report, is quarantined: tried once a minute, while the others go on. Where half of all slots are, the fault is not theirs, and the
    run ends.
    """

    def __init__(self, num_slots: int = 1) -> None:
        self._num_slots = num_slots
        self._deaths: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=MAX_DEATHS))
        self._fruitless: dict[int, int] = defaultdict(int)  # Deaths since the last report.
        self._quarantined: dict[int, float] = {}  # By slot: when it died last.

    def on_report(self, slot: int) -> None:
        """Notes that a slot did some of its work."""
        self._fruitless[slot] = 0

    def on_death(self, slot: int, now: float) -> float | None:
        """Returns the seconds after which the slot begins again, or None where the run ends."""
        deaths = self._deaths[slot]
        deaths.append(now)
        self._fruitless[slot] += 1
        is_often = len(deaths) == MAX_DEATHS and now - deaths[0] < WINDOW_SECONDS
        loops = is_often or self._fruitless[slot] >= MAX_DEATHS
        if loops or slot in self.quarantined(now):
            self._quarantined[slot] = now
            return None if 2 * len(self.quarantined(now)) >= self._num_slots else PROBE_SECONDS
        recent = sum(now - death < WINDOW_SECONDS for death in deaths)
        return 0.0 if recent == 1 else 2.0 ** (recent - 2)

    def quarantined(self, now: float) -> set[int]:
        """Returns the slots that crash-loop; one that has lived for a minute after it was tried again is none of them any more."""
        return {slot for slot, died in self._quarantined.items() if now - died < PROBE_SECONDS + WINDOW_SECONDS}
