"""Several learner ranks that take every step together: torch.distributed, nccl between GPUs, gloo between CPUs.

Each rank draws from shards of its own and computes the gradients of its part of the batch; their sum, and one number that
normalizes all importance weights, are all that they exchange. A single learner uses nothing of this.
"""

from __future__ import annotations

import datetime
import os
import socket
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_SECONDS = 60.0


class Agreement(NamedTuple):
    """What all ranks know after they have asked one another; the same in each."""

    goes_on: bool
    """Whether nobody wants to stop."""
    weight_scale: float | None
    """The greatest of all ranks; None where a rank has no batch."""


class LearnerGroup:
    """One rank's way to all others. Every method is called by all ranks, in the same order.

    A rank that is away for TIMEOUT_SECONDS, or has died, makes the others raise RuntimeError: they cannot go on without it.
    """

    def __init__(self, *, rank: int, num_ranks: int, address: str, device: torch.device) -> None:
        """Waits for all ranks. `address` is HOST:PORT of rank 0, which listens there."""
        self.rank, self.num_ranks = rank, num_ranks
        timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = _meet(address, rank, num_ranks, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        # What the hosts agree on must not wait for the GPU.
        self._hosts = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD

    def agree(self, wants: bool, weight_scale: float | None) -> Agreement:
        """Tells the others whether this rank wants to go on, and the scale of its batch, None where it has none."""
        has_batch = weight_scale is not None
        told = torch.tensor([wants, has_batch, -weight_scale if weight_scale is not None else 0.0], dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._hosts)
        all_want, all_have, least = told.tolist()
        return Agreement(bool(all_want), -least if all_have else None)

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the sums over all ranks, the same bits in each."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def close(self) -> None:
        dist.destroy_process_group()


def _meet(address: str, rank: int, num_ranks: int, timeout: datetime.timedelta) -> Any:
    """Returns the store at which the ranks find one another. It listens at `address` alone, where PyTorch's own would on all of
    the host's."""
    host, port = address.rsplit(":", 1)
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listener: int | None = None
    if rank == 0:
        server = socket.create_server((host, int(port)))
        listener = server.detach()
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), num_ranks, is_master=rank == 0, timeout=timeout, master_listen_fd=listener, use_libuv=False
    )
