"""`qfleet evaluate`: plays a run's last checkpoint, and writes the result and a video."""

from __future__ import annotations

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
    for out in (json_path, video):
        if out is not None and not out.resolve().parent.is_dir():
            raise UserError(f"{out}: there is no directory {out.resolve().parent}")
    newest = run_dir.newest_checkpoint_path(path)
    if newest is None:
        raise UserError(f"{path} has no checkpoint yet: let qfleet train run for a minute")
    saved = checkpoints.read(newest)
    evaluator = roles.make_evaluator(config, probe(config.env), None)
    arrays = saved.tensors["online"]
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
