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
    assert {key for key in base if base[key] != search[key]} == {"run", "train", "tune"}
    assert {key for key in base["train"] if base["train"][key] != search["train"][key]} == {"epochs", "validations"}
