"""The log and the checkpoint against a process that is killed, and a machine that fails, at any system call."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from recorded_disk import RecordedDisk

from common import wire
from common.config import ByteSize, EnvSpec
from common.messages import PriorityUpdate, SampleBatch
from common.planes import decode_planes
from deploy import roles
from deploy.ledger import Ledger
from deploy.recipes import RECIPES
from deploy.replay_logs import ReplayLogs
from learner import checkpoint as checkpoints
from learner.checkpoint import Checkpoint

NUM_POINTS = 200
SPEC = EnvSpec((4, 6), "|u1", 2, 4)
CONFIG = RECIPES["cartpole"]()
CONFIG = replace(
    CONFIG,
    replay=replace(
        CONFIG.replay,
        capacity=120,
        min_size=10,
        priority_exponent=0.5,
        samples_per_insert=None,
        disk_budget=ByteSize(160 << 10),
    ),
)


def with_shards(num):
    return replace(CONFIG, serial=True, replay=replace(CONFIG.replay, num_shards=num))


def start(path, num_shards):
    """Begins on what is in a directory, as a run does; returns (shards, logs, damages)."""
    found = checkpoints.paths(path / "checkpoints")
    meta = checkpoints.read(found[-1]).meta if found else {}
    config = with_shards(num_shards)
    logs = ReplayLogs(path, config)
    starts = logs.begin(meta)
    shards = [roles.make_shard(config, SPEC, "run-a", i, 0, one) for i, one in enumerate(starts)]
    return shards, logs, [damage for shard in shards for damage in shard.stats().log.damages]


def save(path, shards, logs, updates):
    kept = logs.priorities_in_use([None] * len(shards))
    states = [shard.save(names) for shard, names in zip(shards, kept, strict=True)]
    tensors = {name: {"w": np.full(50, updates, np.float32)} for name in ("online", "target", "optimizer")}
    meta = {"updates": updates, "shards": states, "replay_layout": logs.layout}
    return checkpoints.write(path / "checkpoints", updates, Checkpoint(tensors=tensors, meta=meta), kept=2)


def contents(shards):
    """{number of a transition: (priority ** exponent, the bytes of its planes)}; asserts that none is there twice."""
    found = {}
    for shard in shards:
        shard.check_valid()
        if not shard.size:
            continue
        ids = np.arange(shard._oldest_item_id, shard._next_item_id)
        batch, blocks = shard._gather(ids, np.ones(len(ids)))
        planes = decode_planes(wire.unpack(wire.pack(batch, blocks=blocks), SampleBatch))
        for i, priority in enumerate(shard.priorities().values):
            number = int(batch.r_t[i])
            assert number not in found
            found[number] = (priority, planes[batch.s_tm1[i]].tobytes() + planes[batch.s_t[i]].tobytes())
    return found


@dataclass
class Moment:
    """How things stood after so many calls."""

    num_calls: int
    sent: int
    resident: set = field(default_factory=set)
    synced: set = field(default_factory=set)
    """Transitions that were there at a sync which has returned."""
    checkpoint: str | None = None


class Life:
    """A run of 2, then 3, then 1 shards, with everything that writes; and what it knew at each moment."""

    def __init__(self, path, disk, make_chunk):
        self.path, self.disk, self.make_chunk = path, disk, make_chunk
        self.rng = np.random.default_rng(0)
        self.sent, self.synced, self.updates = 0, set(), 0
        self.planes, self.priorities = {}, {}
        """By number; and by name of a checkpoint, as it has them."""
        self.moments = [Moment(0, 0)]

    def note(self, shards, checkpoint=None):
        resident = {number for shard in shards for number in contents([shard])}
        checkpoint = checkpoint or self.moments[-1].checkpoint
        self.moments.append(Moment(len(self.disk.calls), self.sent, resident, self.synced & resident, checkpoint))

    def insert(self, shards):
        num = int(self.rng.integers(1, 6))
        chunk = self.make_chunk(
            self.rng,
            num_transitions=num,
            num_sent_before=self.sent,
            seq=self.sent,
            r_t=np.arange(self.sent, self.sent + num, dtype=np.float32),
            priority=np.ones(num),
        )
        shard = shards[self.sent % len(shards)]
        assert shard.insert(wire.pack(chunk)).num_inserted == num
        self.sent += num
        for number, (_, planes) in contents([shard]).items():
            self.planes[number] = planes
        self.note(shards)

    def checkpoint(self, shards, logs):
        self.updates += 1
        for shard in shards:
            learn(shard, self.rng)
        expected = contents(shards)
        path = save(self.path, shards, logs, self.updates)
        self.priorities[path.name] = {number: priority for number, (priority, _) in expected.items()}
        self.synced |= set(expected)
        self.note(shards, path.name)

    def run(self):
        for num_shards in (2, 3, 1):
            shards, logs, damages = start(self.path, num_shards)
            assert not damages
            self.synced |= set(contents(shards)) if num_shards != 2 else set()
            self.note(shards)
            self.checkpoint(shards, logs)
            for i in range(150):
                self.insert(shards)
                if i % 5 == 4:
                    shard = shards[i % len(shards)]
                    shard._log.sync()
                    self.synced |= set(contents([shard]))
                    self.note(shards)
                if i % 40 == 39:
                    self.checkpoint(shards, logs)
            for shard in shards:
                shard.close()
            self.synced |= set(contents(shards))
            self.note(shards)


def learn(shard, rng):
    """Gives some items other priorities."""
    message = shard.sample(8).batch
    if message is None:  # It has too few.
        return
    batch = wire.unpack(message, SampleBatch)
    update = PriorityUpdate(
        shard_index=batch.shard_index, shard_epoch=batch.shard_epoch, item_id=batch.item_id, priority=rng.random(8) * 9
    )
    shard.update_priorities(wire.pack(update))


@pytest.mark.parametrize("how", ["killed", "power failure", "power failure at its worst"])
def test_whatever_ends_it_the_run_goes_on_from_a_whole_state(tmp_path, make_chunk, monkeypatch, how):
    """Two hundred points of the log's and the checkpoint's writing, of shards that are shared out anew among them.

    A kill loses nothing that was answered for; a power failure at most what was not synced; no item comes back altered, twice or
    with another priority; the ledger balances; and what goes on from there can end and go on again.
    """
    with monkeypatch.context() as patch:
        (tmp_path / "run").mkdir()
        disk = RecordedDisk(tmp_path / "run", patch)
        life = Life(tmp_path / "run", disk, make_chunk)
        life.run()
    rng = np.random.default_rng(1)
    points = np.sort(rng.choice(len(disk.calls), NUM_POINTS, replace=False)) + 1
    names = {call.name for call in disk.calls}
    assert names == {"link", "write", "sync", "rename", "unlink"}, names
    for num_calls in points.tolist():
        target = tmp_path / f"{num_calls}"
        if how == "killed":
            disk.killed(num_calls, target, rng)
        else:
            disk.failed(num_calls, target, rng, is_worst=how.endswith("worst"))
        before = [moment for moment in life.moments if moment.num_calls < num_calls][-1]
        after = next(moment for moment in life.moments if moment.num_calls >= num_calls)
        check(target, life, before, after, is_kill=how == "killed", num_shards=int(rng.integers(1, 4)), rng=rng)


def check(path, life, before, after, *, is_kill, num_shards, rng):
    shards, logs, _ = start(path, num_shards)
    found = checkpoints.paths(path / "checkpoints")
    name = found[-1].name if found else None
    assert (name or "") >= (before.checkpoint or ""), "a checkpoint that was written is gone"
    held = contents(shards)
    needed = (before.resident if is_kill else before.synced) & after.resident
    assert set(held) >= needed, f"{len(needed - set(held))} transitions are gone"
    assert max(held, default=-1) < after.sent
    for number, (priority, planes) in held.items():
        assert planes == life.planes[number]
        if name is not None and number in life.priorities[name]:
            assert priority == life.priorities[name][number]
        else:
            assert priority == 1.0
    ledger = Ledger().balance([shard.stats() for shard in shards])
    assert ledger["balanced"], ledger
    if held and rng.integers(4) == 0:
        for shard in shards:
            learn(shard, rng)
        then = contents(shards)
        save(path, shards, logs, 999)
        for shard in shards:
            shard.close()
        again, _, damages = start(path, 2)
        assert not damages and contents(again) == then
        shards = again
    for shard in shards:
        shard.close()
