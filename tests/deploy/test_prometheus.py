"""A real run, scraped by a real Prometheus where there is one: what is there, what the dashboard finds, and what it costs nobody.

Prometheus is Debian's: `apt-get install prometheus`, or the `prometheus` and `promtool` of its package in a folder that QFLEET_PROMETHEUS names.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import psutil
import pytest
from prometheus import Prometheus, binary, dashboard_queries, fetch, free_port, metrics_of, samples, yaml_blocks
from ray_runs import Run, end_all
from test_listening import is_open, listening

from deploy.metrics_export import ROW_METRICS, SHARD_METRICS, metric_name, shard_metric_name

pytestmark = pytest.mark.ray

ROW_KEYS = {key: text for key, text in ROW_METRICS.items() if key != "learner/agree_fraction"}  # That is of several ranks.
NUM_SHARDS = 3
WORDS = [
    "--max-updates",
    "1000000000",
    "--log-period-seconds",
    "1",
    "--evaluation.period-seconds",
    "1",
    "--evaluation.episodes",
    "2",
]
WORDS += ["--actors.num-actors", "2", "--replay.num-shards", NUM_SHARDS, "--replay.priority-exponent", "0.6"]
WORDS += ["--learner.checkpoint-period-seconds", "2"]
# Ray's own statistics of nodes come each five seconds, and are forgotten after two such intervals.
OFTEN = {"RAY_metrics_report_interval_ms": "5000"}


class Observed(NamedTuple):
    """What there was to see of a run, while it went on."""

    run: str
    port: int
    page: str
    """As scraped."""
    sockets: set
    rows: list
    config: str | None
    """Of Prometheus, which scrapes each second; None where there is none."""
    answers: dict
    """Prometheus's, by expression of the dashboard."""
    told: dict
    """Values, by metric, that Prometheus has of this run."""
    fresh: tuple
    """Env steps: of the newest row, what Prometheus had soon after, of the newest row then."""


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    path, port = tmp_path_factory.mktemp("prometheus"), free_port()
    server = None
    try:
        config = re.sub("scrape_interval: .*", "scrape_interval: 1s", yaml_blocks("metrics.md")[0]).replace("8080", str(port))
        server = Prometheus(path, config)
    except pytest.skip.Exception:
        config = None
    run = Run(path / "run", "train", "gridworld", "--run-dir", path / "run", "--metrics-port", port, *WORDS, environment=OFTEN)
    try:
        yield observe(run, port, server, config)
        run.process.send_signal(signal.SIGINT)
        assert run.end()[0] == 130
    finally:
        end_all([run])
        if server is not None:
            server.close()


def observe(run, port, server, config):
    wanted = {f"ray_{metric_name(key)}" for key in ROW_KEYS} | {"ray_node_mem_used", "ray_component_uss_bytes", "ray_actors"}
    page = ""

    def all_there():
        nonlocal page
        page = fetch(f"http://127.0.0.1:{port}/metrics") or ""
        return wanted <= {name for name, _, _ in samples(page)} and enough_rows()

    def enough_rows():
        return len(run.rows()) > 5

    with_deadline(all_there, 180, lambda: f"{sorted(wanted - {name for name, _, _ in samples(page)})}: {run.text()}")
    answers, told, fresh = {}, {}, ()
    if server is not None:
        before = run.rows()[-1]["env_steps"]
        with_deadline(lambda: steps_in(server) >= before, 60, run.text)
        fresh = (before, steps_in(server), run.rows()[-1]["env_steps"])
        for _, expression in dashboard_queries():
            answers[expression] = server.query(expression.replace("$__rate_interval", "20s").replace("$run", run_id(page)))
        now = time.time()
        for name in wanted & {name for name in wanted if name.startswith("ray_qfleet_")}:
            series = server.query(name, start=now - 60, end=now, step=1)
            told[name] = {float(value) for one in series for _, value in one["values"]}
    return Observed(
        run_id(page), port, page, listening(psutil.Process(run.process.pid)), run.rows(), config, answers, told, fresh
    )


def with_deadline(condition, seconds, text):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s: {text()}"
        time.sleep(0.5)


def steps_in(server):
    series = server.query("ray_qfleet_env_steps")
    return float(series[0]["value"][1]) if series else -1.0


def run_id(page):
    (run,) = {labels["run"] for name, labels, _ in samples(page) if name == "ray_qfleet_env_steps"}
    return run


@pytest.fixture
def scraped(observed):
    """Skips where there is no Prometheus."""
    binary("prometheus")
    return observed


def ours(observed):
    return [sample for sample in samples(observed.page) if sample[0].startswith("ray_qfleet_")]


def test_every_key_of_a_row_is_described_and_every_metric_is_in_some_row(observed):
    assert set().union(*observed.rows) == ROW_KEYS.keys()


def test_the_page_has_each_value_of_a_row_and_of_each_shard_once(observed):
    expected = [f"ray_{metric_name(key)}" for key in ROW_KEYS]
    expected += [f"ray_{shard_metric_name(key)}" for key in SHARD_METRICS for _ in range(NUM_SHARDS)]
    assert sorted(name for name, _, _ in ours(observed)) == sorted(expected)
    assert len(expected) < 150
    for name, labels, value in ours(observed):
        assert labels["run"] == observed.run and labels["recipe"] == "gridworld"
        assert labels.get("shard") in ({"0", "1", "2"} if "each_shard" in name else {None})
        if "each_shard" not in name:
            key = next(key for key in ROW_KEYS if f"ray_{metric_name(key)}" == name)
            assert value in {float(row[key]) for row in observed.rows if key in row}


