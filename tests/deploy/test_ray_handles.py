"""An actor's way to shards that answer, pause, hang, die and come back; Ray is a stand-in, so that each moment is told."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError

from common import wire
from common.messages import TransitionChunk
from common.protocols import InsertReply
from deploy import ray_handles
from deploy.ray_handles import NotBuiltError, RayReplayWriter


class Shard:
    """Answers a call when it is `answering`, with what `replies` says or with success."""

    def __init__(self, calls):
        self.answering, self.error, self.pause = True, None, None
        self.held, self.asked = set(), 0
        self.call = SimpleNamespace(remote=lambda method, *args: calls.make(self, method, *args))
        self.call_each = SimpleNamespace(remote=lambda method, arguments: calls.make(self, f"{method} each", arguments))
        self.num_in_calls: list[int] = []

    def answer(self, method, *args):
        if self.error is not None:
            raise self.error
        if method == "ask_to_insert":
            self.asked += 1
            return self.pause
        if method == "has_chunks":
            return [identity in self.held for identity in args[0]]
        assert method == "insert each"
        self.num_in_calls.append(len(args[0]))
        return [self.insert(message) for message in args[0]]

    def insert(self, message):
        chunk = wire.unpack(message, TransitionChunk)
        self.held.add((chunk.actor_slot, chunk.incarnation, chunk.seq))
        return InsertReply(num_inserted=chunk.num_transitions, num_refused=0, refusal=None, waits_for=self.pause)


class Calls:
    """`ray.wait` and `ray.get` over calls to shards; a call is done when its shard answers, and not before."""

    def __init__(self, clock):
        self.numbers, self.made, self.clock = itertools.count(), {}, clock

    def make(self, shard, method, *args):
        self.made[number := next(self.numbers)] = (shard, method, args)
        return number

    def wait(self, references, num_returns, timeout):
        ready = [one for one in references if self.made[one][0].answering]
        self.clock.now += 0 if ready else timeout
        return ready[:num_returns], []

    def get(self, reference, timeout):
        shard, method, args = self.made[reference]
        return shard.answer(method, *args)


@pytest.fixture
def shards(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    calls = Calls(clock)
    monkeypatch.setattr(ray_handles, "ray", calls)
    monkeypatch.setattr(ray_handles, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return [Shard(calls), Shard(calls)], clock


@pytest.fixture
def push(make_chunk):
    """Pushes so many chunks as an actor does; returns how many went, each of 3 transitions."""
    rng, seqs = np.random.default_rng(0), itertools.count()

    def run(writer, num):
        for done in range(num):
            if writer.wait_until_ready(1.0) is not None:
                return done
            assert writer.push([make_chunk(rng, num_transitions=3, seq=next(seqs))]) == 1
        return num

    return run


def test_a_shard_that_hangs_holds_back_its_own_part(shards, push):
    """Kills: chunks in flight that are counted over all shards, so that one which hangs stops every actor."""
    (hung, alive), _ = shards
    hung.answering = False
    writer = RayReplayWriter([hung, alive], 4, 0)
    assert push(writer, 50) == 50
    assert len(alive.held) in (47, 48) and writer.counts().inserted == 3 * len(alive.held)
    hung.answering = True
    writer.drain(1.0)
    assert writer.counts().inserted == 150 and writer.counts().lost == {}


def test_a_paused_shard_that_hangs_is_asked_once_and_nobody_waits_for_it(shards, push):
    """Kills: a question that is waited for, while the other shard takes all that comes."""
    (hung, alive), clock = shards
    hung.pause = "actors wait for the learner: 8 more samples due"
    writer = RayReplayWriter([hung, alive], 4, 0)
    push(writer, 2)
    hung.answering = False
    before = clock.now
    assert push(writer, 50) == 50 and clock.now - before < 0.1
    assert len(writer._asked) <= 1


def test_when_all_pause_the_sentence_says_for_whom(shards, push):
    for shard in shards[0]:
        shard.pause = "actors wait for the learner: 8 more samples due"
    writer = RayReplayWriter(shards[0], 4, 0)
    assert push(writer, 50) <= 4
    assert writer.wait_until_ready(0.5) == "actors wait for the learner: 8 more samples due"
    assert shards[0][0].asked > 10
    for shard in shards[0]:
        shard.answering = False
    writer._waits_for = [None, None]
    assert push(writer, 50) == 4
    assert writer.wait_until_ready(0.5) == "actors wait for the shards to take 4 chunks"


def test_chunks_that_are_ready_together_go_in_one_call_as_far_as_there_is_room(shards, make_chunk):
    """Kills: a call that takes more than may be in flight, or a shard's pause said by the first of a call and forgotten by the last."""
    (shard, _), _ = shards
    rng = np.random.default_rng(0)
    chunks = [make_chunk(rng, num_transitions=3, seq=seq) for seq in range(7)]
    writer = RayReplayWriter([shard], 4, 0)
    assert writer.wait_until_ready(1.0) is None and writer.push(chunks) == 4
    shard.answering = False
    assert not writer.asks_for_pause()
    assert writer.wait_until_ready(0.1) == "actors wait for the shards to take 4 chunks"
    assert not writer.asks_for_pause(), "that it has not answered is no pause"
    shard.answering, shard.pause = True, "actors wait for the learner: 8 more samples due"
    assert writer.wait_until_ready(0.1) == shard.pause and writer.asks_for_pause()
    shard.pause = None
    assert writer.wait_until_ready(1.0) is None and writer.push(chunks[4:]) == 3
    writer.drain(1.0)
    assert shard.num_in_calls == [4, 3] and {seq for _, _, seq in shard.held} == set(range(7))
    assert writer.counts().inserted == 21 and writer.counts().lost == {}


