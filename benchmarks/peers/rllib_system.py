"""RLlib's DQN of its new API stack on a private Ray: `algo.train()` on its own Atari wrappers, EpisodeReplayBuffer and default model.

Modes: `local`, env runner and learner in this process; `runner`, the env runner in a Ray actor; `remote`, the learner too; `fragments`, as
`local`, but with four times as many steps and updates a round, which saves calls. Its rounds are one after another in all of them.

Frames are stacked by its wrapper and not by its connectors, because what its buffer samples for DQN has no frames before the first. Its
wrappers give float32 within [-1, 1], which is what the buffer holds. `training_intensity` is set so that the ratio comes out.

`fill`: its env runner plays random steps, and these episodes are added under new names until the buffer is full; `add` copies them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from importlib.metadata import version
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import gymnasium
import ray
import torch
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.core import ALL_MODULES
from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
)
from ray.tune.registry import register_env
from rllib_learner import model_config
from system_harness import (
    DISCOUNT,
    EPSILON,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TARGET_PERIOD_UPDATES,
    Reports,
    Work,
    interrupt_on_sigterm,
    make_game,
    read_work,
)

NUM_RECORDED = 1_000
FRAGMENTS = 4
ITERATION_SECONDS = 3.0


def make_env(config: dict[str, Any]) -> gymnasium.Env:
    return wrap_atari_for_new_api_stack(make_game(config["game"]), dim=84, frameskip=4, framestack=4)


def make_config(work: Work) -> DQNConfig:
    num_steps, num_updates = (number * (FRAGMENTS if work.mode == "fragments" else 1) for number in work.rhythm)
    num_runners = int(work.mode in ("runner", "remote"))
    # `calculate_rr_weights` divides the intensity by this, and counts one runner more than there are.
    native_ratio = work.batch / (num_steps * work.num_envs * (num_runners + 1))
    return (
        DQNConfig()
        .environment("game", env_config={"game": work.game}, clip_rewards=True)
        .env_runners(
            num_env_runners=num_runners,
            num_envs_per_env_runner=work.num_envs,
            rollout_fragment_length=num_steps,
            gym_env_vectorize_mode=gymnasium.VectorizeMode.SYNC,
        )
        .learners(num_learners=int(work.mode == "remote"))
        .training(
            lr=LEARNING_RATE,
            gamma=DISCOUNT,
            train_batch_size_per_learner=work.batch,
            training_intensity=num_updates * native_ratio,
            num_steps_sampled_before_learning_starts=work.learning_starts,
            target_network_update_freq=TARGET_PERIOD_UPDATES * work.batch // work.samples_per_step,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": work.capacity},
            epsilon=[(0, 1.0), (work.learning_starts, EPSILON)],
            n_step=1,
            double_q=False,
            dueling=False,
            num_atoms=1,
            grad_clip=MAX_GRAD_NORM,
            grad_clip_by="global_norm",
            td_error_loss_fn="huber",
        )
        .rl_module(model_config=model_config(work.network))
        .reporting(min_time_s_per_iteration=ITERATION_SECONDS, min_sample_timesteps_per_iteration=0)
    )


def fill(algo: DQN, capacity: int) -> None:
    """Fills the buffer with copies of random episodes."""

    def play(runner: Any) -> Any:
        return runner.sample(num_timesteps=NUM_RECORDED, random_actions=True)

    group = algo.env_runner_group
    recorded = [episode for found in group.foreach_env_runner(play) if found for episode in found]
    buffer, number = algo.local_replay_buffer, 0
    while buffer.get_num_timesteps() < capacity:
        for episode in recorded:
            episode.id_ = f"filled-{number}"
            number += 1
            buffer.add([episode])


def run(work: Work) -> None:
    reports = Reports(
        work,
        version=f"ray {version('ray')}, torch {torch.__version__}",
        note="Q-learning, Huber, TD errors out; float32 observations",
    )
    algo = make_config(work).build_algo()
    if work.fill:
        fill(algo, work.capacity)
    while True:
        algo.train()
        env_steps = algo.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        samples = algo.metrics.peek((LEARNER_RESULTS, ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), default=0)
        reports.step(int(env_steps), int(samples) // work.batch)


def main() -> None:
    work = read_work()
    torch.set_num_threads(work.threads)
    register_env("game", make_env)
    with tempfile.TemporaryDirectory(prefix="r") as directory, contextlib.suppress(KeyboardInterrupt):
        ray.init(address="local", include_dashboard=False, _temp_dir=directory, num_cpus=work.cores, log_to_driver=False)
        interrupt_on_sigterm()  # Ray has put a handler of its own there.
        try:
            run(work)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
