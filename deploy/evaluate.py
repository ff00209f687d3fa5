"""`qfleet evaluate`: plays a run's last checkpoint, and writes the result and a video."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from actors.environments import probe
from common.config import EnvConfig, ProtocolName
from common.errors import UserError
from deploy import roles, run_dir
from deploy.human_scores import human_normalized_score
from deploy.progress import Progress
from deploy.protocol_card import make_card, mismatches
from deploy.video import record
from learner import checkpoint as checkpoints


def evaluate(
    path: Path,
    *,
    protocol: ProtocolName | None,
    episodes: int,
    epsilon: float | None,
    seed: int | None,
    json_path: Path | None,
    video: Path | None,
) -> int:
    """Evaluates the newest checkpoint of the run at `path`; returns the exit status."""
    commit = run_dir.commit()
    config = run_dir.read_config(path)
    if epsilon is not None:
        config = replace(config, evaluation=replace(config.evaluation, epsilon=epsilon))
    if video is not None and video.suffix != ".mp4":
        raise UserError(f"--video {video}: the name must end in .mp4")
    for out in (json_path, video):
        if out is not None and (out.is_dir() or not os.access(out.resolve().parent, os.W_OK)):
            raise UserError(f"{out}: cannot be written; name a file in a directory that is there and yours")
    spec = probe(config.env)
    env = config.env if protocol is None else _environment_under(config.env, protocol, spec.num_actions)
    warnings = [] if protocol is None else mismatches(config.env, env, protocol, spec.num_actions)
    newest = run_dir.newest_checkpoint_path(path)
    if newest is None:
        raise UserError(f"{path} has no checkpoint yet: let qfleet train run for a minute")
    saved = checkpoints.read(newest)
    evaluator = roles.make_evaluator(replace(config, protocol=None, env=env), spec, None)
    arrays = saved.tensors[config.learner.publish_params]
    evaluator.network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    evaluator.use_version(saved.meta["epoch"], saved.meta["updates"])
    seed = config.seed + 1 if seed is None else seed
    evaluator.start(episodes, seed)
    result = None
    while result is None:
        result = evaluator.run(60.0)
    evaluator.close()
    card = make_card(
        config,
        result,
        env=env,
        num_actions=spec.num_actions,
        training_frames=Progress(config, dict(saved.meta)).frames,
        commit=commit,
        warnings=warnings,
    )
    score = human_normalized_score(env.game, result.mean_return)
    print(
        f"{env.game}: mean return {result.mean_return:.2f} over {result.episodes} episodes "
        f"(protocol {result.protocol}, epsilon {result.epsilon:g}, update {result.params_version:,})"
        + ("" if score is None else f"; human-normalized {score:.2f}")
    )
    for warning in card.warnings:
        print(f"protocol: {warning}")
    if json_path is not None:
        run_dir.write_json(json_path, asdict(result) | {"human_normalized_score": score, "protocol_card": asdict(card)})
    if video is not None:
        episode_return = record(env, evaluator.network, video, epsilon=config.evaluation.epsilon, seed=seed)
        print(f"{video}: one episode of return {episode_return:g}")
    return 0


def _environment_under(trained: EnvConfig, protocol: ProtocolName, num_actions: int) -> EnvConfig:
    """Returns the protocol's environment for a network that was trained in another one, whose actions its outputs keep."""
    env = replace(trained.with_protocol(protocol), life_loss_terminates=trained.life_loss_terminates)
    if probe(env).num_actions == num_actions:  # In a game that uses all 18 actions, both sets are the same.
        return env
    return replace(env, full_action_set=trained.full_action_set)
