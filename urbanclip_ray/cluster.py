"""What the Ray cluster is and what it may become: its nodes, their hosts, and what an autoscaler can add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from urbanclip_ray.config import ActorsConfig, Placement, ResourcesConfig

HEAD_RESOURCE = "node:__internal_head__"
# whose nodes are processes of the head's machine: Ray's, and ours of cluster/local.yaml
ONE_HOST_PROVIDERS = ("fake_multinode", "local_nodes.LocalNodes")
HEAD_TIMEOUT_S = 15.0
ACCELERATOR_PREFIX = "accelerator_type:"  # a node has 1 of it, and whoever asks for the type takes a thousandth
ACCELERATOR_SHARE = 0.001


class Node(NamedTuple):
    """A Ray node that is alive. Nodes of one host see the same local paths."""

    node_id: str
    host: str
    resources: dict[str, float]
    is_head: bool
    labels: Mapping[str, str] = {}


class NodeGroup(NamedTuple):
    """Nodes of one kind that an autoscaler may start."""

    name: str
    resources: dict[str, float]  # of each
    max_nodes: int
    labels: Mapping[str, str] = {}


class Wanted(NamedTuple):
    """What each of some workers needs, and how they may lie on nodes."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = {}  # of the node
    placement: Placement = "PACK"

    def places(self, node: Node | NodeGroup) -> int:
        """How many of the workers fit on one node."""
        if any(node.labels.get(name) != value for name, value in self.labels.items()):
            return 0
        amounts = {name: amount for name, amount in self.resources.items() if amount > 0}
        return min((int(node.resources.get(name, 0) / amount + 1e-6) for name, amount in amounts.items()), default=1)

    def placed(self, by_node: Sequence[int]) -> int:
        """How many of the workers fit on nodes of which each has so many places."""
        if self.placement == "STRICT_PACK":
            return max(by_node, default=0)
        return sum(min(number, 1) for number in by_node) if self.placement == "STRICT_SPREAD" else sum(by_node)


class Autoscaler(NamedTuple):
    """What an autoscaler may start. `groups` is None where it runs out of our sight (a KubeRay sidecar)."""

    groups: tuple[NodeGroup, ...] | None
    max_nodes: int  # over all groups
    one_host: bool  # new nodes run on the head's machine


class Cluster(NamedTuple):
    """The nodes that there are and the autoscaler, None where there is none."""

    nodes: tuple[Node, ...]
    autoscaler: Autoscaler | None

    @property
    def hosts(self) -> list[str]:
        return sorted({node.host for node in self.nodes})

    @property
    def can_add_hosts(self) -> bool:
        return self.autoscaler is not None and not self.autoscaler.one_host and self.autoscaler.max_nodes > 0

    def total(self, resource: str) -> float:
        return sum(node.resources.get(resource, 0) for node in self.nodes)

    def accelerators(self) -> list[str]:
        """Ray's names of the GPUs that nodes have, or nodes that the autoscaler may start."""
        held = [node.resources for node in self.nodes]
        held += [group.resources for group in (self.autoscaler.groups or ())] if self.autoscaler else []
        names = {name for resources in held for name in resources if name.startswith(ACCELERATOR_PREFIX)}
        return sorted(name.removeprefix(ACCELERATOR_PREFIX) for name in names)

    def places_now(self, wanted: Wanted) -> int:
        """How many such workers the nodes hold when they are free."""
        return wanted.placed([wanted.places(node) for node in self.nodes])

    def places_ever(self, wanted: Wanted) -> int | None:
        """The same with every node that the autoscaler may start; None where its limits cannot be read."""
        if self.autoscaler is None:
            return self.places_now(wanted)
        if self.autoscaler.groups is None:
            return None
        found = [wanted.places(node) for node in self.nodes if node.is_head]
        nodes_left = self.autoscaler.max_nodes
        for group in sorted(self.autoscaler.groups, key=lambda group: -wanted.places(group)):
            num_nodes = min(group.max_nodes, nodes_left)
            found += num_nodes * [wanted.places(group)]
            nodes_left -= num_nodes
        return max(wanted.placed(found), self.places_now(wanted))


def worker_resources(resources: ResourcesConfig) -> dict[str, float]:
    """What one training worker is given."""
    memory = {"memory": float(resources.memory_per_worker_bytes)} if resources.memory_per_worker_bytes else {}
    return {"CPU": float(resources.cpus_per_worker)} | ({"GPU": 1.0} if resources.use_gpu else {}) | memory


