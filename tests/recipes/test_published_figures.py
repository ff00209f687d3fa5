"""Every recipe builds, and its figures are those of its paper, written here once more, and in frames as there.

Sources: the papers that `deploy/recipes.py` names and, where a paper leaves a figure open, the settings of dqn_zoo, Dopamine and the
authors' own code.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest

from common.config import as_dict, from_dict
from deploy.recipes import RECIPES


class Figures(NamedTuple):
    target_frames: float
    learning_rate: float
    optimizer: str
    samples_per_insert: float
    start: int
    """Transitions."""
    epsilon: float
    """At the end of its decay."""
    n_step: int = 1
    discount: float = 0.99
    alpha: float = 0.0
    beta: float | None = None
    """None: no priorities."""
    heads: tuple[str, int] = ("expectation", 1)


M = 1_000_000
FIGURES = {
    "dqn-2013": Figures(4, 2e-4, "rmsprop", 32, 10_000, 0.1, discount=0.95),
    "double": Figures(120_000, 2.5e-4, "rmsprop", 8, 50_000, 0.01),
    "dueling": Figures(120_000, 6.25e-5, "rmsprop", 8, 50_000, 0.01),
    "prioritized": Figures(120_000, 6.25e-5, "rmsprop", 8, 50_000, 0.01, alpha=0.6, beta=0.4),
    "c51": Figures(40_000, 2.5e-4, "adam", 8, 50_000, 0.01, heads=("categorical", 51)),
    "qr-dqn": Figures(40_000, 5e-5, "adam", 8, 50_000, 0.01, heads=("quantile", 200)),
    "iqn": Figures(40_000, 5e-5, "adam", 8, 20_000, 0.01, heads=("implicit_quantile", 64)),
    "munchausen-iqn": Figures(32_000, 5e-5, "adam", 8, 20_000, 0.01, heads=("implicit_quantile", 64)),
    "rainbow": Figures(32_000, 6.25e-5, "adam", 8, 20_000, 0.0, n_step=3, alpha=0.5, beta=0.4, heads=("categorical", 51)),
    # 2,500 updates of 512 at 9.7 samples per 12.5 transitions.
    "apex": Figures(2_500 * 512 / 0.78 * 4, 6.25e-5, "rmsprop", 0.78, 50_000, 0.05, n_step=3, alpha=0.6, beta=0.4),
    # 500 updates, one for each step of 64 environments.
    "btr": Figures(500 * 64 * 4, 1e-4, "adam", 4, 200_000, 0.01, 3, 0.997, alpha=0.2, beta=0.4, heads=("implicit_quantile", 8)),
}


def figures(config):
    """Returns the figures of a configuration, in the units of the papers."""
    learner, network, replay = config.learner, config.network, config.replay
    frames_per_update = learner.batch_size / replay.samples_per_insert * config.env.frames_per_step
    sizes = {
        "expectation": 1,
        "categorical": network.num_atoms,
        "quantile": network.num_quantiles,
        "implicit_quantile": learner.num_quantile_samples,
    }
    return Figures(
        target_frames=learner.target_period_updates * frames_per_update,
        learning_rate=learner.learning_rate,
        optimizer=learner.optimizer,
        samples_per_insert=replay.samples_per_insert,
        start=replay.min_size,
        epsilon=config.actors.exploration.final,
        n_step=config.actors.n_step,
        discount=config.actors.discount,
        alpha=replay.priority_exponent,
        beta=learner.importance_exponent if replay.priority_exponent > 0 else None,
        heads=(network.distribution, sizes[network.distribution]),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_under_its_name_and_can_be_written_and_read(name):
    config = RECIPES[name]()
    assert config.recipe == name
    assert from_dict(as_dict(config)) == config


def test_breakout_has_the_settings_of_pong():
    """No setting is for Pong alone: other games differ from it in how they are evaluated."""
    pong, breakout = RECIPES["pong"](), RECIPES["breakout"]()
    evaluation = replace(breakout.evaluation, target_return=pong.evaluation.target_return, epsilon=pong.evaluation.epsilon)
    assert replace(breakout, recipe="pong", env=replace(breakout.env, game="pong"), evaluation=evaluation) == pong


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_papers(name):
    found, published = figures(RECIPES[name]()), FIGURES[name]
    assert found[:2] == pytest.approx(published[:2])
    assert found[2:] == published[2:]


def test_importance_weights_are_annealed_over_200_million_frames_but_in_apex():
    for name in ("prioritized", "rainbow", "btr"):
        config = RECIPES[name]()
        frames_per_update = config.learner.batch_size / config.replay.samples_per_insert * config.env.frames_per_step
        assert config.learner.importance_anneal_updates * frames_per_update == 200 * M
    assert RECIPES["apex"]().learner.importance_anneal_updates is None


def test_apex_is_of_the_published_fleet():
    config = RECIPES["apex"]()
    assert (config.actors.num_actors, config.learner.batch_size, config.replay.capacity) == (360, 512, 2 * M)
    exploration = config.actors.exploration
    assert (exploration.kind, exploration.ladder_base, exploration.ladder_exponent) == ("ladder", 0.4, 7.0)
    assert (config.learner.optimizer_epsilon, config.learner.max_grad_norm) == (1.5e-7, 40.0)
    assert config.actors.pull_period_steps * config.env.frames_per_step == 400


def test_munchausen_and_atoms_are_the_papers():
    for name in ("munchausen-iqn", "btr"):
        learner = RECIPES[name]().learner
        assert (learner.munchausen_coefficient, learner.entropy_temperature, learner.munchausen_clip) == (0.9, 0.03, -1.0)
    for name in ("c51", "rainbow"):
        assert (RECIPES[name]().network.value_min, RECIPES[name]().network.value_max) == (-10.0, 10.0)
    assert RECIPES["rainbow"]().network.noisy_sigma == 0.5
