"""The actor: steps its environments epsilon-greedily, builds n-step transitions with first priorities, sends chunks."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.chunks import ChunkBuilder
from actors.environments import Step, VectorEnvironment, push_planes
from actors.n_step import NStepBuilder, Transitions
from actors.policy import epsilon_greedy
from common import params as params_module
from common import random_state, schedules, wire
from common.config import ActorsConfig
from common.errors import NonFiniteError, UserError
from common.messages import Array, ParamsSnapshot, TransitionChunk
from common.metrics import ActorStats, PushCounts
from common.networks import QNetwork
from common.priorities import priority
from common.protocols import ParamsReader, ReplayWriter
from common.timing import PhaseClock, usage
from common.value_rescaling import IDENTITY_PAIR, SIGNED_HYPERBOLIC_PAIR

_KEPT_STATS = ("env_steps", "sent", "params_epoch", "params_version", "epsilon")


class Actor:
    """One actor slot: E environments, one batched forward pass a step.

    `step()` does one vector step and never blocks; `run(seconds)` loops and waits where replay asks it to. Called from one
    thread. Epsilon and seeds belong to the slot, so a replacement goes on where the slot was.

    A noisy network gets fresh noise at every step, as published (Fortunato et al. 2018, section 3.1: drawn anew before each action), and
    for each environment its own, so that the environments of one actor explore differently; that is cheap, since the noisy
    layers never build their parameters. The noise comes from a stream of its own. First priorities are of the noisy values acted on.
    """

    def __init__(
        self,
        *,
        config: ActorsConfig,
        environment: VectorEnvironment,
        network: QNetwork,
        replay: ReplayWriter,
        params: ParamsReader,
        run: str,
        slot: int,
        incarnation: int,
        seed: int,
        env_steps: int,
        priority_floor: float,
        keeps_actions: bool = False,
    ) -> None:
        """`keeps_actions`: so that `state` can be asked for; two bytes for each step of each environment, for ever."""
        self._config, self._environment, self._network = config, environment, network
        self._replay, self._params = replay, params
        self._run, self._slot, self._incarnation = run, slot, incarnation
        self._priority_floor = priority_floor
        self._clock = PhaseClock()
        seeds = np.random.SeedSequence([seed, slot, incarnation])
        self._rng = np.random.default_rng(seeds)
        self._noise_generator = torch.Generator().manual_seed(int(seeds.spawn(1)[0].generate_state(1, np.uint64)[0]))
        self._noise: Tensor | None = None  # Of this step, a row for each environment.
        self._rescaling = SIGNED_HYPERBOLIC_PAIR if network.value_rescaling else IDENTITY_PAIR
        num_envs, spec = environment.num_envs, environment.spec
        self._n_step = NStepBuilder(
            num_envs=num_envs,
            n_step=config.n_step,
            discount=config.discount,
            reward_clip=config.reward_clip,
            terminal_reward=config.terminal_reward,
        )
        history = config.n_step + spec.frame_stack + 4
        self._chunks = [ChunkBuilder(spec, history=history, clock=self._clock) for _ in range(num_envs)]
        self._pending: tuple[Transitions, Array, dict[int, float]] | None = None
        # The run: the steps since anything began or ended in any environment, or since a chunk may have been full. What they take is
        # little as long as they only wait here, and what is made of them is made at once: arrays of one step are too small for NumPy.
        self._run_steps: list[tuple[Array, Array, Array]] = []  # a_tm1 i64[E], values f32[E, A], reward f64[E].
        self._num_until_full = config.chunk_transitions  # So many steps fill no chunk yet.
        self._outbox: deque[TransitionChunk] = deque()
        self._num_packed_chunks = 0
        self._num_packed = 0
        self._num_steps = 0
        self._returns: list[float] = []
        self._actions: bytearray | None = bytearray() if keeps_actions else None  # i16[steps, E]
        self._published: float | None = None  # When the parameters in use were, on this process's monotonic clock.
        self._age_seconds, self._num_aged_steps = 0.0, 0  # Sum over the steps since the last report, and how many.
        self._stats = ActorStats(
            slot=slot,
            incarnation=incarnation,
            env_steps=env_steps,
            sent=0,
            pushed=PushCounts(),
            params_epoch=-1,
            params_version=0,
            epsilon=1.0,
        )
        self._environments = np.arange(num_envs)
        self._stacks = np.zeros((num_envs, spec.frame_stack, *spec.plane_shape), np.dtype(spec.plane_dtype))
        self._plane = np.full(num_envs, -1, np.int64)  # Number of the newest plane of each environment.
        self._first = np.zeros(num_envs, np.int64)  # Number of the plane with which its episode began.
        self._env_seed = int(seeds.generate_state(1)[0] >> 2)
        planes = environment.reset(self._env_seed)
        self._push_planes(planes, np.ones(num_envs, bool))

    @property
    def slot(self) -> int:
        return self._slot

    @property
    def env_steps(self) -> int:
        return self._stats.env_steps

    def run(self, seconds: float) -> ActorStats:
        """Steps for about so many seconds, pausing where replay asks for it; returns the statistics.

        However slow the environments and however long the pause, it looks for newer parameters: its version tells that it can.
        """
        deadline = time.monotonic() + seconds
        self._stats.waits_for = None
        self._pull_params()
        while (rest := deadline - time.monotonic()) > 0:
            if self.send_waiting(min(rest, 0.5)):
                self.step()
            else:
                self._pull_params()
        return self.stats()

    def send_waiting(self, timeout_seconds: float) -> bool:
        """Sends the chunks that are ready; returns whether to act on.

        For answers alone it does not stand still: while replay asks for no pause, a chunk of each environment may wait to be sent.
        """
        while True:
            since = time.monotonic()
            with self._clock("push_wait"):
                waits_for = self._replay.wait_until_ready(0.0 if self._acts_meanwhile() else timeout_seconds)
            self._stats.waiting_seconds += time.monotonic() - since
            if waits_for is not None:
                if self._acts_meanwhile():
                    return True
                self._stats.waits_for = waits_for
                return False
            if not self._outbox:
                return True
            with self._clock("push"):
                num_pushed = self._replay.push(self._outbox)
            for _ in range(num_pushed):
                self._stats.sent += self._outbox.popleft().num_transitions

    def _acts_meanwhile(self) -> bool:
        return len(self._outbox) <= self._environment.num_envs and not self._replay.asks_for_pause()

    def step(self) -> None:
        """Acts once in every environment."""
        if self._num_steps % self._config.pull_period_steps == 0:
            self._pull_params()
        if self._published is not None:
            self._age_seconds += time.monotonic() - self._published
            self._num_aged_steps += 1
        with self._clock("inference"):
            if self._network.num_noise:
                self._noise = self._network.draw_noise(self._environment.num_envs, self._noise_generator)
            values = self._values(self._stacks, self._noise)
        with self._clock("n_step"):
            self._finish_pending(values)
        actions = epsilon_greedy(self._rng, values, self._epsilon())
        with self._clock("env"):
            result = self._environment.step(actions)
        with self._clock("n_step"):
            self._take_result(result, values, actions)

    def _take_result(self, result: Step, values: Array, actions: Array) -> None:
        """Takes in what a step gave: transitions wait for the values of the next step, which are their destinations'."""
        if self._actions is not None:
            self._actions += actions.astype(np.int16).tobytes()
        self._num_steps += 1
        if result.only_goes_on() and math.isfinite(result.reward.sum()):
            self._run_steps.append((actions, values, result.reward))
            self._stats.env_steps += len(actions)
            self._push_planes(result.planes, None)
            return
        self._finish_run(values)
        self._returns += result.episode_return[~np.isnan(result.episode_return)].tolist()
        source = self._plane.copy()
        first = self._first.copy()
        bootstraps = self._push_result(result)
        is_transition = ~result.is_first
        try:
            transitions = self._n_step.add(
                source=source,
                a_tm1=actions,
                extra=values[self._environments, actions].astype(np.float64),
                reward=result.reward,
                terminated=result.terminated,
                truncated=result.truncated,
                destination=source + 1,
                is_transition=is_transition,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"actor {self._slot}, env step {self._stats.env_steps}: {error}") from error
        self._stats.env_steps += int(is_transition.sum())
        self._pending = (transitions, first, bootstraps)

    def close(self, timeout_seconds: float) -> ActorStats:
        """Waits for the answers to chunks in flight, closes the environments and returns the final statistics."""
        self._replay.drain(timeout_seconds)
        self._environment.close()
        return self.stats()

    def stats(self) -> ActorStats:
        """Returns the statistics; the returns in them are handed out once, and the age of the parameters is since the last call."""
        returns, self._returns = self._returns, []
        age = self._age_seconds / self._num_aged_steps if self._num_aged_steps else math.nan
        self._age_seconds, self._num_aged_steps = 0.0, 0
        return replace(
            self._stats,
            returns=returns,
            pushed=self._replay.counts(),
            params_age_seconds=age,
            usage=usage([self._clock]),
        )

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Returns all that a restart needs to go on with the very same bits: arrays by name, and plain values.

        Of the environments, whose insides are their own, it is the seed and every action since: `restore` plays them again.
        """
        assert self._actions is not None, "made with keeps_actions"
        arrays: dict[str, Array] = {
            "actions": np.frombuffer(bytes(self._actions), np.int16).reshape(-1, self._environment.num_envs),
            "stacks": self._stacks.copy(),
            "plane": self._plane.copy(),
            "first": self._first.copy(),
            "params": params_module.flatten(self._network),
            "noise_generator": self._noise_generator.get_state().numpy(),
        }
        arrays |= {f"n_step.{name}": array for name, array in self._n_step.state().items()}
        for env, chunk in enumerate(self._chunks):
            arrays |= {f"chunk{env}.{name}": array for name, array in chunk.state().items()}
        arrays |= {f"outbox{i}": wire.pack(chunk) for i, chunk in enumerate(self._outbox)}
        values: dict[str, Any] = {
            "env_seed": self._env_seed,
            "rng": random_state.state_of(self._rng),
            "counts": [self._num_packed_chunks, self._num_packed, self._num_steps],
            "returns": list(self._returns),
            "stats": {name: getattr(self._stats, name) for name in _KEPT_STATS},
            "pending": None,
        }
        if self._run_steps:
            arrays |= {f"run{i}": np.stack(steps) for i, steps in enumerate(zip(*self._run_steps, strict=True))}
        if self._pending is not None:
            transitions, first, bootstraps = self._pending
            arrays |= {f"pending.{field.name}": getattr(transitions, field.name) for field in fields(Transitions)}
            arrays["pending_first"] = first
            values["pending"] = [[env, value] for env, value in bootstraps.items()]
        return arrays, values

    def restore(self, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        """Takes what `state` returned, of the same configuration. Plays every action of the past again.

        Raises:
          UserError: where the environments do not come to where they were: they are not reproducible.
        """
        self._env_seed = values["env_seed"]
        planes = self._environment.reset(self._env_seed)
        for actions in arrays["actions"]:
            planes = self._environment.step(actions.astype(np.int64)).planes
        if not np.array_equal(planes, arrays["stacks"][:, -1]):
            raise UserError(
                "the environments, played again from their seed, came to other observations: they are not reproducible, and a serial "
                "run of them cannot be continued; begin another one"
            )
        self._actions = bytearray(arrays["actions"].tobytes())
        self._stacks, self._plane, self._first = (np.array(arrays[name]) for name in ("stacks", "plane", "first"))
        params_module.unflatten(self._network, arrays["params"])
        self._noise_generator.set_state(torch.from_numpy(np.array(arrays["noise_generator"])))
        self._n_step.restore(_part(arrays, "n_step."))
        for env, chunk in enumerate(self._chunks):
            chunk.restore(_part(arrays, f"chunk{env}."))
        outbox = sorted(_part(arrays, "outbox").items(), key=lambda item: int(item[0]))
        self._outbox = deque(wire.unpack(message, TransitionChunk) for _, message in outbox)
        random_state.restore(self._rng, values["rng"])
        self._num_packed_chunks, self._num_packed, self._num_steps = values["counts"]
        self._returns = list(values["returns"])
        for name, value in values["stats"].items():
            setattr(self._stats, name, value)
        self._num_until_full = self._config.chunk_transitions - max(chunk.num_transitions for chunk in self._chunks)
        self._run_steps = list(zip(arrays["run0"], arrays["run1"], arrays["run2"], strict=True)) if "run0" in arrays else []
        self._pending = None
        if values["pending"] is not None:
            transitions = Transitions(**_part(arrays, "pending."))
            self._pending = transitions, np.array(arrays["pending_first"]), dict(values["pending"])

    def _pull_params(self) -> None:
        with self._clock("pull"):
            message = self._params.poll(self._stats.params_epoch, self._stats.params_version)
            if message is None:
                return
            snapshot = wire.unpack(message, ParamsSnapshot)
            params_module.load(self._network, snapshot)
        self._stats.params_epoch, self._stats.params_version = snapshot.epoch, snapshot.version
        age = self._params.age_seconds()
        self._published = None if age is None else time.monotonic() - age

    def _values(self, stacks: Array, noise: Tensor | None) -> Array:
        with torch.inference_mode():
            return self._network(torch.from_numpy(stacks), noise).numpy()  # type: ignore[no-any-return]

    def _epsilon(self) -> Array | float:
        """Returns f64[E], or one number for all. The fleet's env steps are taken to be this slot's times the number of slots."""
        config = self._config.exploration
        if config.kind == "ladder":
            return self._ladder
        if config.kind == "multiplicative":
            version = self._stats.params_version
            epsilon = schedules.multiplicative(version, initial=config.initial, final=config.final, rate=config.decay_rate)
        else:
            steps = self._stats.env_steps * self._config.num_actors
            epsilon = schedules.linear(steps, initial=config.initial, final=config.final, num=config.decay_steps)
        self._stats.epsilon = epsilon
        return epsilon

    @functools.cached_property
    def _ladder(self) -> Array:
        """f64[E], the rungs of this slot."""
        config, num_envs = self._config.exploration, self._environment.num_envs
        num = self._config.num_actors * num_envs
        rungs = range(self._slot * num_envs, (self._slot + 1) * num_envs)
        ladder = [schedules.ladder(i, num, base=config.ladder_base, exponent=config.ladder_exponent) for i in rungs]
        self._stats.epsilon = float(np.mean(ladder))
        return np.array(ladder)

    def _push_result(self, result: Step) -> dict[int, float]:
        """Takes in the new observations; returns the value of last observations that will not be acted on, by environment."""
        if result.final_planes is None:
            self._push_planes(result.planes, result.is_first)
            return {}
        ended = result.terminated | result.truncated
        self._push_planes(np.where(_rows(ended, result.planes), result.final_planes, result.planes), result.is_first)
        cut = np.flatnonzero(result.truncated & ~result.terminated)
        bootstraps = {}
        if len(cut):
            noise = None if self._noise is None else self._noise[cut]
            bootstraps = dict(zip(cut.tolist(), self._values(self._stacks[cut], noise).max(axis=1).tolist(), strict=True))
        self._push_planes(result.planes, ended, only=ended)
        return bootstraps

    def _push_planes(self, planes: Array, is_first: Array | None, only: Array | None = None) -> None:
        """Adds one plane to every stack (or to those of `only`); stacks of a new episode begin with zeros."""
        if is_first is None:
            push_planes(self._stacks, planes)
            self._plane += 1
            for chunk, plane in zip(self._chunks, planes, strict=True):
                chunk.add_plane(plane)
            return
        rows = slice(None) if only is None else np.flatnonzero(only)
        push_planes(self._stacks, planes, is_first, rows)
        self._plane[rows] += 1 + is_first[rows]  # A new episode's first plane follows a zero plane.
        self._first[is_first] = self._plane[is_first]
        begins = is_first.tolist()
        for row in self._environments[rows].tolist():
            if begins[row]:
                self._chunks[row].begin_episode()
            self._chunks[row].add_plane(planes[row])

    def _finish_pending(self, values: Array) -> None:
        """Puts transitions into chunks, now that the last step's destinations have values; those of a run when a chunk may be full."""
        if self._pending is not None:
            transitions, first, bootstraps = self._pending
            self._pending = None
            bootstrap = values.max(axis=1).astype(np.float64)
            for env, value in bootstraps.items():
                bootstrap[env] = value
            self._add_to_chunks(transitions, first, bootstrap[transitions.env])
        elif len(self._run_steps) >= self._num_until_full or any(self._is_large(chunk) for chunk in self._chunks):
            self._finish_run(values)

    def _finish_run(self, values: Array) -> None:
        """Puts the transitions of the run into chunks; `values`, f32[E, A], are of its last destinations."""
        if not self._run_steps:
            return
        actions, values_tm1, reward = (
            np.stack(arrays) for arrays in zip(*self._run_steps, strict=True)
        )  # [T, E], [T, E, A], [T, E]
        self._run_steps.clear()
        destination = self._plane - np.arange(len(actions) - 1, -1, -1)[:, None]
        transitions = self._n_step.add_run(
            source=destination - 1,
            a_tm1=actions,
            extra=np.take_along_axis(values_tm1, actions[:, :, None], axis=2)[:, :, 0].astype(np.float64),
            reward=reward,
            destination=destination,
        )
        bootstrap = np.concatenate([values_tm1[1:], values[None]]).max(axis=2).astype(np.float64)
        step = transitions.destination - destination[0, transitions.env]
        self._add_to_chunks(transitions, self._first, bootstrap[step, transitions.env])

    def _add_to_chunks(self, transitions: Transitions, first: Array, bootstrap: Array) -> None:
        """Gives transitions their first priorities and puts them into chunks, of which it packs the full ones.

        Args:
          transitions: M of them.
          first: i64[E] the plane with which each environment's episode began.
          bootstrap: f64[M] values of their destinations.
        """
        t = transitions
        target = t.r_t + t.discount_t * self._rescaling.apply_inv(torch.from_numpy(bootstrap)).numpy()
        td_error = self._rescaling.apply(torch.from_numpy(target)).numpy() - t.extra
        columns = (t.source, t.destination, first[t.env], t.a_tm1, t.r_t, t.discount_t)
        priorities = priority(td_error, floor=self._priority_floor)
        rows = zip(*[column.tolist() for column in (*columns, priorities)], strict=True)
        for env, row in zip(t.env.tolist(), rows, strict=True):
            self._chunks[env].add_transition(row)
        for chunk in self._chunks:
            if chunk.num_transitions >= self._config.chunk_transitions or (self._is_large(chunk) and chunk.num_transitions):
                self._pack(chunk)
        self._num_until_full = self._config.chunk_transitions - max(chunk.num_transitions for chunk in self._chunks)

    def _is_large(self, chunk: ChunkBuilder) -> bool:
        return chunk.num_bytes >= self._config.chunk_bytes

    def _pack(self, chunk: ChunkBuilder) -> None:
        fields = chunk.take()
        packed = TransitionChunk(
            run=self._run,
            actor_slot=self._slot,
            incarnation=self._incarnation,
            seq=self._num_packed_chunks,
            num_sent_before=self._num_packed,
            params_version=self._stats.params_version,
            **fields,
        )
        self._num_packed_chunks += 1
        self._num_packed += packed.num_transitions
        self._outbox.append(packed)


def _part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _rows(mask: Array, like: Array) -> Array:
    """Returns the mask [E] shaped so that it picks rows of `like` [E, ...]."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))
