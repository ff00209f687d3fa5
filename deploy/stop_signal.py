"""How a person or a cluster asks a run to end."""

from __future__ import annotations

import signal
import time
from types import FrameType

_SAME_PRESS_SECONDS = 2.0  # People press twice, and terminals send to the whole group.


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that the run reads; one that comes later ends the process at once."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self.is_urgent = False
        """Whether it was a SIGTERM, after which a scheduler soon ends the process."""
        self.install()

    def install(self) -> None:
        """Takes both signals. Call it again after `ray.init`, which puts a handler of its own in the place of SIGTERM's."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Returns whether someone asked the run to end."""
        return self._asked_at is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self.is_urgent = number == signal.SIGTERM
        elif now - self._asked_at > _SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
