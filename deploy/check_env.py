"""`qfleet check-env`: says in words what is wrong with an environment, and what to do about it.

First it plays the environment alone and looks at everything that it returns; then it plays it through actor, n-step, chunks and
replay, and the oracle compares what training would see with what the environment gave.
"""

from __future__ import annotations

import itertools
import math
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env as check_with_gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from actors.environments import GymnasiumEnvironment, VectorEnvironment, find_gymnasium, make_environment
from actors.oracle import RawLog
from actors.recording import Recorder
from actors.scripted import Outcome, ScriptedEnv
from common.config import ActorsConfig, EnvConfig, ExplorationConfig
from common.errors import UserError
from common.messages import Array
from deploy import roles
from deploy.path_check import PathReport, check_path

_NUM_REPRODUCED_STEPS = 50
_EXPLORE = ExplorationConfig(initial=1.0, final=1.0)


def check_env(game: str, *, n_step: int, frame_stack: int | None, steps: int, num_envs: int, seed: int) -> int:
    """Checks the environment, prints what was found, and returns the exit status: 0 all is right, 2 something is wrong.

    Args:
      game: a Gymnasium id, `module:Id-v0` too, or an Atari game as its ROM is named.
      n_step: steps of a transition.
      frame_stack: planes of a stack; None: 4 for an Atari game, else 1.
      steps: to play with each environment.
      num_envs: environments stepped together.
      seed: of the environments and of the random actions.
    """
    roles.limit_threads(1)
    try:
        config = EnvConfig(game=game)
        stack = frame_stack or (4 if config.is_atari else 1)
        config = EnvConfig(game=game, frame_stack=stack, life_loss_terminates=config.is_atari)
    except ValueError as error:
        raise UserError(str(error)) from error
    findings = Findings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium warns of much that is said better here.
        if not config.is_atari and find_gymnasium(game).entry_point is not None:
            EnvironmentCheck(game, findings, seed).run(steps)
        summary: list[str] = []
        if not findings.faults:
            summary = _check_transitions(config, findings, n_step=n_step, steps=steps, num_envs=num_envs, seed=seed)
    for sentence in findings.faults.values():
        print(f"wrong: {sentence}")
    for sentence in findings.warnings.values():
        print(f"warning: {sentence}")
    if findings.faults:
        num_faults = len(findings.faults)
        print(
            f"{game}: {num_faults} {'fault' if num_faults == 1 else 'faults'}; mend {'it' if num_faults == 1 else 'them'} first"
        )
        return 2
    for sentence in summary:
        print(sentence)
    return 0


