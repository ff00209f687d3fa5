"""Where workers go, decided without Ray: nodes are written down, and a placement group is ready where a test says so."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from actors.environments import probe
from common.config import RunConfig, parse_labels
from common.errors import UserError
from deploy import placement
from deploy.placement import Placement
from deploy.plan import plan_cluster_cpus, spread_slots
from deploy.ray_session import Node, has_labels
from deploy.recipes import RECIPES

GIB = 1 << 30


def node(name, cpus, gpus=0, is_head=False, **labels):
    resources = {"CPU": float(cpus), "memory": 64.0 * GIB} | ({"GPU": float(gpus)} if gpus else {})
    return Node(f"id-{name}", name, is_head, resources, labels | {"ray.io/node-id": f"id-{name}"})


class Cluster:
    """Nodes, and which strategies their free room allows."""

    def __init__(self, monkeypatch, *nodes, allows=("STRICT_PACK", "PACK")):
        self.asked = []
        self.allows = allows
        monkeypatch.setattr(placement, "nodes", lambda: list(nodes))
        monkeypatch.setattr(placement, "placement_group", self._group)
        monkeypatch.setattr(placement.ray.util, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(
            placement,
            "PlacementGroupSchedulingStrategy",
            lambda group, placement_group_bundle_index: placement_group_bundle_index,
        )

        self.now = 0.0
        monkeypatch.setattr(placement.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(placement.time, "sleep", self._wait)

    def _wait(self, seconds):
        self.now += seconds

    def _group(self, bundles, strategy, bundle_label_selector):
        self.asked.append((strategy, bundles, bundle_label_selector))

        def wait(seconds):
            self._wait(seconds)
            return strategy in self.allows

        return SimpleNamespace(wait=wait)


def small_cluster(**actors):
    base = RECIPES["small-cluster"]()
    learner = replace(base.learner, node_labels="role=learner")
    return replace(base, address="10.0.0.1:6379", actors=replace(base.actors, **actors), learner=learner)


@pytest.fixture
def spec():
    return probe(RECIPES["small-cluster"]().env)


HEAD = node("head", 16, gpus=1, is_head=True, role="learner")


def test_learner_shards_and_evaluator_lie_together_where_the_labels_say_and_actors_elsewhere(monkeypatch, spec):
    cluster = Cluster(monkeypatch, HEAD, node("w1", 32, role="env"), node("w2", 64, gpus=8, role="other"))
    placed = Placement(small_cluster(node_labels="role=env"), spec)
    placed.reserve(print, lambda: False)
    ((strategy, bundles, selectors),) = cluster.asked
    assert strategy == "STRICT_PACK" and selectors == [{"role": "learner"}] * 4
    assert [bundle["CPU"] for bundle in bundles] == [5.0, 1.0, 1.0, 1.0], "five for a GPU's learner, of the labelled node"
    assert [bundle.get("GPU") for bundle in bundles] == [1.0, None, None, None]
    assert bundles[1]["memory"] > 2 * GIB, "half of replay.memory, and the process"
    assert placed.options("learner")["num_gpus"] == 1.0
    assert [placed.options("shard", i)["scheduling_strategy"] for i in range(2)] == [1, 2]
    assert placed.options("evaluator")["scheduling_strategy"] == placed.options("store")["scheduling_strategy"] == 3
    actor = placed.options("actor", 7)
    assert actor["label_selector"] == {"role": "env", "ray.io/node-id": "!in(id-head)"}
    assert actor["num_cpus"] == 1.0 and 300 << 20 < actor["memory"] < GIB and "scheduling_strategy" not in actor
    assert placed.describe().startswith("attached to 3 nodes: head (16 CPUs, 1 GPUs, role=learner), w1 (32 CPUs, role=env)")


def test_actors_may_be_let_onto_the_head(monkeypatch, spec):
    Cluster(monkeypatch, HEAD)
    assert Placement(small_cluster(on_head=True), spec).options("actor")["label_selector"] == {}


def test_a_local_run_reserves_processors_only(monkeypatch, spec):
    """On a laptop nothing may be refused for memory that Ray keeps no books of."""
    cluster = Cluster(monkeypatch, Node("id", "laptop", True, {"CPU": 2.0}, {}))
    placed = Placement(replace(RECIPES["pong"]()), spec)
    placed.reserve(print, lambda: False)
    assert cluster.asked == [("STRICT_PACK", [{"CPU": 0.5}] * 3, None)]
    assert placed.options("actor") == {"num_cpus": 0.5} and placed.options("store") == {"num_cpus": 0.0}


def test_what_no_node_holds_lies_on_several_and_else_waits_for_one(monkeypatch, spec):
    cluster = Cluster(monkeypatch, HEAD, allows=("PACK",))
    Placement(small_cluster(), spec).reserve(print, lambda: False)
    assert [strategy for strategy, *_ in cluster.asked] == ["STRICT_PACK", "PACK"]
    cluster = Cluster(monkeypatch, HEAD, allows=())
    told = []

    def stop():
        cluster.allows = ("PACK",) if len(cluster.asked) == 4 else ()

    Placement(small_cluster(), spec).reserve(told.append, stop)
    assert len(told) == 2 and told[1].startswith("attached to"), "what it asks for may have changed meanwhile"
    assert "no node has room for learner, shards and evaluator (8 CPUs, 1 GPUs" in told[0] and "labels role=learner" in told[0]


def test_no_node_within_the_time_is_the_users_to_mend(monkeypatch, spec):
    cluster = Cluster(monkeypatch, HEAD, allows=())
    with pytest.raises(UserError, match="no node came within 15 minutes that has room for learner"):
        Placement(small_cluster(), spec).reserve(lambda text: None, lambda: False)
    assert 900 < cluster.now < 960


@pytest.mark.parametrize("able", [[HEAD], []], ids=["no_room", "no_node"])
def test_a_wait_for_nodes_ends_with_ctrl_c_at_once(monkeypatch, spec, able):
    cluster = Cluster(monkeypatch, *able, allows=())
    with pytest.raises(KeyboardInterrupt):
        Placement(small_cluster(), spec).reserve(lambda text: None, lambda: cluster.now > 3.5)
    assert cluster.now <= 5.0


def test_a_gpu_of_a_node_that_is_still_to_come_is_used(monkeypatch, spec):
    """With learner.device auto, as recipes have it. Kills: a plan that is made once, of a cluster without its learner's node."""
    cluster = Cluster(monkeypatch, node("head", 4, is_head=True))
    there = placement.nodes()
    monkeypatch.setattr(placement, "nodes", lambda: there if cluster.now < 10.0 else [*there, HEAD])
    placed, told = Placement(small_cluster(), spec), []
    assert "learner on CPUs" in placed.describe()
    placed.reserve(told.append, lambda: False)
    ((_, bundles, _),) = cluster.asked
    assert bundles[0]["GPU"] == 1.0 and bundles[0]["CPU"] == 5.0 and "learner on a GPU" in told[-1]
    assert placed.options("learner")["num_gpus"] == 1.0


