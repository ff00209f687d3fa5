"""Faults at seeded moments, applied to a run from outside, and what must hold after them."""

import contextlib
import re
import signal
import time

import numpy as np
import psutil

ROLES = ("actor", "shard", "store", "learner", "evaluator")


class Chaos:
    """Kills and stops workers of a run at random: about every `period_seconds`, exponentially distributed."""

    def __init__(self, run, seed, period_seconds, roles=ROLES, hows=("kill", "kill", "stop"), stop_seconds=13.0):
        self.run, self.rng = run, np.random.default_rng(seed)
        self.period_seconds, self.roles, self.hows, self.stop_seconds = period_seconds, roles, hows, stop_seconds
        self.done = []
        """(seconds, how, worker) of every fault that hit a living process."""
        self._stopped = []
        self._began = time.monotonic()

    def go_on(self, seconds):
        """Does its work for so long; returns early where the run has ended."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and self.run.process.poll() is None:
            pause = self.rng.exponential(self.period_seconds)
            self._wait(min(now + pause, end))
            if time.monotonic() < end and self.run.process.poll() is None:
                self.hit(self.rng.choice(self.roles), self.rng.choice(self.hows))
        self._wait(time.monotonic() + self.stop_seconds if self._stopped else 0.0)

    def hit(self, role, how):
        """Hits one worker of a role, where one lives."""
        names = sorted(name for name in self.run.workers() if name.startswith(role))
        if not names:
            return
        name = str(self.rng.choice(names))
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.run.workers()[name]["pid"])
            if not process.name().startswith("ray::"):
                return
            if how == "kill":
                process.send_signal(signal.SIGKILL)
            else:
                process.send_signal(signal.SIGSTOP)
                self._stopped.append((time.monotonic() + self.stop_seconds, process))
            self.done.append((round(time.monotonic() - self._began, 1), how, name))

    def _wait(self, until):
        while time.monotonic() < until and self.run.process.poll() is None:
            time.sleep(0.1)
            for at, process in list(self._stopped):
                if time.monotonic() >= at:
                    self._stopped.remove((at, process))
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(signal.SIGCONT)

    def release(self):
        for _, process in self._stopped:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        self._stopped.clear()


def deaths(text, name):
    return text.count(f"{name} died (")


def check_told(text, done):
    """Every kill of a living worker was told, by its name."""
    for name in {worker for _, how, worker in done if how == "kill"}:
        role, number = re.fullmatch(r"([a-z]+)(\d*)", name).groups()
        told = {"store": "the params store died", "evaluator": "the evaluator died", "learner": "the learner died"}
        assert told.get(role, f"{role} {number} died") in text, f"nothing says that {name} died: {text}"


def check_gone(pids, seconds=20):
    """No process of a run that has ended is left."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if _is_ray(pid)]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.2)


def _is_ray(pid):
    try:
        return psutil.Process(pid).name().startswith("ray::") and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
