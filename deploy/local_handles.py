"""Handles of a serial run: plain calls, in the same process and thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from common import wire
from common.messages import Array, TransitionChunk
from common.metrics import PushCounts
from common.protocols import ReplayShardApi, SampleReply
from deploy.params_store import ParamsStore


class LocalReplayWriter:
    """Pushes to the shards in turn, past those that ask actors to pause."""

    def __init__(self, shards: list[ReplayShardApi]) -> None:
        self._shards = shards
        self._next = 0  # Whose turn it is.
        self._counts = PushCounts()
        self._asked_for_pause = False

    def state(self) -> list[int]:
        return [self._next, self._counts.inserted, self._counts.refused]

    def restore(self, state: list[int]) -> None:
        self._next, self._counts.inserted, self._counts.refused = state

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        sentences = [shard.ask_to_insert() for shard in self._shards]
        self._asked_for_pause = None not in sentences
        return sentences[0] if self._asked_for_pause else None

    def asks_for_pause(self) -> bool:
        return self._asked_for_pause

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        while self._shards[self._next].ask_to_insert() is not None:
            self._next = (self._next + 1) % len(self._shards)
        reply = self._shards[self._next].insert(wire.pack(chunks[0]))
        self._counts.inserted += reply.num_inserted
        self._counts.refused += reply.num_refused
        self._next = (self._next + 1) % len(self._shards)
        return 1

    def counts(self) -> PushCounts:
        return replace(self._counts)

    def drain(self, timeout_seconds: float) -> None:
        pass


class LocalReplayReader:
    """Asks one shard when the answer is wanted."""

    def __init__(self, shard: ReplayShardApi) -> None:
        self._shard = shard
        self._requests: deque[int] = deque()

    def request(self, num_items: int) -> None:
        self._requests.append(num_items)

    def num_requested(self) -> int:
        return len(self._requests)

    def collect(self, timeout_seconds: float) -> SampleReply | None:
        return self._shard.sample(self._requests.popleft())

    def update_priorities(self, message: Array) -> None:
        self._shard.update_priorities(message)


class LocalParams:
    """Both ends of the params store."""

    def __init__(self, store: ParamsStore) -> None:
        self._store = store
        self._published: float | None = None

    def publish(self, message: Array) -> None:
        self._store.publish(message)

    def poll(self, epoch: int, version: int) -> Array | None:
        message = self._store.latest(epoch, version)
        if message is not None:
            self._published = time.monotonic() - self._store.age_seconds()
        return message

    def fetch(self, epoch: int, version: int, timeout_seconds: float) -> Array | None:
        return self.poll(epoch, version)

    def age_seconds(self) -> float | None:
        return None if self._published is None else time.monotonic() - self._published
