"""Sentences are kept in order or rejected with a reason, and all of them are accounted for."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.captioners.refine import CONFIG_ALONE, RefineWork, place_of, refine_captions, refine_sentences
from urbanclip_ray.captioners.rules import Rules, load_rules
from urbanclip_ray.captioners.sentence_checks import Place
from urbanclip_ray.config import RefineConfig
from urbanclip_ray.schema import CAPTIONS, PAIRS, TILES
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


def refine(captions, uri, config=DEFAULT, work=CONFIG_ALONE):
    with publish(uri, "pairs", config.content(), {"captions": captions}) as publication:
        refine_captions(captions, config, publication, work)
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


def test_what_is_not_switched_on_takes_no_part_in_digests():
    assert RefineConfig().content() == {"min_words": 3, "max_words": 60, "repeats": "reject"}
    assert RefineConfig(rules_file="elsewhere.yaml").content() == RefineConfig().content()
    changed = {"rules": ("mood",), "language": "fr", "max_tiles_per_sentence": 5}
    for key, value in changed.items():
        assert RefineConfig(**{key: value}).content() != RefineConfig().content()
    scored = [RefineConfig(consistency={"weights": uri}).content() for uri in ("here", "there")]
    assert scored[0] == scored[1]
    assert scored[0] != RefineConfig(consistency={"weights": "here", "top_share": 0.5}).content()


def test_near_duplicates_need_a_limit_to_count_for():
    with pytest.raises(ValueError, match=r"refine\.max_tiles_per_sentence: set that, too"):
        RefineConfig(near_duplicates=0.7)


def test_rules_hold_each_sentence_against_its_own_tile(tmp_path, ray_cluster):
    text = "A wide river near many houses. There are several cars near the houses. A dense part of Shanghai with trees."
    captions = publish_captions(str(tmp_path / "captions"), [[("r/far", text, None)], [("r/near", text, None)]])
    coarse = {"tile_id": "r/far", "lon": 116.4, "lat": 39.9, "west": 116.395, "east": 116.405, "width": 256}
    fine = {"tile_id": "r/near", "lon": 121.4, "lat": 31.2, "west": 121.3999, "east": 121.4001, "width": 256}
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        rows = [tile | {"region": "r", "scheme": "none"} for tile in (coarse, fine)]
        publication.write_table(pa.Table.from_pylist(rows, schema=TILES))
    work = RefineWork(open_dataset(str(tmp_path / "tiles")), Rules(load_rules(""), ("all",), "en"))
    dataset = refine(captions, str(tmp_path / "pairs"), RefineConfig(rules=("all",)), work)
    rows = {row["tile_id"]: row for row in dataset.read().to_pylist()}
    assert rows["r/near"]["rejected"] == []
    assert [item["reason"] for item in rows["r/far"]["rejected"]] == ["too small to be seen", "another place"]
    assert dataset.manifest.rejects == {"another place": 1, "too small to be seen": 1}


def test_a_tile_s_scale_follows_from_its_footprint():
    tile = {"tile_id": "r/a", "region": "r", "lon": 0.0, "lat": 60.0, "west": -0.005, "east": 0.005, "width": 100}
    place = place_of(tile)
    assert place.side_m == pytest.approx(558, abs=1)  # half of a hundredth of a degree on the equator
    assert place.m_per_px == pytest.approx(5.58, abs=0.01)
    assert place_of(tile | {"west": None}) == Place("r", 0.0, 60.0)


@pytest.mark.parametrize("order", [1, -1])
def test_a_sentence_of_too_many_tiles_is_rejected_in_all_of_them(tmp_path, ray_cluster, order):
    tiles = [(f"r/{at}", f"A large city with houses. The tile number {at} is here.", None) for at in range(6)][::order]
    captions = publish_captions(str(tmp_path / "captions"), [tiles[:2], tiles[2:]])
    dataset = refine(captions, str(tmp_path / "five"), RefineConfig(max_tiles_per_sentence=5))
    assert dataset.manifest.rejects == {"in too many tiles": 6}
    assert sorted(row["texts"] for row in dataset.read().to_pylist()) == [[f"The tile number {at} is here."] for at in range(6)]
    assert dataset.manifest.facts["sentences_in_too_many_tiles"] == 1
    assert refine(captions, str(tmp_path / "six"), RefineConfig(max_tiles_per_sentence=6)).manifest.rejects == {}
    near = RefineConfig(max_tiles_per_sentence=5, near_duplicates=0.3)
    assert refine(captions, str(tmp_path / "near"), near).manifest.rejects == {"in too many tiles": 12}
