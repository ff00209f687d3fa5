"""What the scripts `*_envs.py` of this folder share: the game, the clock, the cores. Needs NumPy.

All play the same game as the networks of 2013 and 2015 see it: 84 x 84 gray, the maximum of the last two of 4 frames, 4 observations
stacked, up to 30 no-ops at the start, rewards as they are, random actions. A script answers one line of its input with one of JSON:

    about                        {"version": ..., "note": ...}
    time WAY NUM_ENVS SECONDS    steps for about so long: {"steps": env steps, "seconds": ..., "cpu_seconds": of all its processes}

Its first argument is the number of cores: it is pinned to the first so many of those that it may use, with all that it starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from harness import open_answers, process_tree

Step = Callable[[], int]
"""Acts in some environments; returns in how many."""


def pin_to_cores(num_cores: int) -> None:
    """Lets this process, and what it starts from now on, run on the first cores of those that it may use."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:num_cores]))


def actions_of(num_actions: int) -> Callable[[int], np.ndarray]:
    """Returns a function that draws i32[n] random actions."""
    rng = np.random.default_rng(0)
    return lambda num: rng.integers(num_actions, size=num, dtype=np.int32)


def time_steps(step: Step, seconds: float, cpu_seconds: Callable[[], float]) -> dict[str, float]:
    """Steps for about so long, at least three times."""
    started, cpu_started, num_calls, num_steps = time.perf_counter(), cpu_seconds(), 0, 0
    while num_calls < 3 or time.perf_counter() - started < seconds:
        num_steps += step()
        num_calls += 1
    return {"steps": num_steps, "seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started}


def serve(time_way: Callable[[str, int, float], dict[str, float]], *, version: str, note: str) -> None:
    """Answers until the input ends."""
    answers = open_answers()
    for line in sys.stdin:
        command, *words = line.split()
        if command == "about":
            answer: dict[str, object] = {"version": version, "note": note}
        else:
            answer = dict(time_way(words[0], int(words[1]), float(words[2])))
        print(json.dumps(answer), file=answers, flush=True)


def serve_steps(make: Callable[[str, int, int], Step], *, version: str, note: str) -> None:
    """Serves what `make` makes of (way, number of environments, number of threads), in this process and its children."""
    num_cores = int(sys.argv[1])
    pin_to_cores(num_cores)
    made: dict[tuple[str, int], Step] = {}

    def time_way(way: str, num_envs: int, seconds: float) -> dict[str, float]:
        if (way, num_envs) not in made:
            made[way, num_envs] = make(way, num_envs, num_cores)
        return time_steps(made[way, num_envs], seconds, lambda: sum(process_tree(os.getpid()).values()))

    serve(time_way, version=version, note=note)
