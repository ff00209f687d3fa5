"""Recipes: functions that return a full, frozen, checked RunConfig. A variant is `dataclasses.replace` of another.

Each says where its numbers come from; what it does not say is the default, in `common/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from actors.gridworld import GRIDWORLD_ID
from common.config import (
    ActorsConfig,
    ByteSize,
    EnvConfig,
    EvaluationConfig,
    ExplorationConfig,
    LearnerConfig,
    NetworkConfig,
    ReplayConfig,
    RunConfig,
)

GIB = 2**30


def cartpole() -> RunConfig:
    """CartPole-v1 solved (mean greedy return >= 475 over 100 episodes) within two minutes on two cores. Our settings."""
    return RunConfig(
        recipe="cartpole",
        env=EnvConfig(game="CartPole-v1"),
        network=NetworkConfig(torso="mlp", hidden_sizes=(128, 128)),
        actors=ActorsConfig(
            num_actors=1,
            num_envs=8,
            n_step=10,
            exploration=ExplorationConfig(kind="linear", final=0.04, decay_steps=10_000),
            chunk_transitions=8,
            pull_period_steps=4,
        ),
        # A small replay: with 50,000 transitions it held the pole but drifted off the track until the oldest were evicted.
        replay=ReplayConfig(capacity=10_000, memory=ByteSize(GIB // 16), min_size=1_000, samples_per_insert=32.0),
        learner=LearnerConfig(
            batch_size=128,
            learning_rate=1e-3,
            optimizer_epsilon=1e-6,
            target_period_updates=100,
            publish_period_updates=20,
            num_threads=1,
        ),
        evaluation=EvaluationConfig(episodes=20, final_episodes=100, num_envs=20, period_seconds=2.0, target_return=475.0),
        max_minutes=10.0,
        log_period_seconds=5.0,
    )


def cartpole_keras_rl() -> RunConfig:
    """CartPole-v0 as in the tutorials of keras-rl's DQN agent: one hidden layer of 16, soft target updates, 5,000 steps."""
    return RunConfig(
        recipe="cartpole-keras-rl",
        env=EnvConfig(game="CartPole-v0"),
        network=NetworkConfig(torso="mlp", hidden_sizes=(16,)),
        actors=ActorsConfig(
            num_envs=1,
            exploration=ExplorationConfig(kind="linear", initial=0.1, final=0.1, decay_steps=1),
            chunk_transitions=1,
            pull_period_steps=1,
        ),
        replay=ReplayConfig(
            capacity=50_000,
            memory=ByteSize(GIB // 16),
            min_size=10,  # Its warm-up. A first batch of 32 is drawn with replacement.
            samples_per_insert=32.0,  # One batch of 32 at every step.
            limiter_buffer_samples=64,
        ),
        learner=LearnerConfig(
            algorithm="q_learning",
            loss="mse",
            batch_size=32,
            learning_rate=1e-3,
            optimizer_epsilon=1e-7,
            max_grad_norm=None,
            target_period_updates=None,
            target_soft_rate=0.01,
            publish_period_updates=1,
            num_threads=1,
        ),
        evaluation=EvaluationConfig(episodes=5, final_episodes=100, num_envs=20, period_seconds=20.0, target_return=195.0),
        max_env_steps=50_000,
    )


def cartpole_24() -> RunConfig:
    """CartPole-v0 with two layers of 24, as in lecture notes: reward -10 at the end of the game, decaying exploration."""
    return RunConfig(
        recipe="cartpole-24",
        env=EnvConfig(game="CartPole-v0"),
        network=NetworkConfig(torso="mlp", hidden_sizes=(24, 24)),
        actors=ActorsConfig(
            num_envs=1,
            terminal_reward=-10.0,
            exploration=ExplorationConfig(kind="multiplicative", initial=1.0, final=0.01, decay_rate=0.995),
            chunk_transitions=1,
            pull_period_steps=1,
        ),
        replay=ReplayConfig(
            capacity=50_000, memory=ByteSize(GIB // 16), min_size=64, samples_per_insert=32.0, limiter_buffer_samples=64
        ),
        learner=LearnerConfig(
            algorithm="q_learning",
            loss="mse",
            batch_size=32,
            learning_rate=1e-3,
            optimizer_epsilon=1e-7,
            max_grad_norm=None,
            target_period_updates=1,  # The notes need no more than one network: the target is the online one.
            publish_period_updates=1,
            num_threads=1,
        ),
        evaluation=EvaluationConfig(episodes=5, final_episodes=100, num_envs=20, period_seconds=20.0, target_return=195.0),
        max_env_steps=100_000,  # 500 episodes of at most 200 steps.
    )


def gridworld() -> RunConfig:
    """A grid world whose learned Q-values agree with value iteration: the oracle of the whole path."""
    return RunConfig(
        recipe="gridworld",
        env=EnvConfig(game=GRIDWORLD_ID),
        network=NetworkConfig(torso="mlp", hidden_sizes=(64,)),
        actors=ActorsConfig(
            num_envs=4,
            discount=0.9,
            exploration=ExplorationConfig(kind="linear", initial=1.0, final=1.0, decay_steps=1),
            chunk_transitions=16,
        ),
        replay=ReplayConfig(capacity=10_000, memory=ByteSize(GIB // 16), min_size=500, samples_per_insert=16.0),
        learner=LearnerConfig(
            algorithm="q_learning",
            loss="mse",
            batch_size=64,
            learning_rate=1e-3,
            optimizer_epsilon=1e-8,
            target_period_updates=100,
            num_threads=1,
        ),
        evaluation=EvaluationConfig(episodes=20, final_episodes=100, num_envs=10, period_seconds=10.0),
        max_updates=6_000,
    )


def pong() -> RunConfig:
    """Atari on two cores: the network of 2013 with layer norm and standardized filters, 32 quantiles, n = 7, a discount of 0.97, double
    Q-learning, four samples a step, more and more frames shifted at random; the target is an average of the last 200 updates, and it
    is also what plays. A lost life is a terminal state in training, as in Mnih et al. 2015. `docs/experiments.md` has what was tried.
    """
    return RunConfig(
        recipe="pong",
        env=EnvConfig(game="pong", frame_stack=4, life_loss_terminates=True),
        network=NetworkConfig(
            torso="dqn2013",
            hidden_sizes=(256,),
            layer_norm=True,
            weight_standardization=True,
            distribution="quantile",
            num_quantiles=32,
        ),
        actors=ActorsConfig(
            num_actors=1,
            num_envs=8,
            n_step=7,
            discount=0.97,
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="linear", final=0.02, decay_steps=40_000),
            chunk_transitions=32,
            pull_period_steps=10,
        ),
        replay=ReplayConfig(capacity=200_000, memory=ByteSize(GIB // 2), min_size=5_000, samples_per_insert=4.0),
        learner=LearnerConfig(
            batch_size=64,
            learning_rate=5e-4,
            learning_rate_hold_updates=50_000,  # Pong is solved before; longer games gain by smaller steps later on.
            learning_rate_anneal_updates=200_000,
            learning_rate_final=1e-4,
            optimizer_epsilon=1.5e-4,
            target_period_updates=None,
            target_soft_rate=0.005,
            publish_params="target",
            publish_period_updates=25,
            random_shift_pixels=4,  # Breakout stays at 20 points without; from the first update on they slow Pong.
            random_shift_fraction=0.5,
            random_shift_anneal_updates=60_000,
        ),
        evaluation=EvaluationConfig(episodes=10, final_episodes=30, num_envs=10, period_seconds=120.0, target_return=18.0),
        max_minutes=120.0,
    )


def breakout() -> RunConfig:
    """Breakout with the settings of `pong`; only the evaluation differs."""
    base = pong()
    return replace(
        base,
        recipe="breakout",
        env=replace(base.env, game="breakout"),
        evaluation=replace(base.evaluation, target_return=None, epsilon=0.01),
    )


def nature() -> RunConfig:
    """Atari DQN as commonly written in PyTorch: the network of 2015, uniform replay of 100,000, batches of 32, MSE."""
    return RunConfig(
        recipe="nature",
        env=EnvConfig(game="pong", frame_stack=4),
        network=NetworkConfig(torso="nature", hidden_sizes=(512,)),
        actors=ActorsConfig(
            num_envs=1,
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="multiplicative", initial=1.0, final=0.1, decay_rate=0.995),
        ),
        replay=ReplayConfig(capacity=100_000, memory=ByteSize(GIB // 2), min_size=10_000, samples_per_insert=32.0),
        learner=LearnerConfig(
            algorithm="q_learning",
            loss="mse",
            batch_size=32,
            learning_rate=2.5e-4,
            target_period_updates=1_000,
            max_grad_norm=10.0,
        ),
    )


def dqn_2013() -> RunConfig:
    """Pong with the network and settings of Mnih et al. 2013 (https://arxiv.org/abs/1312.5602): no second network."""
    return RunConfig(
        recipe="dqn-2013",
        env=EnvConfig(game="pong", frame_stack=4),
        network=NetworkConfig(torso="dqn2013", hidden_sizes=(256,)),
        actors=ActorsConfig(
            num_envs=1,
            discount=0.95,
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="linear", final=0.1, decay_steps=250_000),  # 1 M frames.
        ),
        replay=ReplayConfig(capacity=1_000_000, memory=ByteSize(2 * GIB), min_size=10_000, samples_per_insert=32.0),
        learner=LearnerConfig(
            algorithm="q_learning",
            loss="mse",
            batch_size=32,
            optimizer="rmsprop",
            learning_rate=2e-4,
            rmsprop_decay=0.99,
            optimizer_epsilon=1e-2,
            max_grad_norm=None,
            target_period_updates=1,
        ),
        evaluation=EvaluationConfig(epsilon=0.05),
    )


def apex() -> RunConfig:
    """Ape-X DQN as published (Horgan et al. 2018, https://arxiv.org/abs/1803.00933), for a cluster: 360 actors, one GPU.

    Departures: replay evicts at its capacity where the paper trims every 100 updates; the ratio, which the paper leaves to
    its hardware, is set to what it came to there, 0.78 samples per transition.
    """
    return RunConfig(
        recipe="apex",
        env=EnvConfig(game="pong", frame_stack=4, max_episode_frames=50_000),
        network=NetworkConfig(torso="nature", hidden_sizes=(512,), dueling=True),
        actors=ActorsConfig(
            num_actors=360,
            num_envs=1,
            n_step=3,
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="ladder"),
            chunk_transitions=50,
            pull_period_steps=100,
        ),
        replay=ReplayConfig(
            num_shards=4,
            capacity=2_000_000,
            memory=ByteSize(8 * GIB),
            min_size=50_000,
            samples_per_insert=0.78,
            priority_exponent=0.6,
        ),
        learner=LearnerConfig(
            batch_size=512,
            optimizer="rmsprop",
            learning_rate=0.00025 / 4,
            rmsprop_decay=0.95,
            optimizer_epsilon=1.5e-7,
            max_grad_norm=40.0,
            target_period_updates=2_500,
            importance_exponent=0.4,
            prefetch_batches=16,
        ),
        object_store_memory=ByteSize(2 * GIB),
    )


def small_cluster() -> RunConfig:
    """Atari on one GPU and 16 cores, on one node or several: Ape-X's network, priorities and ladder, eight actors of eight games each and
    eight samples a step. Our settings; nobody has measured them on such a machine yet.
    """
    base = apex()
    return replace(
        base,
        recipe="small-cluster",
        env=replace(base.env, max_episode_frames=108_000),
        actors=replace(base.actors, num_actors=8, num_envs=8, chunk_transitions=32, pull_period_steps=20),
        replay=replace(
            base.replay, num_shards=2, capacity=1_000_000, memory=ByteSize(4 * GIB), min_size=20_000, samples_per_insert=8.0
        ),
        learner=replace(
            base.learner,
            batch_size=256,
            optimizer="adam",
            learning_rate=1e-4,
            optimizer_epsilon=1.5e-4,
            max_grad_norm=10.0,
            prefetch_batches=8,
        ),
        object_store_memory=ByteSize(GIB),
    )


def double() -> RunConfig:
    """Double DQN (van Hasselt et al. 2016, arXiv:1509.06461), the tuned settings as in dqn_zoo's `double_q`.

    RMSProp's epsilon stands under the root in the papers and beside it in PyTorch: sqrt(0.01) / 32 is theirs for a mean over 32. One
    update for four steps is 8 samples per insert. One actor steps 8 environments, where the papers have one.
    """
    return RunConfig(
        recipe="double",
        env=EnvConfig(game="pong", frame_stack=4),
        network=NetworkConfig(torso="nature", hidden_sizes=(512,)),
        actors=ActorsConfig(
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="linear", final=0.01, decay_steps=1_000_000),
        ),
        replay=ReplayConfig(capacity=1_000_000, memory=ByteSize(2 * GIB), min_size=50_000, samples_per_insert=8.0),
        learner=LearnerConfig(
            batch_size=32,
            optimizer="rmsprop",
            learning_rate=2.5e-4,
            optimizer_epsilon=0.1 / 32,
            max_grad_norm=None,
            target_period_updates=7_500,  # 120,000 frames.
        ),
        evaluation=EvaluationConfig(period_seconds=300.0, epsilon=0.01),
    )


def dueling() -> RunConfig:
    """Dueling double DQN (Wang et al. 2016, arXiv:1511.06581): the two heads, gradients clipped, a lower learning rate.

    The paper also divides the gradient that both heads send into the torso by sqrt(2), which is not done here.
    """
    base = double()
    return replace(
        base,
        recipe="dueling",
        network=replace(base.network, dueling=True),
        learner=replace(base.learner, learning_rate=6.25e-5, max_grad_norm=10.0),
    )


def prioritized() -> RunConfig:
    """Prioritized double DQN (Schaul et al. 2016, arXiv:1511.05952), proportional, as in dqn_zoo's `prioritized`."""
    base = double()
    return replace(
        base,
        recipe="prioritized",
        replay=replace(base.replay, priority_exponent=0.6),
        learner=replace(
            base.learner,
            learning_rate=2.5e-4 / 4,
            optimizer_epsilon=0.1 / 32 / 4,
            importance_exponent=0.4,
            importance_anneal_updates=12_500_000,  # 200 M frames.
        ),
    )


def c51() -> RunConfig:
    """C51 (Bellemare et al. 2017, arXiv:1707.06887), 51 atoms in [-10, 10], as in dqn_zoo's `c51`."""
    base = double()
    return replace(
        base,
        recipe="c51",
        network=replace(base.network, distribution="categorical"),
        learner=replace(
            base.learner,
            algorithm="q_learning",
            optimizer="adam",
            learning_rate=2.5e-4,
            optimizer_epsilon=0.01 / 32,
            max_grad_norm=10.0,
            target_period_updates=2_500,  # 40,000 frames.
        ),
        evaluation=replace(base.evaluation, epsilon=0.001),
    )


def qr_dqn() -> RunConfig:
    """QR-DQN-1 (Dabney et al. 2018, arXiv:1710.10044), 200 quantiles, kappa 1."""
    base = c51()
    return replace(
        base,
        recipe="qr-dqn",
        network=replace(base.network, distribution="quantile"),
        learner=replace(base.learner, learning_rate=5e-5, max_grad_norm=None),
    )


def iqn() -> RunConfig:
    """IQN (Dabney et al. 2018, arXiv:1806.06923): N = N' = 64 quantiles drawn, kappa 1, 32 midpoints when acting."""
    base = qr_dqn()
    return replace(
        base,
        recipe="iqn",
        network=replace(base.network, distribution="implicit_quantile"),
        replay=replace(base.replay, min_size=20_000),
    )


def munchausen_iqn() -> RunConfig:
    """Munchausen-IQN (Vieillard et al. 2020, arXiv:2007.14430): alpha 0.9, tau 0.03, l_0 = -1, on Dopamine's IQN, sticky actions."""
    base = iqn()
    return replace(
        base,
        recipe="munchausen-iqn",
        env=replace(base.env, sticky_action_probability=0.25),
        actors=replace(base.actors, exploration=replace(base.actors.exploration, decay_steps=250_000)),
        learner=replace(
            base.learner,
            algorithm="munchausen_q_learning",
            target_period_updates=2_000,  # 8,000 steps.
        ),
    )


def rainbow() -> RunConfig:
    """Rainbow (Hessel et al. 2018, arXiv:1710.02298): double, dueling, prioritized, n = 3, 51 atoms, noisy layers instead of epsilon.

    Priorities are of the expected TD error, where the paper takes the cross-entropy: so that those which actors give first and
    those of the learner are one quantity. Gradients are clipped as in dqn_zoo.
    """
    base = c51()
    return replace(
        base,
        recipe="rainbow",
        network=replace(base.network, dueling=True, noisy_sigma=0.5),
        actors=replace(base.actors, n_step=3, exploration=_none()),
        replay=replace(base.replay, min_size=20_000, priority_exponent=0.5),
        learner=replace(
            base.learner,
            algorithm="double_q_learning",
            learning_rate=6.25e-5,
            optimizer_epsilon=1.5e-4,
            target_period_updates=2_000,  # 32,000 frames.
            importance_exponent=0.4,
            importance_anneal_updates=12_500_000,  # 200 M frames.
        ),
        evaluation=replace(base.evaluation, epsilon=0.0),
    )


def btr() -> RunConfig:
    """Beyond the Rainbow (Clark et al. 2024, arXiv:2411.03820): a wide residual torso, IQN, Munchausen and noisy layers, for one GPU.

    Batches of 256, 64 environments, one update for each of their steps: 4 samples per insert. Epsilon falls on top of the noise, and
    stays at 0.01, where the authors turn it off after half of 200 M frames. A lost life ends an episode, an option of their code.
    """
    return RunConfig(
        recipe="btr",
        env=EnvConfig(game="pong", frame_stack=4, sticky_action_probability=0.25, life_loss_terminates=True),
        network=NetworkConfig(
            torso="impala",
            width=2,
            adaptive_pool=6,
            spectral_norm=True,
            hidden_sizes=(512,),
            dueling=True,
            noisy_sigma=0.5,
            distribution="implicit_quantile",
            num_policy_quantiles=8,
        ),
        actors=ActorsConfig(
            num_envs=64,
            n_step=3,
            discount=0.997,
            reward_clip=1.0,
            exploration=ExplorationConfig(kind="linear", final=0.01, decay_steps=2_000_000),
        ),
        replay=ReplayConfig(
            capacity=2**20,
            memory=ByteSize(2 * GIB),
            min_size=200_000,
            samples_per_insert=4.0,
            priority_exponent=0.2,
        ),
        learner=LearnerConfig(
            algorithm="munchausen_q_learning",
            batch_size=256,
            num_quantile_samples=8,
            num_target_quantile_samples=8,
            learning_rate=1e-4,
            optimizer_epsilon=0.005 / 256,
            max_grad_norm=10.0,
            target_period_updates=500,
            importance_exponent=0.4,
            importance_anneal_updates=781_250,  # 200 M frames.
        ),
        evaluation=EvaluationConfig(period_seconds=300.0, epsilon=0.01),
    )


def _none() -> ExplorationConfig:
    """No random actions."""
    return ExplorationConfig(kind="linear", initial=0.0, final=0.0, decay_steps=1)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "cartpole": cartpole,
    "cartpole-keras-rl": cartpole_keras_rl,
    "cartpole-24": cartpole_24,
    "gridworld": gridworld,
    "pong": pong,
    "breakout": breakout,
    "nature": nature,
    "dqn-2013": dqn_2013,
    "double": double,
    "dueling": dueling,
    "prioritized": prioritized,
    "c51": c51,
    "qr-dqn": qr_dqn,
    "iqn": iqn,
    "munchausen-iqn": munchausen_iqn,
    "rainbow": rainbow,
    "apex": apex,
    "small-cluster": small_cluster,
    "btr": btr,
}
