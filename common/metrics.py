"""What the roles report: the statistics that cross process boundaries beside the four messages.

`deploy/progress.py` makes rows of metrics of them, whose names are `<role>/<quantity>_<unit>`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.timing import Usage


@dataclass(kw_only=True, slots=True)
class PushCounts:
    """What became of the transitions that one incarnation sent; those that no shard has answered for yet are in none of them."""

    inserted: int = 0
    refused: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    """By cause."""
    answer_p95_seconds: float = math.nan
    """Of the slowest shard: from the sending of a chunk until its answer is looked at, since the last counts; NaN: no answers."""


@dataclass(kw_only=True, slots=True)
class ActorStats:
    """Counts of one incarnation since its start; `returns` only of episodes since the last report."""

    slot: int
    incarnation: int
    env_steps: int
    """Transitions of all incarnations of the slot: resets are not counted."""
    sent: int
    """Transitions sent by this incarnation."""
    pushed: PushCounts
    """What became of them."""
    params_epoch: int
    params_version: int
    epsilon: float
    """Mean over the actor's environments."""
    params_age_seconds: float = math.nan
    """From the publication of the parameters to their use, mean over the steps since the last report; NaN where there were none."""
    returns: list[float] = field(default_factory=list)
    """Raw returns of episodes that ended."""
    waits_for: str | None = None
    waiting_seconds: float = 0.0
    """Time spent waiting for replay since the start."""
    usage: Usage | None = field(default=None, compare=False)
    """Phases: pull, inference, env, n_step, compress, push, push_wait."""


@dataclass(kw_only=True, slots=True)
class LearnerStats:
    """Counts since the beginning of the run (updates, samples) or of this process (seconds)."""

    updates: int
    samples: int
    published_version: int
    loss: float
    """Mean of the updates since the last report; NaN where there were none."""
    mean_value: float
    """Mean of q_tm1 at the actions taken, of the last update."""
    grad_norm: float
    params_lag_updates: float
    """Updates between the parameters that acted and those that learned, mean of the last batch."""
    busy_seconds: float
    waiting_seconds: float
    num_ready_batches: int
    num_dropped_batches: int
    waits_for: str | None
    last_fault: str | None
    checkpoint_fault: str | None = None
    """Why the last checkpoint could not be written, or None."""
    update_interval_p50_seconds: float = math.nan
    """From the end of an update to the end of the next, since the last report: the median; NaN where there were none."""
    update_interval_p99_seconds: float = math.nan
    """The same, exceeded by one in a hundred."""
    checkpoint_pause_seconds: float = math.nan
    """The longest such interval while a checkpoint was copied and written that came to its end since the last report."""
    answer_p95_seconds: dict[int, float] = field(default_factory=dict)
    """By shard, from a request until its answer is collected, since the last report: requests lie in a shard's queue meanwhile."""
    usage: Usage | None = field(default=None, compare=False)
    """Phases: wait (for a batch), agree (with the other ranks), update, report, publish, save."""
    prefetch_usage: Usage | None = field(default=None, compare=False)
    """Phases of the prefetch threads: turn (another one collects), collect (shards answer), held (shards may not answer yet), unpack, transfer."""


UNANSWERED = "unanswered at the end"
"""Why an actor counts a chunk as lost that its shard may yet take."""

UNKNOWN_SENDER = (-1, -1)
"""The slot and incarnation under which a shard counts what it had and cannot read any more."""


@dataclass(slots=True)
class SenderCount:
    """What one incarnation of one actor slot brought to this shard, in transitions."""

    inserted: int = 0
    refused: int = 0
    sent: int = 0
    """Transitions that the incarnation had sent, to all shards, up to its newest chunk seen here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitStatus:
    """How one side stands with the limiter of a shard."""

    who: Literal["actors", "learner"]
    reason: str | None
    """Whom it waits for and what is missing, or None where it may go on."""
    seconds: float
    """Since it was refused; 0 where it may go on."""
    total_seconds: float
    """Of all its waiting since the shard's start, until now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogStats:
    """State of a shard's durable log; counts in transitions, since the shard's start."""

    num_bytes: int
    num_segments: int
    num_unsynced: int
    """Written, and not on the disk yet: what a power failure would take."""
    num_unlogged: int
    """Never written, because the disk was full or gone: a restart loses them while they are in memory only."""
    num_dropped: int
    """Deleted before they were evicted, to keep to the budget: a restart loses them."""
    fault: str | None
    """Why nothing is written now, or None."""
    damages: list[str]
    """What could not be read of it when the shard began, a sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStats:
    """State and counts of one shard since its start, in transitions where it does not say otherwise."""

    shard_index: int
    shard_epoch: int
    size: int
    capacity: int
    num_inserted: int
    num_evicted: int
    num_sampled: int
    num_refused_chunks: int
    last_refusal: str | None
    num_priority_updates: int
    """Priorities applied."""
    num_stale_priority_updates: int
    """Priorities dropped, because their items had gone."""
    resident_bytes: int
    """Memory of planes, index and tree that was ever written to: the shard's share of its process."""
    waits: list[WaitStatus]
    """How the actors and the learner stand with its limiter, and for how long."""
    senders: dict[tuple[int, int], SenderCount]
    """By (actor slot, incarnation), and UNKNOWN_SENDER."""
    lost: dict[str, int]
    """Transitions that had been inserted and did not come back after a restart, by cause; they count as inserted no more."""
    log: LogStats | None
    """None: there is no durable log."""
    usage: Usage | None = field(default=None, compare=False)
    """Phases: insert, sample, priorities, save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """State of the params store; counts since its start."""

    params_epoch: int
    """Of what it holds; -1 where it holds nothing."""
    params_version: int
    params_age_seconds: float
    """Since it was published; NaN where it holds nothing."""
    num_published: int
    """Versions that it took."""
    num_answered: int
    """Times that it told a reader of a version newer than the reader's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """What summary.json and `qfleet evaluate --json` hold of an evaluation."""

    mean_return: float
    episodes: int
    returns: list[float]
    """Raw returns, environment by environment."""
    epsilon: float
    protocol: str
    """legacy, machado or custom for Atari, gymnasium else; see `EnvConfig.protocol_name`."""
    seed: int
    params_epoch: int
    params_version: int
    seconds: float