class Findings:
    """What was found, one sentence for each kind, in the order in which it was met."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.warnings: dict[str, str] = {}

    def fault(self, kind: str, sentence: str) -> None:
        self.faults.setdefault(kind, sentence)

    def warn(self, kind: str, sentence: str) -> None:
        self.warnings.setdefault(kind, sentence)


class _Unusable(Exception):
    """The environment gave something after which it cannot be played on; its fault is written down."""


class _Step(NamedTuple):
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any

    @property
    def ended(self) -> bool:
        return bool(self.terminated or self.truncated)


class _End(NamedTuple):
    """How an episode ended."""

    observation: bytes
    goes_on: bool


class EnvironmentCheck:
    """Plays one environment alone, as Gymnasium makes it, and judges each value that it returns."""

    def __init__(self, game: str, findings: Findings, seed: int) -> None:
        self._game, self._findings, self._seed = game, findings, seed
        self._rng = np.random.default_rng(seed)
        self._last: tuple[str, Array, Array] | None = None  # Who returned an observation, the array itself, a copy of it.
        self._first_observations: set[bytes] = set()
        self._num_episodes, self._num_steps = 0, 0

    def run(self, steps: int) -> None:
        """Writes down what is wrong."""
        try:
            self._make()
            self._check_reset_is_reproducible()
            self._check_steps_are_reproducible()
            self._play(steps)
            self._call("close()", self._env.close)
        except _Unusable:
            return
        if not self._findings.faults:
            self._check_with_gymnasium()

    def _make(self) -> None:
        self._env = self._call("making it", lambda: gymnasium.make(self._game, disable_env_checker=True))
        self._spec = self._env.spec
        for name in ("observation_space", "action_space"):
            if not isinstance(getattr(self._env, name, None), gymnasium.Space):
                self._unusable(name, f"it has no {name}: set self.{name} in __init__, as in gymnasium.spaces")
        action_space, observation_space = self._env.action_space, self._env.observation_space
        if not isinstance(action_space, gymnasium.spaces.Discrete):
            raise UserError(f"{self._game} has the action space {action_space}: deep Q-learning needs a Discrete one")
        if not isinstance(observation_space, gymnasium.spaces.Box):
            raise UserError(
                f"{self._game} has the observation space {observation_space}: it must be a Box; wrap it to give one array"
            )
        self._num_actions, self._first_action = int(action_space.n), int(action_space.start)
        self._space = observation_space

    # What is done.

    def _check_reset_is_reproducible(self) -> None:
        first = self._reset(self._seed)
        self._step(self._first_action)
        if not _equal(first, self._reset(self._seed)):
            self._findings.fault(
                "reset seed",
                f"reset(seed={self._seed}) began in two different states: call super().reset(seed=seed) at the start of reset, "
                f"and draw from self.np_random only",
            )

    def _check_steps_are_reproducible(self) -> None:
        if "reset seed" in self._findings.faults or (self._spec is not None and self._spec.nondeterministic):
            return
        actions = [self._random_action() for _ in range(_NUM_REPRODUCED_STEPS)]
        runs = []
        for _ in range(2):
            self._reset(self._seed)
            run = []
            for action in actions:
                run.append(self._step(action))
                if run[-1].ended:
                    break
            runs.append(run)
        for number, (one, other) in enumerate(zip(*runs, strict=False), start=1):
            for name in _Step._fields:
                if not _equal(getattr(one, name), getattr(other, name)):
                    self._findings.fault(
                        "step seed",
                        f"the same seed and the same actions gave another {name} at step {number}: draw from self.np_random "
                        f"only, or register the environment with nondeterministic=True",
                    )
                    return

    def _play(self, steps: int) -> None:
        self._reset(self._seed)
        ends: list[_End] = []
        num_elsewhere = 0
        for _ in range(steps):
            step = self._step(self._random_action())
            num_elsewhere += step.observation.tobytes() not in self._first_observations
            if step.ended:
                ends.append(_End(step.observation.tobytes(), self._goes_on()))
                self._reset(None)
        if not ends:
            self._findings.warn(
                "no end",
                f"no episode ended within {steps} steps: give max_episode_steps when you register it, or raise --steps if its "
                f"episodes are that long",
            )
        elif num_elsewhere and all(end.goes_on and end.observation in self._first_observations for end in ends):
            self._findings.fault(
                "resets itself",
                "every episode ends with the first observation of one, and step() goes on after the end: it seems to reset by "
                "itself; return the observation that the last action led to, and leave the reset to the caller",
            )

    def _goes_on(self) -> bool:
        """Whether a step after the end is one like any other. It need not be possible."""
        self._last = None  # What that step returns is not looked at.
        try:
            result = self._env.step(np.int64(self._random_action()))
        except Exception:  # Whatever the environment raises there is right.
            return False
        return not (result[2] or result[3])

    def _check_with_gymnasium(self) -> None:
        """Gymnasium's own checker, for what qfleet can live with."""
        try:
            env = gymnasium.make(self._game, disable_env_checker=True)
            check_with_gymnasium(env.unwrapped, skip_render_check=True)
            env.close()
        except Exception as error:  # Assertions, and whatever else the environment raises.
            self._findings.warn("gymnasium", f"Gymnasium's own checker says: {_one_line(error)}")

    # What is returned.

    def _reset(self, seed: int | None) -> Array:
        name = "reset()" if seed is None else f"reset(seed={seed})"
        self._num_episodes, self._num_steps = self._num_episodes + 1, 0
        result = self._call(name, lambda: self._env.reset(seed=seed))
        if not isinstance(result, tuple) or len(result) != 2:
            self._unusable(
                "reset tuple",
                f"reset() returned {_kind(result)}, not (observation, info): return both, info may be an empty dict",
            )
        observation, info = result
        self._check_info("reset()", info)
        observation = self._checked("reset()", observation)
        self._first_observations.add(observation.tobytes())
        return observation

    def _step(self, action: int) -> _Step:
        self._num_steps += 1
        when = f" at step {self._num_steps} of episode {self._num_episodes}"
        result = self._call(f"step({action})", lambda: self._env.step(np.int64(action)), when)
        if not isinstance(result, tuple) or len(result) != 5:
            old = "; that was the API of the old gym" if isinstance(result, tuple) and len(result) == 4 else ""
            self._unusable(
                "step tuple",
                f"step() returned {_kind(result)}, not (observation, reward, terminated, truncated, info){old}",
            )
        observation, reward, terminated, truncated, info = result
        self._check_info("step()", info)
        self._check_reward(reward)
        for name, value in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(value, bool | np.bool_):
                self._findings.fault(name, f"step() returned {name} as {_kind(value)}: return bool({name})")
        return _Step(self._checked("step()", observation), reward, terminated, truncated)

    def _check_info(self, who: str, info: Any) -> None:
        if not isinstance(info, dict):
            self._findings.fault("info", f"{who} returned info as {_kind(info)}: return a dict, which may be empty")

    def _check_reward(self, reward: Any) -> None:
        if not isinstance(reward, int | float | np.integer | np.floating) or isinstance(reward, bool):
            self._findings.fault("reward type", f"step() returned the reward as {_kind(reward)}: return float(reward)")
        elif not math.isfinite(reward):
            self._findings.fault(
                "reward",
                f"step() returned the reward {reward}: rewards must be finite, and training ends at the first that is not",
            )

    def _checked(self, who: str, observation: Any) -> Array:
        """Judges an observation and the one before it; returns a copy."""
        space = self._space
        if space.shape == () and isinstance(observation, np.generic | int | float):
            observation = np.asarray(observation, space.dtype)
        if not isinstance(observation, np.ndarray):
            self._unusable(
                "observation type",
                f"{who} returned the observation as {_kind(observation)}: return a NumPy array of dtype {space.dtype}",
            )
        if observation.shape != space.shape:
            self._unusable(
                "observation shape",
                f"{who} returned an observation of shape {observation.shape}, observation_space says {space.shape}: make them agree",
            )
        if observation.dtype != space.dtype:
            self._findings.fault(
                "observation dtype",
                f"{who} returned an observation of dtype {observation.dtype}, observation_space says {space.dtype}: return "
                f"observation.astype(np.{space.dtype}), or declare the space so",
            )
        if observation.dtype.kind not in "biuf":
            raise _Unusable
        if not np.isfinite(observation).all():
            self._findings.fault("observation finite", f"{who} returned an observation that holds NaN or infinity")
        elif (observation < space.low).any() or (observation > space.high).any():
            outside = (observation < space.low) | (observation > space.high)
            where = tuple(int(i) for i in np.argwhere(outside)[0])
            self._findings.fault(
                "observation bounds",
                f"{who} returned an observation with the value {observation[where]:g} at {where or 'its only place'}, "
                f"observation_space says {space.low[where]:g} to {space.high[where]:g}: widen the space, or clip or scale",
            )
        if self._last is not None and not _equal(self._last[1], self._last[2]):
            self._findings.fault(
                "reused",
                f"the observation that {self._last[0]} returned was changed by the {who} after it: return a copy "
                f"(observation.copy()), since callers keep what they were given",
            )
        copy: Array = observation.copy()
        self._last = who, observation, copy
        return copy

    def _random_action(self) -> int:
        return self._first_action + int(self._rng.integers(self._num_actions))

    def _call(self, what: str, function: Callable[[], Any], when: str = "") -> Any:
        """Runs the user's code: what it raises becomes a sentence."""
        try:
            return function()
        except Exception as error:
            is_old = isinstance(error, TypeError) and what.startswith("reset") and "keyword argument" in str(error)
            advice = "; declare it as reset(self, *, seed=None, options=None)" if is_old else ""
            self._findings.fault("raised", f"{what} raised {_one_line(error)}{when}{advice}")
            raise _Unusable from error

    def _unusable(self, kind: str, sentence: str) -> None:
        self._findings.fault(kind, sentence)
        raise _Unusable


