"""The dry run: what would be kept and made, how large it is, and that nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from urbanclip_ray.config import ConfigError, ModelConfig, RunConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.plan import count_training_rows, pretraining_facts, shape_of, show_plan, survey
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.stages import STAGES, Run
from urbanclip_ray.storage import publish

NUM_TILES = 10


@pytest.fixture
def config(tmp_path) -> RunConfig:
    folder = tmp_path / "city"
    folder.mkdir()
    lines = ["file,lon,lat,gdp"]
    for at in range(NUM_TILES):
        Image.fromarray(np.full((16, 16, 3), at, np.uint8)).save(folder / f"{at}.png")
        lines.append(f"{at}.png,{at},{at},{at}")
    (folder / "tiles.csv").write_text("\n".join(lines))
    options = [f"source.uri={folder}", "source.metadata=tiles.csv", f"storage={tmp_path / 'storage'}"]
    return apply_overrides(load_recipe("tiny_test"), options)


def make(config: RunConfig, name: str) -> None:
    """A finished dataset in the place of a stage's."""
    run = Run(config)
    (planned,) = (item for item in survey(run, None) if item.stage.name == name)
    parents = {parent: run.datasets[parent] for parent in planned.stage.parents if parent in run.datasets}
    with publish(planned.uri, name, {}, parents) as publication:
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES - 1, rejects={"not an image": 1})
        publication.facts["parts"] = {"train": 7, "val": 2}


def states(config: RunConfig, only: list[str] | None = None) -> dict[str, tuple[bool, bool, tuple[str, ...]]]:
    return {item.stage.name: (item.dataset is not None, item.is_made, item.after) for item in survey(Run(config), only)}


def test_before_the_first_run_only_the_tiles_are_known_by_name(config):
    found = survey(Run(config), None)
    assert [item.stage.name for item in found] == [stage.name for stage in STAGES]
    assert all(item.is_made for item in found)
    assert found[0].uri.rsplit("/", 2)[1] == "tiles"
    assert found[0].after == ()
    assert {item.stage.name: item.after for item in found}["shards"] == ("tiles", "pairs", "splits")
    assert all(item.uri.endswith(f"/tiny_test/{item.stage.name}") for item in found[1:])


def test_what_is_finished_is_kept_and_names_its_children(config):
    make(config, "tiles")
    found = states(config)
    assert found["tiles"] == (True, False, ())
    assert found["captions"] == (False, True, ())
    assert found["pairs"] == (False, True, ("captions",))


def test_a_job_plans_its_own_stages_and_what_they_need(config):
    found = states(config, ["captions"])
    assert list(found) == ["tiles", "labels", "captions"]
    assert found["tiles"] == (False, False, ())
    assert found["captions"] == (False, True, ("tiles",))


def test_the_plan_shows_stages_sizes_and_places_and_writes_nothing(config, capsys, tmp_path):
    show_plan(config, None)
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "10 tiles",
        "make, after tiles",
        "coca_test_16",
        "about 6, 2 epochs",
        "2 (1 forward of 8 rows)",
        "16 per step",
        "and what a forward keeps for its backward (weights",
    ):
        assert part in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["city"]


def test_the_plan_of_a_single_job_says_what_is_missing(config, capsys):
    show_plan(config, ["captions"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "missing: run jobs/ingest.py first" in shown
    assert "pretraining" not in shown


def test_training_rows_are_counted_once_they_are_packed(config):
    assert count_training_rows(Run(config)) == (6, False)  # 10 tiles without a fifth each for test and validation
    for name in ("tiles", "captions", "pairs", "splits", "shards"):
        make(config, name)
    run = Run(config)
    survey(run, None)
    assert count_training_rows(run) == (7, True)
    facts = pretraining_facts(run)
    assert facts["training rows"] == "7, 2 epochs"
    assert facts["steps"] == "0"  # 14 rows do not fill a step of 16


@pytest.mark.parametrize("architecture", ["coca_test_16", "coca_tiny_27"])
def test_parameters_are_counted_without_being_allocated(architecture):
    config = ModelConfig(architecture=architecture, vocab_size=400)
    real = build_model(open_clip_config(config, 400), seed=0)
    assert shape_of(config).num_parameters == sum(parameter.numel() for parameter in real.parameters())


def test_a_model_of_a_size_that_would_not_fit_here_is_counted():
    config = ModelConfig(architecture="coca_ViT-L-14", tokenizer="open_clip")
    assert 600e6 < shape_of(config).num_parameters < 700e6


def test_a_model_that_there_is_not_fails_the_plan(config):
    with pytest.raises(ConfigError, match=r"model\.architecture='moon' is not known"):
        show_plan(apply_overrides(config, ["model.architecture=moon"]), None)


def test_a_source_that_is_not_there_fails_the_plan(config, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        show_plan(apply_overrides(config, [f"source.uri={Path(tmp_path) / 'gone'}"]), None)