def test_a_gpu_that_is_asked_for_is_waited_for_on_a_cluster_only(monkeypatch, spec):
    config = small_cluster()
    config = replace(config, learner=replace(config.learner, device="cuda", node_labels=None))
    Cluster(monkeypatch, node("head", 4, is_head=True))
    assert Placement(config, spec)._bundles()[0] == {
        "CPU": 5.0,
        "GPU": 1.0,
        "memory": float(Placement(config, spec)._memory["learner"]),
    }
    with pytest.raises(UserError, match="there are 0 GPUs"):
        Placement(replace(config, address=None, actors=replace(config.actors, max_workers=2)), spec)


@pytest.mark.parametrize(
    ("cpus", "uses_gpu", "learner", "shard"),
    [
        (16, True, 5.0, 1.0),
        (6, True, 3.0, 1.0),
        (16, False, 8.0, 1.0),
        (300, False, 16.0, 1.0),
        (4, False, 1.0, 1.0),
        (2, False, 0.5, 0.5),
        (None, True, 5.0, 1.0),
    ],
)
def test_processors_of_the_learners_node(cpus, uses_gpu, learner, shard):
    """Two shards and an evaluator beside it; what is left is for actors, or for others."""
    plan = plan_cluster_cpus(small_cluster(), cpus, uses_gpu=uses_gpu)
    assert (plan.learner, plan.shard, plan.evaluator, plan.actor) == (learner, shard, shard, 1.0)
    total = plan.learner + 2 * plan.shard + plan.evaluator
    assert cpus is None or total <= cpus
    assert plan.learner_threads == max(int(plan.learner), 1)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("role=env", True),
        ("role=learner", False),
        ("role=!learner", True),
        ("role=!env", False),
        ("role=in(learner,env)", True),
        ("role=!in(learner,env)", False),
        ("zone=a", False),
        ("zone=!a", True),
        ("role=env,zone=!in(a,b),ray.io/market-type=spot", True),
        ("role=env,zone=a", False),
    ],
)
def test_labels_select_nodes_as_rays_selectors_do(text, fits):
    assert has_labels({"role": "env", "ray.io/market-type": "spot"}, parse_labels("x", text)) == fits


@pytest.mark.parametrize(
    "text",
    [
        "role",
        "role=",
        "=env",
        "role=env;zone=a",
        "role=in(a",
        "role=env zone=a",
        "role=a,,zone=b",
        "role=in()",
        "./=-x",
        "role=a,",
    ],
)
def test_labels_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="write role=env"):
        parse_labels("actors.node_labels", text)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", "head:", ":6379", "10.0.0.1:6379/x"])
def test_an_address_that_is_another_door_is_refused(address):
    with pytest.raises(ValueError, match="write HOST:PORT"):
        RunConfig(recipe="x", env=RECIPES["gridworld"]().env, address=address)


def test_every_beginning_of_the_slots_spans_the_ladder():
    for num_slots in (1, 2, 3, 10, 64, 360):
        order = spread_slots(num_slots)
        assert sorted(order) == list(range(num_slots))
        for taken in range(1, num_slots + 1):
            chosen = sorted(order[:taken])
            gaps = [b - a for a, b in zip([-1, *chosen], [*chosen, num_slots], strict=True)]
            assert max(gaps) <= 1 + 4 * num_slots / taken, (num_slots, taken, chosen)
