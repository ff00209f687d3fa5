"""The broadcast of parameters on Ray: a store that owns one object a version, and both ways to it.

The learner sends a version by value and the store puts it into the object store itself: what it owns outlives the learner. Readers
are told a reference and map the one copy on their node, however many they are; Ray moves it between nodes, once to each.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError

from common import wire
from common.messages import Array, ParamsSnapshot
from common.metrics import StoreStats

_INLINE_BYTES = 90_000  # Ray carries up to 100 KiB inside an answer.
_KEPT_VERSIONS = 2
_FETCH_SECONDS = 30.0  # A version that did not come from its node by then is given up for the newest.


class Answer(NamedTuple):
    """What a reader is told of a version newer than its own."""

    message: Any
    """The packed ParamsSnapshot, or a reference to it: inside a tuple Ray hands over the reference, not the object."""
    age_seconds: float
    """For how long the store had had it when it answered."""


class RayParamsStore:
    """A ParamsStore whose snapshots lie in Ray's object store; made and used inside a Ray worker.

    It keeps the newest and the one before, so that a reader that was just told of that one still finds it. Ray frees an older one
    when the last reader lets go of it. Messages below 90 kB stay here and travel inside the answers: for them a reference is
    dearer, since each reader would have to ask for the object after it had the answer.
    """

    def __init__(self) -> None:
        self._held = (-1, -1)
        self._kept: deque[Any] = deque(maxlen=_KEPT_VERSIONS)
        self._published = math.nan
        self._num_published = self._num_answered = 0

    def publish(self, message: Array) -> None:
        """Takes a snapshot, unless the one held is newer."""
        snapshot = wire.unpack(message, ParamsSnapshot)
        if (snapshot.epoch, snapshot.version) >= self._held:
            self._held = (snapshot.epoch, snapshot.version)
            self._kept.append(np.array(message) if message.nbytes < _INLINE_BYTES else ray.put(message))
            self._published = time.monotonic()
            self._num_published += 1

    def latest(self, epoch: int, version: int) -> Answer | None:
        """Returns the snapshot if it is newer than (epoch, version), else None."""
        if self._held <= (epoch, version):
            return None
        self._num_answered += 1
        return Answer(self._kept[-1], time.monotonic() - self._published)

    def stats(self) -> StoreStats:
        epoch, version = self._held
        return StoreStats(
            params_epoch=epoch,
            params_version=version,
            params_age_seconds=time.monotonic() - self._published,
            num_published=self._num_published,
            num_answered=self._num_answered,
        )


class RayParamsReader:
    """An actor's way to the params store: one question under way, then the object that its answer named."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._question: Any = None
        self._asked = 0.0
        self._answer: Answer | None = None
        self._published: float | None = None

    def poll(self, epoch: int, version: int) -> Array | None:
        try:
            if self._answer is None and self._question is not None and _is_here(self._question):
                question, self._question = self._question, None
                self._answer = ray.get(question, timeout=_FETCH_SECONDS)
            if self._answer is None:
                if self._question is None:
                    self._ask(epoch, version)
                return None
            if not isinstance(self._answer.message, ray.ObjectRef) or _is_here(self._answer.message):
                return self._take(_FETCH_SECONDS)
            if time.monotonic() > self._asked + _FETCH_SECONDS:
                self._answer = None
        except RayError:  # The store is away, or was when it owned this version: go on with what there is.
            self._question = self._answer = None
        return None

    def fetch(self, epoch: int, version: int, timeout_seconds: float) -> Array | None:
        deadline = time.monotonic() + timeout_seconds
        try:
            self._ask(epoch, version)
            self._answer = ray.get(self._question, timeout=timeout_seconds)
            return None if self._answer is None else self._take(max(deadline - time.monotonic(), 0.0))
        except RayError:
            return None
        finally:
            self._question = self._answer = None

    def age_seconds(self) -> float | None:
        return None if self._published is None else time.monotonic() - self._published

    def _ask(self, epoch: int, version: int) -> None:
        self._question, self._asked = self._store.call.remote("latest", epoch, version), time.monotonic()

    def _take(self, timeout_seconds: float) -> Array:
        """Returns the message that the answer names, and lets go of its reference."""
        answer, self._answer = self._answer, None
        assert answer is not None
        is_reference = isinstance(answer.message, ray.ObjectRef)
        message: Array = ray.get(answer.message, timeout=timeout_seconds) if is_reference else answer.message
        self._published = self._asked - answer.age_seconds  # At most the answer's way too early; needs no common clock.
        return message


class RayParamsWriter:
    """The learner's way to the params store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def publish(self, message: Array) -> None:
        self._store.call.remote("publish", message)


def _is_here(reference: Any) -> bool:
    """Whether a get would find the object, or its error, on this node; else Ray begins to fetch it. Does not wait."""
    ready, _ = ray.wait([reference], timeout=0, fetch_local=True)
    return bool(ready)
