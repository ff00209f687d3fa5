"""This system's update, with the preparation of the batch on the same thread and clock; in a run other threads do that.

python benchmarks/peers/qfleet_learner.py bf16|fp32 double_q_learning|q_learning
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from learner_harness import LEARNING_RATE, NUM_ACTIONS, RawBatch, serve

from common.config import EnvSpec, LearnerConfig
from common.networks import make_network
from common.priorities import priority
from deploy.bench_learner import TORSOS
from learner.batches import Batch
from learner.update import Update

DISCOUNT = 0.99


class Peer:
    def __init__(self, network: str, batch_size: int) -> None:
        precision, algorithm = sys.argv[1:]
        config = LearnerConfig(
            algorithm=algorithm, precision=precision, batch_size=batch_size, learning_rate=LEARNING_RATE, device="cpu"
        )
        spec = EnvSpec((84, 84), "|u1", 4, NUM_ACTIONS)
        online = make_network(TORSOS[network], spec, 0)
        self._update = Update(config=config, network=online, device=torch.device("cpu"), seed=0, group=None)
        self._num, self._loss = 0, float("nan")

    def load(self, batches: list[RawBatch]) -> None:
        self._raw = batches

    def step(self, index: int) -> Any:
        raw, transfer, update = self._raw[index], self._update.transfer, self._update
        batch = Batch(
            s_tm1=transfer.observations(raw.s_tm1),
            s_t=transfer.observations(raw.s_t),
            a_tm1=transfer.scalars(raw.a_tm1),
            r_t=transfer.scalars(raw.r_t),
            discount_t=transfer.scalars(DISCOUNT * (1 - raw.terminated)),
            importance_weight=transfer.scalars(np.ones(len(raw.r_t), np.float32)),
            weight_scale=1.0,
            shares=(),
            mean_params_version=0.0,
            ready=None,
            pinned=None,
        )
        values, _ = update.report(update.gradients(batch, 1.0))
        *td_error, self._loss, _, _ = values.numpy()
        update.apply()
        self._num += 1
        update.update_target(self._num)
        return priority(np.asarray(td_error), floor=1e-3)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._update.online.parameters())

    def loss(self) -> float:
        return float(self._loss)


if __name__ == "__main__":
    serve(Peer, version="this checkout", note="double Q-learning unless it says otherwise, Huber, priorities out")
