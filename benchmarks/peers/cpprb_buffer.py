"""cpprb's PrioritizedReplayBuffer.

Modes: `stacks` keeps both states of transitions of 3 steps; `next_of` keeps one-step transitions whose next state is the next
row, its fastest insert; `stack_compress` also keeps each plane once, which needs the stack in the last dimension. Neither of
the two can be had with steps of more than one, nor with rows that are not in time order.

cpprb's own advice, followed here: add many transitions in one call, compact dtypes, `next_of` and `stack_compress` for image
stacks, `on_episode_end` where an episode ends (https://ymd_h.gitlab.io/cpprb/features/memory_compression/ and /design/).
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from cpprb import PrioritizedReplayBuffer
from harness import Bench, Transitions, chunks


def make_buffer(mode: str, num_items: int) -> PrioritizedReplayBuffer:
    """Returns an empty buffer for the mode."""
    obs = {"shape": (84, 84, 4) if mode == "stack_compress" else (4, 84, 84), "dtype": np.uint8}
    env = {"obs": obs, "act": {"dtype": np.int32}, "rew": {"dtype": np.float32}, "discount": {"dtype": np.float32}}
    if mode == "stacks":
        return PrioritizedReplayBuffer(num_items, env | {"next_obs": obs})
    compress = {"stack_compress": "obs"} if mode == "stack_compress" else {}
    return PrioritizedReplayBuffer(num_items, env, next_of="obs", **compress)


def insert(bench: Bench, buffer: PrioritizedReplayBuffer, part: Transitions) -> None:
    """Adds consecutive transitions in one call."""

    def laid_out(planes: np.ndarray) -> np.ndarray:
        stacks = bench.data.stacks(planes)
        return np.ascontiguousarray(stacks.transpose(0, 2, 3, 1)) if bench.mode == "stack_compress" else stacks

    obs, next_obs = laid_out(part.s_tm1), laid_out(part.s_t)

    def add() -> None:
        buffer.add(obs=obs, next_obs=next_obs, act=part.a_tm1, rew=part.r_t, discount=part.discount_t, priorities=part.priority)

    bench.insert(add, len(part))


def insert_all(bench: Bench, buffer: PrioritizedReplayBuffer) -> Transitions:
    """Adds all transitions and returns them."""
    if bench.mode == "stacks":
        inserted = bench.data.n_step()
        for rows in chunks(len(inserted)):
            insert(bench, buffer, inserted[rows])
        return inserted
    inserted = bench.data.one_step()
    begin = 0
    for episode in bench.data.episodes():
        for rows in chunks(episode.num_steps):
            insert(bench, buffer, inserted[begin + rows.start : begin + rows.stop])
        buffer.on_episode_end()
        begin += episode.num_steps
    return inserted


def main() -> None:
    bench = Bench("cpprb", ("stacks", "next_of", "stack_compress"))
    bench.start()
    buffer = make_buffer(bench.mode, bench.data.num_items)
    inserted = insert_all(bench, buffer)
    bench.inserted()

    def round_trip(priorities: np.ndarray) -> dict[str, np.ndarray]:
        batch = buffer.sample(bench.batch, beta=0.4)
        buffer.update_priorities(batch["indexes"], priorities)
        return batch

    batch = bench.sample(round_trip)
    if bench.mode == "stack_compress":
        batch |= {name: batch[name].transpose(0, 3, 1, 2) for name in ("obs", "next_obs")}
    names = {"s_tm1": "obs", "s_t": "next_obs", "a_tm1": "act", "r_t": "rew", "discount_t": "discount"}
    bench.check(inserted, {ours: batch[theirs].squeeze() for ours, theirs in names.items()})
    bench.report(version=version("cpprb"), note="" if bench.mode == "stacks" else "one-step transitions")


if __name__ == "__main__":
    main()
