"""`qfleet adjust`: what is left for a run that is under way, and how the run takes it up."""

from __future__ import annotations

import fcntl

import pytest

from common.errors import UserError
from deploy import adjust
from deploy.adjust import AdjustFlags, take_up_adjustment
from deploy.recipes import RECIPES
from deploy.run_dir import open_run, read_config


class Events:
    def __init__(self):
        self.sentences = []

    def event(self, sentence):
        self.sentences.append(sentence)


class Display:
    """What stands for Progress: it shows the settings in force."""

    config = None


@pytest.fixture
def run(tmp_path):
    run_dir = open_run(RECIPES["cartpole"](), tmp_path / "run")  # It holds the lock, as a run does.
    yield run_dir
    run_dir.close()


@pytest.fixture
def take_up(run):
    """Lets the run look once; returns (its configuration from then on, the shares given to the shards, its events)."""

    def look(refuse=None):
        given, events = [], Events()

        def set_limiters(shares):
            if refuse:
                raise UserError(refuse)
            given.append(shares)

        config = take_up_adjustment(read_config(run.path), run, Display(), events, set_limiters)
        return config, given, events.sentences

    return look


def test_a_change_reaches_the_shards_once_and_is_kept_for_those_who_continue(run, take_up):
    before = read_config(run.path)
    assert adjust.adjust(run.path, AdjustFlags(samples_per_insert=3.5, min_size=700)) == 0
    config, given, events = take_up()
    assert (config.replay.samples_per_insert, config.replay.min_size) == (3.5, 700)
    assert given == [
        {"min_size": 700, "samples_per_insert": 3.5, "limiter_buffer_samples": config.limiter_buffer_samples}
    ]  # cartpole has one shard.
    assert "3.5 samples per insert" in events[0]
    assert read_config(run.path) == config != before
    assert take_up() == (config, [], [])


def test_no_ratio_is_asked_for_by_infinity(run, take_up):
    adjust.adjust(run.path, AdjustFlags(samples_per_insert=float("inf")))
    config, given, events = take_up()
    assert config.replay.samples_per_insert is None
    assert given[0]["samples_per_insert"] is None
    assert "no samples per insert" in events[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "needs something to change"),
        ({"samples_per_insert": 0.0}, "samples_per_insert must be positive"),
        ({"min_size": 10**9}, "the learner would never start"),
        ({"limiter_buffer_samples": 1}, "it must be at least"),
    ],
)
def test_what_would_stop_the_run_is_refused_by_the_command(run, take_up, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        adjust.adjust(run.path, AdjustFlags(**flags))
    assert take_up()[1:] == ([], [])


def test_nothing_is_left_where_nothing_runs(run):
    run.close()
    with pytest.raises(UserError, match="no qfleet is running there; give the flags to qfleet resume"):
        adjust.adjust(run.path, AdjustFlags(min_size=5))
    assert not list(run.path.glob("adjust*"))
    with (run.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Asking does not keep the lock.


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"seed": 3}', b'{"samples_per_insert": -1.0}', b'{"samples_per_insert": "abc"}', b'{"min_size": true}',
     b"\xff\xfe\x00bad", b'{"min_size": 2.5'],
)  # fmt: skip
def test_a_file_that_cannot_be_a_change_is_told_once_and_nothing_done(run, take_up, data):
    (run.path / "adjust-1.json").write_bytes(data)
    before = read_config(run.path)
    config, given, events = take_up()
    assert (config, given) == (before, [])
    assert events[0].startswith("the limiters stay as they are: ")
    assert take_up() == (before, [], [])


def test_two_changes_before_the_run_looks_are_both_taken_up(run, take_up):
    adjust.adjust(run.path, AdjustFlags(samples_per_insert=4.0))
    adjust.adjust(run.path, AdjustFlags(min_size=700))
    config, given, _ = take_up()
    assert (config.replay.samples_per_insert, config.replay.min_size, len(given)) == (4.0, 700, 2)


def test_a_truncated_run_json_is_written_anew(run, take_up):
    adjust.adjust(run.path, AdjustFlags(samples_per_insert=4.0))
    config = read_config(run.path)
    (run.path / "run.json").write_text('{"format')
    events = Events()
    adjusted = take_up_adjustment(config, run, Display(), events, lambda shares: None)
    assert read_config(run.path) == adjusted != config


def test_a_change_that_is_left_over_does_not_reach_the_next_command(run):
    adjust.adjust(run.path, AdjustFlags(samples_per_insert=4.0))
    config = read_config(run.path)
    run.close()
    again = open_run(config, run.path)
    assert not list(run.path.glob("adjust*"))
    again.close()


def test_a_shard_that_refuses_leaves_all_as_it_was(run, take_up):
    before = read_config(run.path)
    adjust.adjust(run.path, AdjustFlags(samples_per_insert=2.0))
    config, _, events = take_up(refuse="too small")
    assert config == before == read_config(run.path)
    assert events == ["the limiters stay as they are: too small"]
