"""From a shard's log and its last checkpoint to the shard as it was; on another number of shards, and past what is damaged.

A shard takes a log only where its records follow one another without a gap. Whatever else there is (bytes that were altered on
the disk, transitions that were never logged because it was full, another number of shards, an older checkpoint) is made into such
logs first, record by record, so that memory is that of one segment: written beside the old ones, and renamed into their place.
"""

from __future__ import annotations

import copy
import errno
import heapq
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from common import wire
from common.files import sync_directory
from common.messages import Array, TransitionChunk
from common.metrics import UNKNOWN_SENDER
from replay_server.replay_log import Damage, Priorities, Record, ReplayLog

NO_LOG = "of a replay without a log"
GONE = "whose log is gone"
NOT_IN_LOG = "not in the log (altered on the disk, never written to a full one, or beyond replay.disk_budget)"


@dataclass(frozen=True, slots=True)
class SavedShard:
    """What is on the disk of one shard."""

    directory: Path
    """Of its log."""
    state: Mapping[str, Any]
    """`ReplayShard.state()` at a checkpoint, or what `catch_up` made of it: items from its `next_item_id` on are left out."""
    priorities: Priorities | None
    """`ReplayShard.priorities()` at the checkpoint; other items have those that their actors gave."""


def first_state(directory: Path) -> dict[str, Any] | None:
    """Returns how a shard stood when its log began, for one that dies before the first checkpoint; None where there is no log."""
    for record in ReplayLog(directory).records([]):
        if not record.num_items:
            return {**msgpack.unpackb(record.message.data), "priorities": None}
    return None


def catch_up(
    directory: Path, state: Mapping[str, Any], damages: list[Damage | str], *, keeps_samples: bool
) -> tuple[dict[str, Any], bool]:
    """Reads a log through; returns the state with what came after it, and whether the log can be taken as it is.

    Args:
      directory: of the log; one that is not there is an empty log.
      state: of the last checkpoint.
      damages: where it is noted what could not be read.
      keeps_samples: whether what was drawn after the checkpoint stays drawn: where this shard alone was away. Where the learner
        goes back to the checkpoint too, it draws that again.
    """
    now: dict[str, Any] = copy.deepcopy(dict(state))
    first, expected, has_gap = None, None, False
    for record in ReplayLog(directory).records(damages):
        if not record.num_items:
            then = msgpack.unpackb(record.message.data)
            now = then if then["next_item_id"] > now["next_item_id"] else now
            continue
        has_gap |= expected not in (None, record.first_item_id)
        first, expected = record.first_item_id if first is None else first, record.end_item_id
        now["oldest_item_id"] = max(now["oldest_item_id"], record.oldest_item_id)
        if record.first_item_id >= now["next_item_id"]:
            _count_unknown(now, record.first_item_id - now["next_item_id"])
            _count(now, wire.unpack(record.message, TransitionChunk), record)
    now["priorities"] = state.get("priorities")
    if keeps_samples:
        del now["rng"]  # What it drew since is not to be drawn again.
    else:
        now["rng"], now["limiter"]["num_sampled"] = state["rng"], state["limiter"]["num_sampled"]
    now["oldest_item_id"] = max(now["oldest_item_id"], now["next_item_id"] - now["capacity"])
    if first is None or expected is None:
        return now, state["next_item_id"] == state["oldest_item_id"]
    return now, not has_gap and first <= now["oldest_item_id"] and expected >= state["next_item_id"]


