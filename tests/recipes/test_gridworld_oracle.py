"""The oracle of the whole path: learned Q-values agree with value iteration."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.environments import probe
from actors.gridworld import free_cells, num_cells, optimal_q
from common.networks import make_network
from deploy.recipes import gridworld
from deploy.train import train
from learner import checkpoint as checkpoints


def learned_q(config, path):
    """Returns f64[cells, actions] of the newest checkpoint."""
    network = make_network(config.network, probe(config.env), 0)
    arrays = checkpoints.read(checkpoints.paths(path / "checkpoints")[-1]).tensors["online"]
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    with torch.no_grad():
        return network(torch.eye(num_cells())[:, None]).double().numpy()


@pytest.mark.parametrize(
    ("n_step", "algorithm", "priority_exponent"),
    [(1, "q_learning", 0.0), (1, "double_q_learning", 0.6)],
    ids=["recipe", "double-prioritized"],
)
def test_gridworld_agrees_with_value_iteration(tmp_path, n_step, algorithm, priority_exponent):
    config = gridworld()
    config = replace(
        config,
        serial=True,
        log_period_seconds=1000.0,
        actors=replace(config.actors, n_step=n_step),
        learner=replace(config.learner, algorithm=algorithm, importance_exponent=1.0),
        replay=replace(config.replay, priority_exponent=priority_exponent),
    )
    assert train(config, tmp_path) == 0
    error = np.abs(learned_q(config, tmp_path) - optimal_q(config.actors.discount))[free_cells()]
    assert error.max() < 0.01
