"""What a shard weighs: a million transitions in one process, and whether anything grows over millions of inserts.

    python benchmarks/replay_memory.py million   [--games pong ms_pacman] [--transitions 1000000] [--json F]
    python benchmarks/replay_memory.py endurance [--game pong] [--transitions 5000000] [--memory 64MiB] [--json F]

`million` fills a prioritized shard in a process of its own with the chunks that actors send (random play, n = 3, 64 transitions
a chunk, 60,000 different transitions again and again) and reads the process's resident set. `endurance` pushes chunks through Ray
into a shard with a small budget and reads, at each twentieth part, the shard's resident set, Ray's object store and what was
spilled; it fits a line to the second half of the resident sets.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import ByteSize
from common.messages import Array
from deploy.bench import RUN, BenchReplayFlags, local_ray, record_chunks, run_config

TIMEOUT_SECONDS = 120
CHUNKS_IN_FLIGHT = 4
# A process that imports what a shard's process imports, and nothing more.
FILL = """
import json, sys
import numpy as np
import psutil
from common.config import EnvSpec
from replay_server.shard import ReplayShard

file, num_actions, num_transitions, memory = sys.argv[1], *map(int, sys.argv[2:])
lengths = np.load(file + ".lengths.npy")
packed = np.load(file, mmap_mode="r")
begins = np.concatenate([[0], np.cumsum(lengths)])
process = psutil.Process()
before = process.memory_info()
shard = ReplayShard(run="bench", spec=EnvSpec((84, 84), "|u1", 4, num_actions), shard_index=0, shard_epoch=0, memory=memory,
    capacity=num_transitions, min_size=1, samples_per_insert=None, limiter_buffer_samples=0, priority_exponent=0.6,
    send_compressed=True, seed=0)
while shard.stats().num_inserted < num_transitions:
    for chunk in range(len(lengths)):
        assert shard.insert(np.array(packed[begins[chunk] : begins[chunk + 1]])).refusal is None
after, stats = process.memory_info(), shard.stats()
private = lambda info: info.rss - info.shared
print(json.dumps({"transitions": stats.size, "process_bytes": private(after), "grown_bytes": private(after) - private(before),
    "said_bytes": stats.resident_bytes}))
