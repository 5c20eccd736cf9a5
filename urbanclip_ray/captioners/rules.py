"""Rules by which sentences are rejected: patterns that are data (rules.yaml), and the checks of `sentence_checks`."""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from urbanclip_ray.captioners.sentence_checks import (
    NOWHERE,
    Place,
    is_other_language,
    is_wrong_scale,
    repeats_itself,
)
from urbanclip_ray.config import ConfigError, Section
from urbanclip_ray.geo.earth import distance_m
from urbanclip_ray.storage import digest, read_bytes
from urbanclip_ray.yaml_files import MOST_BYTES, parse_yaml

RULES_FILE = "rules.yaml"
OTHER_LANGUAGE, CUT_OFF, REPEATED_WORDS = "other language", "cut off", "repeated words"
ANOTHER_PLACE, WRONG_SCALE = "another place", "wrong scale"
CHECKS = (OTHER_LANGUAGE, CUT_OFF, REPEATED_WORDS, ANOTHER_PLACE, WRONG_SCALE)  # that are more than patterns
MAX_CHARACTERS = 2000  # more is no sentence, and patterns would take long over it
MIN_LENGTH_PX = 4  # that a thing must have to be told from its surroundings
ASSUMED_M_PER_PX = 0.3  # where a tile's scale is not known: that of the finest satellites
CITY_RADIUS_KM = 100.0
LIST_NAME = re.compile(r"\{([a-z_]+)\}")


class Rule(Section):
    """Rejects a sentence in which one of `patterns` is found and none of `unless`."""

    reason: str = Field(min_length=1)
    where: Literal["main", "sentence"] = "main"
    patterns: tuple[str, ...] = Field(min_length=1)
    unless: tuple[str, ...] = ()


