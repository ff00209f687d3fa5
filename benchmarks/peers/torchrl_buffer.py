"""TorchRL's TensorDictPrioritizedReplayBuffer.

Modes: `tensor` and `memmap` keep both states of transitions of 3 steps in a LazyTensorStorage or a LazyMemmapStorage; with
`_prefetch` the buffer samples 3 batches ahead in threads of its own.

The segment trees of its prioritized sampler are compiled for one minor version of torch. Where they cannot be loaded the script
measures TensorDictReplayBuffer, which samples uniformly, and says so in its note.

TorchRL's own advice, followed here (https://docs.pytorch.org/rl/stable/tutorials/rb_tutorial.html): `extend` with batches, the
batch size given to the constructor, preallocated storages, `update_tensordict_priority`.
"""

from __future__ import annotations

import importlib
import tempfile
from importlib.metadata import version

import numpy as np
import torch
from harness import CHUNK, Bench, Transitions, chunks
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

NUM_AHEAD = 3


def has_trees() -> bool:
    """Returns whether the compiled segment trees can be loaded."""
    try:
        importlib.import_module("torchrl._torchrl")
    except ImportError:
        return False
    return True


def make_buffer(bench: Bench, directory: str) -> TensorDictReplayBuffer:
    """Returns an empty buffer for the mode."""
    num_items = bench.data.num_items
    storage = (
        LazyMemmapStorage(num_items, scratch_dir=directory) if bench.mode.startswith("memmap") else LazyTensorStorage(num_items)
    )
    ahead = {"prefetch": NUM_AHEAD} if bench.mode.endswith("_prefetch") else {}
    if not has_trees():
        return TensorDictReplayBuffer(storage=storage, batch_size=bench.batch, **ahead)
    return TensorDictPrioritizedReplayBuffer(
        alpha=0.6, beta=0.4, priority_key="priority", storage=storage, batch_size=bench.batch, **ahead
    )


def as_tensordict(bench: Bench, part: Transitions) -> TensorDict:
    """Returns the transitions with their stacks."""
    return TensorDict(
        {
            "s_tm1": torch.from_numpy(bench.data.stacks(part.s_tm1)),
            "s_t": torch.from_numpy(bench.data.stacks(part.s_t)),
            "a_tm1": torch.from_numpy(part.a_tm1),
            "r_t": torch.from_numpy(part.r_t),
            "discount_t": torch.from_numpy(part.discount_t),
            "priority": torch.from_numpy(part.priority.astype(np.float32)),
        },
        batch_size=[len(part)],
    )


def measure(bench: Bench, buffer: TensorDictReplayBuffer) -> None:
    inserted = bench.data.n_step()
    for rows in chunks(len(inserted), CHUNK):
        part = as_tensordict(bench, inserted[rows])
        bench.insert(lambda part=part: buffer.extend(part), len(part))
    bench.inserted()
    prioritized = isinstance(buffer, TensorDictPrioritizedReplayBuffer)

    def round_trip(priorities: np.ndarray) -> TensorDict:
        batch = buffer.sample()
        if prioritized:
            batch.set("priority", torch.from_numpy(priorities.astype(np.float32)))
            buffer.update_tensordict_priority(batch)
        return batch

    batch = bench.sample(round_trip)
    bench.check(inserted, {name: batch[name].numpy() for name in ("s_tm1", "s_t", "a_tm1", "r_t", "discount_t")})
    cannot_load = f"uniform: its segment trees do not load with torch {torch.__version__}"
    bench.report(version=version("torchrl"), note="" if prioritized else cannot_load)


def main() -> None:
    bench = Bench("torchrl", ("tensor", "memmap", "tensor_prefetch", "memmap_prefetch"))
    bench.start()
    with tempfile.TemporaryDirectory() as directory:
        measure(bench, make_buffer(bench, directory))


if __name__ == "__main__":
    main()