def test_help_says_what_each_metric_is(observed):
    told = dict(re.findall(r"^# HELP (ray_qfleet_\w+) (.*)$", observed.page, re.MULTILINE))
    assert {f"ray_{metric_name(key)}": text for key, text in ROW_KEYS.items()}.items() <= told.items()
    assert {f"ray_{shard_metric_name(key)}": text for key, text in SHARD_METRICS.items()}.items() <= told.items()


def test_a_local_run_listens_on_loopback_only(observed):
    """Ray takes commands from everybody who reaches its sockets and has its token. The port of the metrics is one more of them."""
    assert {"gcs_server", "raylet"} < {name for _, _, name in observed.sockets}
    assert observed.port in {port for _, port, _ in observed.sockets}
    assert [socket for socket in sorted(observed.sockets) if is_open(socket[0])] == []


def unknown_metrics(queries, there):
    """Returns (panel, metric) of each metric that is in a query and not on a scraped page."""
    return [(panel, name) for panel, expression in queries for name in sorted(metrics_of(expression) - there)]


def test_every_query_of_the_dashboard_names_metrics_that_exist_and_a_misspelt_one_is_found(observed):
    there = {name for name, _, _ in samples(observed.page)}
    assert unknown_metrics(dashboard_queries(), there) == []
    for panel, expression in dashboard_queries():
        for name in metrics_of(expression):
            misspelt = re.sub(rf"\b{name}\b", f"{name}z", expression)
            assert unknown_metrics([(panel, misspelt)], there) == [(panel, f"{name}z")]


def test_prometheus_answers_every_query_of_the_dashboard(scraped):
    assert [expression for expression, answer in scraped.answers.items() if not answer] == []
    assert len(scraped.answers) == len({expression for _, expression in dashboard_queries()}) > 70
    by_shard = scraped.answers['max by (shard) (ray_qfleet_each_shard_size_transitions{run="$run"})']
    assert [one["metric"] for one in by_shard] == [{"shard": str(index)} for index in range(NUM_SHARDS)]


def test_prometheus_has_the_values_of_metrics_jsonl(scraped):
    for key in ROW_KEYS:
        told = scraped.told[f"ray_{metric_name(key)}"]
        assert told and told <= {float(row[key]) for row in scraped.rows if key in row}, key


def test_what_prometheus_has_is_fresh(scraped):
    before, told, after = scraped.fresh
    assert before <= told <= after and before > 0


def promtool(*words, stdin=None):
    done = subprocess.run([binary("promtool"), *words], input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong(scraped, tmp_path):
    """With the configuration, with our metrics' names and descriptions, and with the grammar of the dashboard's queries."""
    (tmp_path / "prometheus.yml").write_text(scraped.config)
    promtool("check", "config", tmp_path / "prometheus.yml")
    lines = [line for line in scraped.page.splitlines() if re.match(r"(# (HELP|TYPE) )?ray_qfleet_", line)]
    text = re.sub(
        r'\b(?!run=|recipe=|shard=)\w+="[^"]*",?', "", "\n".join(lines)
    )  # Ray's labels are not named as promtool likes it.
    promtool("check", "metrics", stdin=text + "\n")
    rules = ["groups:", "- name: dashboard", "  rules:"]
    for index, expression in enumerate(scraped.answers):
        rules += [f"  - record: query{index}", "    expr: >-", f"      {expression.replace('$__rate_interval', '20s')}"]
    (tmp_path / "rules.yml").write_text("\n".join(rules) + "\n")
    promtool("check", "rules", tmp_path / "rules.yml")


# Tells two values, then one of them again and again; prints what is scraped at the end of each.
VANISHING = """
import sys, time
from deploy import ray_environment
ray_environment.prepare()
import ray
from deploy.metrics_export import MetricsExport
from prometheus import fetch, free_port, samples

port = free_port()
ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False, _temp_dir=sys.argv[1], _metrics_export_port=port)
export = MetricsExport("r1", "pong")

def told(row, wanted):
    export.take(row, [])
    deadline = time.monotonic() + 60
    while True:
        export.tell()
        page = fetch(f"http://127.0.0.1:{port}/metrics") or ""
        found = {name: value for name, _, value in samples(page) if name.startswith("ray_qfleet_")}
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.2)

print(told({"updates": 1, "learner/loss_mean": 0.5}, {"ray_qfleet_updates": 1, "ray_qfleet_learner_loss_mean": 0.5}))
print(told({"updates": 2}, {"ray_qfleet_updates": 2}))
"""


def test_a_value_that_is_told_no_more_vanishes():
    directory = tempfile.mkdtemp(prefix="qf-")  # Short, for the paths of Ray's sockets.
    environment = os.environ | {"RAY_metrics_report_interval_ms": "1000", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        words = [sys.executable, "-c", VANISHING, directory]
        done = subprocess.run(words, capture_output=True, text=True, timeout=150, env=environment)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert done.stdout.splitlines() == [
        "{'ray_qfleet_updates': 1.0, 'ray_qfleet_learner_loss_mean': 0.5}",
        "{'ray_qfleet_updates': 2.0}",
    ], done.stderr
