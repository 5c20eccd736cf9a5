"""Recipes are whole, valid configs with a line of help."""

from __future__ import annotations

import inspect
import json

import pytest

from urbanclip_ray.config import ConfigError
from urbanclip_ray.overrides import build_config
from urbanclip_ray.recipes import RECIPES, load_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_survives_json(name):
    config = load_recipe(name)
    assert build_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_in_one_line_what_it_is(name):
    first = (inspect.getdoc(RECIPES[name]) or "").splitlines()[0]
    assert 20 < len(first) <= 120


def test_runs_of_recipes_do_not_share_a_folder():
    assert len({load_recipe(name).run for name in RECIPES}) == len(RECIPES)


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'moon' is not known; choose one of world_demo, "):
        load_recipe("moon")


def test_a_derived_recipe_differs_only_where_it_says_so():
    base, derived = (load_recipe(name).model_dump() for name in ("own_tiles", "probe_weights"))
    assert {key for key in base if base[key] != derived[key]} == {"run", "split"}


def test_a_search_over_the_demo_begins_with_the_demo():
    base, search = (load_recipe(name).model_dump() for name in ("world_demo", "demo_search"))
    assert {key for key in base if base[key] != search[key]} == {"run", "train", "embed", "probe", "tune"}
    for section, changed in {"train": {"epochs", "validations"}, "embed": {"views"}, "probe": {"methods"}}.items():
        assert {key for key in base[section] if base[section][key] != search[section][key]} == changed


def test_four_cities_differ_from_beijing_only_in_cities_and_splits():
    base, derived = (load_recipe(name).model_dump() for name in ("urbanclip_beijing", "urbanclip_four_cities"))
    assert {key for key in base if base[key] != derived[key]} == {"run", "source", "split"}
    assert derived["split"]["outer"] == base["split"]["outer"] == "blocks"


def test_the_paper_recipe_has_the_papers_settings():
    """From the released code and its first README."""
    config = load_recipe("urbanclip_beijing")
    train = config.train
    assert (train.lr, train.global_batch_size, train.epochs, train.weight_decay) == (3e-5, 128, 100, 0.01)
    assert (train.contrastive_weight, train.caption_weight, train.max_logit_scale) == (1, 1, 100)
    assert (config.probe.target, config.probe.mlp_hidden, config.probe.mlp_lr) == ("log", 256, 3e-4)
    assert config.model.architecture == "coca_ViT-L-14"
    assert "random" in config.split.also


def test_the_released_protocol_differs_from_the_set_up_only_in_how_it_judges_and_says_that_it_leaks():
    base, derived = (load_recipe(name).model_dump() for name in ("urbanclip_beijing", "urbanclip_protocol"))
    assert {key for key in base if base[key] != derived[key]} == {"run", "split", "probe"}
    assert (derived["split"]["outer"], derived["split"]["transductive"]) == ("random", True)
    assert "coordinates" in derived["probe"]["methods"]


def test_the_verification_differs_on_a_cpu_only_in_model_and_hardware():
    base, derived = (load_recipe(name).model_dump() for name in ("verify_gpu", "verify_cpu"))
    assert {key for key in base if base[key] != derived[key]} == {"run", "model", "train", "embed", "resources"}
    assert base["source"]["max_tiles"] == 200
    assert base["resources"]["use_gpu"]
