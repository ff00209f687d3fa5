"""The supervisor's table of calls when the learner dies, without Ray: workers are names, calls are strings."""

import errno
import time
from collections import deque
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from common.errors import CheckpointError
from common.metrics import LearnerStats
from deploy import ray_handles, supervisor
from deploy.outcome import RunFault
from deploy.progress import Progress
from deploy.ray_handles import WorkerAddress
from deploy.recipes import gridworld
from deploy.supervisor import Supervisor


def learner_stats(updates):
    return LearnerStats(
        updates=updates,
        samples=64 * updates,
        published_version=updates,
        loss=0.0,
        mean_value=0.0,
        grad_norm=0.0,
        params_lag_updates=0.0,
        busy_seconds=1.0,
        waiting_seconds=0.0,
        num_ready_batches=0,
        num_dropped_batches=0,
        waits_for=None,
        last_fault=None,
    )


class FakeRay:
    """Answers at once what was written down for a call; None to whom does not wait for more than its end."""

    def __init__(self):
        self.answers = {}
        self.killed = []

    def wait(self, calls, num_returns, timeout):
        ready = [call for call in calls if call in self.answers]
        return ready, [call for call in calls if call not in ready]

    def get(self, call, timeout):
        if isinstance(call, list):
            return [self.get(one, timeout) for one in call]
        answer = self.answers.get(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, worker):
        self.killed.append(worker)


class FakeWorker:
    """A worker whose calls are strings in the order in which they were made."""

    def __init__(self, name, made):
        def record(method, *args, **named):
            made.append(f"{name}.{method}")
            return f"{name}.{method}#{len(made)}"

        self.call = SimpleNamespace(remote=record)


@pytest.fixture
def under_test(tmp_path, monkeypatch):
    ray = FakeRay()
    for name in ("wait", "get", "kill"):
        monkeypatch.setattr(supervisor.ray, name, getattr(ray, name))
    events, made = deque(), []
    recorder = SimpleNamespace(event=events.append, row=lambda: None)
    config = gridworld()
    tested = Supervisor(
        config,
        None,
        SimpleNamespace(path=tmp_path, write_epoch=lambda epoch: None),
        Progress(config, {}),
        recorder,
        lambda: False,
    )
    monkeypatch.setattr(supervisor.checkpoints, "paths", lambda path: [tmp_path / "0000000030", tmp_path / "0000000040"])
    saved = SimpleNamespace(meta={"updates": 40, "samples": 40 * 64})
    monkeypatch.setattr(supervisor.checkpoints, "read", lambda path: saved)
    monkeypatch.setattr(tested, "_note_worker", lambda name, address: None)
    monkeypatch.setattr(tested._logs, "priorities_in_use", lambda states: [set() for _ in states])
    monkeypatch.setattr(supervisor, "_end_process", lambda address: None)

    def make():
        tested._learners = [FakeWorker(f"learner.{tested._progress.epoch}", made)]

    monkeypatch.setattr(tested, "_make_learners", make)
    monkeypatch.setattr(tested, "_build_learners", lambda checkpoint: [f"build.{tested._progress.epoch}"])
    make()
    tested._start_learners()
    return tested, ray, made, events


def answer(tested, ray, value):
    """Has the one call under way of the learner answer, and the supervisor take it in."""
    (call,) = [call for call, expected in tested._calls.items() if expected.role == "learner"]
    ray.answers[call] = value
    tested._take_answers()


def test_progress_goes_back_to_the_checkpoint_that_the_learner_restarts_from(under_test):
    tested, ray, _, events = under_test
    answer(tested, ray, None)
    answer(tested, ray, learner_stats(75))
    answer(tested, ray, RayActorError())
    progress = tested._progress
    # (epoch, updates) is what the next evaluation waits for: 75 will not be published for long, or ever.
    assert (progress.epoch, progress.updates, progress.samples) == (1, 40, 40 * 64)
    assert "after update 75" in events[-1]


def test_no_rate_spans_two_learners(under_test):
    tested, ray, _, _ = under_test
    answer(tested, ray, None)
    answer(tested, ray, learner_stats(75))
    tested._progress.row()
    answer(tested, ray, RayActorError())
    for value in (WorkerAddress("here", 1), None, learner_stats(41)):
        answer(tested, ray, value)
    assert "learner/updates_per_second" not in tested._progress.row()
    answer(tested, ray, learner_stats(45))
    assert tested._progress.row()["learner/updates_per_second"] > 0


def test_a_learner_that_dies_before_it_prefetches_is_restarted_again(under_test):
    tested, ray, made, _ = under_test
    answer(tested, ray, None)
    answer(tested, ray, RayActorError())
    answer(tested, ray, WorkerAddress("here", 1))
    assert made[-1] == "learner.1.start"
    answer(tested, ray, RayActorError())
    assert tested._progress.epoch == 2
    answer(tested, ray, WorkerAddress("here", 2))
    answer(tested, ray, None)
    assert made[-2:] == ["learner.2.start", "learner.2.run"]


