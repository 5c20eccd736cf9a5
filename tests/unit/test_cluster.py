"""What a cluster holds now and ever, by node records and autoscaler configs as Ray writes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from urbanclip_ray.cluster import (
    ACCELERATOR_SHARE,
    HEAD_RESOURCE,
    Autoscaler,
    Cluster,
    Node,
    NodeGroup,
    Wanted,
    parse_autoscaler,
    parse_node,
    read_autoscaler,
    read_cluster,
    scaling_config,
    wanted_actor,
    worker_resources,
)
from urbanclip_ray.config import EmbedConfig, ResourcesConfig

FAKE = {
    "max_workers": 4,
    "provider": {"type": "fake_multinode"},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}},
        "small": {"resources": {"CPU": 1}, "max_workers": 3},
        "large": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2},
    },
}


def record(hostname: str, address: str, *, is_head: bool = False, **resources: float) -> dict:
    head = {HEAD_RESOURCE: 1.0} if is_head else {}
    return {
        "NodeID": f"{hostname}-{address}",
        "Alive": True,
        "NodeManagerAddress": address,
        "NodeManagerHostname": hostname,
        "Resources": {"memory": 1e9, f"node:{address}": 1.0, **head, **resources},
    }


def cluster_of(*records: dict, autoscaler: Autoscaler | None = None) -> Cluster:
    return Cluster(tuple(parse_node(item) for item in records), autoscaler)


@pytest.mark.parametrize(
    ("records", "num_hosts"),
    [
        ([record("a", "10.0.0.1"), record("a", "10.0.0.1")], 1),  # several nodes of one machine
        ([record("a", "10.0.0.1"), record("b", "10.0.0.2")], 2),
        ([record("localhost", "10.0.0.1"), record("localhost", "10.0.0.2")], 2),  # machines of one image
        ([record("pod-a", "127.0.0.1"), record("pod-b", "127.0.0.1")], 2),
    ],
)
def test_hosts_differ_by_name_or_by_address(records, num_hosts):
    assert len(cluster_of(*records).hosts) == num_hosts


def test_labels_and_types_of_accelerators_choose_the_node():
    labelled = Node("1", "a", {"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}, is_head=False, labels={"group": "caption"})
    plain = Node("2", "b", {"CPU": 8, "GPU": 4, "accelerator_type:A100": 1}, is_head=False)
    cluster = Cluster((labelled, plain), None)
    assert cluster.places_now(Wanted({"GPU": 1})) == 6
    assert cluster.places_now(Wanted({"GPU": 1}, {"group": "caption"})) == 2
    assert cluster.places_now(Wanted({}, {"group": "train"})) == 0
    caption = wanted_actor(EmbedConfig(gpus_per_actor=1, accelerator_type="L4"))
    assert cluster.places_now(caption) == 2
    assert cluster.accelerators() == ["A100", "L4"]


def test_ranks_lie_as_strictly_as_they_are_told():
    nodes = [Node(str(number), str(number), {"CPU": cpus}, is_head=False) for number, cpus in enumerate((2, 5, 0))]
    cluster = Cluster(tuple(nodes), None)
    found = {name: cluster.places_now(Wanted({"CPU": 1}, placement=name)) for name in ("PACK", "STRICT_PACK", "STRICT_SPREAD")}
    assert found == {"PACK": 7, "STRICT_PACK": 5, "STRICT_SPREAD": 2}


def test_ray_train_is_told_what_the_config_says(ray_cluster):
    resources = ResourcesConfig(
        use_gpu=True,
        memory_per_worker_bytes=1 << 30,
        accelerator_type="A100",
        placement="STRICT_SPREAD",
        node_labels={"ray.io/node-group": "train"},
    )
    scaling = scaling_config(resources, (2, 4))
    assert (scaling.min_workers, scaling.max_workers, scaling.use_gpu) == (2, 4, True)
    each = scaling._resources_per_worker_not_none
    assert each == {"CPU": 1, "GPU": 1, "memory": 1 << 30, "accelerator_type:A100": ACCELERATOR_SHARE}
    assert scaling.placement_strategy == "STRICT_SPREAD"
    assert scaling.label_selector == {"ray.io/node-group": "train"}
    plain = scaling_config(ResourcesConfig(), 2)
    assert (plain.accelerator_type, plain.label_selector, plain.placement_strategy) == (None, None, "PACK")


def test_a_node_of_ray_has_its_labels(ray_cluster):
    (node,) = read_cluster().nodes
    assert node.labels["ray.io/node-id"] == node.node_id


@pytest.mark.parametrize(
    ("resources", "wanted", "expected"),
    [
        ({"CPU": 5}, {"CPU": 2}, 2),
        ({"CPU": 8, "GPU": 1}, {"CPU": 2, "GPU": 1}, 1),
        ({"CPU": 8}, {"CPU": 2, "GPU": 1}, 0),
        ({"GPU": 1}, {"GPU": 0.1}, 10),
    ],
)
def test_workers_fit_into_a_node_as_often_as_its_scarcest_resource_allows(resources, wanted, expected):
    assert Wanted(wanted).places(NodeGroup("any", resources, 1)) == expected


def test_a_worker_is_not_cut_over_two_nodes():
    cluster = cluster_of(record("a", "1", CPU=3, is_head=True), record("b", "2", CPU=3))
    assert cluster.places_now(Wanted({"CPU": 2})) == cluster.places_ever(Wanted({"CPU": 2})) == 2


def test_an_autoscaler_adds_its_largest_nodes_within_all_its_limits():
    head = record("a", "1", CPU=0, is_head=True)
    cluster = cluster_of(head, record("a", "1", CPU=1), autoscaler=parse_autoscaler(FAKE))
    assert cluster.places_now(Wanted({"CPU": 1})) == 1
    assert cluster.places_ever(Wanted({"CPU": 1})) == 2 * 4 + 2 * 1  # two large nodes, and two of the three small ones
    assert cluster.places_ever(Wanted({"CPU": 1, "GPU": 1})) == 2
    assert cluster.places_ever(Wanted({"CPU": 5})) == 0


def test_nodes_that_somebody_added_by_hand_count_beside_an_autoscaler():
    cluster = cluster_of(record("a", "1", CPU=64), autoscaler=parse_autoscaler(FAKE))
    assert cluster.places_ever(Wanted({"CPU": 1})) == 64


def test_limits_out_of_sight_are_unknown_and_may_add_hosts():
    cluster = cluster_of(record("a", "1", CPU=1), autoscaler=Autoscaler(None, 1, one_host=False))
    assert cluster.places_ever(Wanted({"CPU": 1})) is None
    assert cluster.can_add_hosts


def test_a_config_of_the_cluster_launcher_is_read_with_rays_defaults():
    assert parse_autoscaler(FAKE) == Autoscaler(
        groups=(
            NodeGroup("ray.head.default", {"CPU": 0}, 0),
            NodeGroup("small", {"CPU": 1}, 3),
            NodeGroup("large", {"CPU": 4, "GPU": 1}, 2),
        ),
        max_nodes=4,
        one_host=True,
    )
    aws = FAKE | {"provider": {"type": "aws", "region": "eu-west-1"}}
    assert not parse_autoscaler(aws).one_host
    without = {"small": {"max_workers": 3}}  # what such a machine has is known to the cloud alone
    assert parse_autoscaler(aws | {"available_node_types": without}).groups is None


@pytest.fixture
def monitor(tmp_path) -> Iterator[Path]:
    """A process that looks like Ray's monitor of a cluster at port 6999."""
    script = tmp_path / "autoscaler" / "_private" / "monitor.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys\nprint('up', flush=True)\nsys.stdin.read()\n")
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(FAKE, sort_keys=False))
    command = [sys.executable, str(script), "--gcs-address=10.0.0.1:6999", f"--autoscaling-config={config}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield config
        process.terminate()


def test_an_autoscaler_is_found_by_the_process_of_its_own_cluster(monitor):
    assert read_autoscaler(6999) == parse_autoscaler(FAKE)
    with pytest.raises(LookupError, match="port 6998"):
        read_autoscaler(6998)


def test_a_ray_of_this_machine_has_one_host_and_no_autoscaler(ray_cluster):
    cluster = read_cluster()
    assert [node.is_head for node in cluster.nodes] == [True]
    assert (len(cluster.hosts), cluster.autoscaler, cluster.can_add_hosts) == (1, None, False)
    assert cluster.places_ever(Wanted({"CPU": 1})) == 2
    assert cluster.total("CPU") == 2


def test_a_training_worker_takes_what_the_config_says():
    assert worker_resources(ResourcesConfig(cpus_per_worker=3)) == {"CPU": 3}
    assert worker_resources(ResourcesConfig(use_gpu=True)) == {"CPU": 1, "GPU": 1}
    assert isinstance(parse_node(record("a", "1")), Node)


def test_the_nodes_of_make_cluster_share_the_heads_files():
    config = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "local.yaml").read_text())
    autoscaler = parse_autoscaler(config)
    assert autoscaler.one_host
    assert autoscaler.max_nodes == 4
