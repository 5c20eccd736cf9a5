"""Datasets on `gs://`, against fake-gcs-server, which speaks Google's protocol; Google itself has not been asked yet."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from google_server import google_server

from urbanclip_ray import google_storage
from urbanclip_ray.config import StoreConfig
from urbanclip_ray.filesystems import STORES_VARIABLE, check_access, resolve, use_stores
from urbanclip_ray.preflight import probe_storage
from urbanclip_ray.storage import (
    MissingDatasetError,
    StorageError,
    create_exclusively,
    delete_folder,
    exists,
    find_dataset,
    list_files,
    list_folders,
    open_dataset,
    open_file,
    publish,
    read_bytes,
    write_bytes,
)
from urbanclip_ray.train.checkpoint_files import list_checkpoints

ROWS = pa.table({"tile_id": ["a", "b"], "value": [1.0, 2.0]})


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server with one bucket, `tiles`."""
    with google_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _stores(server, monkeypatch) -> None:
    monkeypatch.setenv(STORES_VARIABLE, "[]")
    use_stores([StoreConfig(root="gs://", endpoint=server, anonymous=True)])


def test_a_dataset_is_published_and_read_and_exists_by_its_manifest_alone():
    uri = "gs://tiles/runs/first"
    with pytest.raises(MissingDatasetError, match="gs://tiles/runs/first has no manifest"):
        open_dataset(uri)
    with publish(uri, "tiles", {"a": 1}, {}) as publication:
        publication.write_table(ROWS)
        publication.write_file("notes.txt", b"of it")
        publication.count(unit="tiles", rows_in=2, rows_out=2, rejects={})
        assert find_dataset(uri) is None
    dataset = open_dataset(uri)
    assert dataset.read().equals(ROWS)
    assert read_bytes(dataset.file_uri("notes.txt")) == b"of it"
    assert [entry.num_bytes for entry in dataset.manifest.files if entry.path.endswith("notes.txt")] == [5]
    assert list_folders("gs://tiles/runs") == ["first"]


def test_folders_are_seen_for_which_no_object_was_made():
    write_bytes("gs://tiles/bare/deep/folder/file", b"1")
    write_bytes("gs://tiles/bare/file", b"22")
    assert list_folders("gs://tiles/bare") == ["deep"]
    assert [(info.base_name, info.size) for info in list_files("gs://tiles/bare", recursive=False)] == [("file", 2)]
    assert [info.path for info in list_files("gs://tiles/bare")] == ["tiles/bare/deep/folder/file", "tiles/bare/file"]
    delete_folder("gs://tiles/bare")
    assert not exists("gs://tiles/bare/file")


def test_a_training_finds_its_checkpoints_newest_first():
    for step in (1, 12, 7):
        write_bytes(f"gs://tiles/checkpoints/step-{step:08d}-0000000a/commit.json", b"{}")
    assert [uri.rsplit("/", 1)[1][:13] for uri in list_checkpoints("gs://tiles/checkpoints")] == [
        "step-00000012",
        "step-00000007",
        "step-00000001",
    ]


def test_a_failed_stage_leaves_no_file():
    uri = "gs://tiles/runs/failed"
    with pytest.raises(AssertionError, match="2 tiles in"), publish(uri, "tiles", {}, {}) as publication:  # noqa: PT012 the end of the block raises
        publication.write_table(ROWS)
        publication.count(unit="tiles", rows_in=2, rows_out=1, rejects={})
    assert not exists(uri) or list_files(uri) == []


def test_of_racing_writers_one_wins_and_all_read_what_it_wrote():
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda number: create_exclusively("gs://tiles/race", f"writer {number}".encode()), range(6)))
    assert won.count(True) == 1
    assert read_bytes("gs://tiles/race") == f"writer {won.index(True)}".encode()


def test_the_second_of_two_runs_keeps_the_first_ones_dataset():
    uri = "gs://tiles/runs/twice"
    for attempt in ("first", "second"):
        with publish(uri, "tiles", {}, {}) as publication:
            publication.write_file("part", attempt.encode())
            publication.facts["attempt"] = attempt
    assert open_dataset(uri).manifest.facts == {"attempt": "first"}
    assert len(list_files(uri)) == 2  # the manifest and the first one's part


def test_a_storage_is_probed_as_a_stage_uses_it_and_left_empty():
    probe_storage("gs://tiles/probed")
    assert not exists("gs://tiles/probed") or list_files("gs://tiles/probed") == []


def test_a_range_of_a_large_file_is_read_without_the_rest():
    data = bytes(range(256)) * 40_000  # 10 MB: Google takes it in several pieces
    write_bytes("gs://tiles/large", data)
    with open_file("gs://tiles/large") as file:
        assert file.size() == len(data)
        assert file.read_at(300, 5_000_000) == data[5_000_000:5_000_300]


def test_what_is_missing_is_said_by_name():
    with pytest.raises(FileNotFoundError):
        read_bytes("gs://tiles/nothing")
    with pytest.raises(StorageError, match=r"gs://nobodys/x: there is no such bucket: create it, or correct its name"):
        check_access("gs://nobodys/x")
    check_access("gs://tiles/x")


def test_a_server_that_is_away_is_said_with_the_fix(monkeypatch):
    monkeypatch.setattr(google_storage, "CHECK_S", 1)
    use_stores([StoreConfig(root="gs://", endpoint="http://127.0.0.1:9", anonymous=True)])
    with pytest.raises(StorageError, match=r"gs://tiles/x: Google's storage cannot be reached: correct its store's endpoint"):
        check_access("gs://tiles/x")


def test_without_credentials_the_ways_to_give_some_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    use_stores(())
    google_storage.open_client.cache_clear()
    with pytest.raises(StorageError, match="no Google credentials: run on a machine with a service account, set GOOGLE_APPL"):
        check_access("gs://tiles/x")


def test_a_pickled_filesystem_reads_the_same_server():
    write_bytes("gs://tiles/pickled", b"here")
    filesystem, path = resolve("gs://tiles/pickled")
    with pickle.loads(pickle.dumps(filesystem)).open_input_stream(path) as stream:
        assert stream.read() == b"here"
