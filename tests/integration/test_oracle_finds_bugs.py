"""The oracle is worth what it finds. Each of these bugs, planted in the real code, must be named by it:

1. n-step off by one in the discount: discount ** (m - 1), or the value taken one step too early or too late;
2. bootstrapping from a terminated state, or not from a truncated one;
3. a stack that reaches over the start of its episode;
4. a transition over an autoreset step: its action, which the environment ignored, is taken as real;
5. references off by one at the border of a chunk, where the planes of history belong;
6. priorities or scalars written to the neighbour's item once the ring has gone round.

The first four are a line changed in the source of n_step.py, actor.py or environments.py (a test that cannot find its line
fails and says so); the last two change messages on their way, so that they do not hang on how planes are stored.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from actors import actor, environments, n_step
from actors.scripted import Outcome
from common import wire
from common.messages import PriorityUpdate, SampleBatch, TransitionChunk
from replay_server.shard import ReplayShard


def make_scripts():
    rng = np.random.default_rng(1)
    return [[Outcome(float(rng.integers(-2, 3)), *(rng.random(2) < 0.15).tolist()) for _ in range(19)] for _ in range(2)]


def play(play_path, mode=AutoresetMode.NEXT_STEP):
    return play_path(make_scripts(), mode=mode, num_actors=2, n_step=3, frame_stack=4, num_steps=140, capacity=30)[0]


@pytest.fixture
def plant(monkeypatch):
    """Compiles a method anew with one line of its source changed."""

    def change(owner, name, right, wrong):
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        assert source.count(right) == 1, f"{owner.__name__}.{name} no longer has the line {right!r}: plant the bug anew"
        module = inspect.getmodule(owner)
        names = {}
        exec(compile(source.replace(right, wrong), f"<{name} with a bug>", "exec"), vars(module), names)
        monkeypatch.setattr(owner, name, names[name])

    return change


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
def test_without_a_bug_the_oracle_is_silent(play_path, mode):
    report = play(play_path, mode)
    assert report.faults == []
    assert report.num_transitions > 80 and report.stats.num_evicted > 50


STEPS = n_step.NStepBuilder
ACTOR = actor.Actor
ENVIRONMENT = environments.GymnasiumEnvironment


@pytest.mark.parametrize(
    ("mode", "owner", "name", "right", "wrong", "expected"),
    [
        ("NextStep", STEPS, "__init__", "discount ** (ages + 1)", "discount ** ages", "discount_t is 0.81, not 0.729"),
        ("NextStep", STEPS, "__init__", "discount**ages ", "discount ** (ages + 1) ", "r_t is"),
        ("NextStep", STEPS, "add", "=destination[env]", "=destination[env] - 1", "s_t is"),
        ("SameStep", ACTOR, "_take_result", "destination=source + 1", "destination=self._plane.copy()", "s_t is"),
        ("NextStep", STEPS, "add", " * ~terminated[env]", "", "discount_t is 0.9, not 0"),
        ("NextStep", STEPS, "add", "~terminated[env]", "~ended[env]", "discount_t is 0, not 0.9"),
        ("NextStep", STEPS, "add", "(ended[:, None] | self._is_oldest)", "self._is_oldest", "never came out"),
        ("NextStep", STEPS, "add", "self._count[is_transition & ended] = 0", "pass", "no transition begins at [zeros]"),
        (
            "NextStep",
            ACTOR,
            "_push_planes",
            "self._first[is_first] = self._plane[is_first]",
            "self._first[:] = 1",  # Right for the first episode only.
            "not [zeros,",
        ),
        (
            "NextStep",
            ACTOR,
            "_take_result",
            "is_transition = ~result.is_first",
            "is_transition = result.is_first | True",
            "no transition begins at",
        ),
        (
            "NextStep",
            ENVIRONMENT,
            "step",
            "= self._ended, None",
            "= np.zeros(self.num_envs, bool), None",
            "no transition begins at",
        ),
        ("Disabled", ENVIRONMENT, "_planes", "np.array(", "np.asarray(", "s_t is"),
    ],
    ids=[
        "1 discount to the power of m - 1",
        "1 rewards discounted once too often",
        "1 bootstraps one step too early",
        "1 bootstraps from the next episode",
        "2 bootstraps from a terminated state",
        "2 no bootstrap from a truncated state",
        "2 short tails are dropped",
        "3 window over the start of an episode",
        "3 stack over the start of an episode",
        "4 the actor takes the reset for a step",
        "4 the environment does not tell the reset",
        "4 the last observation is overwritten by the reset",
    ],
)
def test_a_planted_line_is_found(play_path, plant, mode, owner, name, right, wrong, expected):
    plant(owner, name, right, wrong)
    faults = play(play_path, AutoresetMode(mode)).faults
    assert any(expected in fault for fault in faults), faults


@pytest.mark.parametrize("name", ["s_tm1", "s_t"])
def test_5_a_reference_off_by_one_at_a_chunk_border_is_found(play_path, monkeypatch, name):
    def off_by_one(**fields):
        stacks = np.array(fields[name])
        stacks[0, :-1] = stacks[0, 1:]  # The oldest plane of the chunk's first stack is not there; the next one is used.
        return TransitionChunk(**fields | {name: stacks})

    monkeypatch.setattr(actor, "TransitionChunk", off_by_one)
    faults = play(play_path).faults
    assert any(f"{name} is [" in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("priority",), "its priority gives"),
        (("r_t",), "r_t is"),
        (("a_tm1", "r_t", "discount_t"), "a_tm1 is"),
        (("s_tm1", "s_t"), "a_tm1 is"),  # It is named by where its stack ends.
    ],
    ids=lambda names: "+".join(names) if isinstance(names, tuple) else None,
)
def test_6_fields_in_the_slot_of_the_neighbour_after_wraparound_are_found(play_path, monkeypatch, names, expected):
    insert = ReplayShard.insert

    def off_by_one(shard, message):
        chunk = wire.unpack(message, TransitionChunk)
        stats = shard.stats()
        if stats.num_inserted + chunk.num_transitions > stats.capacity:
            chunk = replace(chunk, **{name: np.roll(getattr(chunk, name), 1, axis=0) for name in names})
        return insert(shard, wire.pack(chunk))

    monkeypatch.setattr(ReplayShard, "insert", off_by_one)
    faults = play(play_path).faults
    assert any(expected in fault for fault in faults), faults


def test_6_an_old_item_overwritten_by_a_new_one_is_found(play_path, monkeypatch):
    """The scalars of an item change after it came out right: only drawing it again can tell."""
    sample = ReplayShard.sample

    def overwritten(shard, num_items):
        reply = sample(shard, num_items)
        batch = wire.unpack(reply.batch, SampleBatch)
        oldest = shard.stats().num_evicted
        r_t = np.where((batch.item_id == oldest) & (oldest > 0), batch.r_t + 1, batch.r_t)
        return replace(reply, batch=wire.pack(replace(batch, r_t=r_t)))

    monkeypatch.setattr(ReplayShard, "sample", overwritten)
    faults = play(play_path).faults
    assert any("when it was drawn first" in fault for fault in faults), faults


def test_6_an_item_that_is_never_drawn_is_found(play_path, monkeypatch):
    update_priorities = ReplayShard.update_priorities

    def forgets_one(shard, message):
        update = wire.unpack(message, PriorityUpdate)
        priority = np.where(update.item_id == 17, 0.0, update.priority)
        return update_priorities(shard, wire.pack(replace(update, priority=priority)))

    monkeypatch.setattr(ReplayShard, "update_priorities", forgets_one)
    faults = play(play_path).faults
    assert any("item 17 is resident, but" in fault for fault in faults), faults
