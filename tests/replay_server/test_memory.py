"""What a shard says it takes is what its process grows by, whatever its planes compress to, and never more than its budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 1 << 20
HUGE_PAGE = 2 * MIB  # Planes, index and tree may each end in one that is not full.
# A process of its own: memory that another test has freed would be taken again without growth.
SCRIPT = """
import json, sys
import numpy as np
import psutil
from common import wire
from common.config import EnvSpec
from common.messages import TransitionChunk
from common.planes import encode_block, join_blocks
from replay_server.shard import ReplayShard

kind, memory, capacity, num_chunks = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)

def message(seq):
    planes = rng.integers(256, size=(16, 84, 84)).astype(np.uint8)
    if kind == "frames":  # Some noise that stays, and a few pixels that move.
        planes[:, 20:] = 7
        planes[1:] = planes[0]
        planes[np.arange(16), 30 + np.arange(16)] = 255
    offsets, data = join_blocks([encode_block(block, "lz4") for block in planes.reshape(2, 8, 84, 84)])
    stacks = np.arange(7)[:, None] + np.arange(4)
    return wire.pack(TransitionChunk(
        codec="lz4", plane_dtype="|u1", planes_per_block=8, plane_shape=np.array([84, 84]), block_offsets=offsets,
        plane_data=data, run="r", actor_slot=0, incarnation=0, seq=seq, num_sent_before=7 * seq, params_version=0,
        s_tm1=stacks, s_t=stacks + 3, a_tm1=np.zeros(7), r_t=np.zeros(7), discount_t=np.ones(7), priority=np.ones(7)))

messages = [message(seq) for seq in range(20)]
rss = psutil.Process().memory_info
settings = dict(run="r", spec=EnvSpec((84, 84), "|u1", 4, 4), shard_index=0, shard_epoch=0, min_size=1, samples_per_insert=None,
    limiter_buffer_samples=0, priority_exponent=0.6, send_compressed=True, seed=0)
warm = ReplayShard(memory=8 << 20, capacity=100, **settings)
for number in range(200):
    warm.insert(messages[number % 20])
del warm
before = rss().rss
shard = ReplayShard(memory=memory, capacity=capacity, **settings)
most, rows = 0, []
for number in range(num_chunks):
    assert shard.insert(messages[number % 20]).refusal is None
    if number % 50 == 0 or number == num_chunks - 1:
        most = max(most, rss().rss - before)
        rows.append((rss().rss - before, shard.stats().resident_bytes))
stats = shard.stats()
print(json.dumps({"rows": rows, "most": most, "evicted": stats.num_evicted, "size": stats.size}))
"""


def grow(kind, *, memory, capacity, num_chunks):
    arguments = [sys.executable, "-c", SCRIPT, kind, str(memory), str(capacity), str(num_chunks)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("kind", "capacity", "num_chunks"),
    [("noise", 50_000, 1_500), ("frames", 400_000, 60_000), ("frames", 60_000, 20_000)],
    ids=["noise", "frames", "capacity"],
)
def test_process_grows_by_what_the_shard_says(kind, capacity, num_chunks):
    """Kills: an index or a tree that is not counted, a budget that counts live segments only, planes kept as objects."""
    memory = 96 * MIB
    result = grow(kind, memory=memory, capacity=capacity, num_chunks=num_chunks)
    assert result["evicted"] > 0
    assert result["most"] <= 1.01 * memory  # Pages and the interpreter's own small change.
    for resident, said in result["rows"]:
        assert resident == pytest.approx(said, rel=0.05, abs=3 * HUGE_PAGE)
    resident, said = result["rows"][-1]
    assert resident == pytest.approx(said, rel=0.05)
    if capacity != 60_000:  # Memory is what evicts, and all of it is in use.
        assert resident >= 0.95 * memory
