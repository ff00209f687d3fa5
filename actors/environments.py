"""Many copies of one environment behind one interface: Atari through ale-py's vector env, the rest through Gymnasium's.

Autoreset differs between them; here it is told apart once. `Step` says what an actor must know: which rows are transitions,
which observation to act on next, and where an episode's last observation is.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ale_py.roms
import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv

import actors.gridworld
from common.config import EnvConfig, EnvSpec
from common.errors import UserError
from common.messages import Array

actors.gridworld.register()

Wrap = Callable[[VectorEnv[Any, Any, Any]], VectorEnv[Any, Any, Any]]
"""What is put around the vector environment of ale-py or Gymnasium: a recorder, say."""


def _same(envs: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    return envs


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of E environments gave."""

    planes: Array
    """[E, *plane_shape] the newest observation, to act on next."""
    reward: Array
    """f64[E] as the environment gives it."""
    terminated: Array
    """bool[E] the step led to a terminal state; a lost life too, where so configured."""
    truncated: Array
    """bool[E] the episode was cut here, and its value goes on."""
    is_first: Array
    """bool[E] the step only began a new episode: no transition leads to `planes`."""
    final_planes: Array | None
    """[E, *plane_shape] the last observation of rows that ended, where `planes` is already that of a new episode; None
    where `planes` itself is the last one and the next step will be `is_first`."""
    episode_return: Array
    """f64[E] raw return of an episode that is over, reported once; NaN elsewhere."""

    def only_goes_on(self) -> bool:
        """Whether no episode began or ended, nor was a return reported."""
        return not (np.count_nonzero(self.terminated) or np.count_nonzero(self.truncated) or np.count_nonzero(self.is_first))