def _check_transitions(
    config: EnvConfig, findings: Findings, *, n_step: int, steps: int, num_envs: int, seed: int
) -> list[str]:
    """Plays the environment through the path of training; returns the lines of the summary."""
    actors = ActorsConfig(num_envs=num_envs, n_step=n_step, chunk_transitions=16, exploration=_EXPLORE)
    recorder = Recorder()
    try:
        environment = make_environment(config, num_envs, wrap=recorder.attach)
        report = _check_path(environment, recorder.logs, actors, steps, seed)
    except UserError:
        raise
    except Exception as error:
        findings.fault("path", f"playing {num_envs} environments at once raised {_one_line(error)}")
        return []
    if report.faults:
        control = _check_control(actors, config.frame_stack, seed)
        blame = (
            "a scripted environment came through right: look for state that its copies share, or observations that change later"
            if not control.faults
            else "a scripted environment came out wrong too: this is a bug of qfleet"
        )
        for number, sentence in enumerate(report.faults):
            findings.fault(f"path {number}", sentence)
        findings.fault("path", f"training would not see what the environment gave; {blame}")
    return _summary(config.game, environment, recorder.logs, report, n_step)


def _check_path(
    environment: VectorEnvironment, logs: Sequence[RawLog], actors: ActorsConfig, steps: int, seed: int
) -> PathReport:
    capacity = max(512, 2 * (actors.chunk_transitions + actors.n_step))
    return check_path([environment], logs, actors=actors, num_steps=steps, seed=seed, capacity=capacity)


