"""The serial run: the whole system in one process and one thread, where the same seed gives the same bits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.actor import Actor
from common.config import EnvSpec, RunConfig
from common.errors import NonFiniteError
from common.messages import Array
from deploy import roles
from deploy.adjust import take_up_adjustment
from deploy.local_handles import LocalParams, LocalReplayReader, LocalReplayWriter
from deploy.outcome import Outcome
from deploy.params_store import ParamsStore
from deploy.progress import Progress
from deploy.recorder import Recorder
from deploy.replay_logs import ReplayLogs
from deploy.run_dir import RunDirectory
from deploy.stop_signal import StopSignal
from learner import checkpoint as checkpoints
from learner.learner import Learner
from replay_server.shard import ReplayShard


class System(NamedTuple):
    """All roles of a serial run."""

    shards: list[ReplayShard]
    store: ParamsStore
    learner: Learner
    actors: list[Actor]
    writers: list[LocalReplayWriter]
    """By actor."""


def run_serial(
    config: RunConfig, spec: EnvSpec, run_dir: RunDirectory, progress: Progress, recorder: Recorder, stop: StopSignal
) -> Outcome:
    """Updates as often as the limiter allows, then steps every actor once, until a budget is used up.

    In this order, a command that goes on does what would have come next.
    """
    torch.use_deterministic_algorithms(True)
    threads = config.learner.num_threads or 1
    logs = ReplayLogs(run_dir.path, config)
    system = _make(config, spec, run_dir, progress, recorder, logs, threads)
    shards, store, learner, actors, writers = system
    params = LocalParams(store)
    roles.limit_threads(threads)

    def set_limiters(shares: dict[str, Any]) -> None:
        for shard in shards:
            shard.set_limiter(**shares)

    fault: str | None = None
    next_row = next_checkpoint = time.monotonic()
    try:
        while (stopped_by := "interrupted" if stop() else progress.stopped_by()) is None:
            moved = False
            while (stopped_by := progress.stopped_by()) is None and learner.step():
                progress.updates = learner.updates
                moved = True
            if stopped_by is not None:
                break
            for actor, writer in zip(actors, writers, strict=True):
                # What it could push, before it had to wait in the middle, may be what the learner waits for.
                before = writer.counts()
                if actor.send_waiting(0.0):
                    actor.step()
                    progress.env_steps_of[actor.slot] = actor.env_steps
                    moved = True
                after = writer.counts()
                moved = moved or (after.inserted, after.refused) != (before.inserted, before.refused)
            assert moved, f"the serial run is stuck: {actors[0].stats().waits_for}; {learner.stats().waits_for}"
            now = time.monotonic()
            if now >= next_row:
                next_row = now + config.log_period_seconds
                config = take_up_adjustment(config, run_dir, progress, recorder, set_limiters)
                _collect(progress, actors, learner, shards)
                for sentence in progress.new_faults():
                    recorder.event(sentence)
                recorder.row()
            if now >= next_checkpoint + config.learner.checkpoint_period_seconds:
                next_checkpoint = now
                _save(system, progress, recorder, logs)
        _save(system, progress, recorder, logs)
    except NonFiniteError as error:
        stopped_by, fault = "non_finite", str(error)
    _collect(progress, actors, learner, shards)
    if fault is None:
        learner.publish()
        if stopped_by != "interrupted":
            evaluator = roles.make_evaluator(config, spec, params)
            evaluator.begin(config.evaluation.final_episodes, config.seed + 1, (progress.epoch, learner.updates), 0.0)
            progress.on_evaluation_begins()
            while (result := evaluator.run(1.0)) is None and not stop():
                pass
            if result is not None:
                progress.on_evaluation(result)
            evaluator.close()
    for shard in shards:
        shard.close()
    recorder.row()
    return Outcome(stopped_by, fault, learner.digest(), progress.ledger.balance(progress.shards))


def _make(
    config: RunConfig,
    spec: EnvSpec,
    run_dir: RunDirectory,
    progress: Progress,
    recorder: Recorder,
    logs: ReplayLogs,
    threads: int,
) -> System:
    """Makes all roles, new or as the checkpoint has them: to the bit where it can be."""
    is_exact = run_dir.may_go_on_exactly(config)
    starts = logs.begin(run_dir.meta, is_exact=is_exact)
    run, epoch = run_dir.run, progress.epoch
    shards = [roles.make_shard(config, spec, run, i, epoch, start) for i, start in enumerate(starts)]
    progress.shards = [shard.stats() for shard in shards]
    for note in logs.notes + progress.new_faults():
        recorder.event(note)
    if run_dir.checkpoint is not None:
        recorder.event(progress.restored_sentence(run_dir.checkpoint.name))
    store = ParamsStore()
    readers = [LocalReplayReader(shard) for shard in shards]
    saved = checkpoints.read(run_dir.checkpoint) if run_dir.checkpoint is not None else None
    checkpoint = str(run_dir.checkpoint) if run_dir.checkpoint is not None else None
    path, params = str(run_dir.path), LocalParams(store)
    learner = roles.make_learner(config, spec, run, path, epoch, checkpoint, threads, readers, params, publishes=not is_exact)
    writers = [LocalReplayWriter(list(shards)) for _ in range(config.actors.num_actors)]
    actors = []
    for slot, writer in enumerate(writers):
        steps, incarnation = progress.env_steps_of[slot], progress.next_incarnation(slot)
        actors.append(roles.make_actor(config, spec, run, slot, incarnation, steps, writer, params))
    system = System(shards, store, learner, actors, writers)
    if is_exact and saved is not None:
        recorder.event(
            f"environments play their {progress.env_steps:,} steps again, so that the run goes on to the bit: minutes for a million"
        )
        _restore(system, saved.tensors, saved.meta)
    return system


def _save(system: System, progress: Progress, recorder: Recorder, logs: ReplayLogs) -> None:
    """Writes a checkpoint of everything, between two steps; where the disk does not take it, that is told, and the run goes on."""
    shards, store, learner, actors, writers = system
    tensors, values = {}, []
    for actor in actors:
        tensors[f"actor{actor.slot}"], plain = actor.state()
        values.append(plain)
    parts = learner.batch_parts()
    snapshot = store.latest(-1, -1)
    tensors["serial"] = {f"part{i}": part for i, part in enumerate(parts) if part is not None}
    tensors["serial"] |= {"snapshot": snapshot} if snapshot is not None else {}
    run = {
        "run_counters": progress.counters(),
        "replay_layout": logs.layout,
        "shards": [shard.save(kept) for shard, kept in zip(shards, logs.priorities_in_use([None] * len(shards)), strict=True)],
        "serial": {"actors": values, "writers": [writer.state() for writer in writers]},
    }
    try:
        learner.save(run, tensors)
    except OSError as error:
        recorder.event(f"no checkpoint could be written ({error.filename}: {error.strerror}); those before it are kept")


def _restore(system: System, tensors: Mapping[str, Mapping[str, Array]], meta: Mapping[str, Any]) -> None:
    """Brings back what `_save` has written beside networks and shards."""
    shards, store, learner, actors, writers = system
    learner.restore_draws(meta["generator"], [tensors["serial"].get(f"part{i}") for i in range(len(shards))])
    if "snapshot" in tensors["serial"]:
        store.publish(np.array(tensors["serial"]["snapshot"]))
    for actor, writer, values, pushed in zip(actors, writers, meta["serial"]["actors"], meta["serial"]["writers"], strict=True):
        actor.restore(tensors[f"actor{actor.slot}"], values)
        writer.restore(pushed)


def _collect(progress: Progress, actors: list[Actor], learner: Learner, shards: list[ReplayShard]) -> None:
    for actor in actors:
        progress.on_actor(actor.stats())
    progress.on_learner(learner.stats())
    progress.shards = [shard.stats() for shard in shards]
