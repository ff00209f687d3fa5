"""The supervisor on a cluster whose nodes come, go and drain, without Ray: nodes are written down, calls are strings."""

import math
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from common.metrics import ActorStats, PushCounts
from deploy import supervisor
from deploy.progress import Progress
from deploy.ray_handles import WorkerAddress
from deploy.ray_session import Node
from deploy.recipes import gridworld
from deploy.supervisor import Supervisor

NUM_SLOTS = 4


def node(name):
    return Node(f"id-{name}", name, False, {"CPU": 2.0}, {})


def stats(slot, incarnation, sent):
    return ActorStats(
        slot=slot,
        incarnation=incarnation,
        env_steps=sent,
        sent=sent,
        pushed=PushCounts(inserted=sent),
        params_epoch=-1,
        params_version=-1,
        epsilon=0.5,
    )


class FakeFleet:
    """Actors whose calls are named SLOT.INCARNATION.METHOD and are answered when a test says so."""

    def __init__(self, tested):
        self.tested, self.answers, self.killed, self.now = tested, {}, [], 0.0

    def make(self, role, name, index=0, max_restarts=0):
        def method(verb):
            return SimpleNamespace(remote=lambda *args: f"{name}.{verb if verb != 'call' else args[0]}")

        return SimpleNamespace(name=name, address=method("address"), build=method("build"), call=method("call"))

    def wait(self, calls, num_returns, timeout):
        return [c for c in calls if c in self.answers], [c for c in calls if c not in self.answers]

    def get(self, call, timeout):
        answer = self.answers.pop(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, worker):
        self.killed.append(worker.name)

    def answer(self, **answers):
        """By slot, actor0=...: the answer to its call under way."""
        for name, value in answers.items():
            (call,) = self.calls(int(name.removeprefix("actor")))
            self.answers[call] = value
        self.tested._take_answers()

    def calls(self, slot):
        return [c for c, expected in self.tested._calls.items() if expected.worker_index == slot]

    def look(self):
        self.now += 6.0
        self.tested._look_at_nodes()
        self.tested._start_again()

    def place(self, slot, where):
        """Lets a slot find its place, be made there, and act."""
        address = WorkerAddress(where.host, 1, where.node_id)
        self.answer(**{f"actor{slot}": address})
        self.answer(**{f"actor{slot}": address})
        assert self.calls(slot)[0].endswith(".run")  # Its first.


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    base = gridworld()
    config = replace(base, address="10.0.0.1:6379", actors=replace(base.actors, num_actors=NUM_SLOTS))
    events = deque()
    recorder = SimpleNamespace(event=events.append, row=lambda: None)
    run_dir = SimpleNamespace(path=tmp_path, run="r")
    tested = Supervisor(config, None, run_dir, Progress(config, {}), recorder, lambda: False)
    fleet = FakeFleet(tested)
    for name in ("wait", "get", "kill"):
        monkeypatch.setattr(supervisor.ray, name, getattr(fleet, name))
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: fleet.now)
    monkeypatch.setattr(tested, "_worker", fleet.make)
    tested._placement = SimpleNamespace(describe_actor=lambda: "1 CPUs, not the head")
    tested._shards = [None]
    fleet.events, fleet.nodes, fleet.leaving = events, [node("a"), node("b")], set()
    monkeypatch.setattr(supervisor, "nodes", lambda: fleet.nodes)
    monkeypatch.setattr(supervisor, "leaving_nodes", lambda: fleet.leaving)
    monkeypatch.setattr(supervisor, "_end_process", lambda address: None)
    tested._nodes = {n.node_id: n for n in fleet.nodes}
    for slot in tested._slots:
        tested._start_actor(slot)
    return fleet


def test_a_slot_without_a_place_waits_as_long_as_it_takes_and_is_no_death(fleet):
    fleet.place(0, fleet.nodes[0])
    fleet.answer(actor0=stats(0, 0, 5))
    fleet.look()
    assert not fleet.tested._progress.degraded(), "it may take some seconds"
    fleet.look()
    (sentence,) = fleet.tested._progress.degraded()
    assert sentence == "3 of 4 actors wait for a node with 1 CPUs, not the head"
    fleet.now += 1e6
    fleet.answer(actor0=stats(0, 0, 9))
    fleet.look()
    assert fleet.events.count(sentence) == 1 and not any("died" in event for event in fleet.events)
    fleet.nodes.append(node("c"))
    fleet.look()
    assert "node c (2 CPUs) has joined" in fleet.events
    for slot in (1, 2, 3):
        fleet.place(slot, fleet.nodes[2])
    fleet.answer(actor0=stats(0, 0, 11), actor1=stats(1, 0, 1), actor2=stats(2, 0, 1))
    fleet.look()
    assert not fleet.tested._progress.degraded() and fleet.events[-1] != "every actor acts", "one is still being made"
    fleet.answer(actor3=stats(3, 0, 1))
    fleet.look()
    assert fleet.events[-1] == "every actor acts"


def test_actors_of_a_node_that_died_ask_for_another_place_at_once_however_often(fleet):
    """Kills: a flapping node that puts its slots into quarantine, or ends the run."""
    for slot in range(NUM_SLOTS):
        fleet.place(slot, fleet.nodes[slot % 2])
    for number in range(8):
        gone = fleet.nodes.pop(1)
        fleet.answer(actor1=RayActorError(), actor3=RayActorError())
        fleet.tested._start_again()
        assert fleet.calls(1) == [f"actor1.{number + 1}.address"] and fleet.calls(3) == [f"actor3.{number + 1}.address"]
        fleet.look()
        assert f"node {gone.host} (2 CPUs) has left" in fleet.events
        fleet.nodes.append(node(f"b{number}"))
        fleet.look()
        fleet.place(1, fleet.nodes[1])
        fleet.place(3, fleet.nodes[1])
        fleet.answer(actor0=stats(0, 0, number), actor2=stats(2, 0, number))
    fleet.answer(actor2=ActorUnavailableError("unreachable", None))
    fleet.look()
    fleet.answer(actor0=RayActorError())
    fleet.look()
    assert fleet.calls(0) == ["actor0.1.address"], "a death on a node that lives is a death"
    assert fleet.tested._policies["actor"]._deaths.keys() == {0}


