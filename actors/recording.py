"""Writes down what environments really give: between them and the code that steps them, for the oracle."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from actors.oracle import RawLog, RawStep
from common.messages import Array


class Recorder:
    """Holds the logs of the environments that it is attached to.

    Single environments are recorded one by one, below the vector environment that steps and resets them; those that exist
    only as a vector (ale-py's, and vector entry points) are recorded around it, by the documented meaning of their autoreset.
    """

    def __init__(self) -> None:
        self.logs: list[RawLog] = []

    def attach(self, envs: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
        """Returns what to use in the place of `envs`; its logs are added to those held."""
        logs: list[RawLog] = [[] for _ in range(envs.num_envs)]
        self.logs += logs
        if isinstance(envs, SyncVectorEnv):
            envs.envs = [RecordingEnv(env, log) for env, log in zip(envs.envs, logs, strict=True)]
            return envs
        return RecordingVectorEnv(envs, logs)


class RecordingEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Passes all calls on and writes them down; an assertion holds that no ended episode is stepped on."""

    def __init__(self, env: gymnasium.Env[Any, Any], log: RawLog) -> None:
        super().__init__(env)
        self._log = log
        self._first_action = _first_action(env.action_space)
        self._ended = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._log.append(RawStep(np.array(observation), None))
        self._ended = False
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        assert not self._ended, "an environment was stepped on after the end of its episode"
        observation, reward, terminated, truncated, info = self.env.step(action)
        taken = int(action) - self._first_action
        self._log.append(RawStep(np.array(observation), taken, float(reward), bool(terminated), bool(truncated)))
        self._ended = bool(terminated or truncated)
        return observation, reward, terminated, truncated, info


class RecordingVectorEnv(VectorWrapper[Any, Any, Any, Any, Any]):
    """Passes all calls on and writes them down, environment by environment."""

    def __init__(self, env: VectorEnv[Any, Any, Any], logs: list[RawLog]) -> None:
        super().__init__(env)
        self._logs = logs
        self._first_action = _first_action(env.single_action_space)
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._frame_numbers: Array | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = None if options is None else options.get("reset_mask")  # Gymnasium takes it out of the options.
        observations, info = self.env.reset(seed=seed, options=options)
        self._frame_numbers = _frame_numbers(info)
        for row, log in enumerate(self._logs):
            if mask is None or mask[row]:
                log.append(RawStep(np.array(observations[row]), None))
        return observations, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        frame_numbers = _frame_numbers(info)
        for row, log in enumerate(self._logs):
            observation = np.array(observations[row])
            if self._mode is AutoresetMode.NEXT_STEP and self._was_reset(row, log[-1], frame_numbers):
                log.append(RawStep(observation, None))
                continue
            action = int(actions[row]) - self._first_action
            ended = bool(terminated[row] or truncated[row])
            begins = ended and self._mode is AutoresetMode.SAME_STEP and "final_obs" in info
            last = np.array(info["final_obs"][row]) if begins else observation
            log.append(RawStep(last, action, float(rewards[row]), bool(terminated[row]), bool(truncated[row])))
            if begins:
                log.append(RawStep(observation, None))
        self._frame_numbers = frame_numbers
        return observations, rewards, terminated, truncated, info

    def _was_reset(self, row: int, last: RawStep, frame_numbers: Array | None) -> bool:
        """Whether this call only began an episode. Atari's frame counter tells a lost life, after which the game goes on."""
        if last.truncated or not last.terminated or frame_numbers is None or self._frame_numbers is None:
            return last.terminated or last.truncated
        return bool(frame_numbers[row] <= self._frame_numbers[row])


def _frame_numbers(info: dict[str, Any]) -> Array | None:
    numbers = info.get("episode_frame_number")
    return None if numbers is None else np.array(numbers)


def _first_action(space: Any) -> int:
    return int(getattr(space, "start", 0))
