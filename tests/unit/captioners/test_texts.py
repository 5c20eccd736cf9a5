"""Foreign text is cleaned where it enters; nothing of it is cut."""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.captioners.texts import MAX_CHARACTERS, Cleaned, TooLongError, clean_text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A road.\n", "A road."),
        ("A\x00 ro\x1b[31mad\x7f\x9b.", "A ro[31mad."),
        ("lines\nand\ttabs stay", "lines\nand\ttabs stay"),
        ("\u202egnp.exe\u202c \u2066x\u2069 \u200f\u061c", "gnp.exe x"),
        ("in\u200bvisible\ufeff \U000e0041\U000e007f", "invisible"),
        ("half \ud83d of a character", "half  of a character"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),  # words: pages escape them
        ("Straße, 道路, عربى, 👩‍🌾, n\u0303, \ufffd", "Straße, 道路, عربى, 👩‍🌾, n\u0303, \ufffd"),
        ("", ""),
    ],
)
def test_what_stays_and_what_goes(text, clean):
    assert clean_text(text) == clean


@settings(deadline=None)  # the first example loads pyarrow
@given(st.text(st.characters(exclude_categories=[])))
def test_a_clean_text_can_be_stored_and_has_no_control_characters(text):
    clean = clean_text(text)
    assert pa.array([clean]).to_pylist() == [clean]
    assert not any(unicodedata.category(character) == "Cc" and character not in "\t\n\r" for character in clean)
    assert clean_text(clean) == clean


def test_a_text_that_is_too_long_is_an_error_and_not_cut():
    assert clean_text("x" * MAX_CHARACTERS + "\x00 ") == "x" * MAX_CHARACTERS
    with pytest.raises(TooLongError, match="text too long: 100,000 characters, and 20,000 are allowed"):
        clean_text("x" * 100_000)


def test_a_captioner_s_texts_are_clean_and_its_errors_stay():
    class Captioner:
        def describe(self, tiles):
            return [["a\x00", "b"], LookupError("none"), ["c", "d" * 100_000]]

    clean, error, long = Cleaned(Captioner()).describe([])
    assert clean == ["a", "b"]
    assert isinstance(error, LookupError)
    assert isinstance(long, TooLongError)
