"""The data as qfleet's actors send them: packed chunks of 64 transitions, as `ChunkBuilder` makes them of planes in time order."""

from __future__ import annotations

import numpy as np
from harness import NUM_ENVS, STACK, Data

from actors.chunks import ChunkBuilder
from common import wire
from common.config import EnvSpec
from common.messages import Array, TransitionChunk
from deploy.bench import RUN, BenchReplayFlags

CHUNK_TRANSITIONS = 64
SPEC = EnvSpec((84, 84), "|u1", STACK, 18)


def flags(num_items: int, batch_size: int) -> BenchReplayFlags:
    """Returns the settings of a shard that holds all items."""
    return BenchReplayFlags(transitions=num_items, batch_size=batch_size)


def messages(data: Data) -> list[tuple[Array, int]]:
    """Returns the packed chunks of all environments, in turn, with their transitions; a chunk is of one environment."""
    of_envs = [_messages_of(data, env) for env in range(NUM_ENVS)]
    longest = max(map(len, of_envs))
    return [chunks[i] for i in range(longest) for chunks in of_envs if i < len(chunks)]


def _messages_of(data: Data, env: int) -> list[tuple[Array, int]]:
    transitions = data.n_step()
    rows = np.flatnonzero(data.env[: data.num_items] == env)
    builder = ChunkBuilder(SPEC, history=11)
    number = np.zeros(len(data.planes), np.int64)  # Of each plane, as the builder counts; `first` is that of its episode.
    first = np.zeros(len(data.planes), np.int64)
    next_plane, count, packed = int(np.flatnonzero(data.step_env == env)[0]), 0, []
    for row in rows.tolist():
        source, destination = int(transitions.s_tm1[row, -1]), int(transitions.s_t[row, -1])
        while next_plane <= destination:
            if data.step_is_first[next_plane]:
                builder.begin_episode()
                count += 1
                first[next_plane] = count
            else:
                first[next_plane] = first[next_plane - 1]
            builder.add_plane(data.planes[next_plane])
            number[next_plane] = count
            count, next_plane = count + 1, next_plane + 1
        scalars = tuple(float(getattr(transitions, name)[row]) for name in ("r_t", "discount_t", "priority"))
        builder.add_transition((number[source], number[destination], first[source], transitions.a_tm1[row], *scalars))
        if builder.num_transitions == CHUNK_TRANSITIONS or row == rows[-1]:
            header = {"run": RUN, "actor_slot": env, "incarnation": 0, "seq": len(packed), "params_version": 0}
            sent = len(packed) * CHUNK_TRANSITIONS
            num = builder.num_transitions
            packed.append((wire.pack(TransitionChunk(**header, num_sent_before=sent, **builder.take())), num))
    return packed
