"""The supervisor: one driver that owns every Ray worker and never touches data. A loop around `ray.wait`.

Each worker has one call under way: actors and learner `run` for a while and return their statistics, which is also their
heartbeat. What dies is told by its call. The order of creation is learner, shards, store, evaluator, actors: when memory runs
out, Ray kills the newest first.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.config import EnvSpec, RunConfig
from common.errors import CheckpointError, NonFiniteError, UserError, WireError
from common.files import write_whole
from common.metrics import LearnerStats
from deploy import roles
from deploy.adjust import take_up_adjustment
from deploy.metrics_export import MetricsExport
from deploy.outcome import Outcome, RunFault
from deploy.placement import Placement
from deploy.plan import spread_slots
from deploy.progress import Progress
from deploy.ray_errors import one_line
from deploy.ray_handles import NotBuiltError, RayReplayReader, RayReplayWriter, Worker, WorkerAddress, end_worker
from deploy.ray_params import RayParamsReader, RayParamsWriter
from deploy.ray_session import Node, leaving_nodes, make_temp_dir, nodes, object_store, start_ray
from deploy.recorder import Recorder
from deploy.replay_logs import ReplayLogs, ShardStart
from deploy.restart_policy import MAX_DEATHS, WINDOW_SECONDS, RestartPolicy
from deploy.run_dir import RunDirectory, write_json
from deploy.stop_signal import StopSignal
from learner import checkpoint as checkpoints

_CALL_SECONDS = 1.0  # How long a worker runs before it reports,
_MAX_CALL_SECONDS = 10.0  # and at most, where the fleet is so large
_REPORTS_PER_SECOND = 30.0  # that all actors together would report more often.
_MANY_CALLS = 32  # From so many on, answers are taken together,
_TOGETHER_SECONDS = 0.1  # those of so long, but for the learner's.
_START_SECONDS = 180.0  # A worker that is not ready by then will not be.
_ANSWER_SECONDS = 30.0  # A call that only reads or writes state.
_QUIET_SECONDS = 10.0  # A worker that was to report after a second and did not for so long is named.
_HUNG_SECONDS = 60.0  # And after so long it is given up.
_LOOK_SECONDS = 1.0  # Between two questions to shards and store, which answer at once.
_SILENT_SECONDS = 30.0  # A shard or store that did not answer for so long is given up.
_SIDE_CALLS = ("saving", "saving networks", "limiter")  # Of workers that have another call under way, which tells how they are.
_FULL_DISK_SECONDS = 5.0  # Until a shard is made again whose log could not be written.
_REST_SECONDS = 20.0  # For an actor to end its call, at the end of a run.
_MAX_FRUITLESS = 3  # Actors in a row that die on a node before they did anything, until it gets no more.
_NODES_LOOK_SECONDS = 5.0  # Between two questions which nodes there are, and which are about to leave.
_STORE_LOOK_SECONDS = 60.0  # Between two questions how full the nodes' object stores are, which a cluster asks of every node.


class WorkerDied(RunFault):
    """A worker died while it was asked for something."""


class _Call(NamedTuple):
    """A call under way."""

    role: str
    worker_index: int
    deadline: float
    """When the worker counts as hung, on the monotonic clock."""
    quiet_at: float | None
    """When it is named as silent; None: never."""


class Supervisor:
    """Starts the workers of one run, restarts those that die, and ends the run in good order.

    Shards and store come back behind the same handle, which actors and learner keep: Ray makes their process anew, and the
    supervisor its role, a shard's from its log.
    """

    def __init__(
        self, config: RunConfig, spec: EnvSpec, run_dir: RunDirectory, progress: Progress, recorder: Recorder, stop: StopSignal
    ) -> None:
        self._config, self._spec, self._run_dir = config, spec, run_dir
        self._progress, self._recorder, self._stop = progress, recorder, stop
        self._calls: dict[Any, _Call] = {}  # By reference, those under way.
        self._actors: dict[int, Any] = {}
        self._policies: dict[str, RestartPolicy] = {}
        self._starts: dict[tuple[str, int], float] = {}  # When whoever died is to begin again.
        self._logs = ReplayLogs(run_dir.path.resolve(), config)
        self._shards: list[Any] = []
        self._shard_states: list[Any] = []  # As of the last checkpoint.
        self._shard_restarts: list[int] = []
        self._next_look = 0.0
        self._told_back: set[int] = set()  # Shards that are made again and have not told yet what they hold.
        self._must_publish = False  # The store is empty.
        self._saves = False  # The shards are saving their part of a checkpoint.
        self._learners: list[Any] = []  # By rank; the first one publishes and saves.
        self._learns = False  # Else the learner is being made.
        self._next_checkpoint = 0.0
        self._limiters_due: dict[int, dict[str, Any]] = {}  # By shard: what it is to hold to when it answers again.
        self._nodes: dict[str, Node] = {}  # By id.
        self._leaving: set[str] = set()  # Nodes that are about to leave.
        self._next_nodes_look = 0.0
        self._next_store_look = 0.0
        self._placing: set[int] = set()  # Slots that had no place at the last look.
        self._some_waited = False
        self._closing: set[int] = set()  # Slots that leave their node in good order.
        self._node_of: dict[int, str] = {}  # By slot, from the moment that it has a place.
        self._fruitless: dict[str, int] = {}  # By node: deaths there, one after another, of actors that had done nothing.
        self._placement: Placement | None = None
        self._store: Any = None
        self._evaluator: Any = None
        self._evaluating = False
        self._next_evaluation = 0.0
        self._target_reached = False
        num_workers = config.actors.num_workers
        self._slots = spread_slots(config.actors.num_actors)[:num_workers]
        self._actor_seconds = min(max(_CALL_SECONDS, num_workers / _REPORTS_PER_SECOND), _MAX_CALL_SECONDS)
        self._addresses: dict[str, Any] = {}
        self._export: MetricsExport | None = None

    def run(self) -> Outcome:
        """Runs to the end; Ray is shut down, or left, and its files removed whatever happens. On a cluster `ray_session.attach` comes
        before.
        """
        temp_dir = make_temp_dir() if self._config.address is None else None
        try:
            try:
                if temp_dir is not None:
                    start_ray(self._config, temp_dir)
                self._start()
            except (RunFault, RayError) as error:
                return Outcome("fault", one_line(error), None, None)
            return self._supervise()
        finally:
            ray.shutdown()
            if temp_dir is not None:
                shutil.rmtree(temp_dir, ignore_errors=True)

    def _start(self) -> None:
        config = self._config
        if config.metrics_port is not None or config.address is not None:
            self._export = MetricsExport(self._run_dir.run, config.recipe)
        self._stop.install()
        placement = self._placement = Placement(config, self._spec)
        self._nodes = {node.node_id: node for node in nodes()}
        self._recorder.event(placement.describe())
        placement.reserve(self._recorder.event, self._stop)
        self._make_learners()
        starts = self._logs.begin(self._run_dir.meta)
        for note in self._logs.notes:
            self._recorder.event(note)
        indices = range(config.replay.num_shards)
        self._shards = [self._worker("shard", f"shard{i}", i, max_restarts=-1) for i in indices]
        self._shard_states, self._shard_restarts = [start.state for start in starts], [0 for _ in indices]
        self._store = self._worker("store", "store", max_restarts=-1)
        if config.address is not None:
            self._check_run_dir()
        built = [self._build_shard(i, start) for i, start in enumerate(starts)]
        built.append(self._build_store())
        built += self._build_learners(self._run_dir.checkpoint)
        self._start_evaluator()
        if config.address is None:  # Everything at once. A cluster may have hundreds of actors, and what they need comes first.
            self._start_actors()
        names = [*(f"shard{i}" for i in range(len(self._shards))), "store", *self._learner_names()]
        addresses = self._answers(built, _START_SECONDS, "learner, shards and store to start")
        for name, address in zip(names, addresses, strict=True):
            self._note_worker(name, address)
        self._read_shards()
        if self._run_dir.checkpoint is not None:
            self._recorder.event(self._progress.restored_sentence(self._run_dir.checkpoint.name))
        if self._save() is None:
            raise RunFault("a run begins with a checkpoint, and none could be written")
        if config.address is not None:
            self._start_actors()
        self._start_learners()

    def _check_run_dir(self) -> None:
        """Raises UserError where learner or shards do not see the run directory that the driver writes."""
        file = (self._run_dir.path / "run.json").resolve()
        workers = {"the learner": self._learners[0], **{f"shard {i}": shard for i, shard in enumerate(self._shards)}}
        calls = [worker.read_file.remote(str(file)) for worker in workers.values()]
        told = self._answers(calls, _START_SECONDS, "learner and shards to start")
        for name, (host, content) in zip(workers, told, strict=True):
            if content != file.read_bytes():
                raise UserError(
                    f"{name} runs on {host}, where {file.parent} is not this run directory: give --run-dir a place on a file system that all "
                    f"nodes share, or keep learner and shards on this host with --learner.node-labels"
                )

    def _worker(self, role: str, name: str, index: int = 0, max_restarts: int = 0) -> Any:
        """Makes a worker, where the placement of its role says."""
        assert self._placement is not None
        options = self._placement.options(role, index)
        return ray.remote(Worker).options(enable_task_events=False, name=name, max_restarts=max_restarts, **options).remote()

    def _build_shard(self, index: int, start: ShardStart) -> Any:
        """Has a shard made, under an epoch of its own; returns the call, which waits for the process where that comes anew."""
        epoch = 1_000 * self._progress.epoch + self._shard_restarts[index]
        arguments = (self._config, self._spec, self._run_dir.run, index, epoch, start)
        return self._shards[index].build.options(max_task_retries=-1).remote(roles.make_shard, *arguments)

    def _build_store(self) -> Any:
        """Has the params store made; returns the call, which waits for the process where that comes anew."""
        return self._store.build.options(max_task_retries=-1).remote(roles.make_params_store)

    def _learner_names(self) -> list[str]:
        ranks = range(self._config.learner.num_devices)
        return ["learner"] if len(ranks) == 1 else [f"learner{rank}" for rank in ranks]

    def _make_learners(self) -> None:
        names = [f"{name}.{self._progress.epoch}" for name in self._learner_names()]
        self._learners = [self._worker("learner", name, rank) for rank, name in enumerate(names)]

    def _build_learners(self, checkpoint: Path | None) -> list[Any]:
        """Has every rank made, from a checkpoint where there is one; returns the calls."""
        assert self._placement is not None
        config, path = self._config, str(self._run_dir.path.resolve())
        address: str | None = None
        if len(self._learners) > 1:
            (address,) = self._answers([self._learners[0].free_address.remote()], _START_SECONDS, "rank 0 of the learner")
        arguments = (
            config,
            self._spec,
            self._run_dir.run,
            path,
            self._progress.epoch,
            str(checkpoint) if checkpoint is not None else None,
            self._placement.learner_threads,
            [RayReplayReader(shard, i) for i, shard in enumerate(self._shards)],
            RayParamsWriter(self._store),
        )
        return [
            worker.build.remote(roles.make_learner, *arguments, rank, address) for rank, worker in enumerate(self._learners)
        ]

    def _start_learners(self) -> None:
        """Has them prefetch, and learn."""
        self._learns = True
        self._progress.away.pop(("learner", 0), None)
        self._next_checkpoint = time.monotonic() + self._config.learner.checkpoint_period_seconds
        for rank, worker in enumerate(self._learners):
            self._expect(worker.call.remote("start"), "learner", rank)

    def _restart_learners(self, error: RayError) -> None:
        """Ends all ranks, since none can go on without the others, and begins again from the last checkpoint."""
        calls = [call for call, expected in self._calls.items() if expected.role == "learner"]
        if calls:  # A rank that died says more than those that missed it.
            for call in ray.wait(calls, num_returns=len(calls), timeout=_CALL_SECONDS)[0]:
                try:
                    ray.get(call, timeout=_ANSWER_SECONDS)
                except RayError as other:
                    error = other if isinstance(other, RayActorError) else error
        self._calls = {call: expected for call, expected in self._calls.items() if expected.role != "learner"}
        for name, worker in zip(self._learner_names(), self._learners, strict=True):
            ray.kill(worker)
            _end_process(self._addresses.get(name))
        checkpoint, meta = self._newest_whole_checkpoint()
        self._learns = False
        self._progress.away = {key: value for key, value in self._progress.away.items() if key[0] != "learner"}
        self._progress.away["learner", 0] = "the learner is coming back"
        self._recorder.event(
            f"the learner died ({one_line(error)}) after update {self._progress.updates:,}; it goes on from checkpoint {checkpoint.name}"
        )
        self._progress.on_learner_died(meta)
        with contextlib.suppress(OSError):
            self._run_dir.write_epoch(self._progress.epoch)
        self._make_learners()
        for rank, call in enumerate(self._build_learners(checkpoint)):
            self._expect(call, "learner", rank, _START_SECONDS)

    def _newest_whole_checkpoint(self) -> tuple[Path, Mapping[str, Any]]:
        """Returns the newest checkpoint that can be read, and its meta; those that were altered meanwhile are named and passed over."""
        for path in reversed(checkpoints.paths(self._run_dir.path / "checkpoints")):
            try:
                return path, checkpoints.read(path).meta
            except CheckpointError as error:
                self._recorder.event(str(error).partition(";")[0])
        raise RunFault(f"{self._run_dir.path}: there is no whole checkpoint for the learner to go on from")

    def _start_actors(self) -> None:
        for slot in self._slots:
            self._start_actor(slot)

    def _start_actor(self, slot: int) -> None:
        """Begins the next incarnation of a slot. On a cluster it asks Ray for a place first, which may be long in coming."""
        incarnation = self._progress.next_incarnation(slot)
        worker = self._actors[slot] = self._worker("actor", f"actor{slot}.{incarnation}")
        if self._config.address is None:
            self._build_actor(slot)
        else:
            self._expect(worker.address.remote(), "placing", slot, math.inf)

    def _build_actor(self, slot: int) -> None:
        """Has an actor made that has a place; it goes on from the steps that its slot last reported."""
        progress, config = self._progress, self._config
        replay = RayReplayWriter(self._shards, config.actors.max_in_flight_chunks, first_shard=slot)
        params = RayParamsReader(self._store)
        arguments = (config, self._spec, self._run_dir.run, slot, progress.incarnation_of[slot], progress.env_steps_of[slot])
        self._expect(
            self._actors[slot].build.remote(roles.make_actor, *arguments, replay, params), "actor", slot, _START_SECONDS
        )

    def _start_evaluator(self) -> None:
        self._evaluator = self._worker("evaluator", f"evaluator.{time.monotonic_ns()}")
        arguments = (self._config, self._spec, RayParamsReader(self._store))
        self._expect(self._evaluator.build.remote(roles.make_evaluator, *arguments), "evaluator", 0, _START_SECONDS)
        self._evaluating = False

    def _note_worker(self, name: str, address: WorkerAddress) -> None:
        """Writes workers.json: which process is which."""
        self._addresses[name] = address._asdict()
        with contextlib.suppress(OSError):  # A full disk: only people read it.
            write_json(self._run_dir.path / "workers.json", self._addresses)

    def _call_learners(self) -> None:
        for rank, worker in enumerate(self._learners):
            self._expect(worker.call.remote("run", _CALL_SECONDS, self._config.max_updates), "learner", rank)

    def _expect(self, call: Any, role: str, index: int = 0, seconds: float = _HUNG_SECONDS) -> None:
        now = time.monotonic()
        reports_soon = role in ("actor", "learner", "shard", "store") and seconds <= _HUNG_SECONDS
        quiet_seconds = _QUIET_SECONDS + (self._actor_seconds if role == "actor" else 0.0)
        self._calls[call] = _Call(role, index, now + seconds, now + quiet_seconds if reports_soon else None)

    def _name(self, role: str, index: int) -> str:
        """Returns what a person calls a worker."""
        if role == "learner" and len(self._learners) == 1:
            return "the learner"
        names = {"evaluator": "the evaluator", "store": "the params store", "learner": f"rank {index} of the learner"}
        return names.get(role, f"{role} {index}")

    def _supervise(self) -> Outcome:
        """The loop, and then the end: drain, checkpoint, last evaluation, ledger."""
        progress, config = self._progress, self._config
        fault: str | None = None
        next_row = time.monotonic()
        digest: str | None = None
        try:
            while True:
                stopped_by = "interrupted" if self._stop() else progress.stopped_by()
                if stopped_by is None and self._target_reached and self._learns:
                    stopped_by = self._confirm_target()
                if stopped_by is not None:
                    break
                self._take_answers()
                self._start_again()
                self._look_at_shards()
                self._look_at_nodes()
                now = time.monotonic()
                if now >= next_row:
                    next_row = now + config.log_period_seconds
                    self._adjust()
                    self._tell_faults()
                    if now >= self._next_store_look:
                        every = 0.0 if config.address is None else _STORE_LOOK_SECONDS
                        self._next_store_look, self._progress.object_store = now + every, object_store()
                    self._record()
                if self._export is not None:
                    self._export.tell()
            if not self._learns and config.address is not None:  # Its node may never come back.
                self._recorder.event("the learner is away: the last checkpoint stays the newest")
                self._drain_actors()
            else:
                self._drain_role("learner", _ANSWER_SECONDS if self._learns else _START_SECONDS)
                if self._stop.is_urgent:  # The grace period may end before all actors have come to rest.
                    self._save()
                self._drain_actors()
                digest = self._finish(stopped_by)
        except NonFiniteError as error:
            stopped_by, fault = "non_finite", str(error)
        except (RunFault, RayError) as error:
            stopped_by, fault = "fault", f"{one_line(error)}{self._keep_traceback(error)}"
        try:
            if fault is not None:
                self._drain_actors()
            self._read_shards()
        except (RunFault, RayError):
            return Outcome(stopped_by, fault, digest, None)
        self._record()
        return Outcome(stopped_by, fault, digest, progress.ledger.balance(progress.shards))

    def _keep_traceback(self, error: BaseException) -> str:
        """Writes what a worker raised last to a file of the run directory; returns the words that say so, none where it raised nothing."""
        cause = error.__cause__ if isinstance(error, RunFault) else error
        if not isinstance(cause, RayTaskError):
            return ""
        path = self._run_dir.path / "last_traceback.txt"
        with contextlib.suppress(OSError):
            write_whole(path, str(cause).encode())
        return f"; its traceback is in {path}"

    def _look_at_nodes(self) -> None:
        """Tells who has come and gone, and begins a checkpoint when a node is about to leave: what is on it may have half a
        minute left. Actors there move when they report next.
        """
        if time.monotonic() < self._next_nodes_look:
            return
        self._next_nodes_look = time.monotonic() + _NODES_LOOK_SECONDS
        before, self._nodes = self._nodes, {node.node_id: node for node in nodes()}
        for node_id in self._nodes.keys() - before.keys():
            self._recorder.event(f"node {self._nodes[node_id].describe()} has joined")
        for node_id in before.keys() - self._nodes.keys():
            self._recorder.event(f"node {before[node_id].describe()} has left")
        leaving = leaving_nodes()
        for node_id in sorted(leaving - self._leaving):
            self._recorder.event(
                f"node {self._nodes[node_id].host if node_id in self._nodes else node_id[:8]} is about to leave: a checkpoint is written, and "
                f"what is on it begins again elsewhere"
            )
            self._next_checkpoint = time.monotonic()
        self._leaving = leaving
        self._look_for_places()

    def _look_for_places(self) -> None:
        """Tells how many actors wait for a node that takes them."""
        assert self._placement is not None
        if self._config.address is None:
            return
        placing = {call.worker_index for call in self._calls.values() if call.role == "placing"}
        waiting, self._placing = placing & self._placing, placing
        self._progress.away.pop(("fleet", 0), None)
        if waiting:
            text = f"{len(waiting)} of {len(self._slots)} actors wait for a node with {self._placement.describe_actor()}"
            self._progress.away["fleet", 0] = text
        if waiting and not self._some_waited:
            self._some_waited = True
            self._recorder.event(text)
        elif self._some_waited and len(self._progress.actors) == len(self._slots):
            self._some_waited = False
            self._recorder.event("every actor acts")

    def _adjust(self) -> None:
        """Takes up a change of the limiters that `qfleet adjust` has left."""

        def set_limiters(shares: dict[str, Any]) -> None:
            calls = [shard.call.remote("set_limiter", **shares) for shard in self._shards]
            for index, call in enumerate(calls):
                try:
                    self._answers([call], _LOOK_SECONDS, f"shard {index}")
                except RunFault:  # It is away, or slow: it hears of it when it answers again.
                    self._limiters_due[index] = shares

        self._config = take_up_adjustment(self._config, self._run_dir, self._progress, self._recorder, set_limiters)

    def _take_answers(self) -> None:
        """Waits for an answer, takes in all that are there, and gives up workers that are long overdue."""
        if len(self._calls) < _MANY_CALLS:
            ray.wait(list(self._calls), num_returns=1, timeout=0.5)
        else:  # Looking at hundreds of calls for each answer would take a core.
            learner_calls = [call for call, expected in self._calls.items() if expected.role == "learner"]
            ray.wait(learner_calls or list(self._calls), num_returns=1, timeout=_TOGETHER_SECONDS)
        ready, overdue = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for call in ready:
            if call in self._calls:  # A restart of the learner has given up the calls of all its ranks.
                self._on_answer(call)
        now = time.monotonic()
        for call in overdue:
            if call not in self._calls:
                continue
            role, index, deadline, quiet_at = self._calls[call]
            if now > deadline:
                del self._calls[call]
                self._on_death(role, index, ray.exceptions.GetTimeoutError("it gave no answer: it hangs"))
            elif quiet_at is not None and now > quiet_at:
                self._calls[call] = self._calls[call]._replace(quiet_at=None)
                self._progress.away[role, index] = f"{self._name(role, index)} is silent"
                self._recorder.event(
                    f"{self._name(role, index)} is silent for {_QUIET_SECONDS:.0f} s; it is given up in {deadline - now:.0f} s"
                )

    def _on_answer(self, call: Any) -> None:
        """Takes in what a worker reported and gives it its next call."""
        role, index, *_ = self._calls.pop(call)
        try:
            result = ray.get(call, timeout=_ANSWER_SECONDS)
        except RayError as error:
            self._on_death(role, index, error)
            return
        if role not in _SIDE_CALLS and not isinstance(result, WorkerAddress):
            if role != "learner" or isinstance(result, LearnerStats):
                policy, slot = self._policy(role, index)
                policy.on_report(slot)
            if self._progress.away.pop((role, index), None) is not None:
                self._recorder.event(f"{self._name(role, index)} answers again")
        if role == "actor":
            self._on_actor(index, result)
        elif role == "placing":
            self._note_worker(f"actor{index}", result)
            self._node_of[index] = result.node_id
            self._build_actor(index)
        elif role == "learner":
            self._on_learner(index, result)
        elif role == "shard":
            self._on_shard(index, result)
        elif role == "saving":
            self._shard_states[index] = result
        elif role == "store":
            if isinstance(result, WorkerAddress):
                self._note_worker("store", result)
                self._progress.away.pop(("store", 0), None)
                self._recorder.event("the params store is back; the learner publishes again")
                self._must_publish = True
            else:
                self._progress.store = result
        elif role == "evaluator":
            self._on_evaluator(result)

    def _on_actor(self, slot: int, result: Any) -> None:
        """Takes in what an actor reported; it goes on, or, where its node is about to leave, ends in good order and begins elsewhere."""
        if isinstance(result, WorkerAddress):  # The answer of `build`.
            self._note_worker(f"actor{slot}", result)
            self._node_of[slot] = result.node_id
        else:
            self._progress.on_actor(result)
            self._fruitless.pop(self._node_of[slot], None)
        actor = self._actors[slot]
        if slot in self._closing:
            self._closing.discard(slot)
            ray.kill(self._actors.pop(slot))
            self._node_of.pop(slot, None)
            self._progress.on_actor_left(slot)
            self._starts["actor", slot] = time.monotonic()
        elif self._node_of[slot] in self._leaving:
            self._closing.add(slot)
            self._expect(actor.call.remote("close", _ANSWER_SECONDS / 2), "actor", slot)
        else:
            self._expect(actor.call.remote("run", self._actor_seconds), "actor", slot)

    def _look_at_shards(self) -> None:
        """Asks shards and store, each second, how they are: nobody else waits for their answers."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        asked = {(call.role, call.worker_index) for call in self._calls.values()} | self._starts.keys()
        for index, shard in enumerate(self._shards):
            if ("shard", index) not in asked:
                self._expect(shard.call.remote("stats"), "shard", index, _SILENT_SECONDS)
        if ("store", 0) not in asked:
            self._expect(self._store.call.remote("stats"), "store", 0, _SILENT_SECONDS)

    def _on_shard(self, index: int, result: Any) -> None:
        """Takes in how a shard is, or that it is back."""
        if isinstance(result, WorkerAddress):
            self._note_worker(f"shard{index}", result)
            self._progress.away.pop(("shard", index), None)
            self._told_back.add(index)
            return
        if (shares := self._limiters_due.pop(index, None)) is not None:
            self._expect(self._shards[index].call.remote("set_limiter", **shares), "limiter", index)
        shards = list(self._progress.shards)
        shards[index] = result
        self._progress.shards = shards
        if index in self._told_back:
            self._told_back.discard(index)
            lost = sum(result.lost.values())
            self._recorder.event(f"shard {index} is back with {result.size:,} transitions; {lost:,} are lost so far")

    def _on_learner(self, rank: int, result: Any) -> None:
        """Takes in what a rank reported; when all have, they go on together."""
        if isinstance(result, WorkerAddress):
            self._note_worker(self._learner_names()[rank], result)
        elif rank == 0 and result is not None:  # None: the answer of `start`.
            self._progress.on_learner(result)
        if all(expected.role != "learner" for expected in self._calls.values()):
            if isinstance(result, WorkerAddress):
                self._start_learners()
            else:
                if self._must_publish:
                    self._must_publish = False
                    self._learners[0].call.remote("publish")
                self._save_when_due()
                self._call_learners()

    def _on_evaluator(self, result: Any) -> None:
        """Goes on with an evaluation, or begins one where it is time and there are new parameters."""
        evaluator, config = self._evaluator, self._config.evaluation
        if isinstance(result, WorkerAddress):
            self._note_worker("evaluator", result)
        elif result is not None:
            self._evaluating = False
            self._next_evaluation = time.monotonic() + (config.period_seconds or math.inf)
            self._take_evaluation(result)
        if self._evaluating:
            call = evaluator.call.remote("run", _CALL_SECONDS)
        elif config.period_seconds is None or time.monotonic() < self._next_evaluation or self._progress.updates == 0:
            call = evaluator.call.remote("rest", _CALL_SECONDS)
        else:
            self._evaluating = True
            self._progress.on_evaluation_begins()
            call = evaluator.call.remote("begin", config.episodes, self._config.seed, None, _ANSWER_SECONDS)
        self._expect(call, "evaluator")

    def _take_evaluation(self, result: Any) -> None:
        self._progress.on_evaluation(result)
        self._recorder.event(
            f"evaluation of version {result.params_version}: mean return {result.mean_return:.1f} over {result.episodes} episodes "
            f"({result.seconds:.0f} s)"
        )
        self._record()
        target = self._config.evaluation.target_return
        self._target_reached = target is not None and result.mean_return >= target

    def _on_death(self, role: str, index: int, error: RayError) -> None:
        """Restarts what may be restarted; raises for what may not."""
        role = "actor" if role == "placing" else role
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, (NonFiniteError, UserError)) and not isinstance(cause, WireError):
            raise type(cause)(f"{role} {index}: {cause}") from error
        if role in _SIDE_CALLS:  # Another call says so too; the checkpoint before stays.
            return
        if isinstance(cause, NotBuiltError):
            error = ray.exceptions.RayActorError("its process came anew")
        name = "the learner" if role == "learner" else self._name(role, index)
        if role == "shard" and isinstance(cause, OSError):
            self._recorder.event(
                f"{name} cannot come back ({cause.filename or cause}: {cause.strerror}): free some of its disk; it is tried again each "
                f"{_FULL_DISK_SECONDS:.0f} s"
            )
            self._progress.away[role, index] = f"{name} waits for its disk"
            self._starts[role, index] = time.monotonic() + _FULL_DISK_SECONDS
            return
        policy, slot = self._policy(role, index)
        had_process = role != "actor" or index in self._node_of
        delay = 0.0 if self._has_lost_its_node(role, index, error) else policy.on_death(slot, time.monotonic())
        if delay is None:
            raise RunFault(
                f"{name} died {MAX_DEATHS} times within {WINDOW_SECONDS:.0f} s or without a report, the last time of: {one_line(error)}"
            ) from error
        if role == "learner":
            self._restart_learners(error)
        elif role in ("shard", "store"):
            self._restart_behind_handle(role, index, f"{name} died ({one_line(error)})", error, delay)
        else:
            when = f"in {delay:.0f} s a new one takes its place" if delay else "a new one takes its place"
            self._recorder.event(f"{name} died ({one_line(error)}); {when}")
            ray.kill(self._actors.pop(index) if role == "actor" else self._evaluator)
            if had_process:
                _end_process(self._addresses.get(f"actor{index}" if role == "actor" else "evaluator"))
            if role == "actor":
                self._closing.discard(index)
                self._progress.on_actor_died(index)
            quarantined = slot in policy.quarantined(time.monotonic())
            self._progress.away[role, index] = (
                f"{name} is in quarantine: it dies again and again" if quarantined else f"{name} died"
            )
            self._starts[role, index] = time.monotonic() + delay

    def _policy(self, role: str, index: int) -> tuple[RestartPolicy, int]:
        """Returns who decides when a worker begins again, and as which slot it is known there: only actors can do without one."""
        group, slot = (f"{role}{index}", 0) if role == "shard" else (role, index if role == "actor" else 0)
        num_slots = len(self._slots) if role == "actor" else 1
        return self._policies.setdefault(group, RestartPolicy(num_slots)), slot

    def _has_lost_its_node(self, role: str, index: int, error: RayError) -> bool:
        """Whether an actor's node has left the cluster, cannot be reached, is about to leave, or lets no actor live: no fault of the slot."""
        node_id = self._node_of.pop(index, None) if role == "actor" else None
        if node_id is None or self._config.address is None:
            return False
        if isinstance(error, ActorUnavailableError) or node_id in self._leaving:
            return True
        if all(node.node_id != node_id for node in nodes()):
            return True
        return self._is_bad(node_id, index, error)

    def _is_bad(self, node_id: str, slot: int, error: RayError) -> bool:
        """Counts an actor that died before it did anything against its node, which is avoided after three, while others act elsewhere."""
        assert self._placement is not None
        if slot in self._progress.actors:
            return False
        self._fruitless[node_id] = self._fruitless.get(node_id, 0) + 1
        if self._fruitless[node_id] < _MAX_FRUITLESS or not self._progress.actors:
            return False
        if self._placement.avoid(node_id):
            host = self._nodes[node_id].host if node_id in self._nodes else node_id[:8]
            self._recorder.event(
                f"{host} gets no more actors: {_MAX_FRUITLESS} died there before they did anything ({one_line(error)})"
            )
        return True

    def _start_again(self) -> None:
        """Starts those whose time has come."""
        for (role, index), at in list(self._starts.items()):
            if time.monotonic() < at:
                continue
            del self._starts[role, index]
            if role == "shard":
                start = ShardStart(self._logs.start_of(index), self._shard_states[index], keeps_samples=True)
                self._expect(self._build_shard(index, start), "shard", index, _START_SECONDS)
                continue
            if role == "store":
                self._expect(self._build_store(), "store", 0, _START_SECONDS)
                continue
            self._progress.away.pop((role, index), None)
            if role == "actor":
                self._start_actor(index)
            else:
                self._start_evaluator()

    def _restart_behind_handle(self, role: str, index: int, text: str, error: RayError, delay: float) -> None:
        """Has a shard's or the store's role made anew in the process that Ray starts for it."""
        if isinstance(error, ray.exceptions.GetTimeoutError):  # It hangs.
            _end_process(self._addresses.get(f"shard{index}" if role == "shard" else "store"))
        self._progress.away[role, index] = f"{self._name(role, index)} is coming back"
        if role == "store":
            self._progress.store = None
            self._recorder.event(f"{text}; it begins empty, and actors act on with what they have")
        else:
            self._shard_restarts[index] += 1
            has_log = self._logs.start_of(index) is not None
            self._recorder.event(f"{text}; it comes back {'from its log' if has_log else 'empty'}")
        self._starts[role, index] = time.monotonic() + delay

    def _confirm_target(self) -> str | None:
        """Pauses the learner and evaluates its very parameters in full; returns "target_return" where the target holds."""
        self._target_reached = False
        self._drain_role("learner")
        result = self._evaluate_now()
        target = self._config.evaluation.target_return
        assert target is not None
        if result is not None:
            self._progress.on_evaluation(result)
            held = "holds" if result.mean_return >= target else "does not hold: training goes on"
            self._recorder.event(
                f"{result.episodes} episodes of the paused learner: {result.mean_return:.1f}; the target {held}"
            )
            if result.mean_return >= target:
                return "target_return"
        self._call_learners()
        self._expect(self._evaluator.call.remote("rest", 0.0), "evaluator")
        return None

    def _evaluate_now(self) -> Any:
        """Evaluates the learner's present parameters over the final number of episodes; None where it was interrupted.

        An evaluator that dies meanwhile is replaced once.
        """
        self._answers([self._learners[0].call.remote("publish")], _ANSWER_SECONDS, "the learner to publish")
        try:
            return self._play_final_episodes()
        except RunFault as error:
            self._recorder.event(f"{error}; a new evaluator begins again")
            self._calls = {call: expected for call, expected in self._calls.items() if expected.role != "evaluator"}
            ray.kill(self._evaluator)
            self._start_evaluator()
            return self._play_final_episodes()

    def _play_final_episodes(self) -> Any:
        self._drain_role("evaluator", _START_SECONDS)
        config = self._config
        version = (self._progress.epoch, self._progress.updates)
        self._progress.on_evaluation_begins()
        episodes, seed = config.evaluation.final_episodes, config.seed + 1
        begin = self._evaluator.call.remote("begin", episodes, seed, version, _ANSWER_SECONDS)
        self._answers([begin], 2 * _ANSWER_SECONDS, "the evaluator to begin")
        stopped_before = self._stop()
        while self._stop() == stopped_before:
            call = self._evaluator.call.remote("run", _CALL_SECONDS)
            (result,) = self._answers([call], _ANSWER_SECONDS + _CALL_SECONDS, "the evaluator")
            if result is not None:
                self._evaluating = False
                return result
        return None

    def _drain_actors(self) -> None:
        """Lets every actor come to rest, and every chunk in flight be answered."""
        for call, expected in list(self._calls.items()):
            if expected.role == "placing":
                del self._calls[call]
                ray.kill(self._actors.pop(expected.worker_index))
        self._drain_role("actor", _REST_SECONDS)
        for slot in self._closing & self._actors.keys():
            ray.kill(self._actors.pop(slot))
        closing = {slot: worker.call.remote("close", _ANSWER_SECONDS / 2) for slot, worker in self._actors.items()}
        for slot, call in closing.items():
            try:
                self._progress.on_actor(ray.get(call, timeout=_ANSWER_SECONDS))
            except RayError as error:
                self._recorder.event(f"actor {slot} did not end in order: {one_line(error)}")
                self._progress.on_actor_died(slot)

    def _drain_role(self, role: str, seconds: float = _ANSWER_SECONDS) -> None:
        """Waits until workers of a role have no call under way."""
        deadline = time.monotonic() + seconds
        while calls := [call for call, expected in self._calls.items() if expected.role == role]:
            ready, _ = ray.wait(calls, num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready and role == "actor":  # They hang; the others are at rest.
                for call in calls:
                    self._give_up_actor(self._calls.pop(call).worker_index, f"it did not come to rest within {seconds:.0f} s")
                return
            if not ready:
                raise RunFault(f"waited {seconds:.0f} s for the {role} to come to rest")
            for call in ready:
                index = self._calls.pop(call).worker_index
                try:
                    result = ray.get(call, timeout=_ANSWER_SECONDS)
                except RayError as error:
                    if role == "actor":
                        self._progress.on_actor_died(index)
                        self._actors.pop(index)
                        continue
                    raise RunFault(f"the {role} died: {one_line(error)}") from error
                if role == "actor" and not isinstance(result, WorkerAddress):
                    self._progress.on_actor(result)
                elif isinstance(result, LearnerStats) and index == 0:
                    self._progress.on_learner(result)

    def _give_up_actor(self, index: int, why: str) -> None:
        """Ends an actor at the end of a run; what it had not sent is lost, as where it dies."""
        self._recorder.event(f"actor {index} is given up: {why}")
        ray.kill(self._actors.pop(index))
        _end_process(self._addresses.get(f"actor{index}"))
        self._progress.on_actor_died(index)

    def _finish(self, stopped_by: str) -> str:
        """Writes the last checkpoint and evaluates it; returns the digest of its parameters."""
        if (name := self._save()) is not None:
            self._recorder.event(f"checkpoint {name} is written ({stopped_by})")
        (digest,) = self._answers([self._learners[0].call.remote("digest")], _ANSWER_SECONDS, "the learner's digest")
        if stopped_by not in ("interrupted", "target_return"):
            result = self._evaluate_now()
            if result is not None:
                self._take_evaluation(result)
        return str(digest)

    def _save_when_due(self) -> None:
        """Begins a checkpoint where it is due: first all shards save, meanwhile the learner goes on; then, between two of its
        calls, it copies what it has, and writes that while it goes on again."""
        is_saving = any(call.role == "saving" for call in self._calls.values())
        if self._saves and not is_saving:
            self._saves = False
            self._expect(self._learners[0].call.remote("begin_save", self._checkpoint_parts()), "saving networks")
        elif time.monotonic() >= self._next_checkpoint and not self._saves:
            self._next_checkpoint = time.monotonic() + self._config.learner.checkpoint_period_seconds
            self._saves = True
            kept = self._logs.priorities_in_use(self._shard_states)
            for index, shard in enumerate(self._shards):
                self._expect(shard.call.remote("save", kept[index]), "saving", index)

    def _save(self) -> str | None:
        """Writes a checkpoint now; returns its name, or None where the disk does not take it, which is told."""
        kept = self._logs.priorities_in_use(self._shard_states)
        calls = [shard.call.remote("save", names) for shard, names in zip(self._shards, kept, strict=True)]
        deadline = time.monotonic() + _ANSWER_SECONDS
        for index, call in enumerate(calls):
            with contextlib.suppress(RunFault):  # One that is away stays as it was at the checkpoint before.
                seconds = max(deadline - time.monotonic(), 0.0)
                (self._shard_states[index],) = self._answers([call], seconds, f"shard {index} to save")
        call = self._learners[0].call.remote("save", self._checkpoint_parts())
        try:
            (name,) = self._answers([call], _ANSWER_SECONDS, "the learner to write a checkpoint")
        except OSError as error:
            self._recorder.event(
                f"no checkpoint could be written ({error.filename}: {error.strerror}); those before it are kept"
            )
            return None
        return str(name)

    def _checkpoint_parts(self) -> dict[str, Any]:
        """Returns what is in a checkpoint beside the learner's own."""
        return {
            "run_counters": self._progress.counters(),
            "replay_layout": self._logs.layout,
            "shards": self._shard_states,
        }

    def _read_shards(self) -> None:
        """Reads the shards' statistics now."""
        calls = {f"shard {i}": shard.call.remote("stats") for i, shard in enumerate(self._shards)}
        self._progress.shards = [self._answers([call], _ANSWER_SECONDS, name)[0] for name, call in calls.items()]
        self._tell_faults()

    def _record(self) -> None:
        """Writes a row of metrics, and tells Ray's agent its values where they are scraped."""
        row = self._recorder.row()
        if self._export is not None:
            self._export.take(row, self._progress.shards)

    def _tell_faults(self) -> None:
        for sentence in self._progress.new_faults():
            self._recorder.event(sentence)

    def _answers(self, calls: list[Any], seconds: float, what: str) -> list[Any]:
        """Returns the answers to all calls; raises what a worker raised, or RunFault after so many seconds."""
        try:
            return list(ray.get(calls, timeout=seconds))
        except ray.exceptions.GetTimeoutError as error:
            raise RunFault(f"waited {seconds:.0f} s for {what}") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (NonFiniteError, UserError)):
                raise type(cause)(str(cause)) from error
            if isinstance(cause, OSError) and cause.filename is not None:
                raise OSError(cause.errno, cause.strerror, cause.filename) from error
            raise RunFault(f"while waiting for {what}: {one_line(error)}") from error
        except RayActorError as error:
            raise WorkerDied(f"{what}: the worker died: {one_line(error)}") from error


def _end_process(address: dict[str, Any] | None) -> None:
    """Ends a worker's process, here or on its node: one that was stopped does not hear `ray.kill`, and keeps its place."""
    if address is None:
        return
    if address["node_id"] in ("", ray.get_runtime_context().get_node_id()):
        end_worker(address["pid"])
        return
    where = NodeAffinitySchedulingStrategy(address["node_id"], soft=False)
    with contextlib.suppress(RayError, ValueError):
        ray.remote(end_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(address["pid"])
