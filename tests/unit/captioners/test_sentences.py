"""Descriptions are split where sentences end, and nowhere else."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.captioners.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["A road.", "Two houses!", "Is it a lake?"],
        ["About 3.5 km of road.", "4 lanes."],
        ["It covers approx. 3.5 km of road.", "Trees line it."],
        ["There are features, e.g. Roads and canals.", "A lake lies north."],
        ["It has many houses, i.e. homes of people.", "They are small."],
        ["The church of St. Mary stands there.", "It is old."],
        ["House No. 5 is red.", "It is big."],
        ["It lies near Mt. Fuji.", "Snow covers it."],
        ["The U.S. Embassy is near.", "Roads lead to it."],
        ["The area is ca. 100 m wide.", "Houses fill it."],
        ["The area (approx. 5 km. wide) is green.", "Trees grow."],
        ["See Fig. 3 for detail.", "It shows roads."],
        ["The block has shops, offices, etc.", "The street is busy."],
        ["Buildings, roads, etc. are visible."],
        ["A long road...", "Then a river."],
        ["A road... and a river."],
        ['He said "It is a lake."', "Then he left."],
        ["It is “a lake.”", "Then it ends."],
        ["A park (with trees.)", "A road follows."],
        ["A road [see left.]", "A lake."],
        ["Élan is high.", "Über alles."],
        ["many blanks and lines"],
        ["e.g. a lake . and trees"],
        [""],
        ["... !"],
    ],
    ids=" | ".join,
)
def test_a_description_is_split_into_sentences(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_a_stop_without_a_blank_ends_a_sentence_as_released_captions_have_it():
    text = "It is near a river, which adds to its charm.A train track runs through it.\n\n  It is long. "
    assert split_sentences(text) == [
        "It is near a river, which adds to its charm.",
        "A train track runs through it.",
        "It is long.",
    ]


@settings(deadline=None)
@given(st.text("ab.AB!? ()\"'…5\n", max_size=60) | st.text(max_size=60))
def test_nothing_is_lost(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert sentences == [""] or all(sentence == sentence.strip() != "" for sentence in sentences)


@pytest.mark.parametrize("piece", ["... ", "(", "e.g. ", "x.)", "A.B. ", '"', "a. "])
def test_a_hostile_text_takes_seconds_at_most(piece):
    start = time.process_time()
    split_sentences(piece * (20_000 // len(piece)))
    assert time.process_time() - start < 10
