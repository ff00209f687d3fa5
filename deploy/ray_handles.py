"""Handles of a distributed run: Ray calls with timeouts. Waiting happens here, and every wait has its sentence.

A handle is made in the driver, pickled to a worker and used there by one thread, where it does not say otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from common import wire
from common.messages import Array, TransitionChunk
from common.metrics import UNANSWERED, PushCounts
from common.protocols import InsertReply, SampleReply
from common.timing import Latencies

_POLL_SECONDS = 0.02
_AWAY_POLL_SECONDS = 1.0
_MAX_CALL_BYTES = 100_000  # Ray carries up to 100 KiB inside the call, without its object store.


class NotBuiltError(RuntimeError):
    """A worker's process came anew, and its role is not made yet."""


class WorkerAddress(NamedTuple):
    """Where a worker runs: what `py-spy`, `kill` and a person need."""

    host: str
    pid: int
    node_id: str = ""
    """Ray's name of its node."""


class Worker:
    """A Ray process that holds one plain object, its role.

    `build` imports and makes the role in the worker, so that the driver need not import what a role needs (PyTorch), and a
    shard never does; `call` names one of its methods.
    """

    def __init__(self) -> None:
        self._role: Any = None

    def build(self, function: Any, *args: Any) -> WorkerAddress:
        """Makes the role with an importable function; returns where it runs."""
        self._role = function(*args)
        return self.address()

    def address(self) -> WorkerAddress:
        """Returns where it runs; the first answer says that it has a place."""
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""  # Else Ray would start one.
        return WorkerAddress(socket.gethostname(), os.getpid(), node_id)

    def read_file(self, path: str) -> tuple[str, bytes | None]:
        """Returns the host and what it has in a file, None where it has no such."""
        try:
            return socket.gethostname(), Path(path).read_bytes()
        except OSError:
            return socket.gethostname(), None

    def free_address(self) -> str:
        """Returns HOST:PORT where nothing listens: for a group of learners to meet at. On a single node nobody else reaches it."""
        host = "127.0.0.1" if len(ray.nodes()) == 1 else ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as free:
            free.bind((host, 0))
            return f"{host}:{free.getsockname()[1]}"

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        """Calls one of the role's methods. A role that runs out of memory in it may be half changed: its process ends."""
        if self._role is None:
            raise NotBuiltError("this process has no role yet")
        try:
            return getattr(self._role, method)(*args, **named)
        except MemoryError:
            os._exit(1)

    def call_each(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Calls one of the role's methods with each of the arguments in turn; returns the answers."""
        return [self.call(method, argument) for argument in arguments]


def end_worker(pid: int) -> None:
    """Kills a worker of Ray's on this host, and no process that has its number by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.name().startswith("ray::"):
            process.kill()


class _Sent(NamedTuple):
    """A chunk that is on its way."""

    shard: int
    num_transitions: int
    identity: tuple[int, int, int]
    """(actor slot, incarnation, seq)."""


class _Call(NamedTuple):
    """Chunks that are on their way together."""

    at: float
    """Since when, on the monotonic clock."""
    chunks: list[_Sent]


class RayReplayWriter:
    """An actor's way to all shards: bounded chunks in flight to each, in turn to those that ask for no pause.

    So a shard that hangs holds its own part of the chunks back, and no actor. A chunk whose shard dies before it answers is not sent
    again, since the shard may have taken it: when the shard is back it is asked, and what it has not is lost, counted by cause.
    """

    def __init__(self, shards: list[Any], max_in_flight: int, first_shard: int) -> None:
        """`max_in_flight` is over all shards, of which each has an equal part, at least one chunk."""
        self._shards = shards
        self._unknown: list[_Sent] = []  # Whose shards died before they answered.
        self._max_per_shard = -(-max_in_flight // len(shards))
        self._next = first_shard % len(shards)
        self._in_flight: dict[Any, _Call] = {}  # By reference.
        self._num_in_flight = [0] * len(shards)
        self._waits_for: list[str | None] = [None] * len(shards)
        self._ask_again_at = [0.0] * len(shards)
        self._asked: dict[Any, int] = {}  # By reference: shards that were asked whether they take more.
        self._counts = PushCounts()
        self._latencies = [Latencies() for _ in shards]

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._ask_shards()
            self._collect(0.0)
            if any(self._takes(shard) for shard in range(len(self._shards))):
                return None
            rest = deadline - time.monotonic()
            if rest <= 0:
                sentence = next((s for s in self._waits_for if s is not None), None)
                return sentence or f"actors wait for the shards to take {sum(self._num_in_flight)} chunks"
            if self._in_flight or self._asked:
                self._collect(min(_POLL_SECONDS, rest))
            else:
                time.sleep(min(_POLL_SECONDS, rest))

    def asks_for_pause(self) -> bool:
        return None not in self._waits_for

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        """Sends to the next shard what it takes of the chunks, in one call: a call takes as long as six chunks to pack."""
        while not self._takes(self._next):
            self._next = (self._next + 1) % len(self._shards)
        shard, num_bytes = self._next, 0
        messages: list[Array] = []
        in_call: list[_Sent] = []
        for chunk in itertools.islice(chunks, self._max_per_shard - self._num_in_flight[shard]):
            message = wire.pack(chunk)
            num_bytes += len(message)
            if messages and num_bytes > _MAX_CALL_BYTES:
                break
            messages.append(message)
            in_call.append(_Sent(shard, chunk.num_transitions, (chunk.actor_slot, chunk.incarnation, chunk.seq)))
        reference = self._shards[shard].call_each.remote("insert", messages)
        self._in_flight[reference] = _Call(time.monotonic(), in_call)
        self._num_in_flight[shard] += len(in_call)
        self._next = (shard + 1) % len(self._shards)
        return len(in_call)

    def counts(self) -> PushCounts:
        known = [p95 for latencies in self._latencies if not math.isnan(p95 := latencies.take_p95())]
        return replace(self._counts, lost=dict(self._counts.lost), answer_p95_seconds=max(known, default=math.nan))

    def drain(self, timeout_seconds: float) -> None:
        """Waits for the answers to all chunks in flight; those that do not come in time are counted as lost."""
        deadline = time.monotonic() + timeout_seconds
        while self._in_flight and (rest := deadline - time.monotonic()) > 0:
            self._collect(rest)
        for shard in {sent.shard for sent in self._unknown}:
            self._settle_unknown(shard, max(deadline - time.monotonic(), 1.0))
        for sent in (*itertools.chain.from_iterable(call.chunks for call in self._in_flight.values()), *self._unknown):
            self._lose(UNANSWERED, sent.num_transitions)
        self._in_flight.clear()
        self._num_in_flight = [0] * len(self._shards)
        self._unknown.clear()

    def _takes(self, shard: int) -> bool:
        return self._waits_for[shard] is None and self._num_in_flight[shard] < self._max_per_shard

    def _collect(self, timeout_seconds: float) -> None:
        """Takes in answers that are there, waiting for one at most so long."""
        references = [*self._in_flight, *self._asked]
        if not references:
            return
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        if not ready and timeout_seconds > 0:
            ready, _ = ray.wait(references, num_returns=1, timeout=timeout_seconds)
        for reference in ready:
            if reference in self._asked:
                self._on_permission(self._asked.pop(reference), reference)
            else:
                self._on_reply(self._in_flight.pop(reference), reference)

    def _on_reply(self, call: _Call, reference: Any) -> None:
        shard = call.chunks[0].shard
        self._num_in_flight[shard] -= len(call.chunks)
        try:
            replies: list[InsertReply] = ray.get(reference, timeout=10)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, NotBuiltError):
                self._lose(f"shard {shard} was away", sum(sent.num_transitions for sent in call.chunks))
            else:
                self._unknown += call.chunks
            self._mark_away(shard)
            return
        self._latencies[shard].add(time.monotonic() - call.at)
        for sent, reply in zip(call.chunks, replies, strict=True):
            self._counts.inserted += reply.num_inserted
            self._counts.refused += reply.num_refused
            unread = sent.num_transitions - reply.num_inserted - reply.num_refused
            self._lose(f"shard {shard} could not read a chunk", unread)
        self._waits_for[shard] = replies[-1].waits_for
        self._ask_again_at[shard] = time.monotonic() + _POLL_SECONDS

    def _on_permission(self, shard: int, reference: Any) -> None:
        try:
            self._waits_for[shard] = ray.get(reference, timeout=10)
        except RayError:
            self._mark_away(shard)
            return
        self._ask_again_at[shard] = time.monotonic() + _POLL_SECONDS
        self._settle_unknown(shard, 10.0)

    def _settle_unknown(self, shard: int, timeout_seconds: float) -> None:
        """Asks a shard that is back which of the chunks that it had not answered for it has."""
        asked = [sent for sent in self._unknown if sent.shard == shard]
        if not asked:
            return
        try:
            call = self._shards[shard].call.remote("has_chunks", [sent.identity for sent in asked])
            answers = ray.get(call, timeout=timeout_seconds)
        except RayError:
            return
        self._unknown = [sent for sent in self._unknown if sent.shard != shard]
        for sent, is_there in zip(asked, answers, strict=True):
            if is_there:
                self._counts.inserted += sent.num_transitions
            else:
                self._lose(f"shard {shard} died", sent.num_transitions)

    def _lose(self, cause: str, num_transitions: int) -> None:
        if num_transitions:
            self._counts.lost[cause] = self._counts.lost.get(cause, 0) + num_transitions

    def _ask_shards(self) -> None:
        """Asks paused shards whose time has come whether they take more."""
        now = time.monotonic()
        asked = set(self._asked.values())
        for shard, waits_for in enumerate(self._waits_for):
            if waits_for is not None and shard not in asked and now >= self._ask_again_at[shard]:
                self._asked[self._shards[shard].call.remote("ask_to_insert")] = shard

    def _mark_away(self, shard: int) -> None:
        self._waits_for[shard] = f"actors wait for shard {shard} to come back"
        self._ask_again_at[shard] = time.monotonic() + _AWAY_POLL_SECONDS


class RayReplayReader:
    """The learner's way to one shard: requests under way, answers in their order."""

    def __init__(self, shard: Any, shard_index: int) -> None:
        self._shard, self._shard_index = shard, shard_index
        self._requests: deque[Any] = deque()

    def request(self, num_items: int) -> None:
        self._requests.append(self._shard.call.remote("sample", num_items))

    def num_requested(self) -> int:
        return len(self._requests)

    def collect(self, timeout_seconds: float) -> SampleReply | None:
        try:
            reply: SampleReply = ray.get(self._requests[0], timeout=timeout_seconds)
        except GetTimeoutError:
            return None
        except RayError as error:
            reply = SampleReply(
                batch=None, waits_for=f"the learner waits for shard {self._shard_index}: {type(error).__name__}"
            )
        self._requests.popleft()
        return reply

    def update_priorities(self, message: Array) -> None:
        """Sends and forgets; called from the learner's thread, while `request` and `collect` are a prefetch thread's."""
        self._shard.call.remote("update_priorities", message)
