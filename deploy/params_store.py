"""The params store: holds the newest parameters, so that actors pull from it and never from the learner."""

from __future__ import annotations

import numpy as np

from common import wire
from common.messages import Array, ParamsSnapshot


class ParamsStore:
    """Keeps one packed ParamsSnapshot. The learner publishes; actors and evaluator ask for what is newer than theirs.

    Restarted empty it costs nothing: actors go on with what they have until the learner publishes again.
    """

    def __init__(self) -> None:
        self._epoch, self._version = -1, -1
        self._message: Array | None = None

    def publish(self, message: Array) -> None:
        """Replaces the snapshot, unless the one held is newer; copies it."""
        snapshot = wire.unpack(message, ParamsSnapshot)
        if (snapshot.epoch, snapshot.version) >= (self._epoch, self._version):
            self._epoch, self._version, self._message = snapshot.epoch, snapshot.version, np.array(message)

    def latest(self, epoch: int, version: int) -> Array | None:
        """Returns the snapshot if it is newer than (epoch, version), else None."""
        return self._message if (self._epoch, self._version) > (epoch, version) else None
