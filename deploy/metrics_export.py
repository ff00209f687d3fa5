"""What a run tells Prometheus: the values of each row as gauges, which the driver sets and Ray's agent on its node exports.

The driver has every role's statistics anyway, actors' taken together, so it is the only exporter: how many series a run has depends
on its shards, and never on its actors. Ray puts `ray_` before every name. docs/metrics.md says how to scrape them, and
deploy/grafana/qfleet.json shows them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Gauge

from common.metrics import ShardStats

ROW_METRICS = {
    "time_seconds": "Wall time of the run, over all commands on its run directory.",
    "supervisor/command_began_seconds": "Wall time of the run when its last command began.",
    "env_steps": "Steps of the environments, of all actors, over all commands.",
    "frames": "Emulator frames of those steps.",
    "updates": "Updates of the learner.",
    "samples": "Transitions that the learner has learned from; one that was drawn twice counts twice.",
    "supervisor/num_degraded": "What the run does without now: workers that are away, disks that take nothing.",
    "actor/env_steps_per_second": "Steps a second of all actors.",
    "actor/frames_per_second": "Emulator frames a second of all actors.",
    "actor/num_alive": "Actors that act.",
    "actor/epsilon_mean": "Chance of a random action, mean over the actors.",
    "actor/params_lag_updates": "Updates by which the learner is ahead of what the actors act with, mean over the actors.",
    "actor/params_lag_updates_max": "Updates by which the learner is ahead of what an actor acts with, of the actor that is furthest behind.",
    "actor/params_age_seconds": "Time from the publication of parameters to their use, mean over the actors.",
    "actor/params_age_seconds_max": "Time from the publication of parameters to their use, of the actor whose parameters are oldest.",
    "actor/waiting_fraction": "Part of the time that actors wait for replay, mean over the actors.",
    "actor/training_return_mean": "Raw return of the last 20 training episodes, mean.",
    "actor/env_fraction": "Part of an actor's time in the environments, mean over the actors.",
    "actor/inference_fraction": "Part of an actor's time in the network, mean over the actors.",
    "actor/n_step_fraction": "Part of an actor's time making n-step transitions, mean over the actors.",
    "actor/compress_fraction": "Part of an actor's time compressing and packing, mean over the actors.",
    "actor/push_fraction": "Part of an actor's time handing chunks to Ray, mean over the actors.",
    "actor/push_wait_fraction": "Part of an actor's time waiting for shards to take chunks, mean over the actors.",
    "actor/pull_fraction": "Part of an actor's time looking for parameters and loading them, mean over the actors.",
    "actor/cpu_cores": "Cores that all actor processes use.",
    "actor/delay_fraction": "Part of the time that an actor's thread is ready to run and has no processor, mean over the actors.",
    "actor/answer_p95_seconds": "From sending a chunk to having its shard's answer, exceeded by one in twenty; mean over the actors.",
    "actor/answer_p95_seconds_max": "From sending a chunk to having its shard's answer, exceeded by one in twenty; of the actor that waits longest.",
    "learner/updates_per_second": "Updates a second.",
    "learner/samples_per_second": "Transitions a second that the learner learns from.",
    "learner/loss_mean": "Loss, mean of the updates since the report before.",
    "learner/value_mean": "Value of the actions that were taken, mean of the last update.",
    "learner/grad_norm": "Norm of the gradient.",
    "learner/params_lag_updates": "Updates between the parameters that acted and those that learn, mean of the last batch.",
    "learner/busy_fraction": "Part of the time that the learner's thread is busy.",
    "learner/ready_batches": "Batches that are prefetched and wait for the learner.",
    "learner/dropped_batches": "Batches that could not be used, since the start of the learner's process.",
    "learner/update_interval_p50_seconds": "From the end of an update to the end of the next: the median.",
    "learner/update_interval_p99_seconds": "From the end of an update to the end of the next, exceeded by one in a hundred.",
    "learner/checkpoint_pause_seconds": "The longest interval between updates while a checkpoint was written.",
    "learner/wait_fraction": "Part of the time of the learner's thread that it waits for a batch.",
    "learner/agree_fraction": "Part of the time of the learner's thread that it waits for the other ranks.",
    "learner/update_fraction": "Part of the time of the learner's thread in updates.",
    "learner/publish_fraction": "Part of the time of the learner's thread publishing parameters.",
    "learner/report_fraction": "Part of the time of the learner's thread on priorities and what it tells.",
    "learner/save_fraction": "Part of the time of the learner's thread on checkpoints.",
    "learner/answer_p95_seconds_max": "From asking a shard for samples to having them, exceeded by one in twenty; of the slowest shard.",
    "learner/slowest_shard": "Index of the shard that answers the learner latest.",
    "learner/cpu_cores": "Cores that the learner's processes use.",
    "learner/delay_fraction": "Part of the time that the learner's thread is ready to run and has no processor.",
    "prefetch/num_threads": "Prefetch threads of the learner.",
    "prefetch/turn_fraction": "Part of the time of a prefetch thread that it waits for another one to collect, mean over the threads.",
    "prefetch/collect_fraction": "Part of the time of a prefetch thread that it waits for answers of shards, mean over the threads.",
    "prefetch/held_fraction": "Part of the time of a prefetch thread that the limiters hold it back, mean over the threads.",
    "prefetch/unpack_fraction": "Part of the time of a prefetch thread unpacking batches, mean over the threads.",
    "prefetch/transfer_fraction": "Part of the time of a prefetch thread bringing batches to the device, mean over the threads.",
    "shard/size_transitions": "Transitions in replay, of all shards.",
    "shard/resident_bytes": "Memory of replay, of all shards.",
    "shard/inserted_transitions": "Transitions inserted, of all shards.",
    "shard/evicted_transitions": "Transitions evicted, of all shards.",
    "shard/sampled_transitions": "Transitions drawn, of all shards.",
    "shard/samples_per_insert": "Times that a transition is drawn on average, after the first ones of replay.min_size.",
    "shard/refused_chunks": "Chunks that shards could not read or would not take.",
    "shard/stale_priority_updates": "Priorities that came for transitions that had gone.",
    "shard/log_bytes": "The logs on the disk, of all shards.",
    "shard/log_segments": "Files of the logs, of all shards.",
    "shard/log_unsynced_transitions": "Transitions that a power failure would take: written, not synced.",
    "shard/log_unlogged_transitions": "Transitions that the disk did not take: a restart would lose them.",
    "shard/log_dropped_transitions": "Transitions that the disk budget dropped from the logs: a restart would lose them.",
    "shard/actors_waiting_fraction": "Part of the time for which the limiters hold the actors back, mean over the shards.",
    "shard/learner_waiting_fraction": "Part of the time for which the limiters hold the learner back, mean over the shards.",
    "shard/insert_fraction": "Part of a shard's time inserting, mean over the shards.",
    "shard/sample_fraction": "Part of a shard's time drawing and packing samples, mean over the shards.",
    "shard/priorities_fraction": "Part of a shard's time updating priorities, mean over the shards.",
    "shard/save_fraction": "Part of a shard's time on checkpoints, mean over the shards.",
    "shard/busy_fraction": "Part of the time that a shard is busy, mean over the shards.",
    "shard/busy_fraction_max": "Part of the time that the busiest shard is busy.",
    "shard/busiest_index": "Index of the busiest shard.",
    "shard/cpu_cores": "Cores that the shards' processes use.",
    "shard/delay_fraction": "Part of the time that a shard's thread is ready to run and has no processor, mean over the shards.",
    "store/params_epoch": "Epoch of the parameters that the store holds: one more for each learner.",
    "store/params_version": "Version of the parameters that the store holds: the learner's updates when it published them.",
    "store/params_age_seconds": "For how long the store has held them.",
    "store/published_versions": "Versions that the store took since its start.",
    "store/answered_versions": "Times that the store told a reader of newer parameters since its start.",
    "evaluator/return_mean": "Raw return of the last evaluation, mean.",
    "evaluator/params_version": "Version of the parameters of the last evaluation.",
    "evaluator/began_seconds": "Wall time of the run when the last evaluation began.",
    "evaluator/began_env_steps": "Env steps of the run when the last evaluation began.",
    "host/cpu_fraction": "Busy part of all processors of the driver's host, whoever uses them.",
    "object_store/used_bytes": "What the object stores of all nodes hold.",
    "object_store/spilled_bytes": "What the object stores of all nodes ever spilled to disk.",
}
"""By key of a row of metrics.jsonl, whose name ends in its unit: what it is."""

SHARD_METRICS = {
    "size_transitions": "Transitions in this shard.",
    "resident_bytes": "Memory of this shard's replay.",
    "inserted_transitions": "Transitions inserted in this shard.",
    "evicted_transitions": "Transitions evicted from this shard.",
    "sampled_transitions": "Transitions drawn from this shard.",
    "actors_wait_seconds": "For how long this shard's limiter holds the actors back now; 0 where they may go on.",
    "learner_wait_seconds": "For how long this shard's limiter holds the learner back now; 0 where it may go on.",
}
"""Of each shard, with the label `shard`: what it is."""

_KEPT_ROLE = "evaluator/"  # A row has an evaluation once, when it is new; it stays the last one until the next.
_TELL_SECONDS = 1.0  # Ray tells a value once, and drops it unless it is set again before two of its reports (10 s each).


def metric_name(key: str) -> str:
    """Returns the name, without Ray's `ray_`, of what a row calls `key`."""
    return f"qfleet_{key.replace('/', '_')}"


