"""Holds actors and learner to a ratio of samples per insert. A pure question: it never sleeps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import EllipsisType
from typing import Any, Literal

from common.errors import UserError
from common.metrics import WaitStatus

_SETTINGS = ("min_size", "samples_per_insert", "buffer_samples")
_ACCOUNTS = ("num_inserted", "num_sampled", "_due_then", "_inserted_then")


@dataclass(slots=True)
class _Side:
    """One of the two that wait for each other: since when it is refused, and how long it was before."""

    who: Literal["actors", "learner"]
    num_items: int = 0  # That it asked for last.
    refused_since: float | None = None
    seconds_before: float = 0.0


@dataclass(slots=True)
class RateLimiter:
    """Counts inserts and samples of one shard and says which side may go on.

    With `due = (num_inserted - min_size) * samples_per_insert`:

        may_sample(n)  where size >= min_size and num_sampled + n <= due + buffer_samples
        may_insert()   where size <  min_size or  num_sampled     >= due - buffer_samples

    Both are refused only where due + buffer - n < num_sampled < due - buffer, which needs n > 2 * buffer_samples: whatever
    the chunks' size and however many are in flight. An insert that is already under way is never refused: the ratio may
    pass the buffer by the chunks in flight, no further. `samples_per_insert` None: no ratio, only the minimum size.
    Settings that would stop one side for ever are refused by a UserError, at construction and by `set`.

    `may_*` only look. `ask_to_*` are for the side itself: they also note since when it is refused, which `waits` tells.

    Source: Reverb, https://arxiv.org/abs/2102.04736, 3.3.
    """

    min_size: int
    samples_per_insert: float | None
    buffer_samples: int
    num_inserted: int = 0
    num_sampled: int = 0
    _: KW_ONLY
    capacity: int | None = None
    """Transitions that the shard can hold. None: not known, not checked."""
    batch_items: int | None = None
    """Items that one sample asks for at most. None: not known yet."""
    clock: Callable[[], float] = time.monotonic
    _due_then: float = field(default=0.0, init=False)
    _inserted_then: int = field(default=0, init=False)
    _actors: _Side = field(default_factory=lambda: _Side("actors"), init=False)
    _learner: _Side = field(default_factory=lambda: _Side("learner"), init=False)

    def __post_init__(self) -> None:
        _check_live(self.min_size, self.samples_per_insert, self.buffer_samples, self.capacity, self.batch_items)
        self._inserted_then = self.min_size

    def due(self) -> float:
        """Samples that the inserts so far pay for."""
        return self._due_then + (self.num_inserted - self._inserted_then) * (self.samples_per_insert or 0.0)

    def may_insert(self, size: int) -> str | None:
        """Returns None where actors may go on, else whom they wait for."""
        if size < self.min_size or self.samples_per_insert is None or self.num_sampled >= self.due() - self.buffer_samples:
            return None
        missing = math.ceil(self.due() - self.buffer_samples - self.num_sampled)
        return f"actors wait for the learner: {missing} more samples due"

    def may_sample(self, num_items: int, size: int) -> str | None:
        """Returns None where the learner may draw `num_items`, else whom it waits for."""
        if size < self.min_size:
            return f"the learner waits for actors: {size} of {self.min_size} transitions to start"
        if self.samples_per_insert is None or self.num_sampled + num_items <= self.due() + self.buffer_samples:
            return None
        missing = (self.num_sampled + num_items - self.buffer_samples - self.due()) / self.samples_per_insert
        sentence = f"the learner waits for actors: {math.ceil(missing)} more transitions due"
        if num_items > 2 * self.buffer_samples:
            sentence += f", and they for it: {_buffer_advice(num_items, self.buffer_samples)}"
        return sentence

    def ask_to_insert(self, size: int) -> str | None:
        """`may_insert`, for actors who want to: what they are refused counts as waiting."""
        return self._ask(self._actors, size)

    def ask_to_sample(self, num_items: int, size: int) -> str | None:
        """`may_sample`, for the learner that wants to: what it is refused counts as waiting."""
        self.batch_items = max(self.batch_items or 0, num_items)
        self._settle(size)
        self._learner.num_items = num_items
        return self._ask(self._learner, size)

    def waits(self, size: int) -> list[WaitStatus]:
        """Returns how the actors and the learner stand: who is refused, why and for how long."""
        now = self._settle(size)
        statuses = []
        for side in (self._actors, self._learner):
            waiting = side.refused_since is not None
            seconds = now - side.refused_since if side.refused_since is not None else 0.0
            statuses.append(
                WaitStatus(
                    who=side.who,
                    reason=self._refusal(side, size) if waiting else None,
                    seconds=seconds,
                    total_seconds=side.seconds_before + seconds,
                )
            )
        return statuses

    def set(
        self,
        *,
        size: int,
        min_size: int | None = None,
        samples_per_insert: float | EllipsisType | None = ...,
        buffer_samples: int | None = None,
    ) -> None:
        """Changes settings while the run goes on; what is not given stays.

        The past is closed: `due` goes on from where it stands, and the new ratio counts only for inserts from now on. The
        balance `num_sampled - due` is kept as far as the new buffer allows, on either side; where there was no ratio, or the
        learner had not started, it is zero. Items that fill the shard up to a new minimum size are free, as the first ones
        were. So nobody is owed, or owes, more than the new buffer, and the next insert is never refused.

        Args:
          size: items that the shard holds now.

        Raises:
          UserError: for settings that would stop one side for ever; nothing is changed then.
        """
        ratio = self.samples_per_insert if isinstance(samples_per_insert, EllipsisType) else samples_per_insert
        least = self.min_size if min_size is None else min_size
        buffer = self.buffer_samples if buffer_samples is None else buffer_samples
        _check_live(least, ratio, buffer, self.capacity, self.batch_items)
        has_account = self.samples_per_insert is not None and self.num_inserted >= self._inserted_then
        balance = self.num_sampled - self.due() if has_account else 0.0
        self._due_then = self.num_sampled - min(max(balance, -buffer), buffer)
        self._inserted_then = self.num_inserted + max(least - size, 0)
        self.min_size, self.samples_per_insert, self.buffer_samples = least, ratio, buffer

    def state(self) -> dict[str, Any]:
        """Returns settings and accounts, for a checkpoint."""
        return {name: getattr(self, name) for name in (*_SETTINGS, *_ACCOUNTS)}

    def restore(self, state: Mapping[str, Any], size: int) -> None:
        """Takes the accounts of `state()`, so that nobody is owed more or less than before. Settings that are others by now, and
        items that are missing to the minimum size, have the effect that they have in `set`.

        Args:
          state: what `state()` returned.
          size: items that the shard holds now.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        for name in (*_SETTINGS, *_ACCOUNTS):
            setattr(self, name, state[name])
        starts_again = size < self.min_size and self.num_inserted >= self._inserted_then
        if starts_again or any(state[name] != value for name, value in settings.items()):
            self.set(size=size, **settings)

    def _ask(self, side: _Side, size: int) -> str | None:
        now = self._settle(size)
        refusal = self._refusal(side, size)
        if refusal is not None and side.refused_since is None:
            side.refused_since = now
        return refusal

    def _settle(self, size: int) -> float:
        """Ends the waiting of each side that would not be refused any more; returns the time."""
        now = self.clock()
        for side in (self._actors, self._learner):
            if side.refused_since is not None and self._refusal(side, size) is None:
                side.seconds_before += now - side.refused_since
                side.refused_since = None
        return now

    def _refusal(self, side: _Side, size: int) -> str | None:
        return self.may_insert(size) if side.who == "actors" else self.may_sample(side.num_items, size)


