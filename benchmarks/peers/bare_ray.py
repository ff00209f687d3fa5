"""A bare Ray actor: raw planes in one array, stacks gathered by `np.take`, uniform sampling. What Ray alone gives.

One producer puts 256 transitions with the planes that they refer to in one call, at most 2 calls ahead; one consumer asks for a
batch and gets both stacks as arrays in shared memory. There are no priorities. Planes are kept as they come, a little history
again in each call, and none is ever evicted.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from harness import Bench, Data, chunks

TIMEOUT_SECONDS = 120
CALLS_IN_FLIGHT = 2
SCALARS = ("a_tm1", "r_t", "discount_t")


class Replay:
    """Planes and the stacks' places in them. Runs as a Ray actor."""

    def __init__(self, num_planes: int, num_items: int) -> None:
        self._planes = np.zeros((num_planes, 84, 84), np.uint8)
        self._stacks = np.zeros((num_items, 2, 4), np.int32)
        self._scalars = {name: np.zeros(num_items, np.float32) for name in SCALARS}
        self._num_planes = self._size = 0
        self._rng = np.random.default_rng(0)

    def insert(self, planes: np.ndarray, stacks: np.ndarray, scalars: dict[str, np.ndarray]) -> None:
        """Adds M transitions; `stacks`, i4[M, 2, 4], refers to `planes`."""
        rows = slice(self._size, self._size + len(stacks))
        self._planes[self._num_planes : self._num_planes + len(planes)] = planes
        self._stacks[rows] = stacks + self._num_planes
        for name, values in scalars.items():
            self._scalars[name][rows] = values
        self._num_planes += len(planes)
        self._size += len(stacks)

    def sample(self, num_items: int) -> dict[str, np.ndarray]:
        """Returns a batch of arrays."""
        rows = self._rng.integers(self._size, size=num_items)
        s_tm1, s_t = (np.take(self._planes, self._stacks[rows, i], axis=0) for i in range(2))
        return {"s_tm1": s_tm1, "s_t": s_t} | {name: values[rows] for name, values in self._scalars.items()}


def messages(data: Data) -> list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Returns what the producer puts: planes to send, places in them, scalars, 256 transitions each."""
    transitions = data.n_step()
    made = []
    for rows in chunks(len(transitions)):
        part = transitions[rows]
        planes, places = np.unique(np.stack([part.s_tm1, part.s_t], axis=1), return_inverse=True)
        scalars = {name: getattr(part, name) for name in SCALARS}
        made.append((planes, places.reshape(len(part), 2, 4).astype(np.int32), scalars))
    return made


def insert_all(bench: Bench, actor: Any, todo: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]) -> None:
    """Puts all messages, at most 2 ahead."""
    in_flight: list[Any] = []

    def put(planes: np.ndarray, places: np.ndarray, scalars: dict[str, np.ndarray]) -> None:
        in_flight.append(actor.insert.remote(planes, places, scalars))
        if len(in_flight) > CALLS_IN_FLIGHT:
            ray.get(in_flight.pop(0), timeout=TIMEOUT_SECONDS)

    for numbers, places, scalars in todo:
        message = (bench.data.planes[numbers], places, scalars)
        bench.insert(lambda message=message: put(*message), len(places))
    bench.insert(lambda: ray.get(in_flight, timeout=TIMEOUT_SECONDS), 0)


def measure(bench: Bench) -> None:
    todo = messages(bench.data)
    bench.start()
    actor = ray.remote(Replay).remote(sum(len(numbers) for numbers, _, _ in todo), bench.data.num_items)
    ray.get(actor.__ray_ready__.remote(), timeout=TIMEOUT_SECONDS)
    insert_all(bench, actor, todo)
    bench.inserted()
    batch = bench.sample(lambda priorities: ray.get(actor.sample.remote(bench.batch), timeout=TIMEOUT_SECONDS))
    bench.check(bench.data.n_step(), batch)
    bench.report(version=f"ray {version('ray')}", note="uniform")


def main() -> None:
    bench = Bench("bare ray")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:
        ray.init(address="local", include_dashboard=False, _temp_dir=directory, num_cpus=2, log_to_driver=False)
        try:
            measure(bench)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
