"""The params store: holds the newest parameters, so that actors pull from it and never from the learner."""

from __future__ import annotations

import time

import numpy as np

from common import wire
from common.messages import Array, ParamsSnapshot


class ParamsStore:
    """Keeps one packed ParamsSnapshot. The learner publishes; actors and evaluator ask for what is newer than theirs.

    Newer is by (epoch, version): a learner that goes on from a checkpoint has a higher epoch and may have a smaller version.
    Restarted empty it costs nothing: actors go on with what they have until the learner publishes again.
    """

    def __init__(self) -> None:
        self._held = (-1, -1)
        self._message: Array | None = None
        self._published = 0.0

    def publish(self, message: Array) -> None:
        """Replaces the snapshot, unless the one held is newer; copies it."""
        snapshot = wire.unpack(message, ParamsSnapshot)
        if (snapshot.epoch, snapshot.version) >= self._held:
            self._held, self._message = (snapshot.epoch, snapshot.version), np.array(message)
            self._published = time.monotonic()

    def latest(self, epoch: int, version: int) -> Array | None:
        """Returns the snapshot if it is newer than (epoch, version), else None."""
        return self._message if self._held > (epoch, version) else None

    def age_seconds(self) -> float:
        """Returns for how long the store has had what it holds."""
        return time.monotonic() - self._published
