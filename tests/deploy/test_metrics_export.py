"""What the driver tells Ray of a run, without a Ray; who may ask for it; and what dashboard and page say of it."""

import socket

import numpy as np
import pytest
from prometheus import DASHBOARD, ROOT, binary, dashboard_queries, metrics_of, yaml_blocks
from test_cli import failing
from test_params_store import packed

from common.config import as_dict, from_dict
from common.metrics import ActorStats, PushCounts, ShardStats, WaitStatus
from deploy import metrics_export
from deploy.metrics_export import ROW_METRICS, SHARD_METRICS, MetricsExport, metric_name, shard_metric_name
from deploy.progress import Progress
from deploy.ray_params import RayParamsStore
from deploy.recipes import RECIPES

ALL = {f"ray_{metric_name(key)}": text for key, text in ROW_METRICS.items()} | {
    f"ray_{shard_metric_name(key)}": text for key, text in SHARD_METRICS.items()
}


class Told:
    """What gauges were set to."""

    def __init__(self):
        self.values = {}
        self.times = 0

    def gauge(self, name, description, tag_keys):
        told = self

        class Gauge:
            def set_default_tags(self, tags):
                self.tags = tags
                return self

            def set(self, value, tags=None):
                assert isinstance(value, float | int)
                labels = self.tags | (tags or {})
                assert set(labels) == set(tag_keys) and all(isinstance(label, str) for label in labels.values())
                told.values[name, frozenset(labels.items())] = value
                told.times += 1

        assert description
        return Gauge()


@pytest.fixture
def told(monkeypatch):
    told = Told()
    monkeypatch.setattr(metrics_export, "Gauge", told.gauge)
    return told


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_export.time, "monotonic", lambda: now[0])
    return now


def labels(**more):
    return frozenset({"run": "r1", "recipe": "pong", **more}.items())


def make_shard(index):
    waits = [
        WaitStatus(who="actors", reason="because", seconds=2.5, total_seconds=9.0),
        WaitStatus(who="learner", reason=None, seconds=0.0, total_seconds=1.0),
    ]
    return ShardStats(
        shard_index=index,
        shard_epoch=0,
        size=10 + index,
        capacity=100,
        num_inserted=30 + index,
        num_evicted=20,
        num_sampled=80,
        num_refused_chunks=0,
        last_refusal=None,
        num_priority_updates=0,
        num_stale_priority_updates=0,
        resident_bytes=1000,
        waits=waits,
        senders={},
        lost={},
        log=None,
    )


def test_every_value_of_a_row_and_of_each_shard_is_told(told):
    MetricsExport("r1", "pong").take({"env_steps": 7, "actor/num_alive": 2}, [make_shard(0), make_shard(1)])
    assert told.values[metric_name("env_steps"), labels()] == 7
    assert told.values["qfleet_actor_num_alive", labels()] == 2
    of_shard_1 = {
        name.removeprefix("qfleet_each_shard_"): v for (name, tags), v in told.values.items() if tags == labels(shard="1")
    }
    assert of_shard_1 == {
        "size_transitions": 11,
        "resident_bytes": 1000,
        "inserted_transitions": 31,
        "evicted_transitions": 20,
        "sampled_transitions": 80,
        "actors_wait_seconds": 2.5,
        "learner_wait_seconds": 0,
    }
    assert set(of_shard_1) == set(SHARD_METRICS)


def test_what_a_row_has_no_more_is_not_told_again_but_the_last_evaluation_is(told, clock):
    export = MetricsExport("r1", "pong")
    export.take({"updates": 1, "learner/loss_mean": 0.5, "evaluator/return_mean": 3.0}, [])
    told.values.clear()
    clock[0] += 10.0
    export.take({"updates": 2}, [])
    assert {name: value for (name, _), value in told.values.items()} == {
        "qfleet_updates": 2,
        "qfleet_evaluator_return_mean": 3.0,
    }


def test_values_are_told_once_a_second_between_rows(told, clock):
    export = MetricsExport("r1", "pong")
    export.take({"updates": 1}, [])
    for seconds, times in ((0.5, 1), (0.6, 2), (0.1, 2), (1.0, 3)):
        clock[0] += seconds
        export.tell()
        assert told.times == times


def test_a_key_that_the_table_does_not_have_ends_nothing(told):
    MetricsExport("r1", "pong").take({"updates": 1, "of/another_version": 2.0}, [])
    assert {name for name, _ in told.values} == {"qfleet_updates"}


