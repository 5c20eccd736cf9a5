"""What captioners say is foreign text: it is cleaned once, where it enters, whoever said it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from urbanclip_ray.captioners.base import Captioner, Tile

MAX_CHARACTERS = 20_000  # of one text: ten pages; more is a loop of a model, or an attack
# Control characters, marks that turn the reading direction or cannot be seen, tags (invisible instructions), halves of
# characters (no UTF-8 can hold them). A tab and a line's end are blanks.
UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff\U000e0000-\U000e007f\ud800-\udfff]"
)


class TooLongError(ValueError):
    """A text with more than `MAX_CHARACTERS`."""

    def __init__(self, num_characters: int) -> None:
        super().__init__(f"text too long: {num_characters:,} characters, and {MAX_CHARACTERS:,} are allowed")


def clean_text(text: str) -> str:
    """The text as it may be kept and shown: unwanted characters left out, no blanks at its ends.

    Markup stays what it is, words: whoever makes a page of it escapes it. Raises TooLongError: a text is never cut.
    """
    clean = UNWANTED.sub("", text).strip()
    if len(clean) > MAX_CHARACTERS:
        raise TooLongError(len(clean))
    return clean


class Cleaned:
    """A captioner whose texts are clean; a tile with one that is too long has that error."""

    def __init__(self, captioner: Captioner) -> None:
        self._captioner = captioner

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        return [texts if isinstance(texts, Exception) else clean_texts(texts) for texts in self._captioner.describe(tiles)]


def clean_texts(texts: list[str]) -> list[str] | TooLongError:
    try:
        return [clean_text(text) for text in texts]
    except TooLongError as error:
        return error
