"""Holds actors and learner to a ratio of samples per insert. A pure question: it never sleeps."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class RateLimiter:
    """Counts inserts and samples of one shard and says which side may go on.

    With `due = (num_inserted - min_size) * samples_per_insert`:

        may_sample(n)  where size >= min_size and num_sampled + n <= due + buffer_samples
        may_insert()   where size <  min_size or  num_sampled     >= due - buffer_samples

    Both can be refused only where n > 2 * buffer_samples, so a buffer of one batch is always enough. An insert that is
    already under way is never refused: the ratio may pass the buffer by the chunks in flight, no further.
    `samples_per_insert` None: no ratio, only the minimum size. Source: Reverb, https://arxiv.org/abs/2102.04736, 3.3.
    """

    min_size: int
    samples_per_insert: float | None
    buffer_samples: int
    num_inserted: int = 0
    num_sampled: int = 0

    def due(self) -> float:
        """Samples that the inserts so far pay for."""
        return (self.num_inserted - self.min_size) * (self.samples_per_insert or 0.0)

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
        return f"the learner waits for actors: {math.ceil(missing)} more transitions due"