def wanted_worker(resources: ResourcesConfig) -> Wanted:
    """The nodes that training workers can be on."""
    held = worker_resources(resources) | _accelerator(resources.accelerator_type)
    return Wanted(held, resources.node_labels, resources.placement)


def wanted_actor(each: ActorsConfig) -> Wanted:
    """The nodes that an actor can be on; without resources where its config asks for nothing but a share of a CPU."""
    held = {"GPU": each.gpus_per_actor, "CPU": each.cpus_per_actor, "memory": float(each.memory_per_actor_bytes)}
    held |= _accelerator(each.accelerator_type)
    return Wanted({name: amount for name, amount in held.items() if amount}, each.node_labels)


def _accelerator(name: str) -> dict[str, float]:
    return {f"{ACCELERATOR_PREFIX}{name}": ACCELERATOR_SHARE} if name else {}


def scaling_config(resources: ResourcesConfig, num_workers: int | tuple[int, int]) -> Any:
    """Ray Train's, for so many workers, or for between two numbers of them."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=resources.use_gpu,
        resources_per_worker=worker_resources(resources),
        accelerator_type=resources.accelerator_type or None,
        placement_strategy=resources.placement,
        label_selector=dict(resources.node_labels) or None,
    )


def read_cluster() -> Cluster:
    """The cluster that this process is connected to."""
    nodes = tuple(parse_node(record) for record in ray.nodes() if record["Alive"])
    return Cluster(nodes, _find_autoscaler(nodes))


def parse_node(record: Mapping[str, Any]) -> Node:
    """A node from its record in `ray.nodes()`.

    Two nodes are on one host when both their address and their host name are equal: pods have names of their own, and
    machines that share a name have addresses of their own.
    """
    return Node(
        node_id=record["NodeID"],
        host=f"{record['NodeManagerHostname']} ({record['NodeManagerAddress']})",
        resources=dict(record["Resources"]),
        is_head=HEAD_RESOURCE in record["Resources"],
        labels=dict(record.get("Labels") or {}),
    )


def on_node(function: Any, node_id: str) -> Any:
    """A function as a Ray task that runs on one node, even on a busy one or one without CPUs."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(function)


def _find_autoscaler(nodes: Sequence[Node]) -> Autoscaler | None:
    """Ray publishes no limits of its autoscaler, so they are read where it runs: from its config, on the head."""
    out_of_sight = Autoscaler(groups=None, max_nodes=1, one_host=False)
    context = ray.get_runtime_context()
    port = int(context.gcs_address.rpartition(":")[2])
    head = next((node for node in nodes if node.is_head), None)
    if head is None:
        return out_of_sight
    try:
        if head.node_id == context.get_node_id():
            return read_autoscaler(port)
        found: Autoscaler | None = ray.get(on_node(read_autoscaler, head.node_id).remote(port), timeout=HEAD_TIMEOUT_S)
        return found
    except (LookupError, OSError, yaml.YAMLError, ray.exceptions.RayError):
        return out_of_sight


def read_autoscaler(gcs_port: int) -> Autoscaler | None:
    """On the head: what the monitor of the cluster with this port may start; None where it only watches.

    Raises LookupError where no such monitor runs.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
        runs_monitor = any(word.endswith("/monitor.py") and "/autoscaler/" in word for word in words)
        if runs_monitor and options.get("gcs-address", "").endswith(f":{gcs_port}"):
            path = options.get("autoscaling-config")
            return parse_autoscaler(yaml.safe_load(Path(path).expanduser().read_text())) if path else None
    raise LookupError(f"no monitor of a cluster at port {gcs_port}")


def parse_autoscaler(config: Mapping[str, Any]) -> Autoscaler:
    """The limits in a config of Ray's cluster launcher; defaults as Ray fills them in."""
    max_nodes = int(config.get("max_workers", 2))
    provider = config["provider"]
    one_host = provider.get("module", provider["type"]) in ONE_HOST_PROVIDERS
    groups = []
    for name, kind in config["available_node_types"].items():
        most = int(kind.get("max_workers", 0 if name == config.get("head_node_type") else max_nodes))
        if most and not kind.get("resources"):  # Ray asks the cloud what such a machine has; we cannot
            return Autoscaler(None, max_nodes, one_host)
        groups.append(NodeGroup(name, dict(kind.get("resources") or {}), most, dict(kind.get("labels") or {})))
    return Autoscaler(tuple(groups), max_nodes, one_host)
