"""Which tiles a store lacks, and the rows of captions that are read off it; no Ray, no pixels."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray.captioners import projection
from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.missing import Asked, Questions, find_missing
from urbanclip_ray.captioners.projection import Described, project
from urbanclip_ray.captioners.store import CaptionStore, StoredCaption
from urbanclip_ray.schema import CAPTIONS
from urbanclip_ray.storage import StorageError

ORIGIN = Origin("model", "1", "prompt", {})
INDEX = pa.table(
    {
        "tile_id": ["r/0", "r/1", "r/2", "r/3", "r/4", "r/copy"],
        "sha256": ["h0", "h1", None, "h3", "h4", "h1"],
        "error": pa.array([None, None, "zero bytes", None, None, None], pa.string()),
    }
)


@pytest.fixture
def store(tmp_path) -> CaptionStore:
    store = CaptionStore(str(tmp_path), ORIGIN)
    store.add("j-1", [StoredCaption("h1", sample, f"text {sample} of h1") for sample in (0, 1)])
    store.add("j-2", [StoredCaption("h3", 0, "text 0 of h3"), StoredCaption("other", 0, "of no tile here")])
    return store


def rows_of(store, errors, given=None, num_samples=1) -> list[dict]:
    tables = list(project(INDEX, [Described(store, num_samples, errors)], given or {}))
    assert all(table.schema.equals(CAPTIONS) for table in tables)
    return pa.concat_tables(tables).to_pylist()


def test_missing_are_readable_tiles_without_all_their_texts_each_once(store):
    one, two = find_missing(store, INDEX, 1), find_missing(store, INDEX, 2)
    assert sorted(one.missing_tile_ids().to_pylist()) == ["r/0", "r/4"]
    assert sorted(two.missing_tile_ids().to_pylist()) == ["r/0", "r/3", "r/4"]
    assert (len(one.hashes), one.num_missing, two.num_missing) == (4, 2, 3)
    assert (one.num_stored_captions, two.num_stored_captions) == (3, 4)  # the copy has rows of its own


def test_tiles_that_the_source_describes_are_not_missing(store):
    found = find_missing(store, INDEX, 1, given=["r/0", "r/1"])
    assert found.missing_tile_ids().to_pylist() == ["r/4"]
    assert sorted(found.tile_ids.to_pylist()) == ["r/3", "r/4", "r/copy"]


def test_without_a_store_everything_is_missing():
    assert find_missing(None, INDEX, 2).num_missing == 4


def test_rows_lie_in_the_order_of_the_tiles_with_texts_or_errors(store):
    rows = rows_of(store, {"h0": "too long", "h4": "died"})
    assert [row["tile_id"] for row in rows] == INDEX["tile_id"].to_pylist()
    assert [row["text"] for row in rows] == [None, "text 0 of h1", None, "text 0 of h3", None, "text 0 of h1"]
    assert [row["error"] for row in rows] == ["too long", None, "unreadable tile: zero bytes", None, "died", None]
    assert rows[1]["caption_key"] == rows[5]["caption_key"] == ORIGIN.key("h1", 0)
    assert rows[2]["caption_key"] == ORIGIN.key("r/2", 0)
    assert {(row["model"], row["prompt"]) for row in rows} == {("model", "prompt")}


def test_samples_of_a_tile_are_rows_one_after_another(store):
    errors = dict.fromkeys(["h0", "h3", "h4"], "no")
    rows = [row for row in rows_of(store, errors, num_samples=2) if row["tile_id"] == "r/1"]
    assert [row["text"] for row in rows] == ["text 0 of h1", "text 1 of h1"]
    assert len({row["caption_key"] for row in rows}) == 2


def test_what_the_source_gives_comes_before_what_is_stored_and_never_for_an_unreadable_tile(store):
    rows = rows_of(store, {"h0": "no", "h4": "no"}, given={"r/1": ["First.", "Second."], "r/2": ["Unseen."]})
    given = [row for row in rows if row["model"] == "given"]
    assert [(row["tile_id"], row["text"]) for row in given] == [("r/1", "First."), ("r/1", "Second.")]
    assert next(row for row in rows if row["tile_id"] == "r/2")["text"] is None


def test_passes_and_files_do_not_change_the_rows(store, monkeypatch):
    errors = {"h0": "no", "h4": "no"}
    whole = rows_of(store, errors)
    monkeypatch.setattr(projection, "TILES_PER_PASS", 4)
    monkeypatch.setattr(projection, "TILES_PER_FILE", 3)
    assert rows_of(store, errors) == whole
    assert len(list(project(INDEX, [Described(store, 1, errors)], {}))) == 3


def test_no_tiles_are_no_rows_in_one_table(store):
    (table,) = project(INDEX.slice(0, 0), [Described(store, 1, {})], {})
    assert (table.num_rows, table.schema) == (0, CAPTIONS)


def test_several_origins_have_rows_each(store, tmp_path):
    other = CaptionStore(str(tmp_path), ORIGIN._replace(prompt="another"))
    other.add("j-1", [StoredCaption(name, 0, f"other text of {name}") for name in ("h0", "h1", "h3", "h4")])
    errors = {"h0": "no", "h4": "no"}
    rows = pa.concat_tables(project(INDEX, [Described(store, 1, errors), Described(other, 1, {})], {})).to_pylist()
    assert [(row["prompt"], row["text"]) for row in rows if row["tile_id"] == "r/1"] == [
        ("prompt", "text 0 of h1"),
        ("another", "other text of h1"),
    ]


def test_every_tile_has_rows_of_its_own_prompts_in_order_and_an_unreadable_one_has_one_row(store, tmp_path, monkeypatch):
    other = CaptionStore(str(tmp_path), ORIGIN._replace(prompt="another"))
    other.add("j-1", [StoredCaption(name, 0, f"other text of {name}") for name in ("h0", "h1")])
    refused = CaptionStore(str(tmp_path), ORIGIN._replace(prompt="in {city}?"))
    described = [Described(store, 1, {}), Described(other, 1, {}), Described(refused, 1, {"h0": "no city", "h4": "no city"})]
    places = np.array([[1, 2], [0, 1], [0, 2], [0, 0], [2, 2], [1, 0]])

    def project_all() -> list[dict]:
        return pa.concat_tables(project(INDEX, described, {}, places)).to_pylist()

    rows = project_all()
    assert [(row["tile_id"], row["prompt"], row["text"] or row["error"]) for row in rows] == [
        ("r/0", "another", "other text of h0"),
        ("r/0", "in {city}?", "no city"),
        ("r/1", "prompt", "text 0 of h1"),
        ("r/1", "another", "other text of h1"),
        ("r/2", "prompt", "unreadable tile: zero bytes"),
        ("r/3", "prompt", "text 0 of h3"),  # both of its templates read the same
        ("r/4", "in {city}?", "no city"),
        ("r/copy", "another", "other text of h1"),
        ("r/copy", "prompt", "text 0 of h1"),
    ]
    monkeypatch.setattr(projection, "TILES_PER_PASS", 4)  # two tiles, with two prompts each
    assert project_all() == rows


def test_what_is_wanted_are_missing_tiles_each_once_with_the_prompts_that_lack_a_text(store, tmp_path):
    other = CaptionStore(str(tmp_path), ORIGIN._replace(prompt="another"))
    asked = [
        Asked("prompt", store, find_missing(store, INDEX, 1)),
        Asked("another", other, find_missing(other, INDEX.slice(3), 1)),
        Asked("in {city}?", other, find_missing(None, INDEX, 1), reason="no city"),
        Asked("stored", store, find_missing(store, INDEX.slice(1, 1), 1)),
    ]
    questions = Questions(INDEX, asked, np.zeros((6, 1), int))
    assert [each.prompt for each in questions.to_do()] == ["prompt", "another"]
    rows = INDEX.select(["tile_id"]).append_column("image", pa.array([b"x"] * 6))
    assert {row["tile_id"]: row["prompts"] for row in questions.wanted().choose(rows).to_pylist()} == {
        "r/0": ["prompt"],
        "r/3": ["another"],
        "r/4": ["prompt", "another"],
        "r/copy": ["another"],  # it is the first with these bytes that is asked this
    }
    nothing = Questions(INDEX, asked[3:], np.zeros((6, 1), int)).wanted()
    assert (nothing.choose(rows).num_rows, nothing.choose(rows).schema.names) == (0, ["tile_id", "image", "prompts"])


def test_a_text_that_is_gone_without_an_error_is_said(store):
    with pytest.raises(StorageError, match="has lost the text of r/0: run the same command again"):
        rows_of(store, {"h4": "no"})
