"""`qfleet scale RECIPE --role`: limits of a role with known service times, the table, and a short real run of each role."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import os
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from one_server import SERVICE, OneServer, waiting_quantile

from common import wire
from common.errors import UserError
from common.messages import ParamsSnapshot
from deploy import bench, open_loop, role_figure, role_loads, role_peers, run_dir
from deploy.recipes import RECIPES
from deploy.role_loads import Point, Row, ShardLoad, limited_by, loading_config, shortfall_of
from deploy.role_peers import Answering, Meter, StoreCaller, SyntheticShard
from deploy.scale_role import Table, limits, load_role, ramp, run_rounds, sentences
from deploy.scale_table import lock_directory


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def make_row(**fields):
    numbers = {name: 0.0 for name, kind in Row.__annotations__.items() if kind == "float"}
    return Row(
        **numbers
        | {"role": "shard", "axis": "insert", "call": "insert", "unit": "transitions", "loop": "open", "limited_by": ""}
        | fields
    )


class FakeLoad:
    """A load of one server on a clock of its own, in place of a Ray worker and its peers."""

    role, unit, axes = "shard", "transitions", ("insert",)

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.points_measured = []

    def points(self, axis, limit, rates):
        return [Point(axis=axis, offered=rate) for rate in rates]

    def measure(self, point, seconds):
        self.points_measured.append(point.offered)
        server = OneServer()
        if point.offered is None:
            schedule = open_loop.closed_loop([1.0], warm_up=1.0, seconds=seconds, max_in_flight=8, most=100_000)
        else:
            schedule = open_loop.poisson(self.rng, [point.offered], warm_up=1.0, seconds=seconds, max_in_flight=500)
        answers = open_loop.run(schedule, server, began=0.0, drain_seconds=1.0, clock=server.clock, sleep=server.sleep)
        found = open_loop.summarize([answers], 0, warm_up=1.0, seconds=seconds)
        is_open = point.offered is not None
        return [
            make_row(
                loop="open" if is_open else "closed",
                offered_per_second=found.offered_per_second if is_open else math.nan,
                carried_per_second=found.carried_per_second,
                p50_ms=1e3 * found.p50,
                p99_ms=1e3 * found.p99,
                limited_by="role" if not is_open else "",
            )
        ]


def test_rounds_find_the_limit_of_a_known_server_and_its_latency_at_70_percent():
    load, rows = FakeLoad(), []
    run_rounds(load, (), 200.0, 2, rows.append, lambda line: None)
    offered = [None, *(pytest.approx(part / SERVICE, rel=0.01) for part in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))]
    assert load.points_measured == offered * 2  # Rounds are interleaved: each has every point once.
    assert [row.round for row in rows] == [1] * 11 + [2] * 11
    found = limits(rows)["insert"]["insert"]
    assert found["limit"]["median"] == pytest.approx(1 / SERVICE, rel=0.01)
    assert found["p99_ms_at_70_percent"] == pytest.approx(1e3 * SERVICE * waiting_quantile(0.7, 0.99), rel=0.2)
    # Load over the 99th percentile of an M/D/1 queue is greatest between these, and falls to nothing at the limit.
    assert 0.2 / SERVICE < found["knee"] < 0.8 / SERVICE
    assert ramp(rows)[-1]["p99_ms"] > 10 * ramp(rows)[0]["p99_ms"]


def test_given_rates_are_what_is_offered():
    load = FakeLoad()
    run_rounds(load, (20.0, 50.0), 20.0, 1, lambda row: None, lambda line: None)
    assert load.points_measured == [None, 20.0, 50.0]


@pytest.mark.parametrize(
    ("is_short", "thread", "peer", "host", "expected"),
    [
        (True, 0.97, 0.5, 0.99, "role"),
        (True, 0.5, 0.95, 0.99, "peers"),
        (True, 0.5, 0.5, 0.99, "cores"),
        (False, 0.5, 0.5, 0.99, "cores"),  # Carried, but its latency is that of a full machine.
        (True, 0.5, 0.5, 0.5, "transport"),
        (False, 0.97, 0.5, 0.5, ""),
    ],
)
def test_what_holds_a_point_back(is_short, thread, peer, host, expected):
    assert limited_by(is_short=is_short, role_thread=thread, busiest_peer=peer, host=host) == expected


def test_a_few_calls_on_their_way_at_the_end_are_no_shortfall():
    assert shortfall_of(100.0, 75.0, 25) == 0.25
    assert shortfall_of(8.0, 5.0, 3) == 0.0  # Three calls.
    assert shortfall_of(10_000.0, 9_800.0, 200) == 0.0  # Two in a hundred.
    assert shortfall_of(100.0, 120.0, -20) == shortfall_of(0.0, 0.0, 0) == 0.0


def test_the_table_is_there_line_by_line_and_leaves_out_what_does_not_apply(tmp_path):
    rows = []
    table = Table(tmp_path / "shard.csv", rows)
    table.add(make_row(offered_per_second=1234.5678, wait_fraction=math.nan))
    first = read_csv(tmp_path / "shard.csv")
    table.add(make_row(round=2))
    lines = read_csv(tmp_path / "shard.csv")
    assert len(first) == 1 and len(lines) == len(rows) == 2
    assert list(lines[0]) == list(Row.__annotations__)
    assert (lines[0]["offered_per_second"], lines[0]["wait_fraction"], lines[1]["round"]) == ("1234.57", "", "2")
    Table(tmp_path / "shard.csv", []).add(make_row())
    assert len(read_csv(tmp_path / "shard.csv")) == 1  # Another command begins it anew.


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    class Interrupted(FakeLoad):
        def measure(self, point, seconds):
            if len(self.points_measured) == 4:
                raise KeyboardInterrupt
            return super().measure(point, seconds)

    loaded_by(monkeypatch, Interrupted())
    status = load_role(RECIPES["cartpole"](), "shard", rates=(), seconds=20.0, rounds=3, out=tmp_path)
    assert status == 130
    card = json.loads((tmp_path / "shard.json").read_text())
    assert card["is_interrupted"] and card["limits"]["insert"]["insert"]["limit"]["median"] == pytest.approx(100, rel=0.02)
    assert len((tmp_path / "shard.csv").read_text().splitlines()) == 1 + 4
    assert (tmp_path / "shard.png").read_bytes().startswith(b"\x89PNG")
    assert "one shard: 100" in capsys.readouterr().out


def test_sentences_say_where_the_machine_was_the_limit():
    rows = [
        make_row(
            loop="closed", carried_per_second=80_000.0, limited_by="cores", role_cpu_us_each=11.0, role_thread_us_each=8.0
        ),
        make_row(offered_per_second=8_000.0, carried_per_second=8_000.0, p99_ms=2.0),
        make_row(offered_per_second=80_000.0, carried_per_second=70_000.0, p99_ms=90.0, limited_by="cores"),
        make_row(offered_per_second=90_000.0, carried_per_second=70_000.0, p99_ms=99.0, limited_by="peers"),
    ]
    lines = sentences("shard", rows, limits(rows), 32)
    assert lines[0].startswith(
        "one shard: 80,000 inserts/s (80,000 to 80,000), held by the cores; p99 at 70 % of that: inserts 60.7 ms"
    )
    assert lines[1].startswith("in 1 of 3 points this machine's processors were full")
    assert lines[2] == "in 1 of 3 points the synthetic peers were the limit"


def test_sentences_say_how_late_shards_may_answer_at_each_depth():
    def late(depth, answer, wait):
        return make_row(
            role="learner",
            axis="answers",
            call="update",
            loop="closed",
            prefetch_batches=depth,
            answer_ms=answer,
            wait_fraction=wait,
        )

    rows = [late(2.0, 10.0, 0.01), late(2.0, 40.0, 0.4), late(4.0, 10.0, 0.0), late(4.0, 40.0, 0.02), late(1.0, 10.0, 0.3)]
    lines = sentences("learner", rows, {}, 32)
    assert lines == [
        "with --learner.prefetch-batches 1 shards may take less than 10 ms to answer before the learner waits",
        "with --learner.prefetch-batches 2 shards may take up to 10 ms to answer before the learner waits",
        "with --learner.prefetch-batches 4 shards may take up to 40 ms to answer before the learner waits",
    ]


@pytest.mark.parametrize("role", ["shard", "learner"])
def test_a_picture_has_a_panel_for_each_axis(tmp_path, role):
    from matplotlib import image

    from deploy.role_figure import draw_role

    if role == "shard":
        kinds = [("insert", "insert"), ("sample", "sample"), ("both", "insert"), ("both", "sample")]
    else:
        kinds = [("updates", "update"), ("answers", "update")]
    rows = []
    for axis, call in kinds:
        rows.append(make_row(role=role, axis=axis, call=call, loop="closed", carried_per_second=100.0, limited_by="role"))
        late = [
            make_row(role=role, axis=axis, call=call, loop="closed", answer_ms=m, prefetch_batches=2.0) for m in (5.0, 50.0)
        ]
        opened = [
            make_row(role=role, axis=axis, call=call, offered_per_second=r, carried_per_second=r, p50_ms=1.0, p99_ms=1.0 + r)
            for r in (10.0, 50.0, 90.0)
        ]
        rows += late if axis == "answers" else opened
    draw_role(rows, limits(rows), title="one", out=tmp_path / "one.png")
    assert image.imread(tmp_path / "one.png").shape[1] == 660 * len({axis for axis, _ in kinds})


@pytest.mark.parametrize("axis", ["insert", "sample", "both"])
def test_an_offered_rate_becomes_calls_at_the_ratio_of_the_recipe(axis):
    load = ShardLoad(None, {}, 0, (50.0, 200.0), 8.0)
    inserts, samples = load.calls_per_second(Point(axis=axis, offered=1.0))
    assert 50.0 * inserts == (0.0 if axis == "sample" else 1.0)
    assert 200.0 * samples == {"insert": 0.0, "sample": 1.0, "both": 8.0}[axis]
    assert ShardLoad(None, {}, 0, (50.0, 200.0), None).axes == ("insert", "sample")


def test_a_synthetic_shard_answers_at_its_rate_and_as_late_as_it_is_told():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    def make(answering):
        now[0] = 0.0
        return SyntheticShard([np.zeros(1), np.ones(1)], answering, lambda: now[0], sleep)

    late = make(Answering(None, 0.5))
    for _ in range(3):
        late.request(4)
    assert late.num_requested() == 3 and late.collect(0.2) is None and now[0] == pytest.approx(0.2)
    assert late.collect(1.0).batch is not None and now[0] == pytest.approx(0.5)
    assert late.collect(0.0).batch is not None and now[0] == pytest.approx(0.5)  # Requested together, answered together.
    slow = make(Answering(10.0, 0.0))
    for _ in range(20):
        slow.request(4)
        assert slow.collect(1.0) is not None
    assert now[0] == pytest.approx(1.9)  # The first at once, then ten a second.


def test_a_look_is_of_a_reader_that_looked_a_second_ago(monkeypatch):
    """So that, as in a fleet, every reader is told of every version: a reader that always had the newest would be told of none."""
    asked, now = [], [100.0]

    class Store:
        call = SimpleNamespace(remote=lambda *question: asked.append(question) or len(asked))

    monkeypatch.setattr(role_peers.time, "monotonic", lambda: now[0])
    caller = StoreCaller(Store())
    snapshot = ParamsSnapshot(run="r", epoch=0, version=3, layout="", params=np.zeros(2, np.float32))
    answer = SimpleNamespace(message=wire.pack(snapshot), age_seconds=0.25)
    first = caller.send(0)
    now[0] = 100.1
    caller._take(first, answer)
    assert caller.ages == [pytest.approx(0.35)]
    for when, version in ((100.2, (-1, -1)), (101.0, (-1, -1)), (101.2, (0, 3))):
        now[0] = when
        caller.send(0)
        assert asked[-1] == ("latest", *version), when


def test_a_meter_counts_what_is_spent_in_each_method():
    class Role:
        def work(self, num):
            return sum(range(num))

    meter = Meter(Role())
    before = meter.spent()
    assert meter.work(300_000) == sum(range(300_000))
    spent = meter.spent().since(before)
    assert set(spent.wall) == {"work"} and 0 < spent.cpu["work"] <= spent.thread <= spent.process + 1e-3
    assert spent.wall["work"] >= 0.5 * spent.cpu["work"]


def test_a_shard_is_loaded_with_its_part_of_the_recipe():
    config = RECIPES["apex"]()
    loading = loading_config(config)
    assert loading.replay.capacity == 100_000 * config.replay.num_shards
    assert loading.replay.samples_per_insert is None and loading.actors.n_step == config.actors.n_step
    small = loading_config(RECIPES["cartpole"]())
    assert small.replay.capacity == RECIPES["cartpole"]().replay.capacity


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        ({}, {"role": "actor"}, "--role actor: there are shard, store, learner"),
        ({}, {"rates": (10.0, -1.0)}, "--rates must be positive and finite, got -1"),
        ({}, {"seconds": 0.0}, "--role-seconds must be positive"),
        ({}, {"rounds": 0}, "--rounds must be positive"),
        ({"address": "auto"}, {}, "leave out --address"),
        ({"serial": True}, {}, "leave out --serial"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, change, arguments, sentence):
    config = replace(RECIPES["cartpole"](), **change)
    with pytest.raises(UserError, match=sentence):
        load_role(config, **{"role": "shard", "rates": (), "seconds": 1.0, "rounds": 1, "out": tmp_path} | arguments)


def test_a_file_in_the_place_of_the_directory_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        load_role(RECIPES["cartpole"](), "shard", rates=(), seconds=1.0, rounds=1, out=tmp_path / "file")


def loaded_by(monkeypatch, load):
    """Has `load` in the place of a role and its peers."""
    monkeypatch.setattr(role_loads, "load_of", lambda *args: contextlib.nullcontext((load, {"peers": 1})))
    monkeypatch.setattr(bench, "local_ray", lambda config: contextlib.nullcontext())


def load_cartpole(out):
    return load_role(RECIPES["cartpole"](), "shard", rates=(10.0,), seconds=5.0, rounds=1, out=out)


@pytest.mark.parametrize("what", ["csv", "json", "png", "scratch"])
def test_a_full_disk_is_one_line_and_what_was_measured_is_kept(what, tmp_path, monkeypatch, capsys):
    def full(*args, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Filling(FakeLoad):
        def measure(self, point, seconds):
            if what == "csv" and self.points_measured:
                monkeypatch.setattr(csv, "writer", full)
            return super().measure(point, seconds)

    loaded_by(monkeypatch, Filling())
    if what == "json":
        monkeypatch.setattr(run_dir, "write_json", full)
    elif what == "png":
        monkeypatch.setattr(role_figure, "draw_role", full)
    elif what == "scratch":
        monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(No space left on device\); what was measured before is in the CSV"
    ):
        load_cartpole(tmp_path)
    assert len(list((tmp_path).glob("shard.csv"))) == (what != "scratch")
    if what != "scratch":
        assert len(read_csv(tmp_path / "shard.csv")) == (1 if what == "csv" else 2)
    assert ("one shard:" in capsys.readouterr().out) == (what in ("json", "png"))


def test_two_loads_in_one_directory_are_refused_and_what_a_killed_one_left_is_removed(tmp_path, monkeypatch):
    loaded_by(monkeypatch, FakeLoad())
    (tmp_path / ".scale-killed" / "log").mkdir(parents=True)
    with lock_directory(tmp_path), pytest.raises(UserError, match="another qfleet scale is at work there"):
        load_cartpole(tmp_path)
    assert (tmp_path / ".scale-killed").exists() and not (tmp_path / "shard.csv").exists()  # It is the other's.
    assert load_cartpole(tmp_path) == 0
    assert not list(tmp_path.glob(".scale-*")) and len(read_csv(tmp_path / "shard.csv")) == 2


def measured(out, role):
    rows = read_csv(out / f"{role}.csv")
    card = json.loads((out / f"{role}.json").read_text())
    assert (out / f"{role}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".scale-*"))
    assert {"hardware", "versions", "commit", "limits", "config"} <= set(card) and card["role"] == role
    return rows, card


@pytest.mark.ray
def test_a_real_shard_takes_in_and_gives_out_what_it_is_offered(tmp_path, capsys):
    config = RECIPES["cartpole"]()
    config = replace(config, replay=replace(config.replay, priority_exponent=0.6))
    assert load_role(config, "shard", rates=(400.0,), seconds=0.8, rounds=1, out=tmp_path) == 0
    rows, card = measured(tmp_path, "shard")
    assert [(row["axis"], row["call"], row["loop"]) for row in rows] == [
        ("insert", "insert", "closed"),
        ("insert", "insert", "open"),
        ("sample", "sample", "closed"),
        ("sample", "sample", "open"),
        ("both", "insert", "closed"),
        ("both", "sample", "closed"),
        ("both", "insert", "open"),
        ("both", "sample", "open"),
    ]
    closed = {(row["axis"], row["call"]): float(row["carried_per_second"]) for row in rows if row["loop"] == "closed"}
    assert closed["both", "sample"] / closed["both", "insert"] == pytest.approx(config.replay.samples_per_insert, rel=0.5)
    opened = rows[1]
    assert float(opened["offered_per_second"]) == pytest.approx(400, rel=0.6)
    assert 0 < float(opened["p50_ms"]) <= float(opened["p95_ms"]) <= float(opened["p99_ms"])
    assert float(opened["method_cpu_us_each"]) < float(opened["role_thread_us_each"])
    assert card["load"]["durable_log"] and card["load"]["transitions_held"] == config.replay.capacity
    assert "one shard:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_store_answers_its_pullers(tmp_path):
    assert load_role(RECIPES["cartpole"](), "store", rates=(50.0,), seconds=1.5, rounds=1, out=tmp_path) == 0
    rows, card = measured(tmp_path, "store")
    assert [row["loop"] for row in rows] == ["closed", "open"] and set(card["limits"]) == {"look"}
    assert float(rows[1]["carried_per_second"]) > 5
    assert 0 < float(rows[1]["params_age_p50_seconds"]) < 5.0


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_learner_takes_the_batches_it_is_given(tmp_path):
    config = RECIPES["cartpole"]()
    config = replace(config, learner=replace(config.learner, prefetch_batches=1))
    assert load_role(config, "learner", rates=(5.0,), seconds=0.6, rounds=1, out=tmp_path) == 0
    rows, card = measured(tmp_path, "learner")
    offered = next(row for row in rows if row["loop"] == "open")
    assert float(offered["carried_per_second"]) == pytest.approx(5.0, rel=0.5)
    assert float(offered["wait_fraction"]) > 0.5
    limit = card["limits"]["updates"]["update"]["limit"]["median"]
    assert limit > 10.0
    late = [row for row in rows if float(row["answer_ms"]) > 0]
    assert {float(row["prefetch_batches"]) for row in late} == {1.0, 2.0}
    slowest = max(float(row["answer_ms"]) for row in late)
    at_slowest = [row for row in late if float(row["answer_ms"]) == slowest]
    for row in at_slowest:  # No more than its batches in the time of an answer.
        assert float(row["carried_per_second"]) <= 1.3 * 1e3 * float(row["prefetch_batches"]) / slowest
