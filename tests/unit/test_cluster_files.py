"""The files of cluster/: valid by the schemas of those who read them, with the same groups everywhere, and without secrets."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import stat
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import googleapiclient
import jsonschema
import pytest
import yaml
from botocore.validate import validate_parameters
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.util.accelerators import accelerators

from urbanclip_ray.cluster import Cluster, parse_autoscaler
from urbanclip_ray.preflight import list_demands, refuse_impossible
from urbanclip_ray.recipes import RECIPES, load_recipe

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
GROUPS = ["ingest-spot", "ingest", "caption-spot", "caption", "train-spot", "train"]
STAGES = ["tiles", "captions", "pretrain", "embeddings"]

on_a_cloud = pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
on_kubernetes = pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def schema_of(document: dict[str, Any]) -> dict[str, Any]:
    return json.loads((CLUSTER / "kuberay" / "schema.json").read_text())[document["kind"]]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(document)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(document) for container in pod["containers"]]


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The worker groups of a launcher's config, by name."""
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@on_a_cloud
def test_the_launcher_accepts_the_cluster_and_would_name_a_misspelt_key(path):
    config = prepare_config(load(path))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(config | {"idle_timeout_minuts": 5})
    with pytest.raises(jsonschema.ValidationError, match="prioirty"):
        validate_config(config | {"available_node_types": {"a": {"resources": {}, "node_config": {}, "prioirty": 1}}})


def test_the_autoscaler_accepts_the_local_cluster():
    config = load(CLUSTER / "local.yaml")
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0


@on_a_cloud
def test_a_cluster_grows_from_nothing_spot_nodes_first_and_its_head_takes_no_work(path):
    config = load(path)
    head, groups = config["available_node_types"][config["head_node_type"]], workers(config)
    assert list(groups) == GROUPS
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head)
    for name, group in groups.items():
        assert group["min_workers"] == 0 < group["max_workers"]
        assert is_spot(group) == name.endswith("-spot")
        if is_spot(group):
            fallback = groups[name.removesuffix("-spot")]
            assert group["priority"] > fallback["priority"]
            assert group["resources"] == fallback["resources"]
            assert machine(group) == machine(fallback)
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["max_workers"] >= max(group["max_workers"] for group in groups.values())


def is_spot(group: dict[str, Any]) -> bool:
    settings = group["node_config"]
    market = settings.get("InstanceMarketOptions", {}).get("MarketType")
    return "spot" in (market, settings.get("scheduling", {}).get("provisioningModel", "").lower())


def machine(group: dict[str, Any]) -> str:
    return group["node_config"].get("InstanceType") or group["node_config"]["machineType"]


@on_a_cloud
@pytest.mark.parametrize(
    ("wanted", "number", "unavailable", "started"),
    [
        ({"CPU": 1}, 20, (), {"ingest-spot": 2}),  # no machine with a GPU for work without one
        ({"GPU": 1, "accelerator_type:L4": 0.001}, 10, (), {"caption-spot": 8, "caption": 2}),
        ({"GPU": 1, "accelerator_type:L4": 0.001}, 1, ("caption-spot",), {"caption": 1}),
    ],
)
def test_rays_autoscaler_starts_spot_machines_first(path, wanted, number, unavailable, started):
    """By the second version's own scheduler. `unavailable`: a group that the cloud gave no machine of, as Ray notes it."""
    config = AutoscalingConfig(prepare_config(load(path)), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(wanted)] * number),
        recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert {item.instance_type: item.count for item in reply.to_launch if item.instance_type != "head"} == started


@on_a_cloud
def test_nobody_but_the_owner_gets_in_and_no_secret_is_written_down(path):
    config, text = load(path), path.read_text()
    for when in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r" AWS_\w+=\S+", "", config[when][-1])
    (start,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert re.findall(r"--dashboard-host=(\S+)", start) == ["127.0.0.1"]
    assert "0.0.0.0" not in text
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}  # a path, not the token
    assert not re.search(r"AKIA|ASIA|aws_secret|SECRET_ACCESS_KEY|PRIVATE KEY|gcp_credentials|aws_credentials", text)


