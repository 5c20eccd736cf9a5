"""Recipes as YAML files, for `--recipe FILE`: a whole config, or what differs from one of ours.

    recipe: own_tiles      # where it starts from; without this line, from the defaults of every key
    source: {uri: s3://bucket/tiles, metadata: labels.csv}
    train:
      lr: 0.0003

A file is data that others may have written: it is read as `yaml_files` reads one, and every key is checked as one of `--set`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import yaml

from urbanclip_ray.config import SOURCE_KINDS, ConfigError, RunConfig, Section
from urbanclip_ray.overrides import assign_values
from urbanclip_ray.storage import absolute, read_bytes
from urbanclip_ray.yaml_files import MOST_BYTES, PlainLoader, parse_yaml

SUFFIXES = (".yaml", ".yml")
BASE_KEY = "recipe"


def is_recipe_file(name: str) -> bool:
    """Whether `--recipe` names a file and not a recipe of ours."""
    return name.endswith(SUFFIXES)


def recipe_text(config: RunConfig, *comments: str) -> str:
    """A file that gives this config again: the comments, and every key that differs from its default."""
    tree = _differing(config, RunConfig(), config.model_dump(mode="json"))
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    return "\n".join([*lines, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)])


def _differing(section: Section, default: Section, tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a section's tree that differs from the default; another kind of source has defaults of its own."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        own, other = getattr(section, key), getattr(default, key)
        if own == other:
            continue
        if not isinstance(own, Section):
            kept[key] = value
        elif type(own) is type(other):
            kept[key] = _differing(own, other, value)
        else:
            kept[key] = {"kind": value["kind"]} | _differing(own, type(own)(), value)
    return kept


def read_recipe_file(uri: str, find_base: Callable[[str], RunConfig] | None = None) -> RunConfig:
    """The config of a file, here or on `s3://`. `find_base` gives our recipes by name; without it the file names none.

    Raises ConfigError naming the file and what is wrong with it.
    """
    try:
        data = read_bytes(absolute(uri), MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"--recipe {uri}: there is no such file") from None
    tree = _parse(data, uri)
    base = tree.pop(BASE_KEY, None)
    if base is not None and (find_base is None or not isinstance(base, str) or is_recipe_file(base)):
        raise ConfigError(f"--recipe {uri}: {BASE_KEY} names a recipe of ours, not {base!r}")
    try:
        config = find_base(base) if find_base and base is not None else RunConfig()
        return assign_values(config, _flatten(config, tree))
    except ConfigError as error:
        raise ConfigError(f"--recipe {uri}: {error}") from None


def _flatten(section: Section, tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; what is a mapping by itself, such as `tune.space`, is one value."""
    if isinstance(kind := tree.get("kind"), str) and path == "source." and kind in SOURCE_KINDS:
        if kind != getattr(section, "kind", None):
            yield "source.kind", kind  # first: other keys are of this kind
            section = SOURCE_KINDS[kind]()
        tree = {key: value for key, value in tree.items() if key != "kind"}
    for key, value in tree.items():
        below = getattr(section, key, None) if key in type(section).model_fields else None
        if isinstance(below, Section) and isinstance(value, dict):
            yield from _flatten(below, value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _parse(data: bytes, uri: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(data, RecipeLoader)
    except ValueError as error:
        raise ConfigError(f"--recipe {uri} is no YAML of a recipe: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--recipe {uri} holds no mapping of keys to values, such as train: {{lr: 0.0003}}")
    try:
        json.dumps(tree, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--recipe {uri} holds more than text, finite numbers, true, false and null: {error}") from None
    return tree


class RecipeLoader(PlainLoader):
    """No key twice, and no key but text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are text, each there once."""
        names = [key.value for key, _ in node.value]
        for (key, _), name in zip(node.value, names, strict=True):
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is not text", key.start_mark)
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)
