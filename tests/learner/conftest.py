"""A learner over a fake shard that answers from a list, and a params store that records."""

from collections import deque

import numpy as np
import pytest
import torch

from common import wire
from common.config import EnvSpec, LearnerConfig, NetworkConfig
from common.messages import ParamsSnapshot, PriorityUpdate, SampleBatch
from common.networks import make_network
from common.protocols import SampleReply
from learner.batches import shares
from learner.learner import Learner

SPEC = EnvSpec((3,), "<f4", 1, 2)


class FakeShard:
    """Answers every request with the same fixed items, or with a sentence while `waits_for` is set."""

    def __init__(self, index=0, num_items=8, seed=0, size=100, value=None):
        self.index, self.size, self.waits_for = index, size, None
        self.updates, self.requests = [], deque()
        rng = np.random.default_rng([seed, index])
        self.s_tm1, self.s_t = rng.normal(size=(2, num_items, 3)).astype(np.float32)
        self.a_tm1 = rng.integers(2, size=num_items)
        self.r_t = rng.normal(size=num_items) if value is None else np.full(num_items, value)
        self.discount_t = np.full(num_items, 0.9)

    def request(self, num_items):
        self.requests.append(num_items)

    def num_requested(self):
        return len(self.requests)

    def collect(self, timeout_seconds):
        num_items = self.requests.popleft()
        if self.waits_for is not None:
            return SampleReply(batch=None, waits_for=self.waits_for)
        rows = np.arange(num_items) % len(self.a_tm1)
        planes = np.concatenate([self.s_tm1, self.s_t])
        batch = SampleBatch(
            codec="raw",
            plane_dtype="<f4",
            planes_per_block=1,
            plane_shape=np.array([3]),
            block_offsets=np.arange(len(planes) + 1) * 12,
            plane_data=planes.view(np.uint8).reshape(-1),
            shard_index=self.index,
            shard_epoch=3,
            size=self.size,
            priority_mass=1.0,
            s_tm1=rows[:, None],
            s_t=rows[:, None] + len(self.a_tm1),
            a_tm1=self.a_tm1[rows],
            r_t=self.r_t[rows],
            discount_t=self.discount_t[rows],
            item_id=100 * self.index + rows,
            probability=np.full(num_items, 1 / self.size),
            params_version=np.zeros(num_items),
        )
        return SampleReply(batch=wire.pack(batch), waits_for=None)

    def update_priorities(self, message):
        self.updates.append(wire.unpack(message, PriorityUpdate))


class RecordingStore:
    def __init__(self):
        self.published = []

    def publish(self, message):
        self.published.append(wire.unpack(message, ParamsSnapshot))


@pytest.fixture
def make_learner(tmp_path):
    """Returns a function that builds (learner, shards, store)."""

    def make(shards=None, *, is_prioritized=True, network=None, seed=0, **settings):
        torch.set_num_threads(1)
        shards = shards or [FakeShard()]
        store = RecordingStore()
        settings = {"batch_size": 8, "target_period_updates": 10, "device": "cpu", "precision": "fp32"} | settings
        network = network or NetworkConfig(hidden_sizes=(32,))
        learner = Learner(
            config=LearnerConfig(**settings),
            network=make_network(network, SPEC, seed),
            is_prioritized=is_prioritized,
            readers=shards,
            num_items=shares(settings["batch_size"], len(shards)),
            params=store,
            run="test",
            epoch=0,
            run_dir=tmp_path,
            seed=seed,
        )
        return learner, shards, store

    return make


@pytest.fixture
def fake_shard():
    return FakeShard
