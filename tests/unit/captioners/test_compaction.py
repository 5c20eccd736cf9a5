"""Upkeep of the caption store: fewer files, the same captions, and nothing is lost wherever it is cut off."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from urbanclip_ray.captioners import compaction
from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.compaction import compact, find_leftovers, remove
from urbanclip_ray.captioners.store import CaptionStore, FailedTile, StoredCaption
from urbanclip_ray.storage import StorageError

ORIGIN = Origin("model", "1", "prompt", {"max_new_tokens": 8})
NUM_FILES, TILES_PER_FILE = 10, 3
NAMES = pa.array([f"t{number}" for number in range(NUM_FILES * TILES_PER_FILE)])
TEXTS = [f"text {name}" for name in NAMES.to_pylist()]


@pytest.fixture
def store(tmp_path) -> CaptionStore:
    store = CaptionStore(str(tmp_path), ORIGIN)
    for number in range(NUM_FILES):
        names = NAMES.to_pylist()[number * TILES_PER_FILE : (number + 1) * TILES_PER_FILE]
        store.add(f"j-{number}", [StoredCaption(name, 0, f"text {name}") for name in names])
    return store


def texts(store: CaptionStore) -> list[str | None]:
    return store.texts_of(NAMES, 1).to_pylist()


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_many_files_become_few_with_the_same_captions(store):
    written = list(compact(store.folder, rows_per_part=12))
    parts = store.folder.parts()
    assert sorted(part.name for part in parts) == sorted(written)
    assert len(parts) == 3  # 12, 12 and 6 rows
    assert texts(store) == TEXTS


def test_a_second_compaction_leaves_full_files_alone_and_takes_the_new_ones(store):
    list(compact(store.folder, rows_per_part=30))
    assert list(compact(store.folder, rows_per_part=30)) == []
    store.add("k-1", [StoredCaption("new", 0, "n")])
    store.add("k-2", [StoredCaption("newer", 0, "m")])
    assert len(list(compact(store.folder, rows_per_part=30))) == 1
    assert len(store.folder.parts()) == 2
    assert texts(store) == TEXTS
    assert store.texts_of(pa.array(["newer", "new"]), 1).to_pylist() == ["m", "n"]


def test_of_several_texts_of_one_key_the_first_is_kept(store):
    store.add("k-1", [StoredCaption("t0", 0, "a later text"), StoredCaption("t0", 1, "another sample")])
    list(compact(store.folder))
    assert texts(store) == TEXTS
    table = store.folder.read_part(store.folder.parts()[0].name)
    assert table.num_rows == len(TEXTS) + 1


@pytest.mark.parametrize("num_deleted", [0, 1, NUM_FILES - 1])
def test_a_compaction_that_is_killed_while_it_deletes_loses_nothing_and_its_leftovers_are_found(
    store, tmp_path, monkeypatch, num_deleted
):
    deleted = []

    def delete_some(uri: str) -> None:
        if len(deleted) == num_deleted:
            raise KeyboardInterrupt
        deleted.append(uri)
        Path(uri).unlink()

    monkeypatch.setattr(compaction, "delete_file", delete_some)
    with pytest.raises(KeyboardInterrupt):
        list(compact(store.folder))
    monkeypatch.undo()
    assert texts(store) == TEXTS
    leftovers = list(find_leftovers(str(tmp_path)))
    assert len(leftovers) == NUM_FILES - num_deleted
    assert all("its captions are in compact-" in leftover.reason for leftover in leftovers)
    for leftover in leftovers:
        remove(leftover)
    assert len(store.folder.parts()) == 1
    assert texts(store) == TEXTS


def test_a_compaction_that_is_killed_before_its_file_is_whole_changes_nothing(store, monkeypatch):
    before = store.folder.parts()

    def fail(name, table):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.folder, "write_part", fail)
    with pytest.raises(KeyboardInterrupt):
        list(compact(store.folder))
    assert store.folder.parts() == before


def test_a_file_that_reads_back_otherwise_stops_it_and_nothing_is_deleted(store, monkeypatch):
    write = store.folder.write_part
    monkeypatch.setattr(store.folder, "write_part", lambda name, table: write(name, table.slice(1)))
    with pytest.raises(StorageError, match=r"compact-\w+\.parquet is not what was written.*nothing was deleted"):
        list(compact(store.folder))
    assert len([part for part in store.folder.parts() if not part.is_compacted]) == NUM_FILES


def test_readers_and_writers_go_on_beside_compactions(store):
    stop, lost, others = threading.Event(), [], CaptionStore(store.folder.uri.rsplit("/", 1)[0], ORIGIN)

    def read() -> None:
        while not stop.is_set():
            if texts(others) != TEXTS:
                lost.append("a reader missed captions")

    def write() -> None:
        for number in range(40):
            others.add(f"w-{number}", [StoredCaption(f"w{number}", 0, f"written {number}")])

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    while threads[1].is_alive():
        list(compact(store.folder, rows_per_part=16))
    stop.set()
    for thread in threads:
        thread.join()
    assert lost == []
    names = pa.array([f"w{number}" for number in range(40)])
    assert store.texts_of(names, 1).to_pylist() == [f"written {number}" for number in range(40)]


def test_two_compactions_at_once_lose_nothing(store):
    threads = [threading.Thread(target=lambda size=size: list(compact(store.folder, size))) for size in (7, 12, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts(store) == TEXTS


def test_damaged_files_are_named_and_stay_and_stop_a_compaction(store, tmp_path):
    bad = Path(store.folder.uri) / "j-5.parquet"
    bad.write_bytes(b"half")
    (leftover,) = find_leftovers(str(tmp_path))
    assert (leftover.uri, leftover.is_damaged) == (str(bad), True)
    with pytest.raises(AssertionError):
        remove(leftover)
    with pytest.raises(StorageError, match=r"j-5\.parquet is damaged"):
        list(compact(store.folder))
    assert len(store.folder.parts()) == NUM_FILES


def test_half_files_and_notes_of_dead_jobs_are_found_when_they_are_old_enough_and_failures_when_they_are_described(
    store, tmp_path
):
    half = Path(store.folder.uri) / "j-77.parquet.0123.tmp"
    half.write_bytes(b"half")
    store.note_attempt("dead", "x", 1)
    store.note_attempt("alive", "x", 1)
    store.add_failed("j-1", [FailedTile("t1", "r/1", "no memory", 3)])
    store.add_failed("j-2", [FailedTile("t2", "r/2", "no memory", 3), FailedTile("never", "r/3", "too long", 1)])
    failed = Path(store.failed_folder.uri)
    assert [leftover.uri for leftover in find_leftovers(str(tmp_path))] == [str(failed / "j-1.parquet")]
    age(half, 2 * compaction.TEMPORARY_AFTER_S)
    age(Path(store.folder.uri) / "attempts" / "dead" / "x", 2 * compaction.ATTEMPTS_AFTER_S)
    leftovers = list(find_leftovers(str(tmp_path)))
    assert {Path(leftover.uri).name for leftover in leftovers} == {half.name, "j-1.parquet", "dead"}
    for leftover in leftovers:
        remove(leftover)
    assert list(find_leftovers(str(tmp_path))) == []
    assert store.count_attempts("alive", "x") == 1
    assert store.read_failed().num_rows == 2
    assert texts(store) == TEXTS