def test_a_slot_that_lost_its_node_once_is_not_excused_for_what_comes_later(fleet):
    """Kills: a restart without end and without delay of a slot that never finds a place again."""
    fleet.place(1, fleet.nodes[1])
    fleet.nodes.pop(1)
    fleet.answer(actor1=RayActorError())
    fleet.look()
    delays = []
    for _ in range(3):
        fleet.answer(actor1=RayTaskError("address", "traceback", RuntimeError("no environment")))
        delays.append(fleet.tested._starts["actor", 1] - fleet.now)
        fleet.now += delays[-1]
        fleet.tested._start_again()
    assert delays == [0.0, 1.0, 2.0]


def test_a_node_on_which_no_actor_lives_gets_no_more_of_them_while_others_act(fleet):
    """Kills: one machine with a broken installation that ends the whole run, since it always has room."""
    avoided = []
    fleet.tested._placement.avoid = lambda node_id: avoided.append(node_id) or True
    fleet.place(0, fleet.nodes[0])
    fleet.answer(actor0=stats(0, 0, 5))
    bad = fleet.nodes[1]
    for slot in (1, 2, 3):
        fleet.place(slot, bad)
        fleet.answer(**{f"actor{slot}": RayTaskError("build", "traceback", ImportError("no gymnasium"))})
    assert avoided == ["id-b"]
    assert any("b gets no more actors: 3 died there before they did anything" in event for event in fleet.events)
    fleet.now += 1.0
    fleet.tested._start_again()
    assert fleet.calls(3) == ["actor3.1.address"], "and it is no fault of the slot"


def test_without_anybody_who_acts_it_is_no_nodes_fault(fleet):
    fleet.tested._placement.avoid = None
    for slot in range(NUM_SLOTS):
        fleet.place(slot, fleet.nodes[1])
        fleet.answer(**{f"actor{slot}": RayTaskError("build", "traceback", ImportError("no gymnasium"))})
    assert fleet.tested._policies["actor"]._deaths.keys() == set(range(NUM_SLOTS))


def test_actors_leave_a_draining_node_in_good_order(fleet):
    """Kills: one that is killed with what it has not sent, one that goes on there, an incarnation counted as died."""
    for slot in range(NUM_SLOTS):
        fleet.place(slot, fleet.nodes[slot % 2])
    fleet.leaving = {"id-b"}
    fleet.look()
    assert any("node b is about to leave" in event for event in fleet.events)
    assert fleet.tested._next_checkpoint <= fleet.now
    fleet.answer(actor0=stats(0, 0, 7), actor1=stats(1, 0, 7))
    assert fleet.calls(0) == ["actor0.0.run"] and fleet.calls(1) == ["actor1.0.close"]
    fleet.answer(actor1=stats(1, 0, 9))
    assert fleet.killed == ["actor1.0"] and 1 not in fleet.tested._progress.actors
    fleet.tested._start_again()
    assert fleet.calls(1) == ["actor1.1.address"]
    shard = SimpleNamespace(
        shard_index=0,
        senders={
            (0, 0): SimpleNamespace(inserted=7, refused=0, sent=7),
            (1, 0): SimpleNamespace(inserted=9, refused=0, sent=9),
        },
        lost={},
        num_inserted=16,
        size=16,
        num_evicted=0,
        num_sampled=0,
        num_priority_updates=0,
        num_stale_priority_updates=0,
    )
    balance = fleet.tested._progress.ledger.balance([shard])
    assert balance["balanced"] and balance["lost"] == {}


def test_slots_keep_their_steps_and_never_an_incarnation_twice(fleet):
    fleet.place(2, fleet.nodes[0])
    fleet.answer(actor2=stats(2, 0, 40))
    fleet.nodes.pop(0)
    fleet.answer(actor2=RayActorError())
    fleet.look()
    assert fleet.tested._progress.env_steps_of[2] == 40 and fleet.tested._progress.incarnation_of[2] == 1


def test_at_the_end_slots_without_a_place_are_given_up_and_nobody_waits_for_them(fleet):
    fleet.place(0, fleet.nodes[0])
    fleet.answer(actor0=stats(0, 0, 5))
    (call,) = fleet.calls(0)
    fleet.answers |= {call: stats(0, 0, 6), "actor0.0.close": stats(0, 0, 6)}
    fleet.tested._drain_actors()
    assert sorted(fleet.killed) == ["actor1.0", "actor2.0", "actor3.0"] and not fleet.tested._calls
    assert all(math.isinf(expected.deadline) for expected in fleet.tested._calls.values())


def test_a_large_fleet_reports_less_often(tmp_path):
    base = gridworld()

    def seconds(num_actors, max_workers=None):
        config = replace(base, actors=replace(base.actors, num_actors=num_actors, max_workers=max_workers))
        tested = Supervisor(config, None, SimpleNamespace(path=tmp_path), Progress(config, {}), None, lambda: False)
        return tested._actor_seconds, len(tested._slots)

    assert seconds(8) == (1.0, 8)
    assert seconds(90) == (3.0, 90)
    assert seconds(1_000) == (10.0, 1_000)
    assert seconds(1_000, 30) == (1.0, 30)