def test_a_learner_that_always_dies_before_an_update_ends_the_run_however_slowly(under_test, monkeypatch):
    tested, ray, _, _ = under_test
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)
    answer(tested, ray, None)
    answer(tested, ray, learner_stats(75))
    answer(tested, ray, RayActorError())
    for _ in range(3):
        clock.now += 100.0  # Never five within a minute.
        answer(tested, ray, RayActorError())
    with pytest.raises(RunFault, match="the learner died 5 times within 60 s or without a report"):
        answer(tested, ray, RayActorError())


def test_a_learner_that_makes_updates_between_its_deaths_is_restarted_every_time(under_test, monkeypatch):
    tested, ray, _, _ = under_test
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)
    answer(tested, ray, None)
    for number in range(12):
        clock.now += 100.0
        answer(tested, ray, learner_stats(75))
        answer(tested, ray, RayActorError())
        answer(tested, ray, WorkerAddress("here", number))
        answer(tested, ray, None)
    assert tested._progress.epoch == 12


def test_a_checkpoint_is_begun_between_two_calls_of_the_learner_when_all_shards_have_saved(under_test):
    tested, ray, made, _ = under_test
    tested._shards = [FakeWorker("shard0", made), FakeWorker("shard1", made)]
    tested._shard_states = [{"old": 0}, {"old": 1}]
    answer(tested, ray, None)
    tested._next_checkpoint = 0.0
    assert not any("save" in name for name in made), "it is due, and a call is under way, which may hang"
    answer(tested, ray, learner_stats(75))
    assert made[-3:] == ["shard0.save", "shard1.save", "learner.0.run"] and tested._next_checkpoint > time.monotonic()
    saving = {expected.worker_index: call for call, expected in tested._calls.items() if expected.role == "saving"}
    ray.answers[saving[0]] = {"new": 0}
    answer(tested, ray, learner_stats(76))
    assert made[-1] == "learner.0.run" and "learner.0.begin_save" not in made, "a shard is still saving"
    ray.answers[saving[1]] = RayActorError()
    tested._take_answers()
    answer(tested, ray, learner_stats(77))
    assert made[-2:] == ["learner.0.begin_save", "learner.0.run"]
    assert tested._shard_states == [{"new": 0}, {"old": 1}], "one that is away stays as it was at the checkpoint before"


def test_a_learner_goes_on_from_the_checkpoint_before_where_the_newest_was_altered(under_test, monkeypatch):
    tested, ray, _, events = under_test

    def read(path):
        if path.name == "0000000040":
            raise CheckpointError(f"checkpoint {path}: its checksum is wrong; move it away")
        return SimpleNamespace(meta={"updates": 30, "samples": 30 * 64})

    monkeypatch.setattr(supervisor.checkpoints, "read", read)
    answer(tested, ray, None)
    answer(tested, ray, RayActorError())
    assert tested._progress.updates == 30
    assert "its checksum is wrong" in events[-2] and "goes on from checkpoint 0000000030" in events[-1]


def actor_calls(tested):
    return [call for call, expected in tested._calls.items() if expected.role == "actor"]


def test_an_actor_that_dies_again_and_again_begins_later_and_later_and_ends_the_run(under_test, monkeypatch):
    """It is the only one. Kills: an endless restart, one that blocks the loop, a display that says nothing."""
    tested, ray, made, _ = under_test
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)

    def start(slot):
        tested._actors[slot] = FakeWorker(f"actor{slot}", made)
        made.append("actor.build")
        tested._expect(f"actor#{len(made)}", "actor", slot)

    monkeypatch.setattr(tested, "_start_actor", start)
    start(0)
    begun = []
    for delay in (0.0, 1.0, 2.0, 4.0):
        (call,) = actor_calls(tested)
        ray.answers[call] = RayActorError()
        tested._take_answers()
        assert tested._progress.degraded() == ["actor 0 died"]
        if delay:
            clock.now += delay - 0.1
            tested._start_again()
            assert not actor_calls(tested)
            clock.now += 0.1
        tested._start_again()
        assert len(actor_calls(tested)) == 1 and not tested._progress.degraded()
        begun.append(clock.now)
    assert begun == [0.0, 1.0, 3.0, 7.0]
    (call,) = actor_calls(tested)
    ray.answers[call] = RayActorError()
    with pytest.raises(RunFault, match="actor 0 died 5 times within 60 s"):
        tested._take_answers()


