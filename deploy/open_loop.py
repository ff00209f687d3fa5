"""Calls sent at an offered rate, whether or not those before them were answered, and what became of each.

A client that waits for an answer before it sends the next call slows down with what it measures: a stall of a second then costs it one
call, where it would have cost a hundred ("coordinated omission"). Here every call has a time at which it is meant to be sent, and its
latency counts from there: waiting for a place among the calls in flight, or for the sender itself, is part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.messages import Array

_BURST = 8  # Calls sent in a row before answers are looked for, where many are due.


class Caller(Protocol):
    """One way to the role that is measured."""

    def send(self, kind: int) -> Any:
        """Sends a call of a kind and returns its token, which can be hashed; does not wait."""

    def collect(self, tokens: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
        """Takes in answers and returns their tokens: all that are there, waiting for one at most so long."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When calls are meant to be sent; N of them."""

    due: Array
    """f64[N] seconds from the beginning, ascending."""
    kind: Array
    """i64[N] what is called."""
    warm_up: float
    """Seconds from the beginning whose calls load the role and are not counted."""
    end: float
    """Seconds from the beginning after which nothing is sent."""
    max_in_flight: int
    """Calls without an answer; at that number a call that is due waits, on its own clock."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of the calls of a schedule; seconds from its beginning, NaN for what did not come."""

    due: Array
    """f64[N]."""
    kind: Array
    """i64[N]."""
    sent: Array
    """f64[N]."""
    answered: Array
    """f64[N]."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The calls of one kind, between warm-up and end."""

    offered_per_second: float
    """Calls that were due."""
    carried_per_second: float
    """Answers that came."""
    p50: float
    """Seconds from when a call was due to its answer; a call without one counts with the time that it has waited."""
    p95: float
    p99: float
    late_p99: float
    """Seconds from when a call was due until it was sent."""


def poisson(
    rng: np.random.Generator, rates: Sequence[float], *, warm_up: float, seconds: float, max_in_flight: int
) -> Schedule:
    """Returns arrivals of several kinds, each a Poisson process of its own.

    Args:
      rates: calls per second of kind 0, 1, ...
    """
    end = warm_up + seconds
    times = [np.sort(rng.uniform(0.0, end, rng.poisson(rate * end))) for rate in rates]
    kinds = [np.full(len(due), kind) for kind, due in enumerate(times)]
    due, kind = np.concatenate(times), np.concatenate(kinds)
    order = np.argsort(due, kind="stable")
    return Schedule(due[order], kind[order], warm_up, end, max_in_flight)


def closed_loop(shares: Sequence[float], *, warm_up: float, seconds: float, max_in_flight: int, most: int) -> Schedule:
    """Returns a schedule in which everything is due at once, so that `max_in_flight` calls are always under way.

    Args:
      shares: of kind 0, 1, ... in every stretch of calls, in any unit.
      most: calls; more than can be answered.
    """
    edges = np.cumsum(np.asarray(shares) / np.sum(shares))
    # The golden ratio's multiples fall evenly into the parts: calls of the rarer kind are spread as far apart as can be.
    place = np.arange(most) * 0.6180339887498949 % 1.0
    kind = np.minimum(np.searchsorted(edges, place, side="right"), len(edges) - 1)
    return Schedule(np.zeros(most), kind, warm_up, warm_up + seconds, max_in_flight)


def run(
    schedule: Schedule,
    caller: Caller,
    *,
    began: float,
    drain_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Answers:
    """Sends what the schedule says, from `began` on the clock, and then waits at most so long for what is under way."""
    num_calls = len(schedule.due)
    sent, answered = np.full(num_calls, np.nan), np.full(num_calls, np.nan)
    in_flight: dict[Any, int] = {}
    due, kinds = schedule.due.tolist(), schedule.kind.tolist()
    following = 0
    while True:
        now = clock() - began
        burst = 0
        while (
            following < num_calls
            and due[following] <= now < schedule.end
            and len(in_flight) < schedule.max_in_flight
            and burst < _BURST
        ):
            in_flight[caller.send(kinds[following])] = following
            sent[following] = now
            now, following, burst = clock() - began, following + 1, burst + 1
        is_over = now >= schedule.end or following == num_calls
        if is_over and (not in_flight or now >= schedule.end + drain_seconds):
            return Answers(schedule.due, schedule.kind, sent, answered)
        if is_over:
            until = schedule.end + drain_seconds
        elif len(in_flight) < schedule.max_in_flight:
            until = due[following]
        else:
            until = schedule.end
        if not in_flight:
            sleep(max(min(until, schedule.end) - now, 0.0))
            continue
        for token in caller.collect(list(in_flight), max(until - now, 0.0)):
            answered[in_flight.pop(token)] = clock() - began


def summarize(parts: Sequence[Answers], kind: int, *, warm_up: float, seconds: float) -> Summary:
    """Puts together what several senders of one schedule's length saw of a kind of call."""
    end = warm_up + seconds
    due, sent, answered = (
        np.concatenate([getattr(p, name)[p.kind == kind] for p in parts]) for name in ("due", "sent", "answered")
    )
    counted = (due >= warm_up) & (due < end)
    waited = np.where(np.isnan(answered), np.maximum(end - due, 0.0), answered - due)[counted]
    late = np.where(np.isnan(sent), np.maximum(end - due, 0.0), sent - due)[counted]
    p50, p95, p99 = np.percentile(waited, (50, 95, 99)).tolist() if len(waited) else (np.nan,) * 3
    return Summary(
        offered_per_second=float(counted.sum()) / seconds,
        carried_per_second=float(((answered >= warm_up) & (answered < end)).sum()) / seconds,
        p50=p50,
        p95=p95,
        p99=p99,
        late_p99=float(np.percentile(late, 99)) if len(late) else np.nan,
    )