"""


def million(game: str, num_transitions: int) -> dict[str, Any]:
    """Fills one shard; returns what its process takes, without pages shared with others (libraries, the chunks' file)."""
    messages = record_chunks(BenchReplayFlags(game=game))
    from actors.environments import probe

    spec = probe(run_config(BenchReplayFlags(game=game)).env)
    with tempfile.TemporaryDirectory() as directory:
        file = f"{directory}/chunks.npy"
        np.save(file, np.concatenate(messages))
        np.save(f"{file}.lengths.npy", np.array([len(message) for message in messages]))
        command = [sys.executable, "-c", FILL, file, str(spec.num_actions), str(num_transitions), str(8 << 30)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent)
    figures: dict[str, Any] = json.loads(result.stdout)
    stacks = figures["transitions"] * 2 * 4 * 84 * 84
    return {"game": game} | figures | {"stacks_of_both_states_bytes": stacks}


def endurance(game: str, num_transitions: int, memory: int, capacity: int) -> dict[str, Any]:
    """Pushes chunks through a small shard on Ray; returns the rows that it read and what they show."""
    from actors.environments import probe

    flags = BenchReplayFlags(game=game, transitions=20_000)
    messages = record_chunks(flags)
    config = run_config(flags, messages)
    spec = probe(config.env)
    rows: list[dict[str, float]] = []
    with local_ray(config) as ray:
        from deploy.ray_handles import Worker

        shard = ray.remote(Worker).remote()
        address = ray.get(shard.build.remote(make_small_shard, spec, memory, capacity), timeout=TIMEOUT_SECONDS)
        process = psutil.Process(address.pid)
        started, num_inserted = time.monotonic(), 0
        for part in range(1, 21):
            num_inserted = _push(ray, shard, messages, num_inserted, part * num_transitions // 20)
            rows.append({"inserted": num_inserted, "resident_bytes": process.memory_info().rss} | _object_store())
            print(
                f"  {num_inserted:,}  resident {ByteSize(rows[-1]['resident_bytes'])}  store {rows[-1]['store_bytes']:,.0f} B"
            )
        seconds = time.monotonic() - started
        stats = ray.get(shard.call.remote("stats"), timeout=TIMEOUT_SECONDS)
    assert stats.num_inserted == num_inserted == stats.size + stats.num_evicted
    half = rows[len(rows) // 2 :]
    x, y = (np.array([row[name] for row in half], float) for name in ("inserted", "resident_bytes"))
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return {
        "game": game,
        "memory": memory,
        "inserted": num_inserted,
        "evicted": stats.num_evicted,
        "inserts_per_second": num_inserted / seconds,
        "slope_bytes_per_million": 1e6 * float(slope),
        "slope_standard_error": 1e6 * float(covariance[0, 0] ** 0.5),
        "spilled_bytes": rows[-1]["spilled_bytes"],
        "rows": rows,
    }


def make_small_shard(spec: Any, memory: int, capacity: int) -> Any:
    """Makes the shard in its worker."""
    from replay_server.shard import ReplayShard

    return ReplayShard(
        run=RUN,
        spec=spec,
        shard_index=0,
        shard_epoch=0,
        memory=memory,
        capacity=capacity,
        min_size=1,
        samples_per_insert=None,
        limiter_buffer_samples=0,
        priority_exponent=0.6,
        send_compressed=True,
        seed=0,
    )


def _push(ray: Any, shard: Any, messages: list[Array], num_inserted: int, until: int) -> int:
    """Pushes chunks, a few in flight, until so many transitions are in."""
    in_flight: list[Any] = []
    chunk = num_inserted  # Where the last part ended does not matter.
    while num_inserted < until or in_flight:
        if num_inserted < until and len(in_flight) < CHUNKS_IN_FLIGHT:
            in_flight.append(shard.call.remote("insert", messages[chunk % len(messages)]))
            chunk += 1
            continue
        reply = ray.get(in_flight.pop(0), timeout=TIMEOUT_SECONDS)
        assert reply.refusal is None, reply.refusal
        num_inserted += reply.num_inserted
    return num_inserted


def _object_store() -> dict[str, float]:
    """Returns bytes that Ray's object store holds and has spilled, as `ray memory --stats-only` tells them."""
    from ray._private.internal_api import memory_summary

    text = memory_summary(stats_only=True)
    held = re.search(r"Plasma memory usage ([\d.]+) MiB", text)
    spilled = re.search(r"Spilled ([\d.]+) MiB", text)
    assert held, f"Ray tells its object store in other words: {text}"
    return {
        "store_bytes": float(held.group(1)) * 2**20,
        "spilled_bytes": float(spilled.group(1)) * 2**20 if spilled else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["million", "endurance"])
    parser.add_argument("--games", nargs="+", default=["pong", "ms_pacman"])
    parser.add_argument("--game", default="pong")
    parser.add_argument("--transitions", type=int)
    parser.add_argument("--memory", type=ByteSize.parse, default=ByteSize(64 << 20))
    parser.add_argument("--capacity", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "million":
        figures: Any = [million(game, arguments.transitions or 1_000_000) for game in arguments.games]
        for row in figures:
            print(
                f"{row['game']}: {row['transitions']:,} transitions in a process of {row['process_bytes'] / 1e9:.3f} GB "
                f"(grown by {row['grown_bytes'] / 1e9:.3f}, the shard says {row['said_bytes'] / 1e9:.3f}); as stacks "
                f"{row['stacks_of_both_states_bytes'] / 1e9:.1f} GB"
            )
    else:
        figures = endurance(arguments.game, arguments.transitions or 5_000_000, int(arguments.memory), arguments.capacity)
        print({name: value for name, value in figures.items() if name != "rows"})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
