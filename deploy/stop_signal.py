"""How a person or a cluster asks a run to end."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that the run reads; a second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self.install()

    def install(self) -> None:
        """Takes both signals. Call it again after `ray.init`, which puts a handler of its own in the place of SIGTERM's."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Returns whether someone asked the run to end."""
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