class RuleFile(Section):
    """What rules.yaml holds; the comments there say what each part is for."""

    lead: str
    tail: str
    lists: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    sizes_m: dict[float, tuple[str, ...]] = Field(default_factory=dict)
    cities: dict[str, tuple[float, float]] = Field(default_factory=dict)
    rules: tuple[Rule, ...]

    @field_validator("rules")
    @classmethod
    def _reasons_are_new(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        reasons = [rule.reason for rule in rules]
        for reason in reasons:
            if reasons.count(reason) > 1 or reason in CHECKS:
                raise ValueError(f"the reason {reason!r} is taken: name every rule by another one")
        return rules


def load_rules(uri: str) -> RuleFile:
    """The rules of a YAML file, the package's own where `uri` is empty; raises ConfigError naming what is wrong in it."""
    name = uri or RULES_FILE
    try:
        own = importlib.resources.files(__package__).joinpath(RULES_FILE)
        tree = parse_yaml(read_bytes(uri, MOST_BYTES + 1) if uri else own.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("it is not a mapping with lead, tail and rules")
        rules = RuleFile.model_validate(tree)
        for rule in rules.rules:
            _compile(rules, rule, ASSUMED_M_PER_PX)
        re.compile(rules.lead), re.compile(rules.tail)
    except FileNotFoundError:
        raise ConfigError(f"refine.rules_file={uri} is not there: correct the path, or leave it empty") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: {where}: {first['msg']}") from None
    except (ValueError, re.error) as error:
        raise ConfigError(f"{name} holds no rules ({error}): correct it, the package's {RULES_FILE} is an example") from None
    return rules


class Rules:
    """The rules of a file that are switched on, compiled. Pickles as the file's content."""

    def __init__(self, file: RuleFile, names: tuple[str, ...], language: str) -> None:
        known = [*CHECKS, *(rule.reason for rule in file.rules)]
        if unknown := [name for name in names if name not in (*known, "all")]:
            raise ConfigError(f"refine.rules has {unknown[0]!r}, but there are {', '.join(known)}, and all")
        self.file, self.names, self.language = file, tuple(known) if "all" in names else names, language
        self._lead = re.compile(rf"^(?:{file.lead})+", re.IGNORECASE)
        self._tail = re.compile(file.tail, re.IGNORECASE)
        self._cities = re.compile(rf"\b(?:{'|'.join(map(re.escape, file.cities))})\b") if file.cities else None
        self._patterns = lru_cache(maxsize=64)(self._compile_all)

    def __reduce__(self) -> tuple[type[Rules], tuple[RuleFile, tuple[str, ...], str]]:
        return Rules, (self.file, self.names, self.language)

    def content(self) -> dict[str, Any]:
        """What decides rejections, for digests."""
        return {"names": list(self.names), "file": digest(self.file.model_dump(mode="json"))}

    def main_statement(self, sentence: str) -> str:
        """A sentence without what leads it in and what trails it."""
        body = self._lead.sub("", sentence)
        trailing = self._tail.search(body)
        return (body[: trailing.start()] if trailing else body).rstrip(" .!?")

    def reason(self, sentence: str, place: Place = NOWHERE) -> str | None:
        """Why a sentence is rejected, None where it is not."""
        if len(sentence) > MAX_CHARACTERS:
            return "too long"
        checks: dict[str, Callable[[], bool]] = {
            OTHER_LANGUAGE: lambda: is_other_language(sentence, self.language),
            REPEATED_WORDS: lambda: repeats_itself(sentence),
            ANOTHER_PLACE: lambda: self.is_elsewhere(sentence, place),
            WRONG_SCALE: lambda: is_wrong_scale(sentence, place),
        }
        if failed := next((name for name, check in checks.items() if name in self.names and check()), None):
            return failed
        main = self.main_statement(sentence)
        for rule, pattern, unless in self._patterns(_smallest_m(self.file, place)):
            text = main if rule.where == "main" else sentence
            if pattern.search(text) and not (unless and unless.search(text)):
                return rule.reason
        return None

    def is_elsewhere(self, sentence: str, place: Place) -> bool:
        """Whether a large city is named that is not where the tile lies; where that is not known, its region is its city."""
        if self._cities is None:
            return False
        named = {match.group() for match in self._cities.finditer(sentence)}
        if place.lon is not None and place.lat is not None:
            here = (place.lon, place.lat)
            return any(distance_m(*map(np.asarray, (*here, *self.file.cities[city]))) > CITY_RADIUS_KM * 1000 for city in named)
        home = next((city for city in self.file.cities if city.lower() == place.region.lower()), None)
        return home is not None and bool(named - {home})

    def _compile_all(self, smallest_m: float) -> list[tuple[Rule, re.Pattern[str], re.Pattern[str] | None]]:
        return [(rule, *_compile(self.file, rule, smallest_m)) for rule in self.file.rules if rule.reason in self.names]


def _smallest_m(file: RuleFile, place: Place) -> float:
    """The least of the file's sizes that can be seen; infinity where none can."""
    seen = (place.m_per_px or ASSUMED_M_PER_PX) * MIN_LENGTH_PX
    return min((size for size in file.sizes_m if size >= seen), default=math.inf)


def _compile(file: RuleFile, rule: Rule, smallest_m: float) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    small = [noun for size, nouns in file.sizes_m.items() if size < smallest_m for noun in nouns]
    known: dict[str, str] = {"small": _any_of(small)}
    for name, items in file.lists.items():
        known[name] = _any_of([_filled(item, known) for item in items])
    joined = ["|".join(f"(?:{_filled(pattern, known)})" for pattern in patterns) for patterns in (rule.patterns, rule.unless)]
    return re.compile(joined[0], re.IGNORECASE), re.compile(joined[1], re.IGNORECASE) if rule.unless else None


def _any_of(items: list[str]) -> str:
    return rf"(?:{'|'.join(items)})\b" if items else r"(?!)"  # nothing is found where there is nothing to find


def _filled(pattern: str, known: dict[str, str]) -> str:
    def named(match: re.Match[str]) -> str:
        if match.group(1) not in known:
            raise ValueError(f"{{{match.group(1)}}} in {pattern!r} is no list above it: it has {', '.join(known)}")
        return known[match.group(1)]

    return LIST_NAME.sub(named, pattern)
