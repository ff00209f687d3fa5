"""qfleet's shard in a Ray worker, as in a run: one producer of packed chunks, one consumer of batches, both in this process.

The producer has 4 chunks in flight, as an actor has; the consumer's prefetch threads have 2 requests in flight and unpack.
"""

from __future__ import annotations

from typing import Any

from harness import Bench
from qfleet_inprocess import make_source, sample
from qfleet_messages import RUN, SPEC, flags, messages

from deploy import roles
from deploy.bench import local_ray, prefetch_threads, run_config

TIMEOUT_SECONDS = 120
CHUNKS_IN_FLIGHT = 4


def main() -> None:
    bench = Bench("qfleet on Ray")
    settings = flags(bench.data.num_items, bench.batch)
    packed = messages(bench.data)
    config = run_config(settings, [message for message, _ in packed])
    with local_ray(config) as ray:
        from deploy.ray_handles import RayReplayReader, Worker

        bench.start()
        shard = ray.remote(Worker).remote()
        ray.get(shard.build.remote(roles.make_shard, config, SPEC, RUN, 0, 0), timeout=TIMEOUT_SECONDS)
        in_flight: list[Any] = []

        def push(message: Any) -> None:
            in_flight.append(shard.call.remote("insert", message))
            if len(in_flight) > CHUNKS_IN_FLIGHT:
                answer(in_flight.pop(0))

        def answer(reference: Any) -> None:
            reply = ray.get(reference, timeout=TIMEOUT_SECONDS)
            assert reply.refusal is None, reply.refusal

        for message, num_transitions in packed:
            bench.insert(lambda message=message: push(message), num_transitions)
        bench.insert(lambda: [answer(reference) for reference in in_flight], 0)
        bench.inserted()
        source = make_source(RayReplayReader(shard, 0), bench.batch, prefetch_threads(settings))
        sample(bench, source)
        bench.report(version="this tree", note=f"{prefetch_threads(settings)} prefetch threads")


if __name__ == "__main__":
    main()
