"""RLlib's PrioritizedEpisodeReplayBuffer, which DQN of its new API stack uses, with n_step=3.

Modes: `in_process`, as DQN has it; `actor`, the same buffer inside a Ray actor with one producer and one consumer.

Episodes hold stacked observations: a sample is two observations and nothing before them, so a connector could not stack them
afterwards. They come as an EnvRunner's fragments of 256 steps (`truncate_episodes`, `rollout_fragment_length`), as lists
(`episodes_to_numpy=False`), which it adds faster than arrays. The observations of a sample are put together by `np.stack`, as
the learner's connectors do. New steps get one priority a fragment; steps with fewer than 3 after them are never sampled.
Source: the docstrings of the class and https://docs.ray.io/en/latest/rllib/rllib-replay-buffers.html.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from harness import CHUNK, DISCOUNT, Bench, Data, Episode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers.prioritized_episode_buffer import PrioritizedEpisodeReplayBuffer

N_STEP = 3
TIMEOUT_SECONDS = 120
FRAGMENTS_IN_FLIGHT = 2


class Buffer:
    """The buffer with the consumer's batch as arrays. Runs in this process or as a Ray actor."""

    def __init__(self, capacity: int) -> None:
        self._buffer = PrioritizedEpisodeReplayBuffer(capacity, alpha=0.6)

    def add(self, fragment: SingleAgentEpisode, priority: float) -> None:
        self._buffer.add([fragment], weight=priority)

    def sample(self, num_items: int) -> dict[str, np.ndarray]:
        """Returns arrays of the batch."""
        episodes = self._buffer.sample(num_items=num_items, n_step=N_STEP, gamma=DISCOUNT, beta=0.4)
        return {
            "s_tm1": np.stack([episode.get_observations(0) for episode in episodes]),
            "s_t": np.stack([episode.get_observations(-1) for episode in episodes]),
            "a_tm1": np.array([episode.get_actions(0) for episode in episodes]),
            "r_t": np.array([episode.get_rewards(0) for episode in episodes]),
            "discount_t": DISCOUNT**N_STEP * ~np.array([episode.is_terminated for episode in episodes]),
        }

    def update_priorities(self, priorities: np.ndarray) -> None:
        self._buffer.update_priorities(priorities)


def fragments(data: Data, episode: Episode) -> list[SingleAgentEpisode]:
    """Returns the episode in parts of at most 256 steps."""
    stacks = data.stacks(data.stack_indices(episode))
    id_ = f"episode-{episode.begin}"
    parts = []
    for begin in range(0, episode.num_steps, CHUNK):
        end = min(begin + CHUNK, episode.num_steps)
        is_last = end == episode.num_steps
        steps = slice(episode.begin + begin, episode.begin + end)
        part = SingleAgentEpisode(
            id_=id_,
            observations=list(stacks[begin : end + 1]),
            actions=list(data.step_action[steps]),
            rewards=list(data.step_reward[steps]),
            terminated=episode.terminated and is_last,
            truncated=episode.truncated and is_last,
            t_started=begin,
            len_lookback_buffer=0,
        )
        parts.append(part)
    return parts


class ActorHandle:
    """The buffer in a Ray actor; adds are sent ahead, at most 2 at a time."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._in_flight: list[Any] = []

    def add(self, fragment: SingleAgentEpisode, priority: float) -> None:
        self._in_flight.append(self._actor.add.remote(fragment, priority))
        if len(self._in_flight) > FRAGMENTS_IN_FLIGHT:
            ray.get(self._in_flight.pop(0), timeout=TIMEOUT_SECONDS)

    def finish(self) -> None:
        """Waits for all adds."""
        ray.get(self._in_flight, timeout=TIMEOUT_SECONDS)

    def sample(self, num_items: int) -> dict[str, np.ndarray]:
        return ray.get(self._actor.sample.remote(num_items), timeout=TIMEOUT_SECONDS)

    def update_priorities(self, priorities: np.ndarray) -> None:
        self._actor.update_priorities.remote(priorities)


def insert_all(bench: Bench, buffer: Buffer | ActorHandle) -> None:
    """Adds all fragments."""
    for episode in bench.data.episodes():
        for part in fragments(bench.data, episode):
            bench.insert(lambda part=part: buffer.add(part, 1.0), len(part))
    if isinstance(buffer, ActorHandle):
        bench.insert(buffer.finish, 0)


def make_actor(capacity: int, directory: str) -> ActorHandle:
    """Starts a private Ray and the actor in it."""
    ray.init(address="local", include_dashboard=False, _temp_dir=directory, num_cpus=2, log_to_driver=False)
    actor = ray.remote(Buffer).remote(capacity)
    ray.get(actor.__ray_ready__.remote(), timeout=TIMEOUT_SECONDS)
    return ActorHandle(actor)


def measure(bench: Bench, buffer: Buffer | ActorHandle) -> None:
    bench.start()
    insert_all(bench, buffer)
    bench.inserted()

    def round_trip(priorities: np.ndarray) -> dict[str, np.ndarray]:
        batch = buffer.sample(bench.batch)
        buffer.update_priorities(priorities)
        return batch

    batch = bench.sample(round_trip)
    bench.check(bench.data.all_n_step(), batch)
    bench.report(version=f"ray {version('ray')}", note="stacked observations kept once per step")


def main() -> None:
    bench = Bench("rllib", ("in_process", "actor"))
    if bench.mode == "in_process":
        measure(bench, Buffer(bench.data.num_items))
        return
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:
        try:
            measure(bench, make_actor(bench.data.num_items, directory))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