def test_a_call_is_no_larger_than_ray_carries_without_its_object_store(shards, make_chunk, monkeypatch):
    (shard, _), _ = shards
    chunks = [make_chunk(np.random.default_rng(0), num_transitions=3, seq=seq) for seq in range(4)]
    sizes = [len(wire.pack(chunk)) for chunk in chunks]
    monkeypatch.setattr(ray_handles, "_MAX_CALL_BYTES", sum(sizes[:2]))
    writer = RayReplayWriter([shard], 8, 0)
    assert writer.push(chunks) == 2
    monkeypatch.setattr(ray_handles, "_MAX_CALL_BYTES", 1)
    assert writer.push(chunks[2:]) == 1, "one goes however large it is"


def test_chunks_of_a_shard_that_died_are_settled_when_it_is_back(shards, push):
    """It took two, answered for none, and comes back with one of them. Kills: one that is sent twice, or counted twice."""
    (shard, _), _ = shards
    writer = RayReplayWriter([shard], 4, 0)
    shard.answering = False
    assert push(writer, 2) == 2
    shard.answering, shard.error = True, RayActorError()
    assert writer.wait_until_ready(0.5) == "actors wait for shard 0 to come back"
    assert writer.counts().lost == {} and writer.counts().inserted == 0, "nobody knows yet"
    shard.error, shard.held = None, {next(iter(sent.identity for sent in writer._unknown))}
    assert writer.wait_until_ready(2.0) is None
    assert writer.counts().inserted == 3 and writer.counts().lost == {"shard 0 died": 3}


def test_a_chunk_that_reached_a_process_without_its_shard_is_lost_at_once(shards, push):
    (shard, _), _ = shards
    writer = RayReplayWriter([shard], 4, 0)
    shard.answering = False
    push(writer, 1)
    shard.answering = True
    shard.error = RayTaskError("insert", "traceback", NotBuiltError("this process has no role yet"))
    assert writer.wait_until_ready(0.1) is not None
    assert writer.counts().lost == {"shard 0 was away": 3}


def test_a_role_that_runs_out_of_memory_ends_with_its_process(monkeypatch):
    """A shard that took half a chunk must not answer again. Kills: an error that goes to the caller alone."""

    class Full:
        def insert(self):
            raise MemoryError

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(ray_handles.os, "_exit", end)
    worker = ray_handles.Worker()
    worker.build(Full)
    with pytest.raises(Ended, match="1"):
        worker.call("insert")
