"""The supervisor's table of calls when the learner dies, without Ray: workers are names, calls are strings."""

import time
from collections import deque
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from common.metrics import LearnerStats
from deploy import supervisor
from deploy.progress import Progress
from deploy.ray_handles import WorkerAddress
from deploy.recipes import gridworld
from deploy.supervisor import RunFault, Supervisor


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
    """Answers at once what was written down for a call."""

    def __init__(self):
        self.answers = {}
        self.killed = []

    def wait(self, calls, num_returns, timeout):
        ready = [call for call in calls if call in self.answers]
        return ready, [call for call in calls if call not in ready]

    def get(self, call, timeout):
        answer = self.answers[call]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, worker):
        self.killed.append(worker)


class FakeWorker:
    """A learner whose calls are strings in the order in which they were made."""

    def __init__(self, name, made):
        def record(method, *args):
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
    tested = Supervisor(config, None, SimpleNamespace(path=tmp_path), Progress(config, {}), recorder, lambda: False)
    monkeypatch.setattr(supervisor.run_dirs, "newest_checkpoint_path", lambda path: tmp_path / "0000000040")
    saved = SimpleNamespace(meta={"updates": 40, "samples": 40 * 64})
    monkeypatch.setattr(supervisor.checkpoints, "read", lambda path: saved)
    monkeypatch.setattr(tested, "_note_worker", lambda name, address: None)
    monkeypatch.setattr(tested, "_save", lambda: "0000000075")

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
    for _ in range(4):
        clock.now += 100.0  # Never five within a minute.
        answer(tested, ray, RayActorError())
    with pytest.raises(RunFault, match="5 times without an update"):
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


def test_a_checkpoint_is_asked_for_between_two_calls_of_the_learner(under_test, monkeypatch):
    tested, ray, made, _ = under_test
    saved = []
    monkeypatch.setattr(tested, "_save", lambda: saved.append(made[-1]))
    answer(tested, ray, None)
    tested._next_checkpoint = 0.0
    assert not saved  # It is due, and a call is under way, which may hang.
    answer(tested, ray, learner_stats(75))
    assert saved == ["learner.0.run"] and made[-1] == "learner.0.run" and tested._next_checkpoint > time.monotonic()


@pytest.mark.parametrize(
    ("host", "name", "is_ended"),
    [(None, "ray::Worker", True), (None, "bash", False), ("elsewhere", "ray::Worker", False)],
    ids=["here", "another_program", "another_host"],
)
def test_only_a_worker_of_this_host_is_ended_by_its_pid(monkeypatch, host, name, is_ended):
    """A pid may have been given to another program meanwhile."""
    ended = []
    process = SimpleNamespace(name=lambda: name, kill=lambda: ended.append(1))
    monkeypatch.setattr(supervisor.psutil, "Process", lambda pid: process)
    supervisor._end_process({"host": host or supervisor.socket.gethostname(), "pid": 7})
    assert bool(ended) == is_ended
    supervisor._end_process(None)  # A worker that never said where it runs.
