"""Who may import what: light modules stay light, and packages keep to their side."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import urbanclip_ray

PACKAGE = Path(urbanclip_ray.__file__).parent
ROOT = PACKAGE.parent
LIGHT = [
    *("", ".errors", ".remote_errors", ".config", ".overrides", ".recipes", ".schema", ".storage", ".command_line"),
    *(
        ".object_storage",
        ".manifest",
        ".google_storage",
        ".filesystems",
        ".imagery",
        ".sources",
        ".places",
        ".stages",
        ".representations",
        ".plan",
        ".search_space",
        ".search_stage",
        ".recipe_files",
        ".yaml_files",
    ),
    *(".release.plan", ".release.shards", ".release.card"),
    *(".geo.baidu", ".geo.zonal", ".sources.label_files"),
    *(".captioners.model_files", ".captioners.store", ".captioners.vision_language", ".captioners.coca"),
    ".captioners.back_ends",
    *(".captioners.attempts", ".captioners.projection", ".captioners.tally", ".captioners.upkeep"),
]
HEAVY = ("torch", "ray", "deepspeed", "open_clip", "transformers")
USES_RAY = {
    "urbanclip_ray.dataflow",
    "urbanclip_ray.cluster",
    "urbanclip_ray.check",
    "urbanclip_ray.verify",
    *("urbanclip_ray.metrics", "urbanclip_ray.logs"),
    "urbanclip_ray.sources.ingest",
    "urbanclip_ray.sources.label_rasters",
    "urbanclip_ray.captioners.caption",
    "urbanclip_ray.captioners.consistency",
    "urbanclip_ray.captioners.refine",
    "urbanclip_ray.captioners.sample",
    "urbanclip_ray.captioners.vllm_engine",
    "urbanclip_ray.release.export",
    "urbanclip_ray.train.pack",
    "urbanclip_ray.train.launch",
    "urbanclip_ray.train.notice",
    "urbanclip_ray.train.policies",
    "urbanclip_ray.train.worker",
    "urbanclip_ray.evaluate.fits",
    "urbanclip_ray.evaluate.retrieval",
    "urbanclip_ray.evaluate.trained.train",
    "urbanclip_ray.probe_search",
    "urbanclip_ray.report_score",
    "urbanclip_ray.search_scheduling",
    "urbanclip_ray.searchers",
    "urbanclip_ray.tracking",
    "urbanclip_ray.tune",
}
USES_DEEPSPEED = {"urbanclip_ray.train.engine", "urbanclip_ray.train.fragments"}
ENTRIES = {  # of the command line, for jobs
    *("run_job", "run_verification", "run_leak_table", "run_experiment_job", "run_report", "run_search", "run_export"),
    *("run_caption_store", "run_check_storage"),
}
NOT_RAY_ITSELF = {  # but what dataflow makes of it
    *("urbanclip_ray.preflight", "urbanclip_ray.command_line", "urbanclip_ray.integrity"),
    *("urbanclip_ray.train.borrowed", "urbanclip_ray.evaluate.embed"),
    *("urbanclip_ray.evaluate.probe", "urbanclip_ray.evaluate.baselines"),
}


class Import(NamedTuple):
    module: str  # who
    name: str  # imports what
    lazy: bool  # inside a function, or for type checkers alone


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_not_run_on_import(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text())
    inside = {id(node) for outer in ast.walk(tree) if is_not_run_on_import(outer) for node in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(module_name(path), name, id(node) in inside) for name in names]
    return found


ALL = [item for path in sorted(PACKAGE.rglob("*.py")) for item in imports_of(path)]


def importers(prefix: str) -> set[str]:
    return {item.module for item in ALL if is_below(item.name, prefix)}


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_light_modules_import_neither_torch_nor_ray():
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("urbanclip_ray" + name)
    heavy = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not heavy, f"urbanclip_ray{{name}} imports {{heavy}}"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_public_names_are_found_where_they_are_said_to_be():
    code = "import urbanclip_ray as u; assert u.RunConfig().run == 'run' and u.load_recipe('tiny_test')"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    for name, place in urbanclip_ray._PLACES.items():
        path = PACKAGE / (place.replace(".", "/") + ".py")
        path = path if path.exists() else PACKAGE / place.replace(".", "/") / "__init__.py"
        defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{name} is not in {path}"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = urbanclip_ray.nonsense


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("geo", ["sources", "model", "captioners", "train", "evaluate", "dataflow", "storage"]),
        ("sources", ["model", "captioners", "train", "evaluate"]),
        ("model", ["sources", "captioners", "train", "evaluate", "dataflow"]),
        ("captioners", ["sources", "train", "evaluate"]),
    ],
)
def test_packages_keep_to_their_side(package, others):
    mine = [item for item in ALL if is_below(item.module, f"urbanclip_ray.{package}")]
    assert mine
    for other in others:
        assert [item for item in mine if is_below(item.name, f"urbanclip_ray.{other}")] == []


def test_of_captioners_the_coca_and_the_consistency_score_alone_know_the_model_and_load_it_late():
    found = {
        (item.module, item.lazy)
        for item in ALL
        if is_below(item.module, "urbanclip_ray.captioners") and is_below(item.name, "urbanclip_ray.model")
    }
    assert found == {("urbanclip_ray.captioners.coca", True), ("urbanclip_ray.captioners.consistency", True)}


def test_nothing_below_reaches_up():
    below = ["errors", "libraries", "schema", "config"]
    order = [*below, "object_storage", "google_storage", "seals", "manifest", "parquet_files", "filesystems", "storage"]
    for place, lower in enumerate(order):
        allowed = order[: place + 1]  # a package imports its own modules
        for item in ALL:
            if is_below(item.module, f"urbanclip_ray.{lower}") and is_below(item.name, "urbanclip_ray"):
                assert item.name.split(".")[1] in allowed, item


def test_ray_is_used_only_where_work_is_distributed():
    assert importers("ray") == USES_RAY
    assert importers("urbanclip_ray.dataflow") <= USES_RAY | NOT_RAY_ITSELF


def test_deepspeed_is_used_only_by_the_engine_and_its_fragments():
    assert importers("deepspeed") == USES_DEEPSPEED


def test_only_the_command_line_runs_the_pipeline_and_imports_it_late():
    """Through `verify` and `experiment` for one job each, which it imports late as well."""
    found = {(item.module, item.lazy) for item in ALL if is_below(item.name, "urbanclip_ray.pipeline")}
    assert found == {
        ("urbanclip_ray.command_line", True),
        ("urbanclip_ray.verify", False),
        ("urbanclip_ray.experiment", False),
    }
    found = {(item.module, item.lazy) for item in ALL if is_below(item.name, "urbanclip_ray.experiment")}
    assert found == {("urbanclip_ray.command_line", True)}
    found = {(item.module, item.lazy) for item in ALL if is_below(item.name, "urbanclip_ray.verify")}
    assert found == {("urbanclip_ray.command_line", True)}
    assert not [item for item in ALL if item.module == "urbanclip_ray" and is_below(item.name, "urbanclip_ray")]


def test_jobs_know_the_command_line_and_their_own_stage_only_when_it_is_asked_for():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        found = [item for item in imports_of(path) if is_below(item.name, "urbanclip_ray")]
        eager = {item.name for item in found if not item.lazy}
        names = {item.removeprefix("urbanclip_ray.command_line.") for item in eager}
        assert names & ENTRIES
        assert names <= ENTRIES | {"Look"}
        lazy = {item.name.split(".")[1] for item in found if item.lazy}
        allowed = {"caption": {"captioners", "stages"}, "refine": {"evaluate"}}
        assert lazy <= allowed.get(path.stem, set())
