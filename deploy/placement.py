"""Where the workers of a run go: how much of a node each takes, which nodes may take it, and what must lie side by side.

Learner, shards and evaluator share a placement group, on one node where they fit, so that batches move through shared memory; the
params store is with the evaluator. Actors go where there is room: Ray holds those that find none until a node comes, and for its
autoscaler they are the demand, which ends with the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import ByteSize, EnvSpec, RunConfig, parse_labels
from common.errors import UserError
from deploy.outcome import RunFault
from deploy.plan import plan_cluster_cpus, plan_cpus, plan_memory
from deploy.ray_session import Node, has_labels, nodes

_PLACE_SECONDS = 15.0  # For nodes that are there to take the group.
_NODE_SECONDS = 900.0  # For a node to come that can: one with a GPU takes a cloud minutes.


class Placement:
    """Of one run. Made when Ray is up."""

    def __init__(self, config: RunConfig, spec: EnvSpec) -> None:
        """Raises UserError where the nodes have too few GPUs, or a local run too few processors."""
        self._config, self._spec = config, spec
        self._is_cluster = config.address is not None
        self._selector = parse_labels("learner.node_labels", config.learner.node_labels)
        there = nodes()
        self._group: PlacementGroup | None = None
        self._actor_selector = parse_labels("actors.node_labels", config.actors.node_labels)
        self._avoided: list[str] = []
        self._size(there)
        if self._is_cluster:
            if not config.actors.on_head:
                head = next((node.node_id for node in there if node.is_head), None)
                self._avoided += [head] if head is not None else []
            self._about = f"attached to {len(there)} nodes: {', '.join(node.describe() for node in there[:8])}"
            self._about += f" and {len(there) - 8} more" if len(there) > 8 else ""
        else:
            self._about = f"Ray is up on {int(sum(node.resources.get('CPU', 0) for node in there))} CPUs"

    def _size(self, there: list[Node]) -> None:
        """Decides how much each role takes, by the nodes that are there."""
        config = self._config
        able = [node for node in there if not self._is_cluster or has_labels(node.labels, self._selector)]
        self._has_able_node = bool(able)
        self._gpus = self._gpus_of_learner(able)
        self._memory = {role.role: role.ram for role in plan_memory(config, self._spec, uses_gpu=self._gpus > 0)}
        if self._is_cluster:
            self._plan = plan_cluster_cpus(config, self._cpus_for_learner(able), uses_gpu=self._gpus > 0)
        else:
            self._plan = plan_cpus(config, int(sum(node.resources.get("CPU", 0) for node in there)))

    @property
    def learner_threads(self) -> int:
        return self._plan.learner_threads

    def describe(self) -> str:
        device = (
            f"learner on {f'{self._gpus} GPUs' if self._gpus > 1 else 'a GPU' if self._gpus else 'CPUs'}; "
            if self._is_cluster
            else ""
        )
        return f"{self._about}; {device}{self._plan.describe()}"

    def describe_actor(self) -> str:
        """Returns what an actor needs of a node, for a person."""
        labels = self._actor_selector
        needed = f"{self._plan.actor:g} CPUs and {ByteSize(self._memory['actor'])} of memory free"
        needed += f", labels {','.join(f'{name}={value}' for name, value in labels.items())}" if labels else ""
        return needed + ("" if self._config.actors.on_head else ", not the head")

    def reserve(self, tell: Callable[[str], None], is_stopped: Callable[[], Any]) -> None:
        """Reserves what learner, shards and evaluator take: on one node, or over several where no one node is so large. On a
        cluster that may grow, waits for nodes.

        Raises:
          UserError: where no node takes them.
        """
        for strategy in ("STRICT_PACK", "PACK") if self._has_able_node else ():
            if self._reserve(strategy, is_stopped):
                return
        if not self._is_cluster:
            raise RunFault(
                f"no {self._plan.describe()} could be placed for learner and shards: the cluster has too few free CPUs"
            )
        tell(f"no node has room for {self._describe_group()}: waiting up to {_NODE_SECONDS / 60:.0f} minutes for one")
        deadline = time.monotonic() + _NODE_SECONDS
        while time.monotonic() < deadline:
            self._size(nodes())  # What came may have a GPU.
            if self._has_able_node and self._reserve("PACK", is_stopped):
                tell(self.describe())
                return
            if not self._has_able_node:
                time.sleep(1.0)
                _end_where(is_stopped)
        raise UserError(
            f"no node came within {_NODE_SECONDS / 60:.0f} minutes that has room for {self._describe_group()}: add one, lower "
            f"--replay.memory, --replay.num-shards or --learner.num-threads, or see with `ray status` who else uses the cluster"
        )

    def options(self, role: str, index: int = 0) -> dict[str, Any]:
        """Returns Ray's options for a worker of a role."""
        plan, config = self._plan, self._config
        num_ranks, num_shards = config.learner.num_devices, config.replay.num_shards
        if role == "learner":
            return {"num_cpus": plan.learner, "num_gpus": 1.0 if self._gpus else 0.0} | self._in_bundle(index, role)
        if role == "shard":
            return {"num_cpus": plan.shard} | self._in_bundle(num_ranks + index, role)
        if role == "evaluator":
            return {"num_cpus": plan.evaluator} | self._in_bundle(num_ranks + num_shards, role)
        if role == "store":
            return {"num_cpus": plan.store} | (self._in_bundle(num_ranks + num_shards) if self._is_cluster else {})
        options: dict[str, Any] = {"num_cpus": plan.actor}
        if self._is_cluster:
            avoided = {"ray.io/node-id": f"!in({','.join(self._avoided)})"} if self._avoided else {}
            options |= {"memory": self._memory["actor"], "label_selector": self._actor_selector | avoided}
        return options

    def avoid(self, node_id: str) -> bool:
        """Has no further actor begin on a node; returns whether that is new."""
        is_new = node_id not in self._avoided
        self._avoided += [node_id] if is_new else []
        return is_new

    def _in_bundle(self, bundle: int, role: str | None = None) -> dict[str, Any]:
        assert self._group is not None
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        memory = {"memory": self._memory[role]} if self._is_cluster and role is not None else {}
        return {"scheduling_strategy": strategy} | memory

    def _reserve(self, strategy: str, is_stopped: Callable[[], Any]) -> bool:
        bundles = self._bundles()
        selectors = [self._selector] * len(bundles) if self._is_cluster and self._selector else None
        self._group = placement_group(bundles, strategy=strategy, bundle_label_selector=selectors)
        deadline = time.monotonic() + _PLACE_SECONDS
        while time.monotonic() < deadline:
            if self._group.wait(1.0):
                return True
            _end_where(is_stopped)
        ray.util.remove_placement_group(self._group)
        return False

    def _bundles(self) -> list[dict[str, float]]:
        plan, config = self._plan, self._config
        gpu = {"GPU": 1.0} if self._gpus else {}
        roles = [("learner", {"CPU": plan.learner} | gpu)] * config.learner.num_devices
        roles += [("shard", {"CPU": plan.shard})] * config.replay.num_shards
        roles += [("evaluator", {"CPU": plan.evaluator})]
        if not self._is_cluster:
            return [bundle for _, bundle in roles]
        return [bundle | {"memory": float(self._memory[role])} for role, bundle in roles]

    def _describe_group(self) -> str:
        bundles = self._bundles()
        sums = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU", "memory")}
        labels = f" and labels {self._config.learner.node_labels}" if self._selector else ""
        gpus = f", {sums['GPU']:g} GPUs" if sums["GPU"] else ""
        return f"learner, shards and evaluator ({sums['CPU']:g} CPUs{gpus}, {ByteSize(sums['memory'])} of memory{labels})"

    def _gpus_of_learner(self, able: list[Node]) -> int:
        """Returns how many GPUs the learner takes: one a rank, or none."""
        config = self._config.learner
        there = 0 if config.device == "cpu" else int(sum(node.resources.get("GPU", 0) for node in able))
        if self._is_cluster and config.device == "cuda":
            return config.num_devices  # A node that has them may be on its way.
        if there < config.num_devices and (there or config.device == "cuda"):
            raise UserError(
                f"learner.num_devices {config.num_devices}, but there are {there} GPUs: set --learner.num-devices {max(there, 1)}, or "
                f"--learner.device cpu"
            )
        return config.num_devices if there else 0

    def _cpus_for_learner(self, able: list[Node]) -> float | None:
        """Returns the processors of the largest node that may take the learner; None where there is none yet."""
        sizes = [node.resources.get("CPU", 0.0) for node in able if not self._gpus or node.resources.get("GPU", 0) > 0]
        return max(sizes, default=0.0) or None


def _end_where(is_stopped: Callable[[], Any]) -> None:
    """Raises KeyboardInterrupt where somebody wants the run to end: there is nothing yet that could be saved."""
    if is_stopped():
        raise KeyboardInterrupt
