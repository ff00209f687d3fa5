"""A shard from its log, against the shard that was never away; the same items on other numbers of shards."""

import errno
import itertools
import os

import numpy as np
import pytest
from scipy import stats

from common import wire
from common.config import EnvSpec
from common.messages import PriorityUpdate, SampleBatch
from replay_server.recovery import SavedShard, catch_up, finish_move, first_state, move_into_place, recover, rewrite
from replay_server.replay_log import ReplayLog, segment_paths
from replay_server.shard import ReplayShard

SPEC = EnvSpec((4, 6), "|u1", 2, 4)
SEGMENT_BYTES = 8_000
P_REJECT = 1e-6


@pytest.fixture
def feed(make_chunk):
    """Inserts chunks of one actor, whose transitions are numbered by their rewards; returns how many were sent by now."""

    def insert(shards, num_chunks, sent=0, seed=0):
        rng = np.random.default_rng([seed, sent])
        for i in range(num_chunks):
            num = int(rng.integers(1, 6))
            chunk = make_chunk(
                rng,
                num_transitions=num,
                actor_slot=2,
                incarnation=9,
                seq=sent,
                num_sent_before=sent,
                r_t=np.arange(sent, sent + num, dtype=np.float32),
            )
            assert shards[i % len(shards)].insert(wire.pack(chunk)).num_inserted == num
            sent += num
        return sent

    return insert


def make_shard(directory, index=0, epoch=0, **changes):
    log = ReplayLog(directory, segment_bytes=SEGMENT_BYTES) if directory is not None else None
    settings = {
        "memory": 4 << 20,
        "capacity": 150,
        "min_size": 10,
        "samples_per_insert": 2.0,
        "limiter_buffer_samples": 400,
        "priority_exponent": 0.5,
        "send_compressed": True,
        "seed": 0,
    }
    return ReplayShard(run="run-a", spec=SPEC, shard_index=index, shard_epoch=epoch, log=log, **settings | changes), log


def begin(directory, **changes):
    shard, log = make_shard(directory, **changes)
    assert list(log.open([])) == []
    return shard


def recovered(directory, state, priorities, *, keeps_samples=False, **changes):
    damages = []
    caught_up, is_whole = catch_up(directory, state, damages, keeps_samples=keeps_samples)
    assert is_whole and not damages
    shard, log = make_shard(directory, **changes)
    shard.restore(log.open(damages), caught_up, priorities)
    return shard


def learn(shard, num_batches, seed=0):
    """Samples, and gives what was sampled new priorities; returns the packed batches."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        message = shard.sample(8).batch
        batch = wire.unpack(message, SampleBatch)
        update = PriorityUpdate(
            shard_index=batch.shard_index,
            shard_epoch=batch.shard_epoch,
            item_id=batch.item_id,
            priority=rng.random(8) * 9,
        )
        shard.update_priorities(wire.pack(update))
        batches.append(message.tobytes())
    return batches


def contents(*shards):
    """{number of a transition: (priority ** exponent, what it holds)} of all shards."""
    found = {}
    for shard in shards:
        shard.check_valid()
        ids = np.arange(shard._oldest_item_id, shard._next_item_id)
        batch, blocks = shard._gather(ids, np.ones(len(ids)))
        from common.planes import decode_planes

        planes = decode_planes(wire.unpack(wire.pack(batch, blocks=blocks), SampleBatch))
        for i, priority in enumerate(shard.priorities().values):
            key = int(batch.r_t[i])
            assert key not in found, "an item is there twice"
            arrays = planes[batch.s_tm1[i]], planes[batch.s_t[i]], batch.a_tm1[i], batch.discount_t[i], batch.params_version[i]
            found[key] = (priority, b"".join(np.asarray(array).tobytes() for array in arrays))
    return found


@pytest.mark.parametrize("priority_exponent", [0.0, 0.5])
def test_a_shard_that_was_away_goes_on_as_if_it_had_not_been(tmp_path, feed, priority_exponent):
    """To the bit, past eviction. Kills: an RNG, a priority, an account or a counter that is not kept."""
    shard = begin(tmp_path, priority_exponent=priority_exponent)
    sent = feed([shard], 90)
    learn(shard, 20)
    assert shard.stats().num_evicted > 0
    other = recovered(tmp_path, shard.state(), shard.priorities(), priority_exponent=priority_exponent)
    assert contents(other) == contents(shard) and other.state() == shard.state()
    for one in (shard, other):
        feed([one], 30, sent)
    assert learn(shard, 30, seed=1) == learn(other, 30, seed=1)
    assert contents(other) == contents(shard)
    stats_of = [vars_of(one.stats()) for one in (shard, other)]
    assert stats_of[0] == stats_of[1]


def vars_of(shard_stats):
    names = (
        "size",
        "num_inserted",
        "num_evicted",
        "num_sampled",
        "num_priority_updates",
        "num_stale_priority_updates",
        "senders",
    )
    return {name: getattr(shard_stats, name) for name in names}


def test_a_killed_shard_has_all_that_came_after_the_checkpoint(tmp_path, feed):
    """What a kill -9 leaves. Priorities since the checkpoint are the actors' again; nobody owes more than before."""
    shard = begin(tmp_path)
    sent = feed([shard], 20)
    learn(shard, 3)
    saved, priorities = shard.state(), shard.priorities()
    first = contents(shard)
    sent = feed([shard], 90, sent)
    num_sampled = shard.stats().num_sampled
    before = contents(shard)
    alone = recovered(tmp_path, saved, priorities, keeps_samples=True, epoch=1)
    assert {key: item for key, (_, item) in contents(alone).items()} == {key: item for key, (_, item) in before.items()}
    assert {key: contents(alone)[key][0] for key in first if key in before} == {
        key: first[key][0] for key in first if key in before
    }
    assert alone.stats().senders == shard.stats().senders and alone.stats().senders[2, 9].sent == sent
    assert (alone.stats().num_inserted, alone.stats().num_sampled) == (sent, num_sampled)
    assert alone._limiter.due() == shard._limiter.due()


