"""Configs from nested dicts and from `key=value` items; what is wrong is named by its key, with the fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from urbanclip_ray.config import SOURCE_KINDS, ConfigError, RunConfig


def build_config(tree: dict[str, Any]) -> RunConfig:
    """Validate a nested dict; raises :class:`ConfigError` with one line per problem."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A new config with `key=value` items such as `train.lr=1e-4` applied, in order.

    Values are read as JSON where they are JSON (numbers, true, null, lists), `[a, b]` and `{name: value}` as YAML, else text:
    `stores=[{root: s3://public, anonymous: true}]` is a list of one store.
    """
    values = []
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item!r}: write it as key=value, for example train.lr=1e-4")
        values.append((key, _parse_value(key, text)))
    return assign_values(config, values)


def assign_values(config: RunConfig, values: Iterable[tuple[str, Any]]) -> RunConfig:
    """A new config with these values of dotted keys, in order; raises :class:`ConfigError` as above."""
    tree = config.model_dump()
    for key, value in values:
        _assign(tree, key.strip().split("."), value, key)
    return build_config(tree)


def _parse_value(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        kinds = {"[": "list: write [a, b]", "{": "mapping: write {name: value}"}
        if (kind := kinds.get(text[:1])) is not None:
            try:
                return yaml.safe_load(text)
            except yaml.YAMLError:
                raise ConfigError(f"{key}: {text!r} is not a {kind}") from None
        return text


def _assign(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    node = tree
    for depth, name in enumerate(path):
        known = list(node)
        if name not in node:
            where = ".".join(path[:depth]) or "the config"
            raise ConfigError(f"unknown key {key!r}: {where} has no {name!r}{_suggest(name, known)}")
        if depth == len(path) - 1:
            if name == "kind" and isinstance(value, str) and value in SOURCE_KINDS:
                node.clear()  # another kind of source has other fields: they start from that kind's defaults
                node.update(SOURCE_KINDS[value]().model_dump())
            node[name] = value
        elif isinstance(node[name], dict):
            node = node[name]
        else:
            raise ConfigError(f"unknown key {key!r}: {'.'.join(path[: depth + 1])} is a value, not a section")


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"] if part not in SOURCE_KINDS) or "config"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}: remove it or correct its spelling"
    if item["type"] == "union_tag_invalid":
        return f"{key}.kind: {item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
    if key == "config" or message.startswith((f"{key}.", f"{key}=")):  # a check of ours, which names its keys itself
        return message
    is_section = item["type"] == "value_error" and isinstance(item.get("input"), dict)  # all its keys, which nobody would read
    # what was given to stores and tracking may be a secret in the wrong place
    if is_section or item["loc"][:1] == ("stores",) or "tracking" in item["loc"]:
        return f"{key}: {message}"
    return f"{key}: {message} (got {item.get('input')!r})"