def _check_live(
    min_size: int, samples_per_insert: float | None, buffer_samples: int, capacity: int | None, batch_items: int | None
) -> None:
    """Raises UserError for settings of a shard under which one side, or both, would wait for ever."""
    if min_size < 1:
        raise UserError(f"a shard's min_size of {min_size} lets the learner sample from nothing: raise --replay.min-size")
    if capacity is not None and min_size > capacity:
        raise UserError(
            f"a shard of {capacity} transitions never reaches its min_size of {min_size}: raise --replay.capacity or lower "
            f"--replay.min-size"
        )
    if samples_per_insert is None:
        return
    if not (math.isfinite(samples_per_insert) and samples_per_insert > 0):
        raise UserError(
            f"with {samples_per_insert} samples per insert nothing moves: --replay.samples-per-insert must be positive"
        )
    if (batch_items or 1) > 2 * buffer_samples:
        raise UserError(f"actors and learner would wait for each other: {_buffer_advice(batch_items or 1, buffer_samples)}")


def _buffer_advice(num_items: int, buffer_samples: int) -> str:
    return (
        f"{num_items} samples at a time need a buffer of at least {-(-num_items // 2)} on each shard, not {buffer_samples}: raise "
        f"--replay.limiter-buffer-samples or lower --learner.batch-size"
    )