def test_the_whole_run_goes_back_to_the_checkpoints_samples(tmp_path, feed):
    """The learner went back too, and may draw again what it had drawn since. Kills: a ratio that forgets it, or bursts."""
    shard = begin(tmp_path)
    sent = feed([shard], 40)
    learn(shard, 5)
    saved = shard.state()
    feed([shard], 10, sent)
    learn(shard, 5)
    feed([shard], 1, sent + 1_000)
    back = recovered(tmp_path, saved, None)
    assert back.stats().num_sampled == 40 and shard.stats().num_sampled == 80
    assert back._limiter.due() == shard._limiter.due()


def test_new_settings_take_effect_on_old_accounts(tmp_path, feed):
    shard = begin(tmp_path)
    feed([shard], 40)
    learn(shard, 5)
    owed = shard._limiter.due() - shard._limiter.num_sampled
    other = recovered(tmp_path, shard.state(), None, samples_per_insert=4.0)
    assert other._limiter.due() - other._limiter.num_sampled == owed
    feed([other], 1, 2_000)
    num = other.stats().num_inserted - shard.stats().num_inserted
    assert other._limiter.due() - other._limiter.num_sampled == owed + 4.0 * num


def test_without_a_log_only_the_accounts_come_back(tmp_path, feed):
    shard = begin(tmp_path / "log")
    feed([shard], 40)
    learn(shard, 5)
    saved = shard.state()
    empty, _ = make_shard(None)
    assert empty.restore([], saved | {"oldest_item_id": saved["next_item_id"]}, None) == 0
    assert empty.stats().num_inserted == shard.stats().num_inserted == empty.stats().num_evicted
    assert empty._limiter.due() == shard._limiter.due() - 10 * 2.0, "the ten that fill it up to its minimum pay for nothing"


