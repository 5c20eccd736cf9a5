"""Write schema.json: what KubeRay's CRDs say of the fields that the YAMLs of this folder use, and of no others.

A whole CRD is close to a megabyte; a test needs only types, bounds and required names of what is written here. Run again
after adding a field, with the CRDs of a release of ray-project/kuberay (helm-chart/kuberay-operator/crds/):

    python cluster/kuberay/prune_schema.py v1.7.0 ray.io_rayclusters.yaml ray.io_rayjobs.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
VERSION = "v1"
KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")


class UnknownFieldError(ValueError):
    """A field that the CRD does not have; the message names its path."""


def prune(schema: dict[str, Any], samples: list[Any], path: str) -> dict[str, Any]:
    """The JSON schema of the fields that occur in `samples`; objects take no others."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | ({"pattern": schema["pattern"]} if "pattern" in schema else {})
    if "properties" in schema:
        used = sorted({key for sample in samples for key in sample})
        if unknown := [key for key in used if key not in schema["properties"]]:
            raise UnknownFieldError(f"{path} has no field {', '.join(unknown)}: correct its name")
        inner = {
            key: prune(schema["properties"][key], [sample[key] for sample in samples if key in sample], f"{path}.{key}")
            for key in used
        }
        required = {"required": schema["required"]} if "required" in schema else {}
        return {"type": "object", "properties": inner, "additionalProperties": False} | required
    if "items" in schema:
        items = [item for sample in samples for item in sample]
        return {"type": "array", "items": prune(schema["items"], items, f"{path}[]")}
    if isinstance(schema.get("additionalProperties"), dict):
        values = [value for sample in samples for value in sample.values()]
        return {"type": "object", "additionalProperties": prune(schema["additionalProperties"], values, f"{path}.*")}
    return {key: schema[key] for key in KEPT if key in schema}


def main(release: str, crds: list[Path]) -> None:
    documents = [yaml.safe_load(path.read_text()) for path in sorted(HERE.glob("*.yaml"))]
    pruned: dict[str, Any] = {"$comment": f"fields of ray-project/kuberay {release} that are used here; see prune_schema.py"}
    for crd in (yaml.safe_load(path.read_text()) for path in crds):
        kind = crd["spec"]["names"]["kind"]
        (schema,) = (item["schema"]["openAPIV3Schema"] for item in crd["spec"]["versions"] if item["name"] == VERSION)
        pruned[kind] = prune(schema, [document for document in documents if document["kind"] == kind], kind)
    (HERE / "schema.json").write_text(json.dumps(pruned, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], [Path(item) for item in sys.argv[2:]])
