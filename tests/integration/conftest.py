"""Scripted environments behind recorders, ready for the whole path."""

from __future__ import annotations

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from actors.environments import GymnasiumEnvironment
from actors.recording import Recorder
from actors.scripted import ScriptedEnv
from common.config import ActorsConfig, ExplorationConfig
from deploy.path_check import check_path

torch.set_num_threads(1)  # As in an actor's process.


@pytest.fixture(scope="session")
def play_path():
    return run_scripts


def run_scripts(
    scripts,
    *,
    mode=AutoresetMode.NEXT_STEP,
    num_actors=1,
    frame_stack=4,
    pixels=(6, 5),
    num_steps=80,
    n_step=3,
    discount=0.9,
    reward_clip=2.0,
    terminal_reward=None,
    chunk_transitions=5,
    chunk_bytes=90_000,
    **settings,
):
    """Plays one environment for each script, dealt out to the actors; returns (report, logs)."""
    num_envs = len(scripts) // num_actors
    recorder, environments = Recorder(), []
    for actor in range(num_actors):
        numbers = range(actor * num_envs, (actor + 1) * num_envs)
        makers = [lambda i=i: ScriptedEnv(scripts[i], number=i, pixels=pixels) for i in numbers]
        # copy=False: the vector environment writes into one buffer, step after step.
        vector = SyncVectorEnv(makers, copy=False, autoreset_mode=mode)
        environments.append(GymnasiumEnvironment(recorder.attach(vector), frame_stack))
    actors = ActorsConfig(
        num_envs=num_envs,
        n_step=n_step,
        discount=discount,
        reward_clip=reward_clip,
        terminal_reward=terminal_reward,
        chunk_transitions=chunk_transitions,
        chunk_bytes=chunk_bytes,
        exploration=ExplorationConfig(initial=1.0, final=1.0),
    )
    report = check_path(environments, recorder.logs, actors=actors, num_steps=num_steps, **settings)
    return report, recorder.logs
