"""The serial run: the whole system in one process and one thread, where the same seed gives the same bits."""

from __future__ import annotations

import time
from typing import Any

import torch

from actors.actor import Actor
from common.config import EnvSpec, RunConfig
from common.errors import NonFiniteError
from deploy import roles
from deploy.adjust import take_up_adjustment
from deploy.local_handles import LocalParams, LocalReplayReader, LocalReplayWriter
from deploy.outcome import Outcome
from deploy.params_store import ParamsStore
from deploy.progress import Progress
from deploy.recorder import Recorder
from deploy.run_dir import RunDirectory
from deploy.stop_signal import StopSignal
from learner.learner import Learner
from replay_server.shard import ReplayShard


def run_serial(
    config: RunConfig, spec: EnvSpec, run_dir: RunDirectory, progress: Progress, recorder: Recorder, stop: StopSignal
) -> Outcome:
    """Steps every actor once, then updates as often as the limiter allows, until a budget is used up."""
    torch.use_deterministic_algorithms(True)
    threads = config.learner.num_threads or 1
    shards = [roles.make_shard(config, spec, run_dir.run, i, progress.epoch) for i in range(config.replay.num_shards)]
    params = LocalParams(ParamsStore())
    checkpoint = str(run_dir.checkpoint) if run_dir.checkpoint else None
    readers = [LocalReplayReader(shard) for shard in shards]
    path = str(run_dir.path)
    learner = roles.make_learner(config, spec, run_dir.run, path, progress.epoch, checkpoint, threads, readers, params)
    actors = []
    for slot in range(config.actors.num_actors):
        steps, incarnation = progress.env_steps_of[slot], progress.next_incarnation(slot)
        writer = LocalReplayWriter(list(shards))
        actors.append(roles.make_actor(config, spec, run_dir.run, slot, incarnation, steps, writer, params))
    roles.limit_threads(threads)

    def set_limiters(shares: dict[str, Any]) -> None:
        for shard in shards:
            shard.set_limiter(**shares)

    fault: str | None = None
    next_row = next_checkpoint = time.monotonic()
    try:
        while (stopped_by := "interrupted" if stop() else progress.stopped_by()) is None:
            moved = False
            for actor in actors:
                if actor.send_waiting(0.0):
                    actor.step()
                    progress.env_steps_of[actor.slot] = actor.env_steps
                    moved = True
            while progress.stopped_by() is None and learner.step():
                progress.updates = learner.updates
                moved = True
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
                learner.save(progress.counters())
        learner.save(progress.counters())
    except NonFiniteError as error:
        stopped_by, fault = "non_finite", str(error)
    for actor in actors:
        actor.send_waiting(0.0)
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
    recorder.row()
    return Outcome(stopped_by, fault, learner.digest(), progress.ledger.balance(progress.shards))


def _collect(progress: Progress, actors: list[Actor], learner: Learner, shards: list[ReplayShard]) -> None:
    for actor in actors:
        progress.on_actor(actor.stats())
    progress.on_learner(learner.stats())
    progress.shards = [shard.stats() for shard in shards]