def test_a_silent_worker_is_named_and_then_answers_again_or_is_given_up(under_test, monkeypatch):
    tested, ray, _, events = under_test
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)
    answer(tested, ray, None)
    clock.now += 9.0
    tested._take_answers()
    assert not tested._progress.degraded()
    clock.now += 2.0
    tested._take_answers()
    tested._take_answers()
    assert tested._progress.degraded() == ["the learner is silent"]
    assert sum("silent" in event for event in events) == 1
    answer(tested, ray, learner_stats(75))
    assert not tested._progress.degraded() and events[-1] == "the learner answers again"
    clock.now += 61.0
    tested._take_answers()
    assert "the learner died (it gave no answer: it hangs)" in events[-1]


@pytest.mark.parametrize(("name", "is_ended"), [("ray::Worker", True), ("bash", False)], ids=["worker", "another_program"])
def test_only_a_worker_is_ended_by_its_pid(monkeypatch, name, is_ended):
    """A pid may have been given to another program meanwhile."""
    ended = []
    process = SimpleNamespace(name=lambda: name, kill=lambda: ended.append(1))
    monkeypatch.setattr(ray_handles.psutil, "Process", lambda pid: process)
    ray_handles.end_worker(7)
    assert bool(ended) == is_ended


def test_a_worker_is_ended_on_its_own_node(monkeypatch):
    """Kills: a pid of another host that is killed here, and one there that is never ended."""
    here, there = [], []
    context = SimpleNamespace(get_node_id=lambda: "mine")
    monkeypatch.setattr(supervisor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(supervisor, "end_worker", here.append)
    task = SimpleNamespace(
        options=lambda **named: SimpleNamespace(remote=lambda pid: there.append((named["scheduling_strategy"].node_id, pid)))
    )
    monkeypatch.setattr(supervisor.ray, "remote", lambda function: task)
    supervisor._end_process(None)  # A worker that never said where it runs.
    supervisor._end_process({"host": "h", "pid": 7, "node_id": "mine"})
    supervisor._end_process({"host": "h", "pid": 8, "node_id": "ab" * 28})
    assert (here, there) == ([7], [("ab" * 28, 8)])


def test_a_shard_that_cannot_come_back_on_a_full_disk_is_tried_again_and_ends_no_run(under_test, monkeypatch):
    """Kills: a full disk that counts as a crash loop."""
    tested, ray, made, events = under_test
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)
    tested._shards, tested._shard_states, tested._shard_restarts = [FakeWorker("shard0", made)], [None], [0]
    monkeypatch.setattr(tested, "_build_shard", lambda index, start: made.append("build") or f"built{len(made)}")
    monkeypatch.setattr(tested._logs, "start_of", lambda index: "log")
    tested._expect("stats", "shard", 0)
    ray.answers["stats"] = RayActorError()
    tested._take_answers()
    for _ in range(20):
        assert [name for name in made if name == "build"] == [] or clock.now
        tested._start_again()
        (call,) = [call for call, expected in tested._calls.items() if expected.role == "shard"]
        full = OSError(errno.ENOSPC, "No space left on device", "replay/0")
        ray.answers[call] = RayTaskError("build", "traceback", full)
        tested._take_answers()
        assert tested._progress.degraded() == ["shard 0 waits for its disk"]
        clock.now += 4.9
        tested._start_again()
        assert not [call for call, expected in tested._calls.items() if expected.role == "shard"]
        clock.now += 0.2
    assert made.count("build") == 20 and "free some of its disk" in events[-1]


def test_an_actor_that_hangs_at_the_end_is_given_up_and_costs_nothing_else(under_test, monkeypatch):
    """Kills: a run that ends as a fault, without its last checkpoint, since one of its actors does not answer."""
    tested, ray, made, events = under_test
    tested._actors = {0: FakeWorker("actor0", made), 1: FakeWorker("actor1", made)}
    tested._progress.incarnation_of = {0: 0, 1: 0}
    for slot in (0, 1):
        tested._expect(f"run{slot}", "actor", slot)
    ray.answers["run0"] = WorkerAddress("here", 1)
    tested._drain_role("actor", 0.1)
    assert list(tested._actors) == [0] and "actor 1 is given up" in events[-1]
    assert not [call for call, expected in tested._calls.items() if expected.role == "actor"]


def test_a_change_of_the_limiters_reaches_a_shard_that_is_away_when_it_is_back(under_test, monkeypatch):
    tested, ray, made, _ = under_test
    tested._shards = [FakeWorker("shard0", made)]
    tested._progress.shards = [None]
    ray.answers["shard0.set_limiter#3"] = RayActorError()

    def take_up(config, run_dir, progress, recorder, set_limiters):
        set_limiters({"min_size": 5})
        return config

    monkeypatch.setattr(supervisor, "take_up_adjustment", take_up)
    made.append("another")
    tested._adjust()
    assert made.count("shard0.set_limiter") == 1 and tested._limiters_due == {0: {"min_size": 5}}
    tested._on_shard(0, SimpleNamespace())
    assert made.count("shard0.set_limiter") == 2 and tested._limiters_due == {}