class VectorEnvironment(Protocol):
    """E copies of one environment."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seed: int) -> Array:
        """Begins an episode everywhere; returns planes [E, *plane_shape]."""

    def step(self, actions: Array) -> Step:
        """Takes i64[E] actions. A row that follows an ended one is `is_first`, and its action has no effect.

        What it returns stays as it is.
        """

    def close(self) -> None: ...


class AtariEnvironment:
    """ale-py's C++ vector env, one plane (the newest) a step, raw rewards, autoreset at the next step.

    A lost life, where it is a signal, is `life_loss_info`: the game goes on, so the next step is a real one. (`episodic_life`
    of ale-py would reset the game.) Whether a terminated row was reset is read off the episode's frame counter, since some
    games show zero lives while they still run; a truncated one always is.
    """

    def __init__(self, config: EnvConfig, num_envs: int, *, num_threads: int = 1, wrap: Wrap = _same) -> None:
        check_atari_game(config.game)
        self._envs = wrap(
            AtariVectorEnv(
                config.game,
                num_envs,
                num_threads=min(num_threads, num_envs),
                max_num_frames_per_episode=config.max_episode_frames,
                repeat_action_probability=config.sticky_action_probability,
                full_action_space=config.full_action_set,
                autoreset_mode=AutoresetMode.NEXT_STEP,
                stack_num=1,
                frameskip=config.frame_skip,
                noop_max=config.noop_max,
                use_fire_reset=config.fire_reset,
                life_loss_info=config.life_loss_terminates,
                episodic_life=False,
                reward_clipping=False,
            )
        )
        self.num_envs = num_envs
        self.spec = EnvSpec(
            (84, 84), "|u1", config.frame_stack, int(cast(gymnasium.spaces.Discrete, self._envs.single_action_space).n)
        )
        self._ended = np.zeros(num_envs, bool)
        self._truncated = np.zeros(num_envs, bool)
        self._frame_number = np.zeros(num_envs, np.int64)
        self._returns = np.zeros(num_envs)
        self._no_returns = np.full(num_envs, np.nan)

    def reset(self, seed: int) -> Array:
        planes, info = self._envs.reset(seed=seed)
        self._ended[:] = False
        self._truncated[:] = False
        self._returns[:] = 0
        self._frame_number = info["episode_frame_number"].astype(np.int64)
        return np.asarray(planes[:, 0])

    def step(self, actions: Array) -> Step:
        planes, reward, terminated, truncated, info = self._envs.step(np.asarray(actions, np.int64))
        frame_number = info["episode_frame_number"].astype(np.int64)
        if self._ended.any():
            is_first = self._ended & (self._truncated | (frame_number <= self._frame_number))
            episode_return = np.where(is_first, self._returns, np.nan)
            self._returns = np.where(is_first, 0.0, self._returns + reward)
        else:
            is_first, episode_return = np.zeros(self.num_envs, bool), self._no_returns
            self._returns += reward
        self._ended, self._truncated, self._frame_number = terminated | truncated, truncated, frame_number
        return Step(planes[:, 0], reward.astype(np.float64), terminated, truncated, is_first, None, episode_return)

    def close(self) -> None:
        self._envs.close()


class GymnasiumEnvironment:
    """Any Gymnasium vector environment with Discrete actions and a Box observation, in each of its autoreset modes."""

    def __init__(self, envs: VectorEnv[Any, Any, Any], frame_stack: int) -> None:
        self._envs = envs
        self.num_envs = envs.num_envs
        self.spec = _gymnasium_spec(envs, frame_stack)
        self._first_action = int(getattr(envs.single_action_space, "start", 0))
        self._mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._ended = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)

    def reset(self, seed: int) -> Array:
        observations, _ = self._envs.reset(seed=seed)
        self._ended[:] = False
        self._returns[:] = 0
        return self._planes(observations)

    def step(self, actions: Array) -> Step:
        observations, reward, terminated, truncated, info = self._envs.step(np.asarray(actions) + self._first_action)
        reward = np.array(reward, np.float64)  # A copy, too.
        ended = np.asarray(terminated | truncated)
        if self._mode is AutoresetMode.NEXT_STEP:
            is_first, final = self._ended, None
            episode_return = np.where(is_first, self._returns, np.nan)
            self._returns = np.where(is_first, 0.0, self._returns + reward)
            self._ended = ended
        else:
            is_first, final = np.zeros(self.num_envs, bool), None
            episode_return = np.where(ended, self._returns + reward, np.nan)
            self._returns = np.where(ended, 0.0, self._returns + reward)
            if ended.any():
                final, observations = self._final_and_next(observations, ended, info)
        return Step(self._planes(observations), reward, terminated, truncated, is_first, final, episode_return)

    def render(self) -> Array:
        """Returns the u8[H, W, 3] picture of the first environment, which must have been made to render."""
        frames: Any = self._envs.render()
        return np.asarray(frames[0], np.uint8)

    def close(self) -> None:
        self._envs.close()

    def _final_and_next(self, observations: Any, ended: Array, info: dict[str, Any]) -> tuple[Array, Any]:
        """Returns (final planes, observations to act on) where the environment does not wait for the next step to reset."""
        if self._mode is AutoresetMode.DISABLED:
            final = self._planes(observations)
            observations, _ = self._envs.reset(options={"reset_mask": ended})
            return final, observations
        if "final_obs" not in info:
            raise UserError(
                "the vector environment begins the next episode in the same step, but gives no info['final_obs']: give the last "
                "observations there, or declare autoreset_mode NEXT_STEP in its metadata and reset one step later"
            )
        final = self._planes(observations).copy()
        for row in np.flatnonzero(ended):
            final[row] = np.asarray(info["final_obs"][row], dtype=final.dtype)
        return final, observations

    def _planes(self, observations: Any) -> Array:
        planes = np.array(observations, dtype=np.dtype(self.spec.plane_dtype))  # A copy: some environments reuse theirs.
        return planes.reshape(-1, *self.spec.plane_shape)


def make_environment(
    config: EnvConfig, num_envs: int, *, num_threads: int = 1, render: bool = False, wrap: Wrap = _same
) -> VectorEnvironment:
    """Builds the environment that the configuration names.

    Raises:
      UserError: for an unknown game (with the nearest one), continuous actions or a structured observation.
    """
    if config.is_atari:
        return AtariEnvironment(config, num_envs, num_threads=num_threads, wrap=wrap)
    try:
        gymnasium_spec = find_gymnasium(config.game)
        has_scalar = gymnasium_spec.entry_point is not None
        kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
        envs = gymnasium.make_vec(
            config.game,
            num_envs,
            vectorization_mode="sync" if has_scalar else "vector_entry_point",
            vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP} if has_scalar else None,
            **kwargs,
        )
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"environment {config.game!r} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        text = " ".join(str(error).split())
        raise UserError(f"environment {config.game!r} cannot be made: {text}") from error
    return GymnasiumEnvironment(wrap(envs), config.frame_stack)


def find_gymnasium(game: str) -> gymnasium.envs.registration.EnvSpec:
    """Returns what Gymnasium knows of an id; `module:Id-v0` imports the module first, which registers it.

    Raises:
      UserError: for a module that cannot be imported, or an unknown id (with the nearest one).
    """
    module, _, name = game.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # The user's module may raise anything.
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == module
        advice = "put its directory on PYTHONPATH, or install it" if is_absent else "mend that module"
        raise UserError(
            f"environment {game!r}: importing {module!r} raised {type(error).__name__}: {error}; {advice}"
        ) from error
    try:
        return gymnasium.spec(name)
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(f"unknown environment {game!r}{_nearest(name, list(gymnasium.registry))}") from error


def push_planes(stacks: Array, planes: Array, is_first: Array | None = None, rows: Array | slice = slice(None)) -> None:
    """Adds the newest plane to each stack of `rows`, in place; a stack that begins an episode is zero before it.

    Args:
      stacks: [E, K, *plane_shape].
      planes: [E, *plane_shape].
      is_first: bool[E], among `rows`. None: of no stack.
      rows: which stacks; all unless said.
    """
    stacks[rows, :-1] = stacks[rows, 1:]
    stacks[rows, -1] = planes[rows]
    if is_first is not None:
        stacks[is_first, :-1] = 0


def check_atari_game(game: str) -> None:
    """Raises UserError, with the nearest name, unless ale-py has the game."""
    games = ale_py.roms.get_all_rom_ids()
    if game not in games:
        raise UserError(f"unknown game {game!r}{_nearest(game, games)}; Gymnasium environments end in their version, -v1")


def probe(config: EnvConfig) -> EnvSpec:
    """Builds one environment to learn its spec; raises UserError as `make_environment` does."""
    environment = make_environment(config, 1)
    environment.close()
    return environment.spec


def _nearest(name: str, known: list[str]) -> str:
    lowered = {k.lower(): k for k in known}
    simple = name.lower().removeprefix("ale/").split("-v")[0] if name not in known else name
    close = difflib.get_close_matches(name.lower(), lowered, 1, 0.5) or difflib.get_close_matches(simple, lowered, 1, 0.5)
    return f": did you mean {lowered[close[0]]!r}?" if close else ""


def _gymnasium_spec(envs: VectorEnv[Any, Any, Any], frame_stack: int) -> EnvSpec:
    name = envs.spec.id if envs.spec else "the environment"
    action_space, observation_space = envs.single_action_space, envs.single_observation_space
    if not isinstance(action_space, gymnasium.spaces.Discrete):
        raise UserError(f"{name} has the action space {action_space}: deep Q-learning needs a Discrete one")
    if not isinstance(observation_space, gymnasium.spaces.Box):
        raise UserError(f"{name} has the observation space {observation_space}: it must be a Box; wrap it to give one array")
    dtype = "|u1" if observation_space.dtype == np.uint8 else "<f4"
    shape = tuple(int(n) for n in observation_space.shape) or (1,)
    return EnvSpec(shape, dtype, frame_stack, int(action_space.n))
