"""Rows and events where the disk takes nothing: they are missing then, the run goes on, and what can be read stays readable."""

import errno
import json
import os
from types import SimpleNamespace

import pytest

from deploy import recorder as module
from deploy.plots import read_rows
from deploy.progress import Progress
from deploy.recipes import gridworld
from deploy.recorder import Recorder


class Console:
    is_terminal = False

    def __init__(self):
        self.lines = []

    def print(self, text, **options):
        self.lines.append(text)


@pytest.fixture
def record(tmp_path):
    made = []

    def make():
        made.append(Recorder(SimpleNamespace(path=tmp_path), Progress(gridworld(), {}), Console()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_row_that_a_killed_command_left_torn_costs_itself_alone(record, tmp_path):
    first = record()
    first.row()
    first.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"env_steps": 12, "upd')
    second = record()
    second.row()
    assert len(read_rows(tmp_path)) == 2
    assert len(file.read_text().splitlines()) == 3


def test_on_a_full_disk_rows_are_dropped_which_is_told_once_and_come_again(record, tmp_path, monkeypatch):
    recorder = record()
    recorder.row()

    class Full(module._Files):
        def __init__(self, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(row, degraded):
        recorder._files._rows.write(b'{"half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(recorder._files, "write", fail)
        patch.setattr(module, "_Files", Full)
        for _ in range(3):
            recorder.row()
    told = [line for line in recorder._console.lines if "rows of metrics are dropped" in line]
    assert len(told) == 1 and str(tmp_path) in told[0] and "No space left" in told[0]
    recorder.row()
    assert len(read_rows(tmp_path)) == 2
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_file_on_a_full_disk_ends_no_run(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full:
        console = module._SteadyConsole(file=SimpleNamespace(write=lambda text: full.write(text.encode()), flush=lambda: None))
        recorder = Recorder(SimpleNamespace(path=tmp_path), Progress(gridworld(), {}), console)
        recorder.event("something happened")
        recorder.row()
        recorder.close()
    assert len(read_rows(tmp_path)) == 1


def test_tensorboard_reads_every_row(record, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    recorder = record()
    for _ in range(3):
        recorder.row()
    recorder.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    first, *events = EventFileLoader(str(file)).Load()
    assert first.file_version == "brain.Event:2" and len(events) == 3
    for event, row in zip(events, read_rows(tmp_path), strict=True):
        assert {value.tag for value in event.summary.value} == set(row) and event.step == row["env_steps"]
