"""Reverb: a server in another process, one TrajectoryWriter, one TrajectoryDataset, over loopback.

Each plane is appended once; an item's two stacks are slices of the writer's history, so the server keeps and ships chunks
that items share. As in Acme's adder of n-step transitions, the scalars of an item are columns of their own. Transitions go in
environment after environment, since a writer follows one environment.

Reverb's own advice, followed here (https://github.com/google-deepmind/reverb, README, and the docstrings of TrajectoryWriter
and TrajectoryDataset): a signature for the table, overlapping trajectories by slices of the history, partial steps, flush with
a bound on items in flight, a dataset of several workers with max_in_flight_samples_per_worker of twice the batch, batching and
prefetching by tf.data.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import reverb
import tensorflow as tf
from harness import CHUNK, STACK, Bench, Data, Transitions

TABLE = "replay"
TIMEOUT_SECONDS = 300
NUM_WORKERS = 4  # Of the dataset: faster than 1 and than its own choice on 2 cores.


def serve(connection: Connection, capacity: int) -> None:
    """Runs a server until told to stop; sends its port."""
    signature = {
        "s_tm1": tf.TensorSpec([STACK, 84, 84], tf.uint8),
        "s_t": tf.TensorSpec([STACK, 84, 84], tf.uint8),
        "a_tm1": tf.TensorSpec([], tf.int32),
        "r_t": tf.TensorSpec([], tf.float32),
        "discount_t": tf.TensorSpec([], tf.float32),
    }
    table = reverb.Table(
        name=TABLE,
        sampler=reverb.selectors.Prioritized(priority_exponent=0.6),
        remover=reverb.selectors.Fifo(),
        max_size=capacity,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )
    server = reverb.Server([table])
    connection.send(server.port)
    connection.recv()
    server.stop()


@dataclass(frozen=True)
class Arrival:
    """A plane that an environment gives, and the rows of the transitions that it completes."""

    plane: int
    is_first: bool
    rows: list[int]


def arrivals(data: Data, transitions: Transitions) -> list[Arrival]:
    """Returns all planes that N transitions need, environment after environment, in time order."""
    rows_at: dict[int, list[int]] = {}
    for row, plane in enumerate(transitions.s_t[:, -1].tolist()):
        rows_at.setdefault(plane, []).append(row)
    last = {int(data.step_env[plane]): plane for plane in sorted(rows_at)}
    planes = range(1, len(data.planes))
    needed = [plane for plane in planes if plane <= last.get(int(data.step_env[plane]), 0)]
    return [Arrival(plane, bool(data.step_is_first[plane]), rows_at.get(plane, [])) for plane in needed]


class Producer:
    """Feeds a TrajectoryWriter. The episode's history begins with 3 zero planes, so plane i has position i + 3 in it."""

    def __init__(self, writer: reverb.TrajectoryWriter, data: Data, transitions: Transitions) -> None:
        self._writer, self._planes, self._transitions = writer, data.planes, transitions
        self._scalars = list(
            zip(
                transitions.a_tm1,
                transitions.r_t,
                transitions.discount_t,
                transitions.priority.tolist(),
                transitions.s_tm1[:, -1].tolist(),
                strict=True,
            )
        )
        self._first = 0

    def push(self, arrivals: list[Arrival]) -> None:
        """Appends planes and creates the items that they complete."""
        for arrival in arrivals:
            if arrival.is_first:
                self._begin_episode(arrival.plane)
            self._writer.append({"plane": self._planes[arrival.plane]}, partial_step=bool(arrival.rows))
            for i, row in enumerate(arrival.rows):
                self._create_item(arrival.plane, row, is_last=i + 1 == len(arrival.rows))
        self._writer.flush(block_until_num_items=CHUNK, timeout_ms=1000 * TIMEOUT_SECONDS)

    def finish(self) -> None:
        """Waits until the server has confirmed all items."""
        self._writer.end_episode(timeout_ms=1000 * TIMEOUT_SECONDS)
        self._writer.close()

    def _begin_episode(self, plane: int) -> None:
        self._writer.end_episode(timeout_ms=1000 * TIMEOUT_SECONDS)
        self._first = plane
        for _ in range(STACK - 1):
            self._writer.append({"plane": self._planes[0]})

    def _create_item(self, plane: int, row: int, *, is_last: bool) -> None:
        a_tm1, r_t, discount_t, priority, source = self._scalars[row]
        self._writer.append({"a_tm1": a_tm1, "r_t": r_t, "discount_t": discount_t})
        history = self._writer.history
        trajectory = {
            "s_tm1": self._stack(source),
            "s_t": self._stack(plane),
            "a_tm1": history["a_tm1"][-1],
            "r_t": history["r_t"][-1],
            "discount_t": history["discount_t"][-1],
        }
        self._writer.create_item(TABLE, priority, trajectory)

    def _stack(self, plane: int) -> reverb.trajectory_writer.TrajectoryColumn:
        """Returns the slice that ends with the plane, counted from the end: a slice up to a positive length would be empty."""
        planes = self._writer.history["plane"]
        begin = plane - self._first - len(planes)
        return planes[begin : begin + STACK or None]


def insert_all(bench: Bench, client: reverb.Client, transitions: Transitions) -> None:
    """Feeds the server in blocks of 256 planes."""
    writer = client.trajectory_writer(num_keep_alive_refs=16)
    producer = Producer(writer, bench.data, transitions)
    todo = arrivals(bench.data, transitions)
    for begin in range(0, len(todo), CHUNK):
        part = todo[begin : begin + CHUNK]
        bench.insert(lambda part=part: producer.push(part), sum(len(arrival.rows) for arrival in part))
    bench.insert(producer.finish, 0)


def main() -> None:
    bench = Bench("reverb")
    bench.start()
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, bench.data.num_items), daemon=True)
    server.start()
    address = f"localhost:{connection.recv()}"
    client = reverb.Client(address)
    client.server_info()
    bench.start()
    transitions = bench.data.n_step()
    insert_all(bench, client, transitions)
    bench.inserted()
    dataset = reverb.TrajectoryDataset.from_table_signature(
        server_address=address,
        table=TABLE,
        max_in_flight_samples_per_worker=2 * bench.batch,
        num_workers_per_iterator=NUM_WORKERS,
        rate_limiter_timeout_ms=1000 * TIMEOUT_SECONDS,
    )
    batches = dataset.batch(bench.batch, drop_remainder=True).prefetch(1).as_numpy_iterator()

    def round_trip(priorities: np.ndarray) -> reverb.ReplaySample:
        sample = next(batches)
        updates = dict(zip(sample.info.key.tolist(), priorities.tolist(), strict=True))
        client.mutate_priorities(TABLE, updates=updates)
        return sample

    bench.check(transitions, bench.sample(round_trip).data)
    bench.report(version=version("dm-reverb"), note="server in another process; its dataset samples ahead")
    connection.send(None)
    server.join(TIMEOUT_SECONDS)


if __name__ == "__main__":
    main()
