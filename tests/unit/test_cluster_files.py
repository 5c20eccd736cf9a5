"""The files of cluster/: valid by the schemas of those who read them, of one version, and without secrets."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import stat
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def schema_of(document: dict[str, Any]) -> dict[str, Any]:
    return json.loads((CLUSTER / "kuberay" / "schema.json").read_text())[document["kind"]]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(document)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_launcher_accepts_the_aws_cluster_and_would_name_a_misspelt_key():
    config = prepare_config(load(CLUSTER / "aws.yaml"))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(config | {"idle_timeout_minuts": 5})


def test_the_autoscaler_accepts_the_local_cluster():
    config = load(CLUSTER / "local.yaml")
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0


def test_the_aws_cluster_grows_from_nothing_and_has_roles_and_a_token_instead_of_keys():
    config = load(CLUSTER / "aws.yaml")
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = [types[name] for name in ("cpu", "gpu")]
    assert [node["min_workers"] for node in workers] == [0, 0]
    assert sum(node["max_workers"] for node in workers) <= config["max_workers"]
    assert all("IamInstanceProfile" in node["node_config"] for node in types.values())
    for when in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r" AWS_\w+=\S+", "", config[when][-1])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "AWS_ACCESS_KEY_ID" not in (CLUSTER / "aws.yaml").read_text()


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_a_kuberay_cluster_grows_from_nothing_and_takes_its_secrets_from_secrets(path):
    document = load(path)
    spec = cluster_spec(document)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert all(group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])
    gpus = [item["resources"]["limits"].get("nvidia.com/gpu", 0) for item in containers(document)]
    assert gpus == [0, 0, 1]
    assert spec["authOptions"] == {"mode": "token", "secretName": "urbanclip-ray-token"}
    for container in containers(document):
        assert container["envFrom"] == [{"secretRef": {"name": "urbanclip-s3", "optional": True}}]
        assert "env" not in container


def test_everything_names_one_image_and_the_ray_that_was_tested():
    images = {container["image"].partition("/")[2] for path in KUBERAY for container in containers(load(path))}
    images.add(load(CLUSTER / "aws.yaml")["docker"]["image"].partition("/")[2])
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert images == {f"urbanclip_ray:{version}"}
    assert {cluster_spec(load(path))["rayVersion"] for path in KUBERAY} == {RAY_VERSION}
    assert f"FROM rayproject/ray:{RAY_VERSION}-py311-cpu\n" in (CLUSTER / "Dockerfile").read_text()


def test_the_image_copies_files_that_there_are():
    copies = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for names in copies for name in names.split()]
    assert set(names) >= {"constraints.txt", "pyproject.toml", "urbanclip_ray", "jobs"}
    assert all((ROOT / name).exists() for name in names)


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