@pytest.mark.parametrize("num_actors", [1, 500])
def test_series_are_few_whatever_the_number_of_actors(told, num_actors):
    """Every key that there can be, and three shards."""
    config = RECIPES["pong"]()
    progress = Progress(config, {})
    for slot in range(num_actors):
        progress.env_steps_of[slot] = 0
        stats = ActorStats(
            slot=slot,
            incarnation=0,
            env_steps=100,
            sent=0,
            pushed=PushCounts(),
            params_epoch=0,
            params_version=0,
            epsilon=0.5,
        )
        progress.on_actor(stats)
    progress.shards = [make_shard(index) for index in range(3)]
    MetricsExport("r1", "pong").take(dict.fromkeys(ROW_METRICS, 1.0) | progress.row(), progress.shards)
    assert len(told.values) == len(ROW_METRICS) + 3 * len(SHARD_METRICS) < 150


def test_the_store_tells_what_it_holds():
    store = RayParamsStore()
    assert np.isnan(store.stats().params_age_seconds) and store.stats().params_epoch == -1
    for version in (1, 2):
        store.publish(packed(0, version))
    store.publish(packed(0, 1))  # Older than what it holds.
    for asker in (1, 2, 3):
        store.latest(0, asker)
    stats = store.stats()
    assert (stats.params_epoch, stats.params_version, stats.num_published, stats.num_answered) == (0, 2, 2, 1)
    assert 0 <= stats.params_age_seconds < 10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--metrics-port", "0"], "metrics_port must be in [1, 65535], got 0"),
        (["--metrics-port", "70000"], "metrics_port must be in [1, 65535], got 70000"),
        (["--metrics-port", "many"], "--metrics-port"),
        (["--metrics-port", "8080", "--serial"], "leave out --metrics-port"),
        (["--metrics-port", "8080", "--address", "10.0.0.1:6379"], "ray start --metrics-export-port"),
    ],
)
def test_a_port_that_cannot_be_is_one_line_and_writes_nothing(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in failing(capsys, "train", "gridworld", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_one_line_and_writes_nothing(address, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        line = failing(capsys, "train", "gridworld", "--metrics-port", port)
    assert f"--metrics-port {port}: this port cannot be had (Address already in use)" in line
    assert list(tmp_path.iterdir()) == []


def test_the_port_is_a_setting_of_the_run():
    config = from_dict(as_dict(RECIPES["pong"]()) | {"metrics_port": 8080})
    assert config.metrics_port == 8080


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('max(ray_qfleet_env_steps{run="$run"})', {"ray_qfleet_env_steps"}),
        ("sum by (Component) (a_b and on (SessionName) c{x=~\"y(z)\", t='u'} offset 5m)", {"a_b", "c"}),
        ("max without(pid)(rate(a[$__rate_interval])) / 2 > bool b:c", {"a", "b:c"}),
        ("label_values(ray_qfleet_env_stepz, run)", {"ray_qfleet_env_stepz", "run"}),
    ],
)
def test_metrics_of_finds_the_names_in_an_expression(expression, names):
    assert metrics_of(expression) == names


def test_the_dashboard_names_only_metrics_of_the_table_and_of_ray():
    """Those of Ray are held to a real run in test_prometheus.py."""
    named = set().union(*(metrics_of(expression) for _, expression in dashboard_queries()))
    assert {name for name in named if name.startswith("ray_qfleet_")} <= ALL.keys()
    assert len([name for name in named if name.startswith("ray_qfleet_")]) > 60
    assert all(name.startswith("ray_") for name in named)


def test_the_dashboard_is_of_one_run_and_one_prometheus():
    datasource, run = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert run["name"] == "run" and run["query"]["query"] == "label_values(ray_qfleet_env_steps, run)"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert [panel["title"] for panel in DASHBOARD["panels"] if not panel.get("targets") and panel["type"] != "row"] == []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert 'run="$run"' in target["expr"], target
    cells = [cell for panel in DASHBOARD["panels"] for cell in cells_of(panel["gridPos"])]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "panels overlap, or leave the page"


def cells_of(place):
    return [(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]


def test_the_page_lists_every_metric_with_what_it_is():
    lines = (ROOT / "docs/metrics.md").read_text().splitlines()
    listed = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| `ray_qfleet_"))
    assert listed == {f"`{name}`": text for name, text in ALL.items()}


@pytest.mark.parametrize("index", [0, 1])
def test_promtool_accepts_the_configurations_of_the_page(index, tmp_path):
    import subprocess

    file = tmp_path / "prometheus.yml"
    file.write_text(yaml_blocks("metrics.md")[index])
    done = subprocess.run([binary("promtool"), "check", "config", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
