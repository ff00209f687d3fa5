"""An actor that plays nothing, for `benchmarks/fleet.py`. It imports next to nothing: there are hundreds of it on one machine."""

from __future__ import annotations

import time
from typing import Any

from common.metrics import ActorStats, PushCounts


class IdleActor:
    """Reports as an actor does, and plays nothing."""

    def __init__(self, slot: int, incarnation: int) -> None:
        self._slot, self._incarnation = slot, incarnation

    def run(self, seconds: float) -> ActorStats:
        time.sleep(seconds)
        return self.close(0.0)

    def close(self, timeout_seconds: float) -> ActorStats:
        return ActorStats(
            slot=self._slot,
            incarnation=self._incarnation,
            env_steps=0,
            sent=0,
            pushed=PushCounts(),
            params_epoch=-1,
            params_version=-1,
            epsilon=1.0,
        )


def make_idle_actor(config: Any, spec: Any, run: str, slot: int, incarnation: int, *rest: Any) -> IdleActor:
    return IdleActor(slot, incarnation)
