"""Fakes of an actor's neighbours, and the transitions of an episode written down from the definition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from actors.actor import Actor
from actors.environments import GymnasiumEnvironment
from common import params as params_module
from common import wire
from common.config import ActorsConfig, ExplorationConfig, NetworkConfig
from common.messages import ParamsSnapshot, TransitionChunk
from common.metrics import PushCounts
from common.networks import make_network
from common.planes import decode_planes
from common.protocols import InsertReply

NUM_ACTIONS = 3

torch.set_num_threads(1)  # As an actor's process does: threads would wait for one another on a busy machine.


@dataclass
class Episode:
    """What an environment really did: T + 1 observations, T actions and rewards, and how it ended."""

    observations: list
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    end: str = ""


class ExpectedTransition(NamedTuple):
    s_tm1: np.ndarray
    a_tm1: int
    r_t: float
    discount_t: float
    s_t: np.ndarray
    completed_at: int
    """Steps of the episode after which it was complete."""


class ScriptedEnv(gymnasium.Env):
    """Plays episodes of given rewards and ends; no two observations are equal, none is zero. It keeps a log."""

    def __init__(self, index: int, script: list[tuple[list[float], str]], *, pixels: bool) -> None:
        self._index, self._script, self._pixels = index, script, pixels
        shape = (6, 5) if pixels else (3,)
        low, high, dtype = (0, 255, np.uint8) if pixels else (-np.inf, np.inf, np.float32)
        self.observation_space = gymnasium.spaces.Box(low, high, shape, dtype)
        self.action_space = gymnasium.spaces.Discrete(NUM_ACTIONS)
        self._shape, self._dtype = shape, dtype
        self.episodes: list[Episode] = []
        self.seeds: list[int | None] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self._number, self._step = len(self.episodes), 0
        self.episodes.append(Episode([self._observation()]))
        return self.episodes[-1].observations[0].copy(), {}

    def step(self, action):
        rewards, end = self._script[self._number % len(self._script)]
        episode = self.episodes[-1]
        assert not episode.end, "stepped past the end of an episode"
        reward = rewards[self._step]
        self._step += 1
        is_last = self._step == len(rewards)
        episode.actions.append(int(action))
        episode.rewards.append(reward)
        episode.observations.append(self._observation())
        episode.end = end if is_last else ""
        return episode.observations[-1].copy(), reward, is_last and "terminated" in end, is_last and "truncated" in end, {}

    def _observation(self) -> np.ndarray:
        key = [self._index, self._number, self._step]
        if not self._pixels:
            return np.array([self._index + 1.0, 0.01 * self._number + 0.001, 0.1 * self._step - 1.0], self._dtype)
        observation = np.random.default_rng(key).integers(1, 256, self._shape).astype(self._dtype)
        observation[0, :3] = [k % 255 + 1 for k in key]
        return observation


class TapedEnvironment:
    """Passes all calls on, writes their names on the tape and keeps every Step."""

    def __init__(self, inner, tape: list[str]) -> None:
        self._inner, self._tape = inner, tape
        self.num_envs, self.spec = inner.num_envs, inner.spec
        self.seeds: list[int] = []
        self.first_planes: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.steps: list = []

    def reset(self, seed: int):
        self._tape.append("reset")
        self.seeds.append(seed)
        planes = self._inner.reset(seed)
        self.first_planes.append(planes.copy())
        return planes

    def step(self, actions):
        self._tape.append("env step")
        self.actions.append(actions.copy())
        self.steps.append(self._inner.step(actions))
        return self.steps[-1]

    def close(self) -> None:
        self._tape.append("env close")
        self._inner.close()


class RecordingWriter:
    """Keeps the packed chunks, hands them to a shard where it has one, and asks to wait as its answers say."""

    def __init__(self, tape: list[str], shard=None) -> None:
        self._tape, self._shard = tape, shard
        self.waits_for: list[str | None] = []
        """Next answers; None for ever where it is empty."""
        self.messages: list[np.ndarray] = []
        self.replies: list[InsertReply] = []
        self.is_slow = False
        """It asks for no pause: that it is not ready means that answers are not there yet."""
        self._may_push = self._asks_for_pause = False

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        assert timeout_seconds >= 0
        answer = self.waits_for.pop(0) if self.waits_for else None
        self._tape.append("ready" if answer is None else "wait")
        self._may_push = answer is None
        self._asks_for_pause = answer is not None and not self.is_slow
        return answer

    def asks_for_pause(self) -> bool:
        return self._asks_for_pause

    def push(self, chunks) -> int:
        assert self._may_push, "pushed without being told that replay is ready"
        self._may_push = False
        self._tape.append("push")
        message = wire.pack(chunks[0])
        self.messages.append(message)
        if self._shard is not None:
            self.replies.append(self._shard.insert(message))
        return 1

    def counts(self) -> PushCounts:
        return PushCounts()

    def drain(self, timeout_seconds: float) -> None:
        self._tape.append("drain")

    def chunks(self) -> list[TransitionChunk]:
        return [wire.unpack(message, TransitionChunk) for message in self.messages]


class FakeParams:
    """A params store that has one snapshot or none."""

    def __init__(self, tape: list[str]) -> None:
        self._tape = tape
        self.snapshot: ParamsSnapshot | None = None
        self.asked: list[tuple[int, int]] = []
        self.age: float | None = None

    def poll(self, epoch: int, version: int):
        self._tape.append("poll")
        self.asked.append((epoch, version))
        return self._newer(epoch, version)

    def fetch(self, epoch: int, version: int, timeout_seconds: float):
        self._tape.append("fetch")
        return self._newer(epoch, version)

    def age_seconds(self):
        return self.age

    def _newer(self, epoch: int, version: int):
        held = self.snapshot
        return None if held is None or (held.epoch, held.version) <= (epoch, version) else wire.pack(held)

    def publish(self, network, epoch: int, version: int) -> None:
        self.snapshot = ParamsSnapshot(
            run="run",
            epoch=epoch,
            version=version,
            layout=params_module.layout(network),
            params=params_module.flatten(network),
        )


@dataclass
class Rig:
    """An actor and all its fakes."""

    actor: Actor
    environment: TapedEnvironment
    writer: RecordingWriter
    params: FakeParams
    network: object
    tape: list[str]

    def step(self, num_steps: int) -> None:
        """Does what `Actor.run` does, by count and not by the clock."""
        done = 0
        while done < num_steps:
            if self.actor.send_waiting(0.0):
                self.actor.step()
                done += 1
        self.actor.send_waiting(0.0)


@pytest.fixture
def scripted():
    """Makes (GymnasiumEnvironment, its ScriptedEnvs) from one script for each environment."""

    def make(scripts, *, mode=AutoresetMode.NEXT_STEP, frame_stack=1, pixels=False):
        envs = [ScriptedEnv(index, script, pixels=pixels) for index, script in enumerate(scripts)]
        # copy=False: the vector environment writes into one buffer, step after step.
        vector = SyncVectorEnv([lambda env=env: env for env in envs], copy=False, autoreset_mode=mode)
        return GymnasiumEnvironment(vector, frame_stack), envs

    return make


@pytest.fixture
def taped():
    """Makes (environment that records, its tape) around another."""

    def make(inner):
        tape: list[str] = []
        return TapedEnvironment(inner, tape), tape

    return make


@pytest.fixture
def make_rig():
    """Makes an actor among fakes; keyword arguments go to ActorsConfig."""

    def make(
        environment,
        *,
        slot=0,
        incarnation=0,
        seed=0,
        env_steps=0,
        shard=None,
        network=None,
        params=None,
        keeps_actions=False,
        **settings,
    ):
        tape: list[str] = []
        environment = TapedEnvironment(environment, tape)
        network = network or make_network(NetworkConfig(hidden_sizes=(16,)), environment.spec, 0)
        settings = {"exploration": ExplorationConfig(initial=0.5, final=0.5), "num_envs": environment.num_envs} | settings
        writer = RecordingWriter(tape, shard)
        params = params or FakeParams(tape)
        actor = Actor(
            config=ActorsConfig(**settings),
            environment=environment,
            network=network,
            replay=writer,
            params=params,
            run="run",
            slot=slot,
            incarnation=incarnation,
            seed=seed,
            env_steps=env_steps,
            priority_floor=0.001,
            keeps_actions=keeps_actions,
        )
        return Rig(actor, environment, writer, params, network, tape)

    return make


@pytest.fixture
def fake_params():
    return FakeParams([])


@pytest.fixture
def random_script():
    """Makes a script of episodes of 1 to 9 steps with whole rewards, also beyond the clip, and every kind of end."""

    def make(rng, *, num_episodes=7):
        ends = ["terminated", "truncated", "terminated truncated"]
        return [
            (rng.integers(-3, 4, size=rng.integers(1, 10)).astype(float).tolist(), ends[rng.choice(3, p=[0.45, 0.45, 0.1])])
            for _ in range(num_episodes)
        ]

    return make


@pytest.fixture
def oracle():
    """Writes down an episode's n-step transitions, in plain loops, as they complete."""

    def stack(observations, number, frame_stack):
        zero = np.zeros_like(observations[0])
        return np.stack([observations[i] if i >= 0 else zero for i in range(number - frame_stack + 1, number + 1)])

    def expected(episode, *, n_step, discount, reward_clip, frame_stack, terminal_reward=None):
        transitions = []
        length = len(episode.actions)
        for start in range(length):
            end = start + n_step
            if end > length:
                if not episode.end:
                    break
                end = length
            r_t = 0.0
            for i in range(start, end):
                reward = episode.rewards[i]
                if reward_clip is not None:
                    reward = max(-reward_clip, min(reward_clip, reward))
                if terminal_reward is not None and i == length - 1 and "terminated" in episode.end:
                    reward = terminal_reward
                r_t += discount ** (i - start) * reward
            is_terminal = end == length and "terminated" in episode.end
            transitions.append(
                ExpectedTransition(
                    stack(episode.observations, start, frame_stack),
                    episode.actions[start],
                    r_t,
                    0.0 if is_terminal else discount ** (end - start),
                    stack(episode.observations, end, frame_stack),
                    end,
                )
            )
        return transitions

    return expected


@pytest.fixture
def rows_of():
    """Decodes a chunk or a batch: list of (s_tm1, a_tm1, r_t, discount_t, s_t)."""

    def decode(message):
        planes = decode_planes(message)
        return [
            (planes[s_tm1], int(a), float(r), float(d), planes[s_t])
            for s_tm1, a, r, d, s_t in zip(
                message.s_tm1, message.a_tm1, message.r_t, message.discount_t, message.s_t, strict=True
            )
        ]

    return decode
