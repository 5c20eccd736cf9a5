"""What `ray job submit --working-dir .` uploads, by Ray's own packaging: the code, whole, and nothing beside it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
MAX_BYTES = 3_000_000
CODE = {
    str(path.relative_to(ROOT))
    for folder in ("urbanclip_ray", "jobs")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def uploaded(folder: Path, package: Path, include_gitignore: bool = True) -> set[str]:
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), package, include_gitignore=include_gitignore, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_checkout_uploads_its_code_and_little_else(tmp_path):
    package = tmp_path / "package.zip"
    names = uploaded(ROOT, package)
    assert names >= CODE
    assert {name.partition("/")[0] for name in names} <= {"urbanclip_ray", "jobs"} | {path.name for path in ROOT.glob("*.py")}
    assert package.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_what_lies_beside_the_code_stays_and_the_same_names_inside_it_go(tmp_path, include_gitignore):
    checkout = tmp_path / "checkout"
    for folder in ("urbanclip_ray", "jobs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout / name)
    beside = ["runs/demo/run.json", ".venv/bin/python", ".git/HEAD", ".cluster/auth_token", ".mypy_cache/x", "my_tiles/a.png"]
    beside += ["weights.safetensors", "build/x", "jobs/__pycache__/x.pyc", "urbanclip_ray/model/__pycache__/x.pyc"]
    inside = ["urbanclip_ray/runs/x.py", "urbanclip_ray/build/x.py", "urbanclip_ray/tests/x.py", "my_job.py"]
    for name in beside + inside:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    assert uploaded(checkout, tmp_path / "package.zip", include_gitignore) == CODE | set(inside)
