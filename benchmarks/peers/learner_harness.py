"""What the learner scripts of this folder share: the batches, the clock, the check that an update learns. Needs NumPy and PyTorch.

A script builds `make(network, batch_size) -> Peer` and calls `serve`. It then answers one line of its input with one line of JSON:

    about                            name, version and a note on what is on the clock
    check NETWORK                    updates on one batch of 32 until its loss has halved: {"updates": ...}
    time NETWORK BATCH SECONDS       updates for so long: {"updates": ..., "seconds": ..., "cpu_seconds": ...}

All updates: one thread, Adam, observations of uint8 [B, 4, 84, 84] that lie in memory, two batches in turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from harness import open_answers
from layers import CONVOLUTIONS, HIDDEN

NUM_ACTIONS = 6
LEARNING_RATE = 1e-4
CHECK_BATCH, MAX_CHECK_UPDATES = 32, 400


@dataclass(frozen=True)
class RawBatch:
    """Transitions as a replay buffer gives them."""

    s_tm1: np.ndarray
    """u8[B, 4, 84, 84]."""
    s_t: np.ndarray
    a_tm1: np.ndarray
    """i64[B]."""
    r_t: np.ndarray
    """f32[B]."""
    terminated: np.ndarray
    """f32[B], 0 or 1."""


class Peer(Protocol):
    """One system with a network and a batch size."""

    def load(self, batches: list[RawBatch]) -> None:
        """Takes the batches that `step` uses, in the form in which the system keeps them. Not on the clock."""

    def step(self, index: int) -> Any:
        """Does one update with a batch; returns its mean loss where that is known without further work."""

    def num_parameters(self) -> int:
        """Returns the numbers that are learned."""

    def loss(self) -> float:
        """Returns the mean loss of the last update. Not on the clock."""


def make_batches(batch_size: int, *, num: int = 2, all_terminated: bool = False) -> list[RawBatch]:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(num):
        s_tm1, s_t = rng.integers(256, size=(2, batch_size, 4, 84, 84), dtype=np.uint8)
        terminated = np.ones(batch_size) if all_terminated else rng.random(batch_size) < 0.05
        r_t = rng.integers(-1, 2, batch_size).astype(np.float32)
        batches.append(RawBatch(s_tm1, s_t, rng.integers(NUM_ACTIONS, size=batch_size), r_t, terminated.astype(np.float32)))
    return batches


def num_parameters(network: str) -> int:
    """Returns those of the convolutions as listed, a hidden layer and the values, biases included."""
    channels, side, num = 4, 84, 0
    for out_channels, kernel, stride in CONVOLUTIONS[network]:
        num += (channels * kernel * kernel + 1) * out_channels
        channels, side = out_channels, (side - kernel) // stride + 1
    return num + (channels * side * side + 1) * HIDDEN[network] + (HIDDEN[network] + 1) * NUM_ACTIONS


def check(make: Callable[[str, int], Peer], network: str) -> dict[str, Any]:
    """Raises AssertionError unless the network is the one that is asked for and the loss of one batch halves."""
    peer = make(network, CHECK_BATCH)
    assert peer.num_parameters() == num_parameters(network), f"{network}: {peer.num_parameters()} parameters"
    peer.load(make_batches(CHECK_BATCH, num=1, all_terminated=True))
    peer.step(0)
    first = peer.loss()
    for num in range(2, MAX_CHECK_UPDATES):
        peer.step(0)
        if peer.loss() < first / 2:
            return {"updates": num}
    raise AssertionError(f"the loss was {first:.4f} and is {peer.loss():.4f} after {MAX_CHECK_UPDATES} updates of one batch")


def time_updates(peer: Peer, seconds: float) -> dict[str, Any]:
    started, cpu_started, num = time.perf_counter(), time.process_time(), 0
    while num < 3 or time.perf_counter() - started < seconds:
        peer.step(num % 2)
        num += 1
    return {
        "updates": num,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def serve(make: Callable[[str, int], Peer], *, version: str, note: str) -> None:
    """Answers until the input ends."""
    torch.set_num_threads(1)
    answers = open_answers()
    peers: dict[tuple[str, int], Peer] = {}
    for line in sys.stdin:
        command, *words = line.split()
        if command == "about":
            answer: dict[str, Any] = {"version": version, "note": note}
        elif command == "check":
            answer = check(make, words[0])
        else:
            case = words[0], int(words[1])
            if case not in peers:
                peers[case] = make(*case)
                peers[case].load(make_batches(case[1]))
                time_updates(peers[case], 0.0)  # Not counted: libraries choose their algorithms.
            answer = time_updates(peers[case], float(words[2]))
        print(json.dumps(answer), file=answers, flush=True)
