"""Sentences are kept in order or rejected with a reason, and all of them are accounted for."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.captioners.refine import refine_captions, refine_sentences
from urbanclip_ray.config import RefineConfig
from urbanclip_ray.schema import CAPTIONS, PAIRS
from urbanclip_ray.storage import open_dataset, publish

DEFAULT = RefineConfig()


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("", "empty"),
        ("... !", "empty"),
        ("\x00\x07\x1b", "empty"),  # control characters are no words
        ("two words", "too short"),
        ("word " * 61, "too long"),
        ("word " * 20_000, "too long"),  # 100,000 characters
        ("A dense forest.", "repeated"),
        ("a  DENSE, forest", "repeated"),  # case, blanks and marks make no new sentence
    ],
)
def test_each_reason(sentence, reason):
    kept, rejected = refine_sentences(["A dense forest.", sentence, "Green and brown fields."], DEFAULT)
    assert kept == ["A dense forest.", "Green and brown fields."]
    assert rejected == [(sentence, reason)]


def test_the_limits_themselves_are_allowed_and_a_hyphen_joins_a_word():
    config = RefineConfig(min_words=2, max_words=3)
    kept, rejected = refine_sentences(["one two", "one two three", "built-up", "it's one-way here", "a b c d"], config)
    assert kept == ["one two", "one two three", "it's one-way here"]
    assert [reason for _, reason in rejected] == ["too short", "too long"]


def test_words_of_any_script_count():
    assert refine_sentences(["Много зелёных деревьев.", "many trees"], DEFAULT)[0] == ["Много зелёных деревьев."]


def test_repeats_can_be_kept():
    sentences = ["A dense forest.", "A dense forest."]
    assert refine_sentences(sentences, RefineConfig(repeats="keep")) == (sentences, [])


def test_a_rejected_sentence_does_not_make_a_later_one_a_repeat():
    assert refine_sentences(["a b", "a b"], DEFAULT)[1] == [("a b", "too short"), ("a b", "too short")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=8), st.sampled_from(["reject", "keep"]))
def test_every_sentence_is_kept_or_rejected_and_kept_ones_keep_their_order(sentences, repeats):
    kept, rejected = refine_sentences(sentences, RefineConfig(min_words=1, max_words=3, repeats=repeats))
    assert sorted(kept + [text for text, _ in rejected]) == sorted(sentences)
    places = iter(sentences)
    assert all(text in places for text in kept)  # a subsequence


def publish_captions(uri, files):
    with publish(uri, "captions", {}, {}) as publication:
        for number, rows in enumerate(files):
            full = [
                {"tile_id": tile_id, "caption_key": f"{number}{at}", "text": text, "model": "m", "prompt": "", "error": error}
                for at, (tile_id, text, error) in enumerate(rows)
            ]
            publication.write_table(pa.Table.from_pylist(full, schema=CAPTIONS), f"part-{number}.parquet")
    return open_dataset(uri)


def refine(captions, uri, config=DEFAULT):
    with publish(uri, "pairs", config.content(), {"captions": captions}) as publication:
        refine_captions(captions, config, publication)
    return open_dataset(uri)


def test_the_stage_gathers_a_tile_and_accounts_for_every_sentence(tmp_path, ray_cluster):
    captions = publish_captions(
        str(tmp_path / "captions"),
        [
            [("r/b", "A wide river. Short one.", None), ("r/a", "Many green trees.", None), ("r/b", "A wide river.", None)],
            [("r/x", None, "unreadable tile: zero bytes"), ("r/c", "", None), ("r/d", None, None)],
        ],
    )
    dataset = refine(captions, str(tmp_path / "pairs"))
    table = dataset.read()
    assert table.schema.equals(PAIRS)
    rows = {row["tile_id"]: row for row in table.to_pylist()}
    assert list(rows) == ["r/b", "r/a", "r/c", "r/d"]  # one without a caption was counted by the caption stage
    assert rows["r/b"]["texts"] == ["A wide river."]
    assert rows["r/b"]["rejected"] == [
        {"text": "Short one.", "reason": "too short"},
        {"text": "A wide river.", "reason": "repeated"},
    ]
    assert rows["r/c"] == {"tile_id": "r/c", "texts": [], "rejected": [{"text": "", "reason": "empty"}]}
    manifest = dataset.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("sentences", 6, 2)
    assert manifest.rejects == {"empty": 2, "repeated": 1, "too short": 1}
    assert manifest.facts == {"tiles": 4, "tiles_without_text": 2}


def test_a_tile_spread_over_two_files_is_not_refined_in_halves(tmp_path, ray_cluster):
    captions = publish_captions(str(tmp_path / "captions"), [[("r/a", "A wide river.", None)], [("r/a", "A lake.", None)]])
    with pytest.raises(AssertionError, match="spread over several files"):
        refine(captions, str(tmp_path / "pairs"))
