"""What the roles reported last, and the rows of metrics made of it. The serial run and the supervisor share it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common.config import RunConfig, as_dict
from common.metrics import ActorStats, EvaluationResult, LearnerStats, ShardStats, StoreStats
from common.timing import Usage
from deploy.ledger import Ledger
from deploy.params_watch import ParamsWatch
from deploy.usage import UsageRates

_RECENT_EPISODES = 20
_KINDS_OF_AWAY = {"silent": "is silent", "quarantine": "is in quarantine", "disk": "waits for its disk"}
_LOG_COUNTS = {
    "bytes": "bytes",
    "segments": "segments",
    "unsynced_transitions": "unsynced",
    "unlogged_transitions": "unlogged",
    "dropped_transitions": "dropped",
}


class Progress:
    """The state of a run as the driver knows it.

    `counters` go into every checkpoint and come back with it, so that steps, epsilon and wall time continue.
    """

    def __init__(self, config: RunConfig, meta: dict[str, Any], *, last_epoch: int = -1, is_exact: bool = False) -> None:
        """`last_epoch`: the greatest that was used so far. `is_exact`: a serial run that goes on to the bit, with the same epoch and
        the same incarnations.
        """
        self.config = config
        counters = meta.get("run_counters", {})
        self.updates: int = meta.get("updates", 0)
        self.samples: int = meta.get("samples", 0)
        self.epoch: int = meta["epoch"] if is_exact else last_epoch + 1
        slots = range(config.actors.num_actors)
        old_steps = {int(slot): steps for slot, steps in counters.get("env_steps", {}).items()}
        # A run that goes on with another number of actors shares out the steps, so that epsilon goes on where it was.
        total = sum(old_steps.values())
        self.env_steps_of: dict[int, int] = (
            old_steps if len(old_steps) == len(slots) else {s: total // len(slots) + (s < total % len(slots)) for s in slots}
        )
        # No incarnation of a slot comes twice, over all commands on the run: seeds depend on it.
        self.incarnation_of: dict[int, int] = dict.fromkeys(slots, 1_000 * self.epoch - 1)
        if is_exact:
            self.incarnation_of = {int(slot): incarnation - 1 for slot, incarnation in counters["incarnations"].items()}
        self.earlier_seconds: float = counters.get("wall_seconds", 0.0)
        self.after_checkpoint = (0, 0)
        """Updates and env steps of the command before, after the checkpoint from which this one goes on."""
        self.started = time.monotonic()
        self.ledger = Ledger()
        self.actors: dict[int, ActorStats] = {}
        self._params_lag_updates: dict[int, int] = {}  # By slot.
        # In a serial run an actor's next look may be far away, and nothing is between it and the store.
        self._params_watch = ParamsWatch(None if config.serial else config.actors.params_alarm_seconds)
        self.learner: LearnerStats | None = None
        self.shards: Sequence[ShardStats] = []
        self.store: StoreStats | None = None
        self.evaluation: EvaluationResult | None = None
        self.evaluated_frames = 0  # Of training, when `evaluation` took its parameters.
        self.returns: deque[float] = deque(counters.get("returns", ()), maxlen=_RECENT_EPISODES)
        self.events: deque[str] = deque(maxlen=4)
        self.away: dict[tuple[str, int], str] = {}
        """By role and index: a sentence for each worker that does not do its part now."""
        self._known_faults: dict[str, int] = {}
        self._known_disk_faults: dict[str, str] = {}
        self._told: set[str] = set()
        self._evaluation_is_new = False
        self._evaluation_began = (0.0, 0)
        self._previous: dict[str, float] = {}
        self._usage_rates = UsageRates()
        self.object_store: tuple[int, int] | None = None
        """Bytes that Ray's object stores hold, and that they ever spilled to disk; None: not known."""

    @property
    def env_steps(self) -> int:
        return sum(self.env_steps_of.values())

    @property
    def frames(self) -> int:
        return self.env_steps * self.config.env.frames_per_step

    @property
    def wall_seconds(self) -> float:
        """Of this command."""
        return time.monotonic() - self.started

    def counters(self) -> dict[str, Any]:
        return {
            "env_steps": {str(slot): steps for slot, steps in self.env_steps_of.items()},
            "incarnations": {str(slot): incarnation for slot, incarnation in self.incarnation_of.items()},
            "wall_seconds": self.earlier_seconds + self.wall_seconds,
            "returns": list(self.returns),
            "config": as_dict(self.config),
        }

    def next_incarnation(self, slot: int) -> int:
        self.incarnation_of[slot] += 1
        return self.incarnation_of[slot]

    def on_actor(self, stats: ActorStats) -> None:
        self.actors[stats.slot] = stats
        self.env_steps_of[stats.slot] = stats.env_steps
        self.returns.extend(stats.returns)
        self.ledger.report(stats.slot, stats.incarnation, stats.sent, stats.pushed)
        self._params_watch.on_actor(time.monotonic(), stats.slot, stats.incarnation, (stats.params_epoch, stats.params_version))
        if stats.params_epoch in (-1, self.epoch):  # Versions of two epochs are not so many updates apart.
            self._params_lag_updates[stats.slot] = max(self.updates - stats.params_version, 0)  # The learner reported earlier.
        else:
            self._params_lag_updates.pop(stats.slot, None)

    def on_actor_died(self, slot: int) -> None:
        self.ledger.died(slot, self.incarnation_of[slot])
        self.on_actor_left(slot)

    def on_actor_left(self, slot: int) -> None:
        """Notes that a slot does not act now."""
        self.actors.pop(slot, None)
        self._params_lag_updates.pop(slot, None)
        self._params_watch.forget(slot)

    def on_learner(self, stats: LearnerStats) -> None:
        self.learner = stats
        self.updates, self.samples = stats.updates, stats.samples
        self._params_watch.on_published(time.monotonic(), (self.epoch, stats.published_version))

    def on_learner_died(self, meta: Mapping[str, Any]) -> None:
        """Goes back to the checkpoint that the next learner begins with, whose `meta` this is."""
        self.epoch += 1
        self.updates, self.samples = meta["updates"], meta["samples"]
        self.learner = None
        self._known_faults.pop("learner", None)
        for name in ("updates", "samples", "learner_busy"):  # They begin anew: no rate spans both learners.
            self._previous.pop(name, None)

    def on_evaluation_begins(self) -> None:
        self._evaluation_began = (self.earlier_seconds + self.wall_seconds, self.env_steps)

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Takes a result; the next row has it, and says when its parameters were taken."""
        self.evaluation = result
        self.evaluated_frames = self._evaluation_began[1] * self.config.env.frames_per_step
        self._evaluation_is_new = True

    def stopped_by(self) -> str | None:
        """Returns the budget that is used up, or None."""
        config = self.config
        if config.max_updates is not None and self.updates >= config.max_updates:
            return "max_updates"
        if config.max_env_steps is not None and self.env_steps >= config.max_env_steps:
            return "max_env_steps"
        if config.max_minutes is not None and self.wall_seconds + self._final_seconds() >= 60 * config.max_minutes:
            return "max_minutes"
        return None

    def fraction_done(self) -> float:
        """Returns how much of the nearest budget is used, in [0, 1]."""
        config = self.config
        used = [self.updates / config.max_updates] if config.max_updates else []
        used += [self.env_steps / config.max_env_steps] if config.max_env_steps else []
        used += [(self.wall_seconds + self._final_seconds()) / (60 * config.max_minutes)] if config.max_minutes else []
        return min(max(used, default=0.0), 1.0)

    def new_faults(self) -> list[str]:
        """Returns a sentence for each kind of refused data, and each actor with parameters that stand still, since the last call."""
        sentences = self._params_watch.new_alarms()
        for shard in self.shards:
            name = f"shard {shard.shard_index}"
            if shard.num_refused_chunks > self._known_faults.get(name, 0):
                sentences.append(f"{name} refused {shard.num_refused_chunks} chunks so far, the last: {shard.last_refusal}")
                self._known_faults[name] = shard.num_refused_chunks
        if self.learner is not None and self.learner.num_dropped_batches > self._known_faults.get("learner", 0):
            self._known_faults["learner"] = self.learner.num_dropped_batches
            sentences.append(f"{self.learner.num_dropped_batches} batches dropped so far, the last: {self.learner.last_fault}")
        return sentences + self._new_disk_faults() + self._new_once()

    def degraded(self) -> list[str]:
        """Returns what the run does without now: workers that are away, a disk that takes nothing."""
        return [sentence for _, sentence in self.degraded_by_kind()]

    def degraded_by_kind(self) -> list[tuple[str, str]]:
        """Returns the same as (kind, sentence); kinds: silent, restart, quarantine, node, disk."""
        found = []
        for (role, _), sentence in self.away.items():
            kinds = [kind for kind, words in _KINDS_OF_AWAY.items() if words in sentence]
            found.append(("node" if role == "fleet" else kinds[0] if kinds else "restart", sentence))
        return found + [("disk", fault) for fault in self._disk_faults().values()]

    def _disk_faults(self) -> dict[str, str]:
        """Returns by name what the disk does not take now."""
        faults = {f"shard {s.shard_index}": s.log.fault for s in self.shards if s.log is not None and s.log.fault is not None}
        if self.learner is not None and self.learner.checkpoint_fault is not None:
            faults["the learner"] = (
                f"no checkpoint could be written ({self.learner.checkpoint_fault}); those before it are kept"
            )
        return faults

    def _new_once(self) -> list[str]:
        """Returns what is told once: damages of the logs, what the disk budget has dropped, books that do not balance."""
        found = {damage for shard in self.shards if shard.log is not None for damage in shard.log.damages}
        found |= {
            f"shard {shard.shard_index}: replay.disk_budget {self.config.replay.disk_budget} holds a part of the replay only: a restart "
            f"loses the rest"
            for shard in self.shards
            if shard.log is not None and shard.log.num_dropped
        }
        found |= set(self.ledger.faults(self.shards))
        sentences = sorted(found - self._told)
        self._told |= found
        return sentences

    def _new_disk_faults(self) -> list[str]:
        faults = self._disk_faults()
        sentences = [f"{name}: {fault}" for name, fault in faults.items() if name not in self._known_disk_faults]
        sentences += [f"{name}: the disk takes what it writes again" for name in self._known_disk_faults if name not in faults]
        self._known_disk_faults = faults
        return sentences

    def waits(self) -> list[str]:
        """Returns who waits for whom, now: what the limiters say, with how long; else what actors and learner say."""
        waits = [wait for shard in self.shards for wait in shard.waits if wait.reason]
        if waits:
            waits.sort(key=lambda wait: -wait.seconds)
            return [f"{wait.reason} ({wait.seconds:.1f} s)" for wait in waits]
        sentences = [stats.waits_for for stats in self.actors.values() if stats.waits_for]
        sentences += [self.learner.waits_for] if self.learner and self.learner.waits_for else []
        return sorted(set(sentences))

    def restored_sentence(self, checkpoint: str) -> str:
        """Returns what came back of a run that goes on from this checkpoint, and what did not."""
        size = sum(shard.size for shard in self.shards)
        updates, steps = self.after_checkpoint
        lost = [f"{updates:,} updates and {steps:,} env steps after it"] if updates or steps else []
        lost += [f"{number:,} transitions ({cause})" for cause, number in self.ledger.balance(self.shards)["lost"].items()]
        return (
            f"restored from checkpoint {checkpoint}: networks, optimizer and counters of update {self.updates:,}, epsilon of env step "
            f"{self.env_steps:,}, {size:,} transitions in {len(self.shards)} shards; lost so far: {', '.join(lost) or 'nothing'}"
        )

    def row(self) -> dict[str, Any]:
        """Returns one flat row of metrics; rates are since the row before."""
        seconds = self.wall_seconds
        row: dict[str, Any] = {
            "time_seconds": self.earlier_seconds + seconds,
            "supervisor/command_began_seconds": self.earlier_seconds,
            "env_steps": self.env_steps,
            "frames": self.frames,
            "updates": self.updates,
            "samples": self.samples,
            "supervisor/num_degraded": len(self.degraded()),
        }
        steps_per_second = self._rate("env_steps", self.env_steps, seconds)
        row["actor/env_steps_per_second"] = steps_per_second
        row["actor/frames_per_second"] = steps_per_second and steps_per_second * self.config.env.frames_per_step
        row["actor/num_alive"] = len(self.actors)
        if self.actors:
            row["actor/epsilon_mean"] = _mean([stats.epsilon for stats in self.actors.values()])
            row |= _mean_and_max("actor/params_lag_updates", self._params_lag_updates.values())
            row |= _mean_and_max("actor/params_age_seconds", [stats.params_age_seconds for stats in self.actors.values()])
            waiting = sum(stats.waiting_seconds for stats in self.actors.values())
            row["actor/waiting_fraction"] = self._rate("actor_waiting", waiting / len(self.actors), seconds)
            row |= _mean_and_max(
                "actor/answer_p95_seconds", [stats.pushed.answer_p95_seconds for stats in self.actors.values()]
            )
        if self.returns:
            row["actor/training_return_mean"] = _mean(list(self.returns))
        row |= self._learner_row(seconds) | self._shard_row() | self._waits_row(seconds) | self._usage_row() | self._store_row()
        if self.evaluation is not None and self._evaluation_is_new:
            self._evaluation_is_new = False
            row["evaluator/return_mean"] = self.evaluation.mean_return
            row["evaluator/params_version"] = self.evaluation.params_version
            row["evaluator/began_seconds"], row["evaluator/began_env_steps"] = self._evaluation_began
        self._previous["seconds"] = seconds
        return {name: value for name, value in row.items() if value is not None and not _is_nan(value)}

    def evaluation_dict(self) -> dict[str, Any] | None:
        return asdict(self.evaluation) if self.evaluation is not None else None

    def _learner_row(self, seconds: float) -> dict[str, Any]:
        stats = self.learner
        if stats is None:
            return {}
        return {
            "learner/updates_per_second": self._rate("updates", stats.updates, seconds),
            "learner/samples_per_second": self._rate("samples", stats.samples, seconds),
            "learner/loss_mean": stats.loss,
            "learner/value_mean": stats.mean_value,
            "learner/grad_norm": stats.grad_norm,
            "learner/params_lag_updates": stats.params_lag_updates,
            "learner/busy_fraction": self._rate("learner_busy", stats.busy_seconds, seconds),
            "learner/ready_batches": stats.num_ready_batches,
            "learner/dropped_batches": stats.num_dropped_batches,
            "learner/update_interval_p50_seconds": stats.update_interval_p50_seconds,
            "learner/update_interval_p99_seconds": stats.update_interval_p99_seconds,
            "learner/checkpoint_pause_seconds": stats.checkpoint_pause_seconds,
        }

    def _shard_row(self) -> dict[str, Any]:
        if not self.shards:
            return {}
        total = {
            name: sum(getattr(shard, name) for shard in self.shards)
            for name in ("size", "resident_bytes", "num_inserted", "num_evicted", "num_sampled", "num_refused_chunks")
        }
        inserted = total["num_inserted"] - self.config.replay.min_size
        return {
            "shard/size_transitions": total["size"],
            "shard/resident_bytes": total["resident_bytes"],
            "shard/inserted_transitions": total["num_inserted"],
            "shard/evicted_transitions": total["num_evicted"],
            "shard/sampled_transitions": total["num_sampled"],
            "shard/samples_per_insert": total["num_sampled"] / inserted if inserted > 0 else None,
            "shard/refused_chunks": total["num_refused_chunks"],
            "shard/stale_priority_updates": sum(shard.num_stale_priority_updates for shard in self.shards),
            **{
                f"shard/log_{name}": sum(getattr(shard.log, f"num_{field}") for shard in self.shards if shard.log is not None)
                for name, field in _LOG_COUNTS.items()
            },
        }

    def _usage_row(self) -> dict[str, Any]:
        """Where the time of each role went."""
        rates = self._usage_rates
        shards: dict[tuple[int, ...], Usage | None] = {
            (shard.shard_index, shard.shard_epoch): shard.usage for shard in self.shards
        }
        busy = {key[0]: sum(i.phases.values()) / i.at for key, i in rates.intervals("busy shard", shards).items()}
        row = rates.of_role("actor", {(slot, stats.incarnation): stats.usage for slot, stats in self.actors.items()})
        row |= rates.of_role("shard", shards)
        if busy:
            busiest = max(busy, key=lambda index: busy[index])
            row |= _mean_and_max("shard/busy_fraction", busy.values()) | {"shard/busiest_index": busiest}
        if self.learner is not None:
            row |= rates.of_role("learner", {(self.epoch,): self.learner.usage})
            row |= rates.of_role("prefetch", {(self.epoch,): self.learner.prefetch_usage})
            if self.learner.prefetch_usage is not None:
                row["prefetch/num_threads"] = self.learner.prefetch_usage.num_threads
            known = {shard: p95 for shard, p95 in self.learner.answer_p95_seconds.items() if not _is_nan(p95)}
            if known:
                slowest = max(known, key=lambda shard: known[shard])
                row |= {
                    "learner/answer_p95_seconds_max": known[slowest],
                    "learner/slowest_shard": slowest * self.config.learner.num_devices,
                }
        for name in ("prefetch/cpu_cores", "prefetch/delay_fraction"):  # Of the learner's process and thread, told there.
            row.pop(name, None)
        if self.config.serial:  # One process and one thread are all roles.
            row = {name: value for name, value in row.items() if not name.endswith(("/cpu_cores", "/delay_fraction"))}
        row["host/cpu_fraction"] = rates.host_cpu_fraction()
        if self.object_store is not None:
            row["object_store/used_bytes"], row["object_store/spilled_bytes"] = self.object_store
        return row

    def _waits_row(self, seconds: float) -> dict[str, Any]:
        """Parts of the time for which the limiters held actors and learner back, mean over the shards."""
        row: dict[str, Any] = {}
        for who in ("actors", "learner") if self.shards else ():
            total = sum(wait.total_seconds for shard in self.shards for wait in shard.waits if wait.who == who)
            row[f"shard/{who}_waiting_fraction"] = self._rate(f"{who}_held_back", total / len(self.shards), seconds)
        return row

    def _store_row(self) -> dict[str, Any]:
        stats = self.store
        if stats is None or stats.params_epoch < 0:
            return {}
        return {
            "store/params_epoch": stats.params_epoch,
            "store/params_version": stats.params_version,
            "store/params_age_seconds": stats.params_age_seconds,
            "store/published_versions": stats.num_published,
            "store/answered_versions": stats.num_answered,
        }

    def _rate(self, name: str, value: float, seconds: float) -> float | None:
        before, self._previous[name] = self._previous.get(name), value
        elapsed = seconds - self._previous.get("seconds", 0.0)
        return None if before is None or elapsed <= 0 else (value - before) / elapsed

    def _final_seconds(self) -> float:
        """Returns what the evaluation at the end will take, judged by the last one."""
        if self.evaluation is None:
            return 0.0
        config = self.config.evaluation
        return self.evaluation.seconds * max(config.final_episodes / config.episodes, 1.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_and_max(name: str, values: Iterable[float]) -> dict[str, float]:
    """Returns the mean and the greatest of those that are known, where there are any."""
    known = [value for value in values if not _is_nan(value)]
    return {name: _mean(known), f"{name}_max": max(known)} if known else {}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
