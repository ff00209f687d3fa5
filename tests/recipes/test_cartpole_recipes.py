"""Every algorithm that a recipe names solves CartPole, in serial runs: the same seed gives the same bits."""

import json
from dataclasses import replace

import pytest

from common.config import EnvConfig, EvaluationConfig
from deploy.recipes import cartpole
from deploy.train import train
from tests.recipes.test_gridworld_oracle import PUBLISHED

SOLVED = 195.0  # CartPole-v0: mean greedy return over 100 episodes of at most 200 steps.
UPDATES = range(2_500, 9_501, 1_000)  # Where training pauses for an evaluation.
LONG = ("btr", "munchausen_iqn", "prioritized", "rainbow")  # Half a minute or more; `make test` has them on the grid world.


def on_cartpole(config):
    """Carries a recipe over to CartPole-v0.

    What makes the algorithm stays: how targets are made and of what, heads, noise, priorities and importance weights, loss,
    Ape-X's ladder of epsilons. What belongs to Atari goes: torso, sizes, rates, periods, reward clipping, discount, and
    with it the range of the atoms: returns are between 0 and 1 / (1 - 0.99). Ten steps; five with Munchausen's bonus,
    which is of the first alone. Less noise at first: 128 units average less of it away than 512.
    """
    base = cartpole()
    noisy, ladder = config.network.noisy_sigma is not None, config.actors.exploration.kind == "ladder"
    exploration = replace(config.actors.exploration, decay_steps=1 if config.actors.exploration.final == 0.0 else 2_000)
    return replace(
        config,
        serial=True,
        log_period_seconds=1000.0,
        env=EnvConfig(game="CartPole-v0"),
        network=replace(
            config.network,
            torso="mlp",
            width=1,
            adaptive_pool=None,
            spectral_norm=False,
            weight_standardization=False,
            hidden_sizes=(128, 128),
            noisy_sigma=0.1 if noisy else None,
            value_min=0.0,
            value_max=100.0,
            num_quantiles=8,
            num_policy_quantiles=8,
            num_cosines=16,
        ),
        actors=replace(
            base.actors,
            n_step=5 if config.learner.algorithm == "munchausen_q_learning" else 10,
            discount=0.99,
            exploration=exploration if noisy or ladder else replace(exploration, final=0.05),
        ),
        replay=replace(base.replay, samples_per_insert=32.0, priority_exponent=config.replay.priority_exponent),
        learner=replace(
            config.learner,
            batch_size=128,
            num_quantile_samples=8,
            num_target_quantile_samples=8,
            optimizer="adam",
            learning_rate=1e-3,
            optimizer_epsilon=1e-5,
            max_grad_norm=10.0,
            target_period_updates=100,
            importance_anneal_updates=None if config.learner.importance_anneal_updates is None else 4_000,
            publish_period_updates=10,
            num_threads=1,
        ),
        evaluation=EvaluationConfig(final_episodes=100, num_envs=100),
        object_store_memory=base.object_store_memory,
    )


def mean_returns(config, path):
    """Trains in stretches until CartPole is solved; returns the mean greedy return after each.

    Every stretch continues the run of the one before, with an empty replay, as a user's next command does.
    """
    results = []
    for updates in UPDATES:
        assert train(replace(config, max_updates=updates), path) == 0
        evaluation = json.loads((path / "summary.json").read_text())["evaluation"]
        assert evaluation["episodes"] == 100
        results.append(evaluation["mean_return"])
        if results[-1] >= SOLVED:
            break
    return results


@pytest.mark.filterwarnings("ignore:.*CartPole-v0 is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=pytest.mark.slow if recipe.__name__ in LONG else ()) for recipe in PUBLISHED],
    ids=lambda recipe: recipe.__name__,
)
def test_recipe_solves_cartpole(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("deploy.train.draw_learning_curve", lambda *_: None)  # A second for each run, and looked at by nobody.
    results = mean_returns(on_cartpole(recipe()), tmp_path)
    assert results[-1] >= SOLVED, results
