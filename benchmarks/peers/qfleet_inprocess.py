"""qfleet's shard in the process that uses it: packed chunks in, unpacked batches out, LZ4 storage.

Modes: `serial`, one thread, every call in turn; `prefetch`, the learner's prefetch threads, one for each core (at most 4), draw and
unpack the next batches meanwhile. A batch has its importance weights too.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import Bench
from qfleet_messages import RUN, SPEC, flags, messages

from deploy import roles
from deploy.bench import LockedShard, prefetch_threads, run_config
from deploy.local_handles import LocalReplayReader
from learner.batches import Batch, BatchSource

PREFETCH_BATCHES = 2


def arrays_of(batch: Batch) -> dict[str, Any]:
    """Returns what the harness checks."""
    return {name: getattr(batch, name).numpy() for name in ("s_tm1", "s_t", "a_tm1", "r_t", "discount_t")}


def make_source(reader: Any, batch_size: int, num_threads: int, prefetch_batches: int = PREFETCH_BATCHES) -> BatchSource:
    return BatchSource(
        [reader],
        batch_size=batch_size,
        importance_exponent=0.4,
        prefetch_batches=prefetch_batches,
        prefetch_threads=num_threads,
        prepare=lambda observations: observations,
        device=torch.device("cpu"),
    )


def sample(bench: Bench, source: BatchSource) -> None:
    """Times the batches, and checks the last one."""

    def draw(priorities: Any) -> Batch:
        batch = source.next_batch(60.0)
        assert batch is not None, source.waits_for
        source.update_priorities(batch, priorities)
        return batch

    source.start()
    batch = bench.sample(draw)
    source.close()
    bench.check(bench.data.n_step(), arrays_of(batch))


def main() -> None:
    bench = Bench("qfleet", modes=("serial", "prefetch"))
    settings = flags(bench.data.num_items, bench.batch)
    packed = messages(bench.data)
    bench.start()
    shard = LockedShard(roles.make_shard(run_config(settings, [message for message, _ in packed]), SPEC, RUN, 0, 0))
    for message, num_transitions in packed:
        reply = bench.insert(lambda message=message: shard.insert(message), num_transitions)
        assert reply.refusal is None, reply.refusal
    bench.inserted()
    num_threads = prefetch_threads(settings) if bench.mode == "prefetch" else 0
    source = make_source(LocalReplayReader(shard), bench.batch, num_threads)
    sample(bench, source)
    bench.report(version="this tree", note=f"{num_threads} prefetch threads")


if __name__ == "__main__":
    main()
