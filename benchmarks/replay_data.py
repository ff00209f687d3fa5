"""Real Atari transitions for the replay benchmark, collected once per game and kept as .npy files that can be memory-mapped.

    python benchmarks/replay_data.py [--games pong ms_pacman] [--items 60000] [--seed 0]

A random policy plays 8 environments; `NStepBuilder` makes transitions of 3 steps, with the discount 0.99 and rewards clipped
to [-1, 1]. Files in build/bench-replay/GAME/, with F planes and T transitions:

    planes.npy       u8[F, 84, 84]  plane 0 is all zero and stands for the time before an episode; then each environment's
                                    planes, in time order, one environment after another
    s_tm1.npy        i4[T, 4]       planes of the stack before the action, oldest first
    s_t.npy          i4[T, 4]       planes of the stack 3 steps later, fewer at the end of an episode
    a_tm1.npy        i4[T]
    r_t.npy          f4[T]          discounted sum of the clipped rewards
    discount_t.npy   f4[T]          0 after a terminal state
    priority.npy     f8[T]          random, positive
    env.npy          i2[T]

Each environment gives equally many transitions, its first ones. They are interleaved in blocks of 256: block 0 of
environment 0, block 0 of environment 1, ..., block 1 of environment 0, ...; within a block they are in time order.

For replay buffers that take single steps, with one row per plane:

    step_action.npy      i4[F]    the action taken on seeing the plane, -1 where none was
    step_reward.npy      f4[F]    the clipped reward of that action
    step_terminated.npy  bool[F]  it led to a terminal state
    step_truncated.npy   bool[F]  it led to where the episode was cut
    step_is_first.npy    bool[F]  the plane begins an episode
    step_env.npy         i2[F]    -1 for plane 0
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.environments import make_environment
from actors.n_step import NStepBuilder, Transitions
from common.config import EnvConfig
from common.messages import Array

ROOT = Path("build/bench-replay")
GAMES = ("pong", "ms_pacman")
NUM_ENVS = 8
BLOCK = 256
STACK = 4


@dataclass(frozen=True)
class Recipe:
    """All that the data depend on."""

    game: str
    num_items: int = 60_000
    seed: int = 0
    num_envs: int = NUM_ENVS
    n_step: int = 3
    discount: float = 0.99
    reward_clip: float = 1.0


def collect(recipe: Recipe, root: Path = ROOT) -> Path:
    """Returns the directory of the game's data, which are collected first unless they are there."""
    directory = root / recipe.game
    marker = directory / "recipe.json"
    if not marker.exists() or json.loads(marker.read_text()) != asdict(recipe):
        directory.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        for name, array in _play(recipe).items():
            np.save(directory / f"{name}.npy", array)
        marker.write_text(json.dumps(asdict(recipe)))
    return directory


