"""Whole runs on a local Ray of their own, in a process that tests kill, stop and ask to end, as a user and a machine would."""

import json
import os
import subprocess
import sys
import time

from deploy.plots import read_rows


class Run:
    """A `qfleet` command in a process of its own, and what it leaves."""

    def __init__(self, path, *words, environment=None, module=("-m", "deploy"), log=None):
        self.path = path
        self.log = log or path.with_name(f"{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *module, *map(str, words)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_AUTH_MODE": "token"} | (environment or {}),
            )

    def wait_for(self, what, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.text()}"
            time.sleep(0.2)

    def text(self):
        return self.log.read_text()

    def rows(self):
        return read_rows(self.path) if (self.path / "metrics.jsonl").exists() else []

    def updates(self):
        rows = self.rows()
        return rows[-1]["updates"] if rows else 0

    def workers(self):
        return json.loads((self.path / "workers.json").read_text())

    def summary(self):
        return json.loads((self.path / "summary.json").read_text())

    def end(self, seconds=90):
        status = self.process.wait(seconds)
        assert "Traceback" not in self.text()
        return status, self.summary()


def end_all(runs):
    """Ends what a test has left under way."""
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait(10)
