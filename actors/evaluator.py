"""The evaluator: plays full episodes with its own environments and reports raw returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from actors.environments import VectorEnvironment, make_environment, push_planes
from actors.policy import epsilon_greedy
from common import params as params_module
from common import wire
from common.config import EnvConfig, EvaluationConfig
from common.messages import Array, ParamsSnapshot
from common.metrics import EvaluationResult
from common.networks import QNetwork
from common.protocols import ParamsReader


class Evaluator:
    """Plays `episodes` episodes, a fixed number in each of its environments, so that short ones are not preferred.

    Environments are stepped one by one and only while they have episodes to play, so that one long game costs no more than
    itself; the forward pass is one batch. `start` begins, `run(seconds)` goes on and returns the result when all is played.
    Lives never end an episode here. A noisy network plays with its mean parameters. Called from one thread.
    """

    def __init__(
        self,
        *,
        env: EnvConfig,
        evaluation: EvaluationConfig,
        network: QNetwork,
        params: ParamsReader | None,
        make: Callable[[EnvConfig], VectorEnvironment] = lambda config: make_environment(config, 1),
    ) -> None:
        self._env = replace(env, life_loss_terminates=False)
        self._protocol = env.protocol_name  # Training's signal of lost lives is part of it.
        self._config, self.network, self._params, self._make = evaluation, network, params, make
        self._environments: list[VectorEnvironment] = []
        self._params_epoch, self._params_version = -1, 0
        self._games: list[_Game] = []

    @property
    def params_version(self) -> tuple[int, int]:
        """(epoch, version) of the parameters in use; epoch -1 before the first."""
        return self._params_epoch, self._params_version

    def pull_params(self, timeout_seconds: float) -> bool:
        """Takes the newest parameters, waiting for the store's answer; returns whether there are any."""
        assert self._params is not None, "this evaluator was given its parameters"
        message = self._params.fetch(self._params_epoch, self._params_version, timeout_seconds)
        if message is not None:
            snapshot = wire.unpack(message, ParamsSnapshot)
            params_module.load(self.network, snapshot)
            self._params_epoch, self._params_version = snapshot.epoch, snapshot.version
        return self._params_epoch >= 0

    def begin(self, episodes: int, seed: int, version: tuple[int, int] | None, timeout_seconds: float) -> None:
        """Pulls the newest parameters, waiting until they are at least of that (epoch, version), and starts.

        Raises:
          TimeoutError: where the store had none such in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.pull_params(max(deadline - time.monotonic(), 0.0)) or (
            version is not None and self.params_version < version
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {timeout_seconds:.0f} s for parameters {version}; the newest are {self.params_version}"
                )
            time.sleep(0.01)
        self.start(episodes, seed)

    def rest(self, seconds: float) -> None:
        """Does nothing for so long: the answer is a heartbeat."""
        time.sleep(seconds)

    def use_version(self, epoch: int, version: int) -> None:
        """Says which parameters the network was given from elsewhere."""
        self._params_epoch, self._params_version = epoch, version

    def start(self, episodes: int, seed: int) -> None:
        """Begins an evaluation of the parameters now held."""
        num_envs = min(episodes, self._config.num_envs)
        while len(self._environments) < num_envs:
            self._environments.append(self._make(self._env))
        quotas = [episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)]
        seeds = np.random.SeedSequence([seed, self._params_version]).generate_state(num_envs) >> 2
        self._rng = np.random.default_rng([seed, self._params_version])
        self._seed, self._started = seed, time.monotonic()
        self._games = [
            _Game(environment, int(env_seed), quota)
            for environment, env_seed, quota in zip(self._environments, seeds, quotas, strict=False)
        ]

    def run(self, seconds: float) -> EvaluationResult | None:
        """Plays on for about so many seconds; returns the result once every episode has ended, else None."""
        deadline = time.monotonic() + seconds
        while playing := [game for game in self._games if game.episodes_left]:
            if time.monotonic() >= deadline:
                return None
            with torch.inference_mode():
                stacks = torch.from_numpy(np.concatenate([game.stack for game in playing]))
                values = self.network(stacks).numpy()
            actions = epsilon_greedy(self._rng, values, self._config.epsilon)
            for game, action in zip(playing, actions, strict=True):
                game.step(action)
        returns = [episode_return for game in self._games for episode_return in game.returns]
        return EvaluationResult(
            mean_return=float(np.mean(returns)),
            episodes=len(returns),
            returns=returns,
            epsilon=self._config.epsilon,
            protocol=self._protocol,
            seed=self._seed,
            params_epoch=self._params_epoch,
            params_version=self._params_version,
            seconds=time.monotonic() - self._started,
        )

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class _Game:
    """One environment of the evaluator and the episodes that it still has to play."""

    def __init__(self, environment: VectorEnvironment, seed: int, episodes: int) -> None:
        self._environment = environment
        self.episodes_left = episodes
        self.returns: list[float] = []
        spec = environment.spec
        self.stack: Array = np.zeros((1, spec.frame_stack, *spec.plane_shape), np.dtype(spec.plane_dtype))
        self._return = 0.0
        push_planes(self.stack, environment.reset(seed), np.array([True]))

    def step(self, action: np.int64) -> None:
        result = self._environment.step(np.array([action]))
        begins = bool(result.is_first[0]) or result.final_planes is not None
        push_planes(self.stack, result.planes, np.array([begins]))
        if result.is_first[0]:
            return
        self._return += float(result.reward[0])
        if result.terminated[0] or result.truncated[0]:
            self.returns.append(self._return)
            self._return = 0.0
            self.episodes_left -= 1
