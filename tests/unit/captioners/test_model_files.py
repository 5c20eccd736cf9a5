"""Which model a config stands for, and its files on a node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.captioners.model_files import fetch_model, is_directory, resolve_model
from urbanclip_ray.config import CaptionConfig, ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path) -> Path:
    """Files as a model has them; nothing in here looks inside."""
    folder = tmp_path / "models" / "small"
    (folder / "chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8192)
    (folder / "chat_templates" / "other.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not loaded")
    (folder / "modeling.py").write_text("raise SystemExit('never run')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def resolve(model, tmp_path, **keys):
    cache = str(tmp_path / "cache")
    return resolve_model(CaptionConfig(captioner="transformers", model=str(model), cache_folder=cache, **keys))


def test_a_directory_is_known_by_the_files_a_model_is_loaded_from(model, tmp_path):
    reference = resolve(model, tmp_path)
    assert (reference.name, reference.place, reference.is_hub) == ("small", str(model), False)
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "small")
    (moved / "README.md").write_text("other words")
    assert resolve(moved, tmp_path).revision == reference.revision
    (moved / "config.json").write_text('{"a": 1}')
    assert resolve(moved, tmp_path).revision != reference.revision
    (moved / "config.json").write_text("{}")
    os.rename(moved / "chat_templates" / "other.jinja", moved / "chat_templates" / "default.jinja")
    assert resolve(moved, tmp_path).revision != reference.revision


def test_the_digest_is_remembered_until_the_directory_changes(model, tmp_path):
    before = resolve(model, tmp_path).revision
    weights = model / "model.safetensors"
    stamp = weights.stat()
    weights.write_bytes(bytes(len(weights.read_bytes())))
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # size and time as before: not read again
    assert resolve(model, tmp_path).revision == before
    os.utime(weights)
    assert resolve(model, tmp_path).revision != before


def test_a_path_is_used_in_place_and_a_uri_is_downloaded_without_what_is_not_loaded(model, tmp_path):
    cache = str(tmp_path / "cache")
    assert fetch_model(resolve(model, tmp_path), cache) == str(model)
    reference = resolve(f"file://{model}", tmp_path)
    assert reference.revision == resolve(model, tmp_path).revision
    folder = Path(fetch_model(reference, cache))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {"config.json", "model.safetensors", "chat_templates/other.jinja"}
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    (folder / "config.json").write_text("touched")
    assert fetch_model(reference, cache) == str(folder)
    assert (folder / "config.json").read_text() == "touched"  # not downloaded again


def test_one_of_several_actors_downloads_and_a_cut_off_download_is_begun_anew(model, tmp_path):
    reference, cache = resolve(f"file://{model}", tmp_path), tmp_path / "cache"
    partial = cache / "models" / f"{reference.revision}.partial"
    partial.mkdir(parents=True)
    (partial / "half.safetensors").write_bytes(b"half")
    folders: list[str] = []
    actors = [threading.Thread(target=lambda: folders.append(fetch_model(reference, str(cache)))) for _ in range(4)]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert not (Path(folders[0]) / "half.safetensors").exists()
    assert not partial.exists()


def test_a_model_that_changes_under_the_run_is_refused_and_not_kept(model, tmp_path):
    reference = resolve(f"file://{model}", tmp_path)
    (model / "config.json").write_text('{"changed": true}')
    with pytest.raises(UnusableCaptionerError, match="was changed while the run used it"):
        fetch_model(reference, str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_a_path_that_a_node_lacks_is_named_with_the_node(model, tmp_path):
    reference = resolve(model, tmp_path)
    shutil.rmtree(model)
    with pytest.raises(UnusableCaptionerError, match=f"{model} is not there on the node {os.uname().nodename}"):
        fetch_model(reference, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json there"),
        ("model.safetensors", r"no \*\.safetensors there; .*can run foreign code"),
    ],
)
def test_a_directory_that_is_no_safe_model_is_refused(model, tmp_path, remove, message):
    (model / remove).unlink()
    with pytest.raises(ConfigError, match=message):
        resolve(model, tmp_path)


@pytest.mark.parametrize("place", ["/nowhere/model", "./nowhere", "file:///nowhere/model"])
def test_a_directory_that_is_not_there_is_named(tmp_path, place):
    with pytest.raises(ConfigError, match=r"caption\.model=\S*/nowhere\S*: no config\.json there"):
        resolve(place, tmp_path)


def test_what_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_directory("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert all(is_directory(model) for model in ("owner/name", "/x", "./x", "../x", "~/x", "s3://bucket/x"))


def test_a_directory_takes_no_revision_and_a_hub_model_needs_one(model, tmp_path):
    with pytest.raises(ConfigError, match="is known by its content; leave it out"):
        resolve(model, tmp_path, revision="main")
    with pytest.raises(ConfigError, match=r"no directory here, so it is a model id.*needs caption\.revision"):
        resolve("owner/name", tmp_path)
    with pytest.raises(ConfigError, match="neither a directory here nor a model id like owner/name"):
        resolve("owner/name/more", tmp_path, revision="main")


def test_a_commit_needs_no_hub_and_a_branch_is_found_in_the_cache(model, tmp_path):
    """In a process of its own: the hub's client reads its environment once. Nothing is sent anywhere."""
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    code = f"""
from urbanclip_ray.captioners.model_files import fetch_model, resolve_model
from urbanclip_ray.config import CaptionConfig, ConfigError
def resolve(revision):
    return resolve_model(CaptionConfig(captioner="transformers", model="owner/name", revision=revision))
assert resolve("{COMMIT}") == resolve("main") == ("owner/name", "{COMMIT}", "owner/name", True)
print(fetch_model(resolve("main"), "unused"))
try:
    resolve("other")
except ConfigError as error:
    print(error)
"""
    offline = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    folder, refusal = result.stdout.splitlines()
    assert folder == str(cached / "snapshots" / COMMIT)
    assert "caption.model=owner/name: its revision other cannot be looked up" in refusal
    assert "give the full commit" in refusal
