"""`qfleet evaluate`: plays a run's last checkpoint, and writes the result and a video."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from actors.environments import probe
from common.errors import UserError
from deploy import roles, run_dir
from deploy.video import record
from learner import checkpoint as checkpoints


def evaluate(
    path: Path, *, episodes: int, epsilon: float | None, seed: int | None, json_path: Path | None, video: Path | None
) -> int:
    """Evaluates the newest checkpoint of the run at `path`; returns the exit status."""
    config = run_dir.read_config(path)
    if epsilon is not None:
        config = replace(config, evaluation=replace(config.evaluation, epsilon=epsilon))
    if video is not None and video.suffix != ".mp4":
        raise UserError(f"--video {video}: the name must end in .mp4")
    for out in (json_path, video):
        if out is not None and (out.is_dir() or not os.access(out.resolve().parent, os.W_OK)):
            raise UserError(f"{out}: cannot be written; name a file in a directory that is there and yours")
    newest = run_dir.newest_checkpoint_path(path)
    if newest is None:
        raise UserError(f"{path} has no checkpoint yet: let qfleet train run for a minute")
    saved = checkpoints.read(newest)
    evaluator = roles.make_evaluator(config, probe(config.env), None)
    arrays = saved.tensors[config.learner.publish_params]
    evaluator.network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    evaluator.use_version(saved.meta["epoch"], saved.meta["updates"])
    seed = config.seed + 1 if seed is None else seed
    evaluator.start(episodes, seed)
    result = None
    while result is None:
        result = evaluator.run(60.0)
    evaluator.close()
    print(
        f"{config.env.game}: mean return {result.mean_return:.2f} over {result.episodes} episodes "
        f"(protocol {result.protocol}, epsilon {result.epsilon:g}, update {result.params_version:,})"
    )
    if json_path is not None:
        run_dir.write_json(json_path, asdict(result))
    if video is not None:
        episode_return = record(config.env, evaluator.network, video, epsilon=config.evaluation.epsilon, seed=seed)
        print(f"{video}: one episode of return {episode_return:g}")
    return 0