def shard_metric_name(quantity: str) -> str:
    """Returns the name, without Ray's `ray_`, of a quantity of each shard."""
    return f"qfleet_each_shard_{quantity}"


class MetricsExport:
    """The gauges of one run, used by the driver's one thread where a Ray is up.

    A value that a row has no more (a learner that died, NaN) is not set again, and Ray drops it half a minute later at most. So is
    everything when the driver ends, hangs, or waits for the evaluation at the end.
    """

    def __init__(self, run: str, recipe: str) -> None:
        tags = {"run": run, "recipe": recipe}
        self._of_row = {key: _gauge(metric_name(key), text, tags) for key, text in ROW_METRICS.items()}
        self._of_shard = {key: _gauge(shard_metric_name(key), text, tags, "shard") for key, text in SHARD_METRICS.items()}
        self._row: dict[str, float] = {}
        self._shards: dict[str, dict[str, float]] = {}  # By index.
        self._next = 0.0

    def take(self, row: Mapping[str, Any], shards: Sequence[ShardStats]) -> None:
        """Tells Ray the values of a row, and each shard's."""
        kept = {key: value for key, value in self._row.items() if key.startswith(_KEPT_ROLE) and key not in row}
        self._row = kept | {key: float(value) for key, value in row.items() if key in self._of_row}
        self._shards = {str(shard.shard_index): _shard_values(shard) for shard in shards}
        self._next = 0.0
        self.tell()

    def tell(self) -> None:
        """Tells Ray the same values again, where a second has passed."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TELL_SECONDS
        for key, value in self._row.items():
            self._of_row[key].set(value)
        for index, values in self._shards.items():
            for key, value in values.items():
                self._of_shard[key].set(value, {"shard": index})


def _gauge(name: str, description: str, tags: dict[str, str], *more_tags: str) -> Gauge:
    gauge = Gauge(name, description, (*tags, *more_tags))
    gauge.set_default_tags(tags)
    return gauge


def _shard_values(shard: ShardStats) -> dict[str, float]:
    """Returns the values of SHARD_METRICS."""
    waits = {wait.who: wait.seconds for wait in shard.waits}
    values = {
        "size_transitions": shard.size,
        "resident_bytes": shard.resident_bytes,
        "inserted_transitions": shard.num_inserted,
        "evicted_transitions": shard.num_evicted,
        "sampled_transitions": shard.num_sampled,
        "actors_wait_seconds": waits.get("actors", 0.0),
        "learner_wait_seconds": waits.get("learner", 0.0),
    }
    return {key: float(value) for key, value in values.items()}
