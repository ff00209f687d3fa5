"""The measurements of `benchmarks/fleet.py`, in a module that Ray's workers can import. Call `ray_environment.prepare` before."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from actors.environments import probe
from benchmarks.idle_actor import make_idle_actor
from common import wire
from common.messages import ParamsSnapshot
from common.metrics import ActorStats
from deploy import roles, run_dir
from deploy.progress import Progress
from deploy.ray_handles import Worker
from deploy.ray_params import RayParamsReader
from deploy.ray_session import make_temp_dir
from deploy.recipes import cartpole
from deploy.recorder import Recorder
from deploy.stop_signal import StopSignal
from deploy.supervisor import Supervisor

NUM_PROCESSES = 8
LOOK_SECONDS = 1.0
SAMPLE_SECONDS = 5.0


class Pullers:
    """Readers of parameters in one process, each looking once a second, one after another."""

    def __init__(self, store: Any, number: int, phase: float) -> None:
        self._readers = [RayParamsReader(store) for _ in range(number)]
        self._have = [(-1, -1)] * number
        self._phase = phase

    def run(self, until: float) -> list[tuple[int, int, float]]:
        """Looks until a time of the monotonic clock; returns (reader, version, when) of all that came."""
        taken = []
        step = LOOK_SECONDS / len(self._readers)
        due, index = time.monotonic() + self._phase * step, 0
        while due < until:
            time.sleep(max(due - time.monotonic(), 0.0))
            message = self._readers[index].poll(*self._have[index])
            if message is not None:
                snapshot = wire.unpack(message, ParamsSnapshot)
                self._have[index] = snapshot.epoch, snapshot.version
                taken.append((index, snapshot.version, time.monotonic()))
            due, index = due + step, (index + 1) % len(self._readers)
        return taken


@contextlib.contextmanager
def local_ray(num_cpus: int, memory: int, object_store_memory: int) -> Iterator[None]:
    """A Ray that is told of more processors and memory than there are."""
    temp_dir = make_temp_dir()
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            _memory=memory,
            include_dashboard=False,
            object_store_memory=object_store_memory,
            log_to_driver=False,
            _temp_dir=temp_dir,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def measure_supervisor(num_actors: int, seconds: float, report_seconds: float | None) -> dict[str, Any]:
    """Returns the share of a core that the driver takes, over intervals of five seconds, and how many reports it heard."""
    roles.make_actor = make_idle_actor  # type: ignore[assignment]
    base = cartpole()
    config = dataclasses.replace(
        base,
        address="auto",
        max_minutes=None,
        actors=dataclasses.replace(base.actors, num_actors=num_actors, on_head=True, params_alarm_seconds=None),
        replay=dataclasses.replace(base.replay, sync_seconds=None),
        evaluation=dataclasses.replace(base.evaluation, target_return=None),
    )
    spec = probe(config.env)
    samples: list[tuple[float, float]] = []
    heard = 0
    with tempfile.TemporaryDirectory() as directory, local_ray(num_actors + 32, num_actors << 30, 1 << 28):
        opened = run_dir.open_run(config, Path(directory) / "run")
        progress = Progress(config, opened.meta)
        recorder = Recorder(opened, progress)
        supervisor = Supervisor(config, spec, opened, progress, recorder, StopSignal())
        if report_seconds is not None:
            supervisor._actor_seconds = report_seconds
        on_actor = progress.on_actor

        def count(stats: ActorStats) -> None:
            nonlocal heard
            heard += 1
            on_actor(stats)

        progress.on_actor = count  # type: ignore[method-assign]

        def watch() -> None:
            nonlocal heard
            while len(progress.actors) < num_actors:
                time.sleep(0.5)
            time.sleep(SAMPLE_SECONDS)
            process, heard = psutil.Process(), 0
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                samples.append((time.monotonic(), sum(process.cpu_times()[:2])))
                time.sleep(SAMPLE_SECONDS)
            samples.append((time.monotonic(), sum(process.cpu_times()[:2])))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()
        outcome = supervisor.run()
        recorder.close()
        opened.close()
    assert outcome.fault is None and outcome.ledger is not None and outcome.ledger["balanced"], outcome
    shares = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(samples)]
    elapsed = samples[-1][0] - samples[0][0]
    return {
        "actors": num_actors,
        "seconds": elapsed,
        "reports_per_second": heard / elapsed,
        "report_seconds": supervisor._actor_seconds,
        "driver_core_share": _spread(shares),
    }


def measure_params(num_pullers: int, num_params: int, seconds: float) -> dict[str, Any]:
    """Returns what the store's process takes, and how old versions are when readers have them."""
    with local_ray(NUM_PROCESSES + 2, 1 << 34, 1 << 28):
        make = ray.remote(Worker)
        store = make.options(num_cpus=0, name="store").remote()
        address = ray.get(store.build.remote(roles.make_params_store), timeout=60)
        workers = [make.options(num_cpus=1).remote() for _ in range(NUM_PROCESSES)]
        each = num_pullers // NUM_PROCESSES
        ray.get([w.build.remote(Pullers, store, each, i / NUM_PROCESSES) for i, w in enumerate(workers)], timeout=120)
        process = psutil.Process(address.pid)
        began, cpu = time.monotonic(), sum(process.cpu_times()[:2])
        runs = [worker.call.remote("run", began + seconds) for worker in workers]
        published: dict[int, float] = {}
        largest = 0
        params = np.random.default_rng(0).standard_normal(num_params).astype(np.float32)
        while time.monotonic() < began + seconds:
            version = len(published)
            message = wire.pack(ParamsSnapshot(run="r", epoch=0, version=version, layout="w", params=params))
            published[version] = time.monotonic()
            ray.get(store.call.remote("publish", message), timeout=30)
            largest = max(largest, _object_store_bytes())
            time.sleep(max(published[version] + 1.0 - time.monotonic(), 0.0))
        taken = [one for run in ray.get(runs, timeout=60) for one in run]
        elapsed, cpu = time.monotonic() - began, sum(process.cpu_times()[:2]) - cpu
    ages = [when - published[version] for _, version, when in taken]
    return {
        "pullers": NUM_PROCESSES * each,
        "params": num_params,
        "seconds": elapsed,
        "taken_per_second": len(taken) / elapsed,
        "taken_of_published": len(taken) / (NUM_PROCESSES * each * len(published)),
        "age_p50_seconds": float(np.percentile(ages, 50)),
        "age_p99_seconds": float(np.percentile(ages, 99)),
        "store_core_share": cpu / elapsed,
        "object_store_bytes_max": largest,
        "version_bytes": 4 * num_params,
    }


def _object_store_bytes() -> int:
    total, free = ray.cluster_resources(), ray.available_resources()
    return int(total["object_store_memory"] - free.get("object_store_memory", 0.0))


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
