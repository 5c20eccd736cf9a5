"""What is refused at the start of a run, and with which fix."""

from __future__ import annotations

import json
import os

import pytest

from urbanclip_ray.cluster import Autoscaler, Cluster, Node, NodeGroup
from urbanclip_ray.config import RunConfig
from urbanclip_ray.dataflow import JOB_CONFIG_VARIABLE
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.preflight import (
    PreflightError,
    list_demands,
    probe_storage,
    refuse_impossible,
    refuse_paths_of_one_host,
    refuse_place_of_one_host,
    refuse_uploaded_paths,
)
from urbanclip_ray.recipes import load_recipe

HEAD = Node("1", "a (10.0.0.1)", {"CPU": 2.0}, is_head=True)
OTHER_HOST = Node("2", "b (10.0.0.2)", {"CPU": 2.0}, is_head=False)
SAME_HOST = HEAD._replace(node_id="3", is_head=False)
ONE_SMALL_NODE = Autoscaler((NodeGroup("small", {"CPU": 1}, 1),), 1, one_host=True)


def config_with(*overrides: str) -> RunConfig:
    return apply_overrides(load_recipe("own_tiles"), ["source.uri=/data/tiles", "storage=/data/runs", *overrides])


@pytest.fixture
def uploaded(monkeypatch, tmp_path) -> str:
    """The working directory of a job as Ray's job server starts it."""
    monkeypatch.chdir(tmp_path)
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}, "metadata": {}}
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps(job))
    return os.getcwd()


@pytest.mark.parametrize("override", ["storage=runs", "source.uri=tiles", "embed.weights=../weights", "storage=file://runs"])
def test_a_relative_path_in_an_uploaded_directory_is_refused_with_the_fix(uploaded, override):
    key, _, value = override.partition("=")
    option = "--storage " if key == "storage" else f"--set {key}="
    with pytest.raises(PreflightError, match=f"^{key}={value} lies in the working directory.*Give {option}s3://bucket/prefix"):
        refuse_uploaded_paths(config_with(override))


def test_an_absolute_path_below_an_uploaded_directory_is_refused_too(uploaded):
    with pytest.raises(PreflightError, match="working directory that was uploaded"):
        refuse_uploaded_paths(config_with(f"storage={uploaded}/runs"))


def test_the_output_of_an_export_is_a_place_too(uploaded):
    with pytest.raises(PreflightError, match=r"^output=pairs lies in the working directory.*Give --output s3://bucket/prefix"):
        refuse_place_of_one_host("output", "pairs", config_with())


def test_other_places_are_fine_in_an_uploaded_directory(uploaded):
    assert refuse_uploaded_paths(config_with()) is None
    assert refuse_uploaded_paths(config_with("storage=s3://bucket/runs", "source.uri=s3://bucket/tiles")) is None


@pytest.mark.parametrize("job", [None, {"runtime_env": {}}, {"runtime_env": {"env_vars": {"A": "b"}}}])
def test_relative_paths_are_fine_where_nothing_was_uploaded(monkeypatch, job):
    monkeypatch.delenv(JOB_CONFIG_VARIABLE, raising=False)
    if job is not None:
        monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps(job))
    assert refuse_uploaded_paths(config_with("storage=runs")) is None


def test_local_paths_on_two_hosts_are_refused_with_the_fix():
    message = (
        r"storage=/data/runs, source\.uri=/data/tiles: local paths, but the cluster has 2 hosts: a \(10\.0\.0\.1\), "
        r"b \(10\.0\.0\.2\)\. Use s3://bucket/prefix, or.*--set resources\.shared_filesystem=true"
    )
    with pytest.raises(PreflightError, match=message):
        refuse_paths_of_one_host(config_with(), Cluster((HEAD, OTHER_HOST), None))


def test_a_local_source_alone_is_refused_too():
    with pytest.raises(PreflightError, match=r"^source\.uri=/data/tiles: local paths"):
        refuse_paths_of_one_host(config_with("storage=s3://bucket/runs"), Cluster((HEAD, OTHER_HOST), None))


def test_local_paths_are_refused_where_an_autoscaler_will_add_hosts():
    elsewhere = ONE_SMALL_NODE._replace(one_host=False)
    with pytest.raises(PreflightError, match="the cluster has an autoscaler that adds hosts"):
        refuse_paths_of_one_host(config_with(), Cluster((HEAD,), elsewhere))


def test_local_paths_are_fine_on_one_host_or_where_they_are_declared_shared():
    assert refuse_paths_of_one_host(config_with(), Cluster((HEAD, SAME_HOST), ONE_SMALL_NODE)) is None
    shared = config_with("resources.shared_filesystem=true")
    assert refuse_paths_of_one_host(shared, Cluster((HEAD, OTHER_HOST), None)) is None
    in_a_bucket = config_with("storage=s3://bucket/runs", "source.uri=s3://bucket/tiles")
    assert refuse_paths_of_one_host(in_a_bucket, Cluster((HEAD, OTHER_HOST), None)) is None


