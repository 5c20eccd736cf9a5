"""The caption store: what is committed is found again by every run, in one form or another."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.store import CaptionStore, FailedTile, StoredCaption
from urbanclip_ray.schema import FAILED_CAPTIONS, STORED_CAPTIONS
from urbanclip_ray.storage import StorageError

ORIGIN = Origin("model", "1", "prompt", {"max_new_tokens": 8})


def hashes(*names: str) -> pa.Array:
    return pa.array(names, pa.string())


@pytest.fixture
def store(tmp_path) -> CaptionStore:
    return CaptionStore(str(tmp_path), ORIGIN)


def test_a_store_that_is_not_there_yet_has_nothing(store):
    assert not store.samples_of(hashes("a", "b"), 2).any()
    assert store.texts_of(hashes("a"), 2).to_pylist() == [None, None]
    assert store.read_group("x") == {}
    assert store.read_failed().num_rows == 0


def test_texts_are_found_by_tile_and_sample_over_all_files(store):
    store.add("j-1", [StoredCaption("a", 0, "A road."), StoredCaption("a", 1, "A path.")])
    store.add("j-2", [StoredCaption("c", 1, "A lake."), StoredCaption("b", 0, "")])
    store.add("j-3", [])
    assert store.samples_of(hashes("c", "a", "x", "b"), 2).tolist() == [[False, True], [True, True], [False] * 2, [True, False]]
    assert store.samples_of(hashes("c", "a"), 1).tolist() == [[False], [True]]
    assert store.texts_of(hashes("c", "a", "b"), 2).to_pylist() == [None, "A lake.", "A road.", "A path.", "", None]
    assert store.read_group("j-1") == {"a": ["A road.", "A path."]}
    assert len(store.folder.parts()) == 2  # nothing to say is no file


def test_more_files_than_are_read_at_a_time(store, monkeypatch):
    monkeypatch.setattr("urbanclip_ray.captioners.store.PARTS_PER_READ", 3)
    for number in range(10):
        store.add(f"j-{number}", [StoredCaption(f"t{number}", 0, f"text {number}")])
    names = [f"t{number}" for number in range(10)]
    assert store.texts_of(hashes(*names), 1).to_pylist() == [f"text {number}" for number in range(10)]


def test_the_first_text_of_a_key_stands(store):
    store.add("z-first", [StoredCaption("a", 0, "first")])
    store.add("a-second", [StoredCaption("a", 0, "second"), StoredCaption("a", 1, "other")])
    assert store.texts_of(hashes("a"), 2).to_pylist() == ["first", "other"]


def test_a_file_that_is_replaced_while_it_is_read_is_read_in_its_new_form(store, tmp_path):
    for number in range(3):
        store.add(f"j-{number}", [StoredCaption(f"t{number}", 0, f"text {number}")])
    folder = store.folder
    listed = folder.parts()

    def replaced():
        listings = iter([listed])

        def parts():
            known = next(listings, None)
            if known is not None:  # between this listing and the reading, two files become one
                store.add("compact-x", [StoredCaption(f"t{number}", 0, f"text {number}") for number in (0, 1)])
                for number in (0, 1):
                    (Path(folder.uri) / f"j-{number}.parquet").unlink()
                return known
            return type(folder).parts(folder)

        return parts

    folder.parts = replaced()
    assert store.samples_of(hashes("t0", "t1", "t2"), 1).all()


@pytest.mark.parametrize(
    "change", [{"model": "m"}, {"revision": "2"}, {"prompt": "p"}, {"decoding": {"max_new_tokens": 9}}], ids=str
)
def test_another_origin_has_captions_of_its_own(store, tmp_path, change):
    store.add("j-1", [StoredCaption("a", 0, "A road.")])
    other = CaptionStore(str(tmp_path), ORIGIN._replace(**change))
    assert not other.samples_of(hashes("a"), 1).any()


def test_rows_say_what_made_them(store, tmp_path):
    store.add("j-1", [StoredCaption("ab", 0, "A road.")])
    (path,) = tmp_path.rglob("*.parquet")
    table = pq.read_table(path)
    assert table.schema.equals(STORED_CAPTIONS)
    assert table.to_pylist() == [
        {
            "caption_key": ORIGIN.key("ab", 0),
            "text": "A road.",
            "sha256": "ab",
            "sample": 0,
            "model": "model",
            "revision": "1",
            "prompt": "prompt",
            "decoding": '{"max_new_tokens": 8}',
        }
    ]


def test_leftovers_of_a_killed_writer_are_not_read_and_a_damaged_file_is_named(store, tmp_path):
    store.add("j-1", [StoredCaption("a", 0, "A road.")])
    (path,) = tmp_path.rglob("*.parquet")
    Path(f"{path}.0123.tmp").write_bytes(b"half")
    assert store.samples_of(hashes("a"), 1).all()
    path.write_bytes(b"half")
    with pytest.raises(StorageError, match=f"{path.name} is damaged .*: delete it"):
        store.samples_of(hashes("a"), 1)


def test_the_last_reason_of_a_failed_tile_is_kept_with_all_its_attempts(store):
    store.add_failed("j-1", [FailedTile("a", "r/1", "no memory", 3), FailedTile("b", "r/2", "too long", 1)])
    store.add_failed("k-1", [FailedTile("a", "s/1", "died", 2)])
    rows = {row["sha256"]: row for row in store.read_failed().to_pylist()}
    assert set(rows) == {"a", "b"}
    assert (rows["a"]["tile_id"], rows["a"]["reason"], rows["a"]["num_attempts"]) == ("s/1", "died", 5)
    assert (rows["b"]["reason"], rows["b"]["num_attempts"]) == ("too long", 1)
    assert rows["a"]["failed_at"] > rows["b"]["failed_at"]
    raw = pq.read_table(Path(store.failed_folder.uri) / "j-1.parquet")
    assert raw.schema.equals(FAILED_CAPTIONS)


def test_attempts_are_remembered_until_the_job_forgets_them(store):
    assert store.count_attempts("j", "x") == 0
    store.note_attempt("j", "x", 2)
    assert store.count_attempts("j", "x") == 2
    assert store.count_attempts("k", "x") == 0
    store.forget_attempts("j")
    store.forget_attempts("never")
    assert store.count_attempts("j", "x") == 0
