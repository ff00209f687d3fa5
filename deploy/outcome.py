"""How a run of either kind ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class RunFault(RuntimeError):
    """Something that the run cannot go on from. Its text is one line."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the driver needs for summary.json and for the exit status."""

    stopped_by: str
    """max_updates, max_env_steps, max_minutes, target_return, interrupted, non_finite or fault."""
    fault: str | None
    """One line, where something went wrong."""
    params_digest: str | None
    ledger: dict[str, Any] | None
