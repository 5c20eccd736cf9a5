"""The stages that a config adds: their order and what remakes them. Stages write a word, as in test_pipeline."""

from __future__ import annotations

import json

import pytest
from quick_stages import replace_stages, three_tiles

from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.places import list_places
from urbanclip_ray.plan import walk
from urbanclip_ray.representations import stages_of
from urbanclip_ray.stages import STAGES, Run, representations
from urbanclip_ray.storage import MissingDatasetError

BASELINES = "baselines.names=[pca, simclr]"
ADDED = ["trained_pca", "trained_simclr", "baseline_pca", "baseline_simclr"]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return three_tiles(tmp_path)


@pytest.fixture
def made(monkeypatch, ray_cluster) -> list[str]:
    return replace_stages(monkeypatch)


def rerun(config: RunConfig, made: list[str], *overrides: str, only=None) -> list[str]:
    made.clear()
    run_stages(apply_overrides(config, list(overrides)), only)
    return list(made)


def test_a_run_without_baselines_has_the_stages_of_every_run(config):
    assert stages_of(config) == STAGES


def test_baselines_are_trained_and_embedded_before_the_probe_which_gets_them(config):
    stages = stages_of(apply_overrides(config, [BASELINES, "embed.also={remote: /w}", "embed.features=tokens"]))
    names = [stage.name for stage in stages]
    before = [s.name for s in STAGES[:7]]
    assert before[-1] == "pretrain"
    embedded = ["embeddings", "untrained", "pretrained_features", *ADDED[2:], "also_remote"]
    assert names == [*before, *ADDED[:2], *embedded, "retrieval", "prompts", "probe"]
    assert set(stages[-1].parents) >= {"baseline_pca", "baseline_simclr", "also_remote", "pretrained_features", "untrained"}
    for at, stage in enumerate(stages):
        assert set(stage.parents) <= set(names[:at])


@pytest.mark.parametrize(
    ("override", "remade"),
    [
        ("caption.max_error_share=0.5", []),
        ("refine.max_words=9", []),
        ("train.contrastive_weight=0.5", []),
        ("train.text_mode=paragraph", []),
        ("probe.target=log", []),
        ("baselines.simclr_temperature=0.5", ["trained_simclr", "baseline_simclr"]),
        ("train.epochs=3", ["trained_simclr", "baseline_simclr"]),
        ("baselines.pca_side_px=8", ["trained_pca", "baseline_pca"]),
        ("baselines.seed=3", ADDED),
        ("embed.views=8", ["baseline_pca", "baseline_simclr"]),
        ("baselines.names=[pca, simclr, image_only]", ["trained_image_only", "baseline_image_only"]),
        ("pixels.crop_left_px=2", ADDED),
    ],
)
def test_a_baseline_is_remade_when_what_decides_it_changes_and_not_otherwise(config, made, override, remade):
    rerun(config, made, BASELINES)
    again = rerun(config, made, BASELINES, override)
    assert [name for name in again if name.startswith(("trained_", "baseline_"))] == remade


def test_how_baselines_are_trained_remakes_nothing(config, made):
    rerun(config, made, BASELINES)
    assert rerun(config, made, BASELINES, "baselines.cpus_per_task=2") == []


def test_a_supervised_baseline_is_made_of_labels(config):
    (stage,) = (s for s in stages_of(apply_overrides(config, ["baselines.names=[resnet18]"])) if s.name == "trained_resnet18")
    assert "labels" in stage.parents
    (plain,) = (s for s in stages_of(apply_overrides(config, ["baselines.names=[simclr]"])) if s.name == "trained_simclr")
    assert "labels" not in plain.parents


def test_a_run_may_judge_other_representations_alone(config, made):
    found = rerun(config, made, "embed.weights=none", BASELINES)
    assert found == ["tiles", "labels", "splits", *ADDED, "probe"]


def test_the_job_of_baselines_needs_names_and_the_stages_before(config, made):
    with pytest.raises(ConfigError, match=r"no stage of baselines: name baselines, for example baselines\.names="):
        walk(config, ["baselines"])
    with pytest.raises(MissingDatasetError, match=r"run jobs/ingest\.py"):
        rerun(config, made, BASELINES, only=["baselines"])
    for job in ("ingest", "caption", "refine", "split", "pack", "pretrain", "baselines"):
        rerun(config, made, BASELINES, only=[job])
    assert made == ["trained_pca", "trained_simclr"]
    with pytest.raises(MissingDatasetError, match=r"embeddings/\w+ is not made yet: run jobs/embed\.py"):
        rerun(config, made, BASELINES, only=["probe"])


def test_representations_have_the_names_of_what_made_them(config, made):
    run = run_stages(apply_overrides(config, [BASELINES, "embed.features=tokens"]), None)
    found = representations(run.datasets)
    assert set(found) == {"pretrained", "untrained", "prompts", "pca", "simclr"}
    assert found["pretrained"].manifest.stage == "pretrained_features"
    record = json.loads((config_run(config) / "run.json").read_text())
    assert "trained_simclr" in record["datasets"]


def config_run(config: RunConfig):
    from pathlib import Path

    return Path(config.storage) / config.run


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("weights", "weights"),
        ("local-dir:weights", "weights"),
        ("ViT-B-32@models/remote.pt", "models/remote.pt"),
        ("runs/demo#simclr", "runs/demo"),
    ],
)
def test_relative_paths_of_weights_become_absolute_inside_their_uri(config, tmp_path, monkeypatch, given, place):
    monkeypatch.chdir(tmp_path)
    run = Run(apply_overrides(config, [f"embed.also={{remote: '{given}'}}"]))
    assert run.config.embed.also["remote"] == given.replace(place, str(tmp_path / place))
    assert list_places(run.config)["embed.also.remote"] == str(tmp_path / place)
    run = Run(apply_overrides(config, ["caption.captioner=coca", f"caption.model={given}"]))
    assert run.config.caption.model == given.replace(place, str(tmp_path / place))
    assert list_places(run.config)["caption.model"] == str(tmp_path / place)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed.also={pretrained: x}", "'pretrained' cannot name a representation"),
        ("embed.also={a/b: x}", "cannot name a representation"),
        ("embed.also={x_mlp: y}", "cannot name a representation"),
        ("embed.also={x: ''}", "x has no URI"),
        ("baselines.names=[pca, pca]", "has a name twice"),
    ],
)
def test_names_that_would_be_confused_are_refused(config, override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, [override])


def test_a_baseline_and_weights_of_one_name_are_refused(config):
    with pytest.raises(ConfigError, match=r"embed\.also and baselines\.names both have simclr"):
        apply_overrides(config, [BASELINES, "embed.also={simclr: x}"])