def _play(recipe: Recipe) -> dict[str, Array]:
    """Returns the files' arrays by name."""
    num_envs = recipe.num_envs
    per_env = -(-recipe.num_items // num_envs)
    rng = np.random.default_rng(recipe.seed)
    environment = make_environment(EnvConfig(game=recipe.game, frame_stack=STACK), num_envs, num_threads=2)
    builder = NStepBuilder(
        num_envs=num_envs,
        n_step=recipe.n_step,
        discount=recipe.discount,
        reward_clip=recipe.reward_clip,
        terminal_reward=None,
    )
    planes = [environment.reset(recipe.seed)]
    steps: list[dict[str, Array]] = []
    parts: list[Transitions] = []
    num_made = np.zeros(num_envs, np.int64)
    while num_made.min() < per_env:
        action = rng.integers(environment.spec.num_actions, size=num_envs)
        result = environment.step(action)
        source = np.full(num_envs, len(steps))
        planes.append(result.planes)
        made = builder.add(
            source=source,
            a_tm1=action,
            extra=np.zeros(num_envs),
            reward=result.reward,
            terminated=result.terminated,
            truncated=result.truncated,
            destination=source + 1,
            is_transition=~result.is_first,
        )
        num_made += np.bincount(made.env, minlength=num_envs)
        parts.append(made)
        steps.append(
            {
                "action": np.where(result.is_first, -1, action),
                "reward": np.clip(result.reward, -recipe.reward_clip, recipe.reward_clip),
                "terminated": result.terminated,
                "truncated": result.truncated,
                "is_first": result.is_first,
            }
        )
    environment.close()
    streams = _streams(steps)
    return {
        "planes": _by_env(np.stack(planes, axis=1), np.uint8(0)),
        **streams,
        **_transitions(parts, num_planes=len(planes), is_first=streams["step_is_first"], num_items=recipe.num_items, rng=rng),
    }


def _by_env(array: Array, before: np.generic) -> Array:
    """Lays [E, P, ...] out by environment, with the row of plane 0, full of `before`, ahead."""
    flat = array.reshape(-1, *array.shape[2:])
    return np.concatenate([np.full_like(flat[:1], before), flat])


def _streams(steps: list[dict[str, Array]]) -> dict[str, Array]:
    """Returns the files with one row per plane. Step i leads from plane i to plane i + 1 of its environment."""

    def of_source(name: str, nothing: float, dtype: type) -> Array:
        values = np.stack([step[name] for step in steps] + [np.full(len(steps[0][name]), nothing)], axis=1)
        return _by_env(values.astype(dtype), dtype(nothing))

    num_envs = len(steps[0]["action"])
    is_first = np.stack([np.ones(num_envs, bool)] + [step["is_first"] for step in steps], axis=1)
    env = np.repeat(np.arange(num_envs, dtype=np.int16)[:, None], len(steps) + 1, axis=1)
    return {
        "step_action": of_source("action", -1, np.int32),
        "step_reward": of_source("reward", 0, np.float32),
        "step_terminated": of_source("terminated", False, np.bool_),
        "step_truncated": of_source("truncated", False, np.bool_),
        "step_is_first": _by_env(is_first, np.bool_(False)),
        "step_env": _by_env(env, np.int16(-1)),
    }


def _transitions(
    parts: list[Transitions], *, num_planes: int, is_first: Array, num_items: int, rng: np.random.Generator
) -> dict[str, Array]:
    """Returns the files with one row per transition, each environment's first ones, interleaved in blocks."""
    fields = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("env", "source", "destination", "a_tm1", "r_t", "discount_t")
    }
    order = _interleaved(fields["env"], num_items)
    fields = {name: values[order] for name, values in fields.items()}
    begin = np.maximum.accumulate(np.where(is_first, np.arange(len(is_first)), 0))  # First plane of the plane's episode.
    offset = 1 + fields["env"] * num_planes
    return {
        "s_tm1": _stacks(offset + fields["source"], begin),
        "s_t": _stacks(offset + fields["destination"], begin),
        "a_tm1": fields["a_tm1"].astype(np.int32),
        "r_t": fields["r_t"].astype(np.float32),
        "discount_t": fields["discount_t"].astype(np.float32),
        "priority": rng.gamma(2.0, 0.5, size=num_items) + 0.01,
        "env": fields["env"].astype(np.int16),
    }


def _interleaved(env: Array, num_items: int) -> Array:
    """Returns the order, i64[num_items], of blocks of environments in turn; `env` is in time order."""
    rank = np.zeros(len(env), np.int64)  # Of a transition within its environment.
    for e in np.unique(env):
        rank[env == e] = np.arange(np.count_nonzero(env == e))
    order = np.lexsort((rank, env, rank // BLOCK))
    per_env = -(-num_items // len(np.unique(env)))
    return order[rank[order] < per_env][:num_items]


def _stacks(newest: Array, begin: Array) -> Array:
    """Returns i4[T, 4]: the planes up to `newest`, plane 0 where they would be of an earlier episode."""
    planes = newest[:, None] + np.arange(1 - STACK, 1)
    return np.where(planes >= begin[newest][:, None], planes, 0).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", nargs="+", default=list(GAMES))
    parser.add_argument("--items", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for game in arguments.games:
        print(collect(Recipe(game=game, num_items=arguments.items, seed=arguments.seed)))


if __name__ == "__main__":
    main()