def test_more_workers_than_can_ever_be_had_are_refused_with_the_numbers():
    config = config_with("resources.num_workers=4", "train.contrastive_batch_size=256")
    (demand,) = list_demands(config, ["pretrain"])
    message = (
        r"4 training workers of 1 CPU each: 2 fit on 1 node \(2 CPU\), 3 with all that the autoscaler can start: "
        r"lower resources\.num_workers"
    )
    with pytest.raises(PreflightError, match=message):
        refuse_impossible(demand, Cluster((HEAD,), ONE_SMALL_NODE))
    refuse_impossible(demand, Cluster((HEAD, OTHER_HOST), None))
    refuse_impossible(demand, Cluster((HEAD,), ONE_SMALL_NODE._replace(groups=None)))  # unknown: Ray may still get them


def test_gpus_that_no_node_has_are_refused():
    config = config_with("resources.use_gpu=true", "embed.gpus_per_actor=0.5")
    training, embedding = list_demands(config, ["pretrain", "embeddings"])
    with pytest.raises(PreflightError, match=r"2 training workers of 1 CPU \+ 1 GPU each: 0 fit on 1 node \(2 CPU, 0 GPU\)"):
        refuse_impossible(training, Cluster((HEAD,), None))
    (trial,) = list_demands(config_with("resources.use_gpu=true"), ["shards", "search"])
    assert trial == training
    with pytest.raises(PreflightError, match=r"1 embedding actor of 0\.5 GPU each: 0 fit.*lower embed\.gpus_per_actor"):
        refuse_impossible(embedding, Cluster((HEAD,), None))


def test_a_type_of_gpu_that_nothing_has_is_refused_with_those_that_there_are():
    gpu_node = Node("4", "c", {"CPU": 8.0, "GPU": 4.0, "accelerator_type:T4": 1.0}, is_head=False)
    config = config_with("embed.gpus_per_actor=1", "embed.accelerator_type=A100")
    (demand,) = list_demands(config, ["embeddings"])
    message = (
        r"1 embedding actor of 1 GPU \+ type A100 each: 0 fit on 2 nodes "
        r"\(4 GPU; types that there are, or can be started: T4\): "
        r"lower embed\.gpus_per_actor, or change embed\.accelerator_type, or add nodes"
    )
    with pytest.raises(PreflightError, match=message):
        refuse_impossible(demand, Cluster((HEAD, gpu_node), None))
    growing = Autoscaler((NodeGroup("train", {"CPU": 8, "GPU": 1, "accelerator_type:A100": 1}, 2),), 2, one_host=False)
    refuse_impossible(demand, Cluster((HEAD, gpu_node), growing))


@pytest.mark.parametrize(
    ("overrides", "stage", "message"),
    [
        (
            ["caption.memory_per_actor_bytes=4294967296"],
            "captions",
            r"1 captioning actor of 4 GiB of memory each: 0 fit on 1 node \(0 GiB of memory\): change "
            r"caption\.memory_per_actor_bytes, or add nodes",
        ),
        (
            ["caption.node_labels={ray.io/node-group: caption}"],
            "captions",
            r"1 captioning actor of any size, on nodes with ray\.io/node-group=caption each: 0 fit.*caption\.node_labels",
        ),
        (["ingest.cpus_per_task=4"], "tiles", r"1 reading task of 4 CPU .*lower ingest\.cpus_per_task, or add nodes"),
        (
            ["refine.consistency.weights=/w", "refine.consistency.cpus_per_actor=9"],
            "pairs",
            r"1 scoring actor of 9 CPU each.*refine\.consistency\.cpus_per_actor",
        ),
        (
            ["resources.placement=STRICT_SPREAD"],
            "pretrain",
            r"2 training workers of 1 CPU each on a node of its own: 1 fit on 1 node.*or set resources\.placement=PACK",
        ),
    ],
)
def test_what_a_stage_asks_for_and_no_node_has_is_refused_by_its_key(overrides, stage, message):
    (demand,) = list_demands(config_with(*overrides), [stage])
    with pytest.raises(PreflightError, match=message):
        refuse_impossible(demand, Cluster((HEAD,), None))


def test_only_stages_to_be_made_demand_anything():
    assert list_demands(config_with("embed.gpus_per_actor=1"), ["tiles", "probe"]) == []


def test_a_probed_storage_is_left_as_it_was(tmp_path):
    (tmp_path / "mine").write_text("stays")
    probe_storage(str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_storage_that_is_a_file_cannot_be_used(tmp_path):
    (tmp_path / "runs").write_text("a file in the place of a folder")
    with pytest.raises(OSError, match="runs"):
        probe_storage(str(tmp_path / "runs"))
