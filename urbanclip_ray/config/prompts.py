"""Prompts as data: templates by name (`prompts.yaml`), checked before a run and filled with what is known of a tile."""

from __future__ import annotations

import importlib.resources
import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache

import yaml

FIELDS = ("city", "width_m", "ground_resolution_m")
OPTIONAL = re.compile(r"\[\[|\]\]|\[([^\[\]]*)\]")


class PromptFieldError(LookupError):
    """A tile of which a field of its prompt is not known."""


@lru_cache(maxsize=1)
def packaged_prompts() -> dict[str, str]:
    """The templates that come with the package, by name."""
    text = importlib.resources.files("urbanclip_ray.config").joinpath("prompts.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def find_prompts(names: Sequence[str], own: Mapping[str, str]) -> tuple[str, ...]:
    """The templates of these names; raises ValueError for an unknown or repeated name, and for a text that cannot be filled."""
    known = packaged_prompts() | dict(own)
    for name in names:
        if name not in known:
            raise ValueError(
                f"caption.prompts: there is no template {name!r}: choose of {', '.join(known)}, or write it as "
                f"caption.templates.{name}"
            )
        check_template(name, known[name])
    if len({known[name] for name in names}) < len(names):
        raise ValueError(f"caption.prompts={list(names)} would ask the same twice: leave the repeated one out")
    return tuple(known[name] for name in names)


def check_template(name: str, template: str) -> None:
    """Raise ValueError where a template has unknown fields, or braces and brackets that do not close."""
    try:
        fields = fields_of(template)
    except ValueError as error:
        raise ValueError(f"the template {name!r}: {error}; write {{{{ and }}}} for braces") from None
    if not template.strip():
        raise ValueError(f"the template {name!r} is empty")
    if unknown := fields - set(FIELDS):
        raise ValueError(f"the template {name!r}: {{{min(unknown)}}} is no field; there are {', '.join(FIELDS)}")
    if "[" in (rest := OPTIONAL.sub("", template)) or "]" in rest:
        raise ValueError(f"the template {name!r}: a bracket does not close; write [[ and ]] for brackets")


def fields_of(template: str) -> set[str]:
    """Names of the fields in a template: names only, without indices, attributes, conversions and formats."""
    found = set()
    for _, field, specification, conversion in string.Formatter().parse(template):
        if field is None:
            continue
        if not field.isidentifier() or specification or conversion:
            raise ValueError(f"{{{field}}} must be a plain name, without dots, indices and formats")
        found.add(field)
    return found


def fill_template(template: str, known: Mapping[str, str]) -> str:
    """The prompt for a tile of which `known` is known; raises PromptFieldError where a field that it needs is not.

    Values are data: they are put in as they are, in one line, and never read as templates.
    """

    def keep(match: re.Match[str]) -> str:
        inside = match[1]
        if inside is None:
            return match[0]
        return inside if fields_of(inside) <= known.keys() else ""

    needed = OPTIONAL.sub(keep, template)
    if missing := fields_of(needed) - known.keys():
        raise PromptFieldError(
            f"the prompt needs {{{min(missing)}}}, which is not known of the tile: put that part of the template in [brackets]"
        )
    return _fill(needed, known)


def _fill(template: str, values: Mapping[str, str]) -> str:
    parts = []
    for text, field, _, _ in string.Formatter().parse(template):
        parts.append(text.replace("[[", "[").replace("]]", "]"))
        if field is not None:
            parts.append(values[field])
    return "".join(parts)
