"""What is checked of a sentence without patterns: its language, loops of words, its end, and lengths that the tile belies."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

MIN_CONFIDENCE = 0.6  # of another language: a few words of English are often taken for a cousin of it, with less
SCALE_TOLERANCE = 2.0
RUN_WORDS = 6  # that do not come twice in a sentence of anybody's
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SENTENCE_MARKS = ".!?…。！？"
CLOSING_MARKS = "\"'”’)]»"
LENGTH = re.compile(
    r"(\d[\d,]*(?:\.\d+)?)[ -]?(km|kilomet(?:er|re)s?|miles?|m|met(?:er|re)s?)\b(\s*(?:per|/|a) pixel)?", re.IGNORECASE
)
RESOLUTION = re.compile(
    r"\bresolution of (?:about |approximately )?(\d[\d,]*(?:\.\d+)?)[ -]?(km|kilomet(?:er|re)s?|m|met(?:er|re)s?)\b", re.I
)


class Place(NamedTuple):
    """What the metadata say of a tile; None where unknown."""

    region: str = ""
    lon: float | None = None  # degrees, WGS84
    lat: float | None = None
    m_per_px: float | None = None
    side_m: float | None = None


NOWHERE = Place()


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def is_other_language(sentence: str, language: str) -> bool:
    """Whether a sentence is most likely in another language than this one (ISO 639-1). Doubt speaks for the sentence."""
    found, confidence = _identifier().classify(sentence)
    return bool(found != language and confidence >= MIN_CONFIDENCE)


def repeats_itself(sentence: str) -> bool:
    """Whether a clause of three words or more comes three times, or a word four times running: a model's loop."""
    words = [word.lower() for word in WORD.findall(sentence)]
    if any(len(set(words[at : at + 4])) == 1 for at in range(len(words) - 3)):
        return True
    clauses = [" ".join(WORD.findall(clause)).lower() for clause in re.split(r"[,;:]| and ", sentence)]
    long = [clause for clause in clauses if clause.count(" ") >= 2]
    runs = [" ".join(words[at : at + RUN_WORDS]) for at in range(len(words) - RUN_WORDS + 1)]
    return any(long.count(clause) >= 3 for clause in set(long)) or len(set(runs)) < len(runs)


def is_wrong_scale(sentence: str, place: Place) -> bool:
    """Whether a resolution is named that is not the tile's, or a length that the tile has no room for."""
    for match in RESOLUTION.finditer(sentence):
        claimed = _metres(match.group(1), match.group(2))
        if place.m_per_px is not None and not 1 / SCALE_TOLERANCE <= claimed / place.m_per_px <= SCALE_TOLERANCE:
            return True
    for match in LENGTH.finditer(sentence):
        claimed = _metres(match.group(1), match.group(2))
        if match.group(3) and place.m_per_px is not None:
            return not 1 / SCALE_TOLERANCE <= claimed / place.m_per_px <= SCALE_TOLERANCE
        if place.side_m is not None and claimed > SCALE_TOLERANCE * place.side_m:
            return True
    return False


def _metres(number: str, unit: str) -> float:
    value = float(number.replace(",", ""))
    return value * (1609.344 if unit.lower().startswith("mile") else 1000 if unit.lower().startswith("k") else 1)


def ends_whole(sentence: str) -> bool:
    """Whether a sentence has its closing mark."""
    return sentence.rstrip().rstrip(CLOSING_MARKS).endswith(tuple(SENTENCE_MARKS))
