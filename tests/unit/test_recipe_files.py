"""Recipes as files: what is written is read again as the same config, and what others wrote is data and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from urbanclip_ray.config import ConfigError
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipe_files import recipe_text
from urbanclip_ray.recipes import RECIPES, load_recipe
from urbanclip_ray.yaml_files import MOST_BYTES


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_as_a_file_is_read_as_the_same_one(name, tmp_path):
    config = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe_text(config, "a comment\nof two lines"))) == config


def test_mappings_lists_and_stores_are_read_as_they_were(tmp_path):
    items = [
        'labels.rasters={"people": {"uri": "/data/people.tif", "operation": "sum"}}',
        'embed.also={"mine": "/runs/mine"}',
        'stores=[{"root": "s3://public", "anonymous": true}]',
        'tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}, "train.freeze": {"choice": [[], ["image"]]}}',
        "probe.targets={'gdp': 'log'}",
        "resources.num_workers=[1, 4]",
        "source.uri=/data/Straße",
    ]
    config = apply_overrides(load_recipe("own_tiles"), items)
    assert load_recipe(write(tmp_path, recipe_text(config))) == config


def test_a_file_may_start_from_a_recipe_of_ours(tmp_path):
    text = "recipe: rsicd_small\nrun: mine\nsource: {uri: s3://bucket/RSICD}\ntrain:\n  lr: 3e-4\n  augment: {flips: false}\n"
    expected = ["run=mine", "source.uri=s3://bucket/RSICD", "train.lr=3e-4", "train.augment.flips=false"]
    assert load_recipe(write(tmp_path, text)) == apply_overrides(load_recipe("rsicd_small"), expected)


def test_another_kind_of_source_starts_from_its_own_defaults(tmp_path):
    text = "recipe: own_tiles\nsource: {max_tiles: 9, kind: world}\n"
    expected = apply_overrides(load_recipe("own_tiles"), ["source.kind=world", "source.max_tiles=9"])
    assert load_recipe(write(tmp_path, text)) == expected


def test_an_ablation_may_be_the_base(tmp_path):
    assert load_recipe(write(tmp_path, "recipe: rsicd_small/without_caption\n")).train.caption_weight == 0


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n" for before, name in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch HERE']", "no YAML of a recipe: could not determine a constructor"),
        ("run: !!python/name:os.system", "no YAML of a recipe: could not determine a constructor"),
        (BOMB, "aliases are not taken"),
        ("train: {lr: 1, lr: 2}", "the key 'lr' is there twice"),
        ("base: {x: 1}\ntrain: {<<: {lr: 1}}", "the key '<<' is not text"),
        ("1: 2", "the key '1' is not text"),
        ("train: [", "no YAML of a recipe"),
        ("- a", "holds no mapping of keys to values"),
        ("", "holds no mapping of keys to values"),
        ("[" * 50_000, "nested too deeply"),
        ("run: 2020-01-01", "holds more than text, finite numbers, true, false and null"),
        ("train: {lr: .nan}", "holds more than text, finite numbers, true, false and null"),
        ("run: !!binary aGVsbG8=", "holds more than text, finite numbers"),
        ("train: {lrr: 1}", "unknown key 'train.lrr': train has no 'lrr'; did you mean 'lr'?"),
        ("trian: {lr: 1}", "unknown key 'trian'"),
        ("train: 3", "train: Input should be a valid dictionary"),
        ("train: {lr: fast}", "train.lr: Input should be a valid number"),
        ("source: {kind: moon}", "source.kind: 'moon' is not one of"),
        ("recipe: moon", "'moon' is not known; choose one of"),
        ("recipe: mine.yaml", "recipe names a recipe of ours, not 'mine.yaml'"),
        ("recipe: [own_tiles]", "recipe names a recipe of ours"),
        ("run: " + "x" * MOST_BYTES, "it has more than 1,048,576 bytes"),
        ("run: \x00", "no YAML of a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name_with_the_reason(text, message, tmp_path):
    uri = write(tmp_path, text.replace("HERE", str(tmp_path / "touched")))
    with pytest.raises(ConfigError) as caught:
        load_recipe(uri)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--recipe {uri}")
    assert not (tmp_path / "touched").exists()


def test_a_file_that_is_not_there_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"--recipe .*none\.yaml: there is no such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "picture.yml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match=r"picture\.yml is no YAML of a recipe"):
        load_recipe(str(tmp_path / "picture.yml"))
