"""Whole runs, on a Ray of their own or on a cluster, in a process that tests kill, stop and ask to end, as a user and a machine would."""

import itertools
import json
import os
import re
import subprocess
import sys
import time

from common import wire
from common.messages import TransitionChunk
from deploy.plots import read_rows
from replay_server.replay_log import ReplayLog

CAUSES = re.compile(r"actor died|on its way when an earlier command ended|shard \d+ (was away|died)|unanswered at the end")
"""Of losses that a fault explains: what was on its way. Nothing that a shard had is among them."""


class Run:
    """A `qfleet` command in a process of its own, here or in one of the hosts of `tests/cluster`, and what it leaves."""

    def __init__(self, path, *words, environment=None, module=("-m", "deploy"), log=None, host=None):
        self.path = path
        self.log = log or path.with_name(f"{time.monotonic_ns()}.log")
        popen, ours = (subprocess.Popen, os.environ) if host is None else (host.popen, host.environment)
        with self.log.open("w") as log:
            self.process = popen(
                [sys.executable, *module, *map(str, words)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ours | {"RAY_AUTH_MODE": "token"} | (environment or {}),
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


def check_ledger(ledger):
    """Everything that was sent is somewhere, and what is lost was on its way."""
    assert ledger["balanced"], ledger
    assert ledger["sent"] == ledger["inserted"] + ledger["refused"] + sum(ledger["lost"].values())
    assert ledger["inserted"] == ledger["resident"] + ledger["evicted"] > 0
    assert ledger["refused"] == 0
    assert all(CAUSES.fullmatch(cause) for cause in ledger["lost"]), ledger["lost"]


def check_logs(path, num_learner_deaths):
    """Reads the shards' logs on their own: no transition is there twice, none is half-written, and within one incarnation of an actor
    the parameters that acted go back only where a learner began again from a checkpoint. Returns how many transitions there are.
    """
    parts, num_items = {}, 0
    for directory in sorted(one for one in (path / "replay").iterdir() if one.is_dir()):
        expected, damages = None, []
        for record in ReplayLog(directory).records(damages):
            if not record.num_items:
                continue
            assert expected in (None, record.first_item_id), "a gap in a log that goes on"
            expected = record.end_item_id
            chunk = wire.unpack(record.message, TransitionChunk)
            assert chunk.num_transitions == record.num_items
            end = chunk.num_sent_before + record.num_items
            span = (chunk.num_sent_before, end, chunk.seq, chunk.params_version)
            parts.setdefault((chunk.actor_slot, chunk.incarnation), []).append(span)
            num_items += record.num_items
        assert not damages, damages
    for sender, spans in parts.items():
        spans.sort()
        pairs = list(itertools.pairwise(spans))
        assert all(before[1] <= after[0] for before, after in pairs), f"transitions of {sender} are there twice"
        assert all(before[2] < after[2] for before, after in pairs), f"chunks of {sender} are out of order"
        assert sum(before[3] > after[3] for before, after in pairs) <= num_learner_deaths, f"parameters of {sender} went back"
    return num_items
