"""Plays environments through actors and a replay shard, samples every item while it is there, and asks the oracle.

The path is the one of training: environment, Actor, chunk, bytes, `ReplayShard.insert`, `sample`, decoded planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.actor import Actor
from actors.environments import VectorEnvironment
from actors.oracle import RawLog, Rules, TransitionOracle
from common import wire
from common.config import ActorsConfig, NetworkConfig
from common.messages import PriorityUpdate, SampleBatch, TransitionChunk
from common.metrics import PushCounts, ShardStats
from common.networks import make_network
from common.planes import decode_planes
from deploy.local_handles import LocalParams
from deploy.params_store import ParamsStore
from replay_server.shard import ReplayShard

_RUN = "path-check"
_GROUP = 32  # Items whose turn it is to be drawn.
_BATCH = 64
_MAX_DRAWS_PER_ITEM = 40  # Of g equally likely items one is missed by chance with probability g * exp(-40).


@dataclass(frozen=True, kw_only=True, slots=True)
class PathReport:
    """What came out."""

    faults: list[str]
    """Sentences; empty where all is right."""
    num_transitions: int
    """Items that were sampled and compared."""
    stats: ShardStats


def check_path(
    environments: Sequence[VectorEnvironment],
    logs: Sequence[RawLog],
    *,
    actors: ActorsConfig,
    num_steps: int,
    seed: int = 0,
    memory: int = 1 << 28,
    capacity: int = 512,
    priority_exponent: float = 1.0,
    send_compressed: bool = True,
    turns: Sequence[int] = (),
) -> PathReport:
    """Plays one actor for each environment, at random, and compares all that can be sampled with the logs.

    Args:
      environments: each with one recorder attached.
      logs: what the recorders write, environment by environment.
      actors: n, discount, reward clipping and the size of chunks; it explores as it says.
      num_steps: vector steps of all actors together.
      seed: of environments, actions and draws.
      memory, capacity, priority_exponent, send_compressed: of the one shard.
      turns: which actor takes the next step, over and over; one after another where it is empty.
    """
    spec = environments[0].spec
    rules = Rules(
        n_step=actors.n_step,
        discount=actors.discount,
        reward_clip=actors.reward_clip,
        terminal_reward=actors.terminal_reward,
        frame_stack=spec.frame_stack,
    )
    shard = ReplayShard(
        run=_RUN,
        spec=spec,
        shard_index=0,
        shard_epoch=1,
        memory=memory,
        capacity=capacity,
        min_size=1,
        samples_per_insert=None,
        limiter_buffer_samples=1,
        priority_exponent=priority_exponent,
        send_compressed=send_compressed,
        seed=seed,
    )
    oracle = TransitionOracle(logs, spec, rules)
    reader = _Reader(shard, oracle, priority_exponent, capacity)
    params = LocalParams(ParamsStore())
    players = [
        Actor(
            config=actors,
            environment=environment,
            network=make_network(NetworkConfig(hidden_sizes=(16,)), spec, seed),
            replay=reader,
            params=params,
            run=_RUN,
            slot=slot,
            incarnation=0,
            seed=seed,
            env_steps=0,
            priority_floor=1e-3,
        )
        for slot, environment in enumerate(environments)
    ]
    turns = turns or range(len(players))
    for step in range(num_steps):
        player = players[turns[step % len(turns)] % len(players)]
        player.step()
        player.send_waiting(0.0)
    reader.read(reader.resident)
    shard.check_valid()
    for player in players:
        player.close(0.0)
    # An actor holds back less than a chunk, and the transitions of its last step.
    faults = reader.faults + oracle.faults(num_unsent=actors.chunk_transitions - 1 + actors.n_step)
    return PathReport(faults=faults, num_transitions=oracle.num_seen, stats=shard.stats())


class _Reader:
    """An actor's way to the shard, which samples after every chunk until each of its items came out.

    It keeps its own account of which items are there and with which priority, and holds the shard to it.
    """

    def __init__(self, shard: ReplayShard, oracle: TransitionOracle, exponent: float, capacity: int) -> None:
        self._shard, self._oracle, self._exponent, self._capacity = shard, oracle, exponent, capacity
        self._priorities: list[float] = []  # By item id, evicted ones too.
        self._num_evicted = 0
        self._next_review = capacity
        self._faults: dict[str, str] = {}  # The first of each kind.

    @property
    def faults(self) -> list[str]:
        return list(self._faults.values())

    @property
    def resident(self) -> range:
        return range(self._num_evicted, len(self._priorities))

    def wait_until_ready(self, timeout_seconds: float) -> str | None:
        return None

    def asks_for_pause(self) -> bool:
        return False

    def counts(self) -> PushCounts:
        return PushCounts()

    def drain(self, timeout_seconds: float) -> None:
        pass

    def push(self, chunks: Sequence[TransitionChunk]) -> int:
        self._take(chunks[0])
        return 1

    def _take(self, chunk: TransitionChunk) -> None:
        """Inserts the chunk and reads its items back; all that are resident once in a while."""
        priorities = chunk.priority.tolist()
        reply = self._shard.insert(wire.pack(chunk))
        if reply.refusal is not None:
            self._fault("refused", f"replay refused a chunk: {reply.refusal}")
            return
        first = len(self._priorities)
        self._priorities += priorities
        stats = self._shard.stats()
        self._num_evicted = stats.num_evicted
        if stats.num_inserted != len(self._priorities) or stats.size != len(self.resident) or stats.size > self._capacity:
            self._fault(
                "counts", f"replay counts {stats.num_inserted} inserted and {stats.size} resident items of {self.resident}"
            )
        if self._total() > 0:
            self._draw()  # By the priorities that the actor gave.
        self.read(range(first, len(self._priorities)))
        if len(self._priorities) >= self._next_review:
            self._next_review += self._capacity
            self.read(self.resident)

    def read(self, items: range) -> None:
        """Draws until each of the items came out, by giving priority to a few at a time."""
        groups = [items[i : i + _GROUP] for i in range(0, len(items), _GROUP)]
        for group in groups if self._exponent > 0 else [self.resident]:
            if self._exponent > 0:
                self._favour(group)
            waiting = set(group)
            num_draws = 0
            while waiting and num_draws < _MAX_DRAWS_PER_ITEM * max(len(group), _BATCH):
                waiting -= set(self._draw())
                num_draws += _BATCH
            if waiting:
                self._fault(
                    "not drawn",
                    f"item {min(waiting)} is resident, but {num_draws} draws among {len(group)} items never gave it",
                )

    def _favour(self, group: range) -> None:
        """Takes the priority of all but these, and sends an update for an item that has gone too."""
        chosen = {item: 1.0 + i / len(group) for i, item in enumerate(group)}
        changed = {item: 0.0 for item in self.resident if self._priorities[item] > 0} | chosen
        gone = {self._num_evicted - 1: 9.0} if self._num_evicted else {}
        update = PriorityUpdate(
            shard_index=0,
            shard_epoch=1,
            item_id=np.array([*gone, *changed]),
            priority=np.array([*gone.values(), *changed.values()]),
        )
        num_applied = self._shard.update_priorities(wire.pack(update))
        if num_applied != len(changed):
            self._fault("applied", f"replay applied {num_applied} of {len(changed)} priorities of resident items")
        for item, priority in changed.items():
            self._priorities[item] = priority

    def _total(self) -> float:
        return float(np.sum(np.array(self._priorities[self._num_evicted :]) ** self._exponent))

    def _draw(self) -> list[int]:
        """Draws one batch, shows it to the oracle and returns its items."""
        reply = self._shard.sample(_BATCH)
        if reply.batch is None:
            self._fault("no batch", f"replay gave no batch: {reply.waits_for}")
            return []
        batch = wire.unpack(reply.batch, SampleBatch)
        items: list[int] = batch.item_id.tolist()
        total = self._total()
        for item, probability in zip(items, batch.probability.tolist(), strict=True):
            if item not in self.resident:
                self._fault("gone", f"item {item} was drawn, but the resident ones are {self.resident}")
                continue
            wanted = self._priorities[item] ** self._exponent / total
            if abs(probability - wanted) > 1e-9 * wanted:
                self._fault(
                    "probability",
                    f"item {item} has probability {probability:g} of being drawn, but its priority gives {wanted:g}",
                )
        self._oracle.see(
            item_id=batch.item_id,
            planes=decode_planes(batch),
            s_tm1=batch.s_tm1,
            a_tm1=batch.a_tm1,
            r_t=batch.r_t,
            discount_t=batch.discount_t,
            s_t=batch.s_t,
        )
        return items

    def _fault(self, kind: str, sentence: str) -> None:
        self._faults.setdefault(kind, sentence)
