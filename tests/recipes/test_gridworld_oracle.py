"""The oracle of the whole path: learned Q-values agree with value iteration, for every algorithm that a recipe names."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.environments import probe
from actors.gridworld import free_cells, num_cells, optimal_q, transition
from common.networks import make_network
from common.value_rescaling import SIGNED_HYPERBOLIC_PAIR
from deploy import recipes
from deploy.recipes import gridworld
from deploy.train import train
from learner import checkpoint as checkpoints


def learned_q(config, path):
    """Returns f64[cells, actions] of the newest checkpoint, in units of reward; noisy layers at their mean parameters."""
    network = make_network(config.network, probe(config.env), 0)
    arrays = checkpoints.read(checkpoints.paths(path / "checkpoints")[-1]).tensors["online"]
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    with torch.no_grad():
        values = network(torch.eye(num_cells())[:, None])
        return (SIGNED_HYPERBOLIC_PAIR.apply_inv(values) if config.network.value_rescaling else values).double().numpy()


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


def on_gridworld(config):
    """Carries a recipe over to the grid world.

    What makes the algorithm stays: how targets are made and of what, heads, noise, priorities and importance weights, loss, kind of
    optimizer. What belongs to Atari goes: torso (the impala one takes no vectors, and has tests of its own), sizes, rates, periods.
    One step: with uniform exploration, n > 1 is another policy's value. Gradients are not clipped where the recipe does not.
    """
    base = gridworld()
    implicit = config.network.distribution == "implicit_quantile"
    noisy = config.network.noisy_sigma is not None
    updates = (4_000 if noisy else 2_000) if implicit else 1_000
    return replace(
        config,
        serial=True,
        log_period_seconds=1000.0,
        max_updates=updates,
        env=base.env,
        network=replace(
            config.network,
            torso="mlp",
            width=1,
            adaptive_pool=None,
            spectral_norm=False,
            weight_standardization=False,
            hidden_sizes=(64,),
            num_atoms=21,
            value_min=-2.0,
            value_max=2.0,
            num_quantiles=8,
            num_policy_quantiles=8,
            num_cosines=16,
            noisy_sigma=0.1 if noisy else None,  # 64 units average less of it away than 512.
        ),
        actors=replace(base.actors, num_envs=16, n_step=1),
        replay=replace(base.replay, min_size=1_000, samples_per_insert=64.0, priority_exponent=config.replay.priority_exponent),
        learner=replace(
            config.learner,
            batch_size=128,
            num_quantile_samples=8,
            num_target_quantile_samples=8,
            learning_rate=1e-3 if config.learner.optimizer == "rmsprop" else 2e-3 if implicit else 5e-3,
            optimizer_epsilon=1e-3 if config.learner.optimizer == "rmsprop" else 1e-5,
            target_period_updates=None if implicit else 30,
            target_soft_rate=0.05 if implicit else None,  # Less for its quantiles to chase: 0.01 where hard copies gave 0.03.
            importance_anneal_updates=updates if config.learner.importance_anneal_updates is not None else None,
            num_threads=1,
        ),
        evaluation=replace(base.evaluation, final_episodes=1, num_envs=1),
        object_store_memory=base.object_store_memory,
    )


def munchausen_q(discount, *, alpha, tau, clip):
    """Returns f64[12, 4], the fixed point of Munchausen value iteration as the paper writes it; zero off the free cells."""
    q, change = np.zeros_like(optimal_q(discount)), np.inf
    while change > 1e-9:
        new = np.zeros_like(q)
        log_pi = q / tau - np.log(np.exp(q / tau).sum(axis=1, keepdims=True))
        for cell in free_cells():
            for action in range(q.shape[1]):
                next_cell, reward, terminated = transition(cell, action)
                soft_value = np.sum(np.exp(log_pi[next_cell]) * (q[next_cell] - tau * log_pi[next_cell]))
                bonus = alpha * np.clip(tau * log_pi[cell, action], clip, 0.0)
                new[cell, action] = reward + bonus + (0.0 if terminated else discount * soft_value)
        q, change = new, np.abs(new - q).max()
    return q


def expected_q(config):
    """Returns what the configuration's algorithm converges to."""
    discount, learner = config.actors.discount, config.learner
    if learner.algorithm != "munchausen_q_learning":
        return optimal_q(discount)
    alpha, tau = learner.munchausen_coefficient, learner.entropy_temperature
    return munchausen_q(discount, alpha=alpha, tau=tau, clip=learner.munchausen_clip)


def value_rescaling():
    """No recipe has it: that of double Q-learning with rescaled values."""
    base = recipes.double()
    return replace(base, network=replace(base.network, value_rescaling=True))


PUBLISHED = [
    recipes.double,
    recipes.dueling,
    recipes.prioritized,
    recipes.c51,
    recipes.qr_dqn,
    recipes.iqn,
    recipes.munchausen_iqn,
    recipes.rainbow,
    recipes.apex,
    recipes.btr,
]


@pytest.mark.parametrize("recipe", [*PUBLISHED, value_rescaling], ids=lambda recipe: recipe.__name__)
def test_recipe_learns_the_gridworld(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("deploy.train.draw_learning_curve", lambda *_: None)  # A second for each run, and looked at by nobody.
    config = on_gridworld(recipe())
    assert train(config, tmp_path) == 0
    error = np.abs(learned_q(config, tmp_path) - expected_q(config))[free_cells()]
    assert error.max() < 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        optimal_q(0.9),
        munchausen_q(0.9, alpha=0.0, tau=0.03, clip=-1.0),
        munchausen_q(0.9, alpha=0.9, tau=0.03, clip=-0.5),
        munchausen_q(0.81, alpha=0.9, tau=0.03, clip=-1.0),
    ],
    ids=["q_learning", "without_bonus", "clip", "discount"],
)
def test_the_gridworld_test_tells_munchausen_from_other_operators(wrong):
    expected = expected_q(on_gridworld(recipes.munchausen_iqn()))
    assert np.abs(wrong - expected)[free_cells()].max() > 0.2