def _check_control(actors: ActorsConfig, frame_stack: int, seed: int) -> PathReport:
    """The same check of an environment that is known to be right."""
    rng = np.random.default_rng(seed)
    script = [Outcome(float(rng.normal()), *(rng.random(2) < 0.1).tolist()) for _ in range(50)]
    makers = [lambda i=i: ScriptedEnv(script[i:], number=i) for i in range(actors.num_envs)]
    recorder = Recorder()
    envs = recorder.attach(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP))
    return _check_path(GymnasiumEnvironment(envs, frame_stack), recorder.logs, actors, 300, seed)


def _summary(game: str, environment: VectorEnvironment, logs: Sequence[RawLog], report: PathReport, n_step: int) -> list[str]:
    lengths, returns, rewards = [], [], []
    for log in logs:
        starts = [i for i, call in enumerate(log) if call.action is None]
        for start, end in itertools.pairwise(starts):
            lengths.append(end - start - 1)
            returns.append(sum(call.reward for call in log[start + 1 : end]))
        rewards += [call.reward for call in log if call.action is not None]
    spec = environment.spec
    kind = {"|u1": "u8", "<f4": "f32"}[spec.plane_dtype]
    episodes = (
        f"{len(lengths):,} episodes of {min(lengths)} to {max(lengths)} steps, returns {min(returns):g} to {max(returns):g}"
        if lengths
        else "no episode ended"
    )
    return [
        f"{game}: observations {kind}{list(spec.plane_shape)}, {spec.num_actions} actions; played at random for {len(rewards):,} "
        f"steps: {episodes}, rewards {min(rewards):g} to {max(rewards):g}",
        f"all right: {report.num_transitions:,} transitions (n = {n_step}, stacks of {spec.frame_stack}) came out of replay as the "
        f"environment gave them",
    ]


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, NaN to itself too."""
    is_float = isinstance(one, np.ndarray | np.generic | float) and np.asarray(one).dtype.kind == "f"
    return bool(np.array_equal(one, other, equal_nan=is_float))


def _kind(value: Any) -> str:
    """Names a value's type, as in 'a tuple of 4', 'None'."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _one_line(error: Exception) -> str:
    """The exception, and where in the user's code it was raised."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{where}"