def recover(
    directory: Path, state: Mapping[str, Any], capacity: int, damages: list[Damage | str], *, keeps_samples: bool
) -> dict[str, Any]:
    """Makes a log such that its shard can take it, writing it anew where it must; returns the state to take it with.

    Args:
      directory, state, damages, keeps_samples: as `catch_up` takes them; the state with the name of its `priorities`.
      capacity: of the shard.
    """
    aside = directory.with_name(f"{directory.name}.new")
    finish_move(aside / "0", directory)
    shutil.rmtree(aside, ignore_errors=True)
    caught_up, is_whole = catch_up(directory, state, damages, keeps_samples=keeps_samples)
    if is_whole and state["capacity"] <= capacity:  # A smaller shard may not take a chunk as it is.
        return caught_up
    saved = SavedShard(directory, caught_up, ReplayLog(directory).read_priorities(caught_up["priorities"], damages))
    try:
        (written,) = rewrite([saved], aside, [capacity], [])
        move_into_place(aside / "0", directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # On a full disk it takes what others need.
    return written


def _count_unknown(state: dict[str, Any], num_items: int) -> None:
    """Adds items that came after the state and cannot be read: nobody knows who sent them."""
    if num_items:
        state["limiter"]["num_inserted"] += num_items
        _sender(state, UNKNOWN_SENDER)[2] += num_items


def _sender(state: dict[str, Any], sender: tuple[int, int]) -> list[int]:
    """Returns [slot, incarnation, inserted, refused, sent] of a sender."""
    counts = next((counts for counts in state["senders"] if tuple(counts[:2]) == sender), None)
    if counts is None:
        counts = [*sender, 0, 0, 0]
        state["senders"].append(counts)
    return counts


def _count(state: dict[str, Any], chunk: TransitionChunk, record: Record) -> None:
    """Adds a chunk that came after the state."""
    limiter = state["limiter"]
    state["next_item_id"] = record.end_item_id
    limiter["num_inserted"] += record.num_items
    limiter["num_sampled"] = max(limiter["num_sampled"], record.num_sampled)
    counts = _sender(state, (chunk.actor_slot, chunk.incarnation))
    counts[2] += record.num_items
    counts[4] = max(counts[4], chunk.num_sent_before + record.num_items)


def rewrite(
    sources: Sequence[SavedShard], target: Path, capacities: Sequence[int], damages: list[Damage | str], **log_settings: Any
) -> list[dict[str, Any]]:
    """Writes the items of all sources into as many new logs as there are capacities, in `target`/<index>, with their priorities.
    Returns the states with which shards of these capacities can take them.

    Chunks are taken in the order of their age as far as it is known (each source's own order; between sources, the part of its
    items that came before), and each goes to the shard with the most room for its size; one that does not fit is divided. So
    every shard gets its share of the old and of the new. Priorities go with their items. Where there is less room than items, the
    oldest are evicted; those that should be there and are not count as lost.

    Args:
      sources: the shards as they were.
      target: a directory that is not there yet.
      capacities: transitions that each new shard holds at most.
      damages: where it is noted what could not be read.

    Raises:
      OSError: where it cannot be written; the sources are as they were.
    """
    logs = [ReplayLog(target / str(index), **log_settings) for index in range(len(capacities))]
    for log in logs:
        assert not list(log.open([])), f"{target} must be new"
    num_expected = sum(source.state["next_item_id"] - source.state["oldest_item_id"] for source in sources)
    num_items = sum(len(item[1]) for item in _by_age(sources, damages))
    num_over = max(num_items - sum(capacities), 0)
    states = share([source.state for source in sources], capacities, num_over)
    if num_items < num_expected:
        lost = states[0]["lost"]
        lost[NOT_IN_LOG] = lost.get(NOT_IN_LOG, 0) + num_expected - num_items
    firsts = [state["oldest_item_id"] for state in states]
    ends = list(firsts)
    priorities: list[list[Array]] = [[np.empty(0)] for _ in capacities]
    for log, state in zip(logs, states, strict=True):
        log.state = lambda state=state: msgpack.packb(state)  # type: ignore[misc]
    for chunk, priority, num_sampled in _by_age(sources, []):
        num_evicted = min(num_over, len(priority))
        num_over -= num_evicted
        chunk, priority = _part(chunk, num_evicted, chunk.num_transitions), priority[num_evicted:]
        while len(priority):
            room = np.array(capacities) - ends + firsts
            index = int(np.argmax(room / capacities))
            num = min(int(room[index]), len(priority))
            logs[index].append(ends[index], num, num_sampled, wire.pack(_part(chunk, 0, num)))
            _raise_fault(logs[index])
            priorities[index].append(priority[:num])
            ends[index] += num
            chunk, priority = _part(chunk, num, chunk.num_transitions), priority[num:]
    written = []
    for log, state, end, parts in zip(logs, states, ends, priorities, strict=True):
        values = Priorities(state["oldest_item_id"], state["priority_exponent"], np.concatenate(parts))
        written.append(state | {"next_item_id": end, "priorities": log.write_priorities(values)})
        log.close()
        _raise_fault(log)
    sync_directory(target)
    return written


def _raise_fault(log: ReplayLog) -> None:
    if (fault := log.fault) is not None:
        raise OSError(errno.ENOSPC, fault, str(log.directory))


def move_into_place(new: Path, place: Path) -> None:
    """Renames directory `new` to `place`, in whose stead it is from then on; `finish_move` ends what a crash has cut short."""
    sync_directory(new)
    shutil.rmtree(_old(place), ignore_errors=True)
    if place.exists():
        os.rename(place, _old(place))
    os.rename(new, place)
    sync_directory(place.parent)
    shutil.rmtree(_old(place), ignore_errors=True)


def finish_move(new: Path, place: Path) -> None:
    """After a crash brings `place` into one of two states, as it was or `new`, whole."""
    if not place.exists() and _old(place).exists():  # `new` was whole, or the old one would not have been moved away.
        os.rename(new if new.exists() else _old(place), place)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(_old(place), ignore_errors=True)


def _old(place: Path) -> Path:
    return place.with_name(f"{place.name}.old")


def _part(chunk: TransitionChunk, start: int, end: int) -> TransitionChunk:
    """Returns a chunk of transitions [start, end) of `chunk`, with all of its planes."""
    part = slice(start, end)
    return replace(
        chunk,
        num_sent_before=chunk.num_sent_before + start,
        s_tm1=chunk.s_tm1[part],
        s_t=chunk.s_t[part],
        a_tm1=chunk.a_tm1[part],
        r_t=chunk.r_t[part],
        discount_t=chunk.discount_t[part],
        priority=chunk.priority[part],
    )


def _by_age(sources: Sequence[SavedShard], damages: list[Damage | str]) -> Iterator[tuple[TransitionChunk, Array, int]]:
    """Yields (chunk, priorities ** exponent of its items, num_sampled) of all sources, without what had been evicted."""
    merged = heapq.merge(*(_resident(i, source, damages) for i, source in enumerate(sources)), key=lambda item: item[:2])
    for _, _, chunk, priority, num_sampled in merged:
        yield chunk, priority, num_sampled


def _resident(
    index: int, source: SavedShard, damages: list[Damage | str]
) -> Iterator[tuple[float, int, TransitionChunk, Array, int]]:
    """Yields the chunks of one source with the part of its items that came before each."""
    oldest, end = source.state["oldest_item_id"], source.state["next_item_id"]
    exponent, saved = source.state["priority_exponent"], source.priorities
    for record in ReplayLog(source.directory).records(damages):
        start = max(oldest - record.first_item_id, 0)
        stop = min(end - record.first_item_id, record.num_items)
        if start >= stop:
            continue
        chunk = wire.unpack(record.message, TransitionChunk)
        priority = chunk.priority**exponent if exponent > 0 else np.ones(record.num_items)
        first, last = record.first_item_id, record.end_item_id
        if saved is not None:
            first, last = max(first, saved.first_item_id), min(last, saved.end_item_id)
        if saved is not None and last > first:
            priority[first - record.first_item_id : last - record.first_item_id] = saved.of(first, last)
        age = (record.first_item_id - oldest) / (end - oldest)
        yield age, index, _part(chunk, start, stop), priority[start:stop], record.num_sampled


def emptied(state: Mapping[str, Any], cause: str) -> dict[str, Any]:
    """Returns the state of a shard whose items are lost."""
    emptied: dict[str, Any] = copy.deepcopy(dict(state))
    num_items = state["next_item_id"] - state["oldest_item_id"]
    if num_items:
        emptied["lost"][cause] = emptied["lost"].get(cause, 0) + num_items
    return emptied | {"next_item_id": state["oldest_item_id"], "priorities": None}


def share(states: Sequence[Mapping[str, Any]], capacities: Sequence[int], num_more_evicted: int = 0) -> list[dict[str, Any]]:
    """Returns empty states of shards of these capacities that together have evicted, sampled, received and refused as much as the given ones, and
    evicted so many more.

    Whole counts are the first one's; what actors and learner owe each other is shared out evenly.
    """
    limiter = _shared_limiter([state["limiter"] for state in states], len(capacities))
    senders: dict[tuple[int, int], list[int]] = {}
    for state in states:
        for slot, incarnation, inserted, refused, sent in state["senders"]:
            counts = senders.setdefault((slot, incarnation), [0, 0, 0])
            counts[0] += inserted
            counts[1] += refused
            counts[2] = max(counts[2], sent)
    counts_total = {name: sum(state["counts"][name] for state in states) for name in states[0]["counts"]}
    lost: Counter[str] = Counter()
    for state in states:
        lost.update(state["lost"])
    num_evicted = num_more_evicted + sum(state["oldest_item_id"] for state in states)
    shared = []
    for index, capacity in enumerate(capacities):
        is_first = index == 0
        first_item_id = num_evicted if is_first else 0
        shared.append(
            {
                **copy.deepcopy(dict(states[index % len(states)])),
                "oldest_item_id": first_item_id,
                "next_item_id": first_item_id,
                "capacity": capacity,
                "limiter": limiter[index],
                "lost": dict(lost) if is_first else {},
                "priorities": None,
                "counts": {name: value if is_first else 0 for name, value in counts_total.items()},
                "senders": [[*sender, *counts] for sender, counts in senders.items()] if is_first else [],
            }
        )
    return shared


def _shared_limiter(states: Sequence[Mapping[str, Any]], num: int) -> list[dict[str, Any]]:
    ratio = states[0]["samples_per_insert"]
    balance, missing = 0.0, 0
    for state in states:
        since = state["num_inserted"] - state["_inserted_then"]
        missing += max(-since, 0)
        if ratio is not None and since >= 0:
            balance += state["num_sampled"] - (state["_due_then"] + since * ratio)
    total = {
        name: sum(state[name] for state in states) for name in ("min_size", "buffer_samples", "num_inserted", "num_sampled")
    }
    shared = []
    for index in range(num):
        num_inserted, num_sampled = (
            total[name] // num + (index < total[name] % num) for name in ("num_inserted", "num_sampled")
        )
        shared.append(
            {
                "min_size": -(-total["min_size"] // num),
                "samples_per_insert": ratio,
                "buffer_samples": -(-total["buffer_samples"] // num),
                "num_inserted": num_inserted,
                "num_sampled": num_sampled,
                "_due_then": num_sampled - balance / num,
                "_inserted_then": num_inserted + -(-missing // num),
            }
        )
    return shared