def test_an_aws_node_has_a_role_an_encrypted_disk_and_metadata_that_no_proxied_request_reads():
    config = load(CLUSTER / "aws.yaml")
    for name, group in config["available_node_types"].items():
        settings = group["node_config"]
        role = "urbanclip-head" if name == "head" else "urbanclip-worker"
        assert settings["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{role}")
        assert settings["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in settings["BlockDeviceMappings"])
        assert settings["SecurityGroupIds"] == ["SECURITY_GROUP"]  # the launcher's own would open SSH to everybody
    assert "security_group" not in config["provider"]


def test_aws_knows_every_setting_of_a_node_and_every_machine():
    """By the model of EC2 that botocore ships; it would refuse a misspelt setting, a wrong type and an unknown machine."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    launched, machines = ec2.operation_model("RunInstances").input_shape, ec2.shape_for("InstanceType").enum
    for group in load(CLUSTER / "aws.yaml")["available_node_types"].values():
        validate_parameters({**group["node_config"], "MinCount": 1, "MaxCount": 1}, launched)
        assert machine(group) in machines
    with pytest.raises(Exception, match="HttpToken"):
        validate_parameters({"MetadataOptions": {"HttpToken": "required"}, "MinCount": 1, "MaxCount": 1}, launched)


def test_an_aws_machine_has_what_its_group_promises(moto_s3, monkeypatch):
    """By moto's copy of what EC2 says of its machines, through the function with which Ray fills in a group's resources."""
    config = load(CLUSTER / "aws.yaml")
    names = sorted({machine(group) for group in config["available_node_types"].values()})
    ec2 = boto3.client("ec2", endpoint_url=moto_s3.meta.endpoint_url)
    described = ec2.describe_instance_types(InstanceTypes=names)["InstanceTypes"]  # of all of them it takes moto 15 s
    monkeypatch.setattr(node_provider, "list_ec2_instances", lambda region, credentials: described)
    written = {name: kind.pop("resources") for name, kind in config["available_node_types"].items() if name != "head"}
    for kind in config["available_node_types"].values():
        kind["resources"] = {}
    filled = node_provider.AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]
    for name, promised in written.items():
        found = filled[name]["resources"]
        assert {key: value for key, value in found.items() if key != "memory"} == {
            key: value for key, value in promised.items() if key != "memory"
        }
        assert promised["memory"] <= found["memory"]


def test_google_knows_every_setting_of_a_node():
    """By the description of the Compute API that its client ships."""
    document = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    config = load(CLUSTER / "gcp.yaml")
    for group in config["available_node_types"].values():
        refuse_unknown(group["node_config"], schemas["Instance"], schemas)
        (account,) = group["node_config"]["serviceAccounts"]
        assert re.match(r"urbanclip-(head|worker)@", account["email"])
    with pytest.raises(AssertionError, match="provisioningModell"):
        refuse_unknown({"scheduling": {"provisioningModell": "SPOT"}}, schemas["Instance"], schemas)
    with pytest.raises(AssertionError, match="SPOTT"):
        refuse_unknown({"scheduling": {"provisioningModel": "SPOTT"}}, schemas["Instance"], schemas)


def refuse_unknown(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> None:
    """An assertion that fails at a field, a type or a word that the API does not have."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = {"object": dict, "array": list, "boolean": bool, "integer": int}.get(schema["type"], (str, int))
    assert isinstance(value, kind), f"{value!r} is no {schema['type']}"
    if schema["type"] == "object":
        for key, inner in value.items():
            assert key in schema["properties"], f"the API has no {key}"
            refuse_unknown(inner, schema["properties"][key], schemas)
    elif schema["type"] == "array":
        for item in value:
            refuse_unknown(item, schema["items"], schemas)
    else:
        assert value in schema.get("enum", [value]), f"{value!r} is none of {schema['enum']}"


@on_a_cloud
def test_accelerator_types_are_rays_own_names(path):
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    groups = workers(load(path))
    assert set(accelerators_of(groups)) <= known
    assert {name for name, group in groups.items() if group["resources"].get("GPU")} == set(GROUPS) - {"ingest", "ingest-spot"}


def accelerators_of(groups: dict[str, dict[str, Any]]) -> list[str]:
    return [name.partition(":")[2] for group in groups.values() for name in group["resources"] if ":" in name]


@on_a_cloud
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_fits_into_the_groups(path, recipe):
    cluster = Cluster((), parse_autoscaler(load(path)))
    for demand in list_demands(load_recipe(recipe), STAGES):
        refuse_impossible(demand, cluster)
        assert cluster.places_ever(demand.wanted) is not None


@on_kubernetes
def test_kuberay_accepts_the_file_and_would_name_what_is_wrong(path):
    document = load(path)
    schema = schema_of(document)
    jsonschema.validate(document, schema)
    for place, key, value, message in [
        (lambda spec: spec, "enableAutoscaling", True, "enableAutoscaling"),
        (lambda spec: spec["workerGroupSpecs"][0], "maxReplicas", "8", "'8' is not of type 'integer'"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"], "num-cpus", 0, "0 is not of type 'string'"),
        (lambda spec: spec["authOptions"], "mode", "tokens", "'tokens' is not one of"),
    ]:
        changed = copy.deepcopy(document)
        place(cluster_spec(changed))[key] = value
        with pytest.raises(jsonschema.ValidationError, match=message):
            jsonschema.validate(changed, schema)


@on_kubernetes
def test_a_kuberay_cluster_has_the_groups_of_the_clouds_and_grows_from_nothing(path):
    spec, groups = cluster_spec(load(path)), cluster_spec(load(path))["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"  # the first version knows no priorities
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert [group["groupName"] for group in groups] == GROUPS
    assert all(group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"] for group in groups)
    on_aws = workers(load(CLUSTER / "aws.yaml"))
    for group in groups:
        assert group["priority"] == on_aws[group["groupName"]]["priority"]
        assert ("affinity" in group["template"]["spec"]) == group["groupName"].endswith("-spot")
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        promised, theirs = group.get("resources", {}), on_aws[group["groupName"]]["resources"]
        assert limits.get("nvidia.com/gpu", 0) == int(promised.get("GPU", 0)) == theirs.get("GPU", 0)
        assert promised.get("CPU", limits["cpu"]) == limits["cpu"]
        assert [name for name in promised if ":" in name] == [name for name in theirs if ":" in name]


@on_kubernetes
def test_pods_are_nobodys_root_and_take_their_secrets_from_secrets(path):
    document = load(path)
    assert cluster_spec(document)["authOptions"] == {"mode": "token", "secretName": "urbanclip-ray-token"}
    for container in containers(document):
        assert container["envFrom"] == [{"secretRef": {"name": "urbanclip-s3", "optional": True}}]
        assert "env" not in container
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["serviceAccountName"] == "urbanclip"
    assert [pod.get("automountServiceAccountToken", True) for pod in pods(document)] == [True] + [False] * len(GROUPS)


def test_a_job_on_kubernetes_has_the_same_cluster_and_ends_by_itself():
    cluster, job = load(CLUSTER / "kuberay" / "raycluster.yaml"), load(CLUSTER / "kuberay" / "rayjob.yaml")
    assert cluster_spec(job) == cluster_spec(cluster)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0
    assert "--storage s3://" in spec["entrypoint"]  # all that a retry's new cluster finds


def test_everything_names_one_image_and_the_ray_that_was_tested():
    images = {container["image"].rpartition("/")[2] for path in KUBERAY for container in containers(load(path))}
    images |= {load(path)["docker"]["image"].rpartition("/")[2] for path in LAUNCHER}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert images == {f"urbanclip_ray:{version}"}
    assert {cluster_spec(load(path))["rayVersion"] for path in KUBERAY} == {RAY_VERSION}
    assert f"FROM rayproject/ray:{RAY_VERSION}-py311-cpu\n" in (CLUSTER / "Dockerfile").read_text()


def test_the_image_copies_files_that_there_are_and_runs_as_a_user():
    text = (CLUSTER / "Dockerfile").read_text()
    names = [name for names in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE) for name in names.split()]
    assert set(names) >= {"constraints.txt", "pyproject.toml", "urbanclip_ray", "jobs"}
    assert all((ROOT / name).exists() for name in names)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "ray"


def test_policies_in_the_readme_are_json_and_name_actions_that_aws_has():
    text = (CLUSTER / "README.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.+?)```", text, re.DOTALL)]
    actions = [action for policy in policies for rule in policy["Statement"] for action in as_list(rule["Action"])]
    assert {"s3:PutObject", "ec2:RunInstances", "iam:PassRole", "ecr:GetAuthorizationToken"} <= set(actions)
    assert not any("*" in action for action in actions)
    session = botocore.session.get_session()
    for service in ("ec2", "ecr"):
        known = set(session.get_service_model(service).operation_names)
        assert {action.partition(":")[2] for action in actions if action.startswith(f"{service}:")} <= known


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_pruning_keeps_what_is_used_and_names_a_field_that_the_crd_lacks():
    prune_schema = load_module(CLUSTER / "kuberay" / "prune_schema.py")
    port = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    group = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "port": port, "old": {}}}
    schema = {
        "properties": {"groups": {"type": "array", "items": group}, "labels": {"additionalProperties": {"type": "string"}}}
    }
    samples = [{"groups": [{"name": "a"}, {"name": "b", "port": 1}], "labels": {"x": "y"}}]
    pruned = prune_schema.prune(schema, samples, "Thing")
    jsonschema.validate(samples[0], pruned)
    assert set(pruned["properties"]["groups"]["items"]["properties"]) == {"name", "port"}
    for wrong in ({"groups": [{"port": "http"}]}, {"groups": [{"name": "a", "old": 1}]}, {"labels": {"x": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, pruned)
    with pytest.raises(prune_schema.UnknownFieldError, match=r"Thing\.groups\[\] has no field prot: correct its name"):
        prune_schema.prune(schema, [{"groups": [{"name": "a", "prot": 1}]}], "Thing")


def test_a_secret_file_is_its_owners_alone_and_is_never_written_into_another(tmp_path):
    local_cluster = load_module(CLUSTER / "local_cluster.py")
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "auth_token").symlink_to(tmp_path / "elsewhere")
    local_cluster.write_private(tmp_path / "auth_token", "secret")
    assert stat.S_IMODE((tmp_path / "auth_token").lstat().st_mode) == 0o600
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_ports_are_free_and_different():
    ports = load_module(CLUSTER / "local_cluster.py").free_ports(5)
    assert len(set(ports)) == 5
    assert all(1024 <= port < 65536 for port in ports)
