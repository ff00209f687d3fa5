"""Two ranks on gloo, each a process, against one learner on the concatenated batches."""

import multiprocessing
import os
import signal
import socket

import numpy as np
import pytest
import torch

from common import params as params_module
from common.config import LearnerConfig, NetworkConfig
from common.networks import make_network
from learner.batches import shares
from learner.collective import LearnerGroup
from learner.learner import Learner
from tests.learner.conftest import SPEC, FakeShard, RecordingStore

NUM_UPDATES = 50


def make(tmp_path, shards, rank=0, num_ranks=1, group=None, **settings):
    torch.set_num_threads(1)
    config = LearnerConfig(
        batch_size=10, target_period_updates=7, device="cpu", precision="fp32", importance_exponent=0.6, **settings
    )
    return Learner(
        config=config,
        network=make_network(NetworkConfig(hidden_sizes=(32,)), SPEC, 0),
        is_prioritized=True,
        readers=shards[rank::num_ranks],
        num_items=shares(config.batch_size, len(shards))[rank::num_ranks],
        params=RecordingStore(),
        run="test",
        epoch=0,
        run_dir=tmp_path,
        seed=rank,
        group=group,
    )


def make_shards(late=False):
    """Three shards of unequal size, so that the ranks' weights differ; the last one may keep its rank waiting."""
    shards = [FakeShard(i, size=50 * (i + 1)) for i in range(3)]
    if late:
        answer, calls = shards[1].collect, iter(range(10_000))
        shards[1].collect = lambda timeout: answer(timeout) if next(calls) % 3 == 0 else None
    return shards


def rank_of_two(rank, address, tmp_path, answers, late, dies_at):
    group = LearnerGroup(rank=rank, num_ranks=2, address=address, device=torch.device("cpu"))
    shards = make_shards(late)
    learner = make(tmp_path, shards, rank, 2, group)
    learner.start()
    try:
        if rank == 1 and dies_at is not None:
            learner.run(60.0, dies_at)
            os.kill(os.getpid(), signal.SIGKILL)
        while learner.updates < NUM_UPDATES:
            learner.run(0.05 + 0.3 * rank, NUM_UPDATES)  # The first rank's time is up before the second's.
        priorities = [np.concatenate([u.priority for u in shard.updates]) for shard in shards[rank::2]]
        answers.put((rank, params_module.flatten(learner._online), learner.stats(), priorities))
    except RuntimeError as error:
        answers.put((rank, None, str(error), None))
    finally:
        learner.close()


def run_two(tmp_path, *, late=False, dies_at=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=rank_of_two, args=(rank, address, tmp_path, answers, late, dies_at)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        got = [answers.get(timeout=120) for _ in range(1 if dies_at is not None else 2)]
        for process in ranks:
            process.join(30)
        return sorted(got, key=lambda answer: answer[0])
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("late", [False, True])
def test_two_ranks_learn_what_one_learns_from_the_concatenated_batches(tmp_path, late):
    """Kills: gradients averaged over unequal parts, weights normalized by each rank alone, ranks that drift apart."""
    shards = make_shards()
    alone = make(tmp_path, shards)
    while alone.updates < NUM_UPDATES:
        assert alone.step()
    (_, first, stats, _), (_, second, _, _) = both = run_two(tmp_path, late=late)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, params_module.flatten(alone._online), rtol=0, atol=1e-5)
    assert (stats.updates, stats.samples) == (NUM_UPDATES, 10 * NUM_UPDATES)
    assert stats.grad_norm == pytest.approx(alone.stats().grad_norm, rel=1e-4)
    for rank, (_, _, _, priorities) in enumerate(both):
        for shard, mine in zip(shards[rank::2], priorities, strict=True):
            np.testing.assert_allclose(mine, np.concatenate([u.priority for u in shard.updates]), rtol=1e-3)


def test_the_weights_of_the_ranks_differ_in_this_test(tmp_path):
    """The test above has power only where a rank's own normalization is not the group's."""
    scales = [make(tmp_path, make_shards(), rank, 2)._fetch(0.0).weight_scale for rank in range(2)]
    assert max(scales) > 1.2 * min(scales)


def test_a_rank_that_dies_stops_the_other_within_seconds(tmp_path):
    ((rank, params, error, _),) = run_two(tmp_path, dies_at=5)
    assert rank == 0 and params is None and error