def test_damage_costs_the_items_that_it_hit(tmp_path, feed):
    """An altered byte in the middle: the log is written anew without that record, the priorities go with their items."""
    shard = begin(tmp_path / "log")
    feed([shard], 40)
    learn(shard, 5)
    before = contents(shard)
    state, priorities = shard.state(), shard.priorities()
    path = segment_paths(tmp_path / "log")[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damages = []
    caught_up, is_whole = catch_up(tmp_path / "log", state, damages, keeps_samples=False)
    assert not is_whole and len(damages) == 1
    (state,) = rewrite([SavedShard(tmp_path / "log", caught_up, priorities)], tmp_path / "new", [150], [])
    move_into_place(tmp_path / "new" / "0", tmp_path / "log")
    mended = recovered(tmp_path / "log", state, ReplayLog(tmp_path / "log").read_priorities(state["priorities"], []))
    after = contents(mended)
    assert 0 < len(before) - len(after) < 6 and all(before[key] == item for key, item in after.items())


def test_items_and_priorities_survive_two_three_and_one_shards(tmp_path, feed):
    """2 -> 3 -> 1, with items since the checkpoint, evicted ones and full shards. Kills: one lost, doubled or come back."""

    def shares(num):
        return {"capacity": 300 // num, "min_size": 30 // num, "limiter_buffer_samples": 1_200 // num}

    shards = [begin(tmp_path / "a" / str(i), index=i, **shares(2)) for i in range(2)]
    sent = feed(shards, 150)
    for shard in shards:
        learn(shard, 10)
    saved = [(shard.state(), shard.priorities()) for shard in shards]
    feed(shards, 8, sent)
    expected = contents(*shards)
    assert len(expected) == 300
    ledger = sum(shard.stats().num_inserted for shard in shards), sum(shard.stats().num_evicted for shard in shards)
    owed = sum(shard._limiter.due() - shard._limiter.num_sampled for shard in shards)
    sources, damages = [], []
    for i, (state, priorities) in enumerate(saved):
        caught_up, _ = catch_up(tmp_path / "a" / str(i), state, damages, keeps_samples=False)
        sources.append(SavedShard(tmp_path / "a" / str(i), caught_up, priorities))
    for name, num in (("b", 3), ("c", 1)):
        states = rewrite(sources, tmp_path / name, [300 // num] * num, damages, segment_bytes=SEGMENT_BYTES)
        sources = []
        for i, state in enumerate(states):
            directory = tmp_path / name / str(i)
            sources.append(SavedShard(directory, state, ReplayLog(directory).read_priorities(state["priorities"], damages)))
        moved = [recovered(one.directory, one.state, one.priorities, index=i, **shares(num)) for i, one in enumerate(sources)]
        assert contents(*moved) == expected and not damages
        assert (sum(one.stats().num_inserted for one in moved), sum(one.stats().num_evicted for one in moved)) == ledger
        assert sum(one._limiter.due() - one._limiter.num_sampled for one in moved) == pytest.approx(owed)
        assert [one.size for one in moved] == [300 // num] * num
        by_share(moved, expected)


def by_share(shards, expected):
    """Draws as the learner does, so many of each shard: every item by its priority over the mass of its shard."""
    for shard in shards:
        shard._limiter.samples_per_insert = None
        held = contents(shard)
        mass = sum(priority for priority, _ in held.values())
        drawn = np.zeros(len(expected) + 500)
        for _ in range(40):
            batch = wire.unpack(shard.sample(1_000).batch, SampleBatch)
            np.add.at(drawn, batch.r_t.astype(int), 1)
        keys = [key for key, (priority, _) in held.items() if priority > 0]
        chances = np.array([held[key][0] / mass for key in keys])
        assert drawn[keys].sum() == 40_000
        assert stats.chisquare(drawn[keys], chances * 40_000).pvalue > P_REJECT


@pytest.mark.parametrize("num_steps", range(6))
def test_a_crash_while_logs_are_exchanged_leaves_the_old_or_the_new(tmp_path, monkeypatch, num_steps):
    """Every system call that changes the directory, in turn."""
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    left = itertools.count(num_steps, -1)

    class Killed(BaseException):
        pass

    def counted(call):
        def wrapped(*args, **kwargs):
            if next(left) == 0:
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        try:
            move_into_place(tmp_path / "new", tmp_path / "place")
            assert num_steps >= 4
        except Killed:
            pass
    finish_move(tmp_path / "new", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "file").read_text() in ("new", "place")


@pytest.mark.parametrize("fails_at", [3, 5, 20])
def test_a_rewrite_that_the_disk_does_not_take_leaves_the_log_as_it_was(tmp_path, feed, monkeypatch, fails_at):
    """Full for one write, or for good. Kills: records that are left out of the new log, which is then taken for whole."""
    shard = begin(tmp_path / "log")
    feed([shard], 40)
    state = shard.save()
    before = contents(shard)
    path = segment_paths(tmp_path / "log")[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    writev, calls = os.writev, itertools.count()

    def full(file, parts):
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writev(file, parts)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(OSError, match="No space left"):
            recover(tmp_path / "log", state, 150, [], keeps_samples=True)
    assert [path.name for path in tmp_path.iterdir()] == ["log"], "what was half written is gone"
    state = recover(tmp_path / "log", state, 150, [], keeps_samples=True)
    mended, log = make_shard(tmp_path / "log")
    mended.restore(log.open([]), state, log.read_priorities(state["priorities"], []))
    assert 0 < len(before) - len(contents(mended)) < 6


def test_a_smaller_shard_takes_what_a_larger_one_held(tmp_path, feed):
    """Smaller than a chunk: chunks are divided. Kills: a log that is refused for it."""
    shard = begin(tmp_path / "log")
    feed([shard], 40)
    state = shard.save()
    newest = sorted(contents(shard))[-3:]
    state = recover(tmp_path / "log", state, 3, [], keeps_samples=False)
    small, log = make_shard(tmp_path / "log", capacity=3, min_size=1)
    small.restore(log.open([]), state, log.read_priorities(state["priorities"], []))
    assert sorted(contents(small)) == newest


def test_a_shard_that_dies_before_the_first_checkpoint_has_its_log(tmp_path, feed):
    shard = begin(tmp_path / "log")
    feed([shard], 20)
    state = recover(tmp_path / "log", first_state(tmp_path / "log"), 150, [], keeps_samples=True)
    back, log = make_shard(tmp_path / "log")
    back.restore(log.open([]), state, None)
    assert contents(back).keys() == contents(shard).keys()
    assert back.stats().senders == shard.stats().senders and first_state(tmp_path / "none") is None
