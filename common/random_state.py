"""The state of NumPy's random generators as plain values, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def state_of(rng: np.random.Generator) -> dict[str, Any]:
    """Returns the generator's state; integers of more than 64 bits, which msgpack has none of, as text."""
    state: Mapping[str, Any] = rng.bit_generator.state
    inner = {name: str(value) for name, value in state["state"].items()}
    return {**state, "state": inner}


def restore(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Sets the generator to a state that `state_of` returned."""
    inner = {name: int(value) for name, value in state["state"].items()}
    rng.bit_generator.state = {**state, "state": inner}
