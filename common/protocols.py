"""What a role knows of the others: handles. `deploy/` makes them of Ray calls, or of plain calls in a serial run.

No handle blocks longer than the timeout it is given, and none raises for a peer that is away: it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages import Array, TransitionChunk
from common.metrics import PushCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class InsertReply:
    """A shard's answer to one chunk."""

    num_inserted: int
    num_refused: int
    """Transitions of a chunk that was refused; 0 where it could not even be read."""
    refusal: str | None
    """Why the chunk was refused, or None."""
    waits_for: str | None
    """A sentence where the limiter asks actors to pause, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleReply:
    """A shard's answer to a request for items: a packed SampleBatch, or a sentence that says what it waits for."""

    batch: Array | None
    waits_for: str | None


class ReplayShardApi(Protocol):
    """What a shard offers, wherever it runs. It never sleeps."""

    def insert(self, message: Array) -> InsertReply: ...
    def ask_to_insert(self) -> str | None: ...
    def sample(self, num_items: int) -> SampleReply: ...
    def update_priorities(self, message: Array) -> int: ...


class ReplayWriter(Protocol):
    """An actor's way to all shards."""

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        """Returns None as soon as a chunk may be pushed, or after the timeout the sentence who waits for what."""

    def asks_for_pause(self) -> bool:
        """Whether replay itself asked for a pause when last looked at: else it is only answers that are not there yet. Never blocks."""

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        """Sends the first of these chunks, or several, to one shard; returns how many. Call it after `wait_until_ready` said None."""

    def counts(self) -> PushCounts:
        """Returns what became of what was sent, a copy."""

    def drain(self, timeout_seconds: float) -> None:
        """Waits for all answers; what is not answered in time counts as lost."""


class ReplayReader(Protocol):
    """The learner's way to one shard."""

    def request(self, num_items: int) -> None:
        """Asks for items; `collect` brings the answers in the order of the requests."""

    def num_requested(self) -> int:
        """Requests that were not collected yet."""

    def collect(self, timeout_seconds: float) -> SampleReply | None:
        """Returns the oldest answer, or None where it is not there within the timeout."""

    def update_priorities(self, message: Array) -> None:
        """Sends a packed PriorityUpdate and does not wait."""


class ParamsReader(Protocol):
    """A way to the newest parameters."""

    def poll(self, epoch: int, version: int) -> Array | None:
        """Returns a packed ParamsSnapshot newer than (epoch, version) if one is at hand. Never blocks."""

    def fetch(self, epoch: int, version: int, timeout_seconds: float) -> Array | None:
        """Asks now and waits for the answer: a ParamsSnapshot newer than (epoch, version), or None."""

    def age_seconds(self) -> float | None:
        """Returns how long ago the snapshot that was last returned came to the store; None before the first."""


class ParamsWriter(Protocol):
    """The learner's way to the params store."""

    def publish(self, message: Array) -> None:
        """Sends a packed ParamsSnapshot and does not wait."""
