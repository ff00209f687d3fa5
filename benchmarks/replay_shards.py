"""How sampling grows with the number of shards: each shard in a process of its own, one core each.

    python benchmarks/replay_shards.py [--game pong] [--shards 1 2] [--rounds 5] [--seconds 4] [--json F]

Every process fills its shard and then draws batches of 512 and sends new priorities back, serially, with what the learner's side
costs in the same process: `--consumer unpack` decodes the stacks with one thread, `--consumer none` only reads the message. So a core
carries a shard and its share of the consumer, and nothing else stands between. The rounds are interleaved. Behind Ray a consumer
of its own is what the cores are shared with: see `qfleet bench replay --topology ray --no-unpack --num-shards N`, whose
`shard_cpu_per_second` says how much of the machine the shards had.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.messages import Array
from deploy import roles
from deploy.bench import RUN, BenchReplayFlags, make_consumer, record_chunks, run_config
from deploy.local_handles import LocalReplayReader


def sample(messages: list[Array], flags: BenchReplayFlags, barrier: Any, rates: Any) -> None:
    """One process: fills a shard, waits for the others, samples, and reports its rate."""
    from actors.environments import probe

    config = run_config(flags, messages)
    shard = roles.make_shard(config, probe(config.env), RUN, 0, 0)
    for message in messages:
        assert shard.insert(message).refusal is None
    consumer = make_consumer([LocalReplayReader(shard)], flags)
    if not flags.unpack:
        consumer.start()
    consumer.run(0.5)  # The compiler, the caches.
    barrier.wait(120)
    seconds, batches, _ = consumer.run(flags.seconds)
    rates.put(len(batches) * flags.batch_size / seconds)


def total_rate(num_shards: int, messages: list[Array], flags: BenchReplayFlags) -> float:
    """Returns transitions per second over all processes."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(num_shards), context.Queue()
    processes = [context.Process(target=sample, args=(messages, flags, barrier, rates)) for _ in range(num_shards)]
    for process in processes:
        process.start()
    found = [rates.get(timeout=180) for _ in processes]
    for process in processes:
        process.join(30)
    return float(sum(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="pong")
    parser.add_argument("--shards", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--consumer", choices=["unpack", "none"], default="unpack")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unpack = arguments.consumer == "unpack"
    flags = BenchReplayFlags(game=arguments.game, seconds=arguments.seconds, unpack=unpack, prefetch_threads=0)
    messages = record_chunks(flags)
    rates: dict[int, list[float]] = {num: [] for num in arguments.shards}
    for round_number in range(arguments.rounds):
        for num in arguments.shards:
            started = time.monotonic()
            rates[num].append(total_rate(num, messages, flags))
            print(
                f"round {round_number}: {num} shards {rates[num][-1]:,.0f}/s ({time.monotonic() - started:.0f} s)", flush=True
            )
    medians = {num: statistics.median(found) for num, found in rates.items()}
    first = arguments.shards[0]
    for num, median in medians.items():
        print(f"{num} shards: {median:,.0f} transitions/s, {median / medians[first]:.2f} times {first}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rates": rates, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
