"""Datasets exist by their manifest, which is written last and once: on a local disk, a full one, and S3."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pyarrow as pa
import pytest
import ray.data

from urbanclip_ray import dataflow, storage
from urbanclip_ray.storage import (
    MANIFEST,
    Dataset,
    MissingDatasetError,
    StorageError,
    dataset_uri,
    delete_folder,
    digest,
    exists,
    find_dataset,
    join,
    list_files,
    open_dataset,
    publish,
    read_bytes,
    resolve,
    write_bytes,
)

ROWS = pa.table({"name": ["a", "b", "c"], "value": [1, 2, 3]})


def make(uri: str, rows: pa.Table = ROWS, parents: dict[str, Dataset] | None = None) -> Dataset:
    with publish(uri, "made", {"seed": 1}, parents or {}) as publication:
        publication.write_table(rows)
        publication.count(unit="rows", rows_in=rows.num_rows + 1, rows_out=rows.num_rows, rejects={"odd": 1})
        publication.facts["note"] = "kept"
    return open_dataset(uri)


def fail(uri: str, error: BaseException) -> None:
    """An attempt that breaks after it has written a file."""
    with publish(uri, "made", {}, {}) as publication:
        publication.write_table(ROWS.slice(1))
        raise error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_published_dataset_can_be_read_and_says_what_it_is(tmp_path):
    parent = make(str(tmp_path / "parent"))
    dataset = make(str(tmp_path / "child"), parents={"parent": parent})
    assert dataset.read().equals(ROWS)
    assert dataset.read(["value"]).column_names == ["value"]
    manifest = dataset.manifest
    assert (manifest.stage, manifest.config, manifest.facts) == ("made", {"seed": 1}, {"note": "kept"})
    assert (manifest.unit, manifest.rows_in, manifest.rows_out, manifest.rejects) == ("rows", 4, 3, {"odd": 1})
    assert manifest.parents == {"parent": hashlib.sha256((tmp_path / "parent" / MANIFEST).read_bytes()).hexdigest()}
    assert manifest.libraries["pyarrow"] == pa.__version__


def test_sizes_and_checksums_are_those_of_the_files(tmp_path):
    with publish(str(tmp_path / "d"), "made", {}, {}) as publication:
        publication.write_table(ROWS)
        publication.write_file("deep/er/notes.txt", b"x" * (3 << 20))  # more than one chunk of the reader
    entries = open_dataset(str(tmp_path / "d")).manifest.files
    assert len(entries) == 2
    for entry in entries:
        data = (tmp_path / "d" / entry.path).read_bytes()
        assert (entry.num_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_manifest_is_not_there_before_the_block_ends(tmp_path):
    uri = str(tmp_path / "d")
    with publish(uri, "made", {}, {}) as publication:
        publication.write_table(ROWS)
        assert exists(join(publication.data_uri, "part-00000.parquet"))
        assert find_dataset(uri) is None
    assert find_dataset(uri) is not None


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), OSError("disk")])
def test_a_failure_leaves_no_dataset_no_files_and_touches_no_other(tmp_path, error):
    make(str(tmp_path / "finished"))
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        fail(str(tmp_path / "d"), error)
    assert contents(tmp_path) == before
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "d"))


def test_a_failed_second_attempt_leaves_the_finished_dataset_as_it_was(tmp_path):
    make(str(tmp_path / "d"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="ours"):
        fail(str(tmp_path / "d"), ValueError("ours"))
    assert contents(tmp_path) == before


def test_a_failure_can_be_followed_by_a_success(tmp_path):
    with pytest.raises(ValueError, match="ours"):
        fail(str(tmp_path / "d"), ValueError("ours"))
    assert make(str(tmp_path / "d")).read().equals(ROWS)


def test_a_dataset_without_manifest_is_refused_by_name(tmp_path):
    (tmp_path / "d" / "data-1").mkdir(parents=True)
    (tmp_path / "d" / "data-1" / "part-0.parquet").write_bytes(b"leftover")
    with pytest.raises(MissingDatasetError) as caught:
        open_dataset(str(tmp_path / "d"))
    assert str(tmp_path / "d") in str(caught.value)
    assert "Run the stage that makes it" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b'{"stage": "x"}', b"[]"])
def test_a_damaged_manifest_is_no_manifest_of_ours(tmp_path, data):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(StorageError, match=MANIFEST):
        open_dataset(str(tmp_path))


def test_files_that_a_manifest_does_not_name_are_not_read(tmp_path):
    dataset = make(str(tmp_path / "d"))
    folder = Path(dataset.parquet_paths()[0]).parent
    (folder / "part-99999.parquet").write_bytes(b"leftover of a lost writer")
    assert open_dataset(str(tmp_path / "d")).read().equals(ROWS)


def test_a_manifest_cannot_point_outside_its_dataset(tmp_path):
    make(str(tmp_path / "d"))
    path = tmp_path / "d" / MANIFEST
    manifest = open_dataset(str(tmp_path / "d")).manifest
    outside = manifest.files[0].model_copy(update={"path": "../other/part.parquet"})
    path.write_bytes(manifest.model_copy(update={"files": (outside,)}).to_bytes())
    dataset = open_dataset(str(tmp_path / "d"))
    for use in (dataset.read, lambda: dataset.file_uri("part.parquet")):
        with pytest.raises(StorageError, match="not a name below"):
            use()


def test_the_writer_who_finishes_first_stands(tmp_path):
    uri = str(tmp_path / "d")
    with publish(uri, "made", {}, {}) as slow:
        slow.write_table(ROWS)
        make(uri, ROWS.slice(2))
        before = contents(tmp_path / "d")
    after = contents(tmp_path / "d")
    assert open_dataset(uri).read().equals(ROWS.slice(2))
    assert after == {name: data for name, data in before.items() if slow.attempt not in name}


def test_of_racing_writers_exactly_one_stands(tmp_path):
    uri, num_writers = str(tmp_path / "d"), 6
    barrier = Barrier(num_writers)

    def write(number: int) -> None:
        with publish(uri, "made", {}, {}) as publication:
            publication.write_table(pa.table({"writer": [number]}))
            barrier.wait()

    threads = [Thread(target=write, args=(number,)) for number in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset = open_dataset(uri)
    assert set(contents(tmp_path / "d")) == {MANIFEST, dataset.manifest.files[0].path}
    assert dataset.read()["writer"][0].as_py() in range(num_writers)


def test_rows_that_do_not_add_up_are_a_mistake_of_the_stage(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"made: 5 tiles in, but 3 out and {'odd': 1} rejected"),
        publish(str(tmp_path / "d"), "made", {}, {}) as publication,
    ):
        publication.count(unit="tiles", rows_in=5, rows_out=3, rejects={"odd": 1})
    assert find_dataset(str(tmp_path / "d")) is None


@pytest.mark.parametrize("part", ["..", "a/../../b", "/etc/passwd", "../x"])
def test_a_name_cannot_climb_out(part):
    for root in ("runs", "s3://bucket/prefix"):
        with pytest.raises(StorageError, match="is not a name below"):
            join(root, "a", part)


def test_joined_names_stay_uris():
    assert join("s3://bucket/prefix/", "run", "a/b") == "s3://bucket/prefix/run/a/b"
    assert join("runs", "a..b") == "runs/a..b"  # dots inside a name do not climb


def test_uris_have_a_filesystem_or_a_refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/x")[1] == str(tmp_path / "runs/x")
    assert resolve(f"file://{tmp_path}/x")[1] == f"{tmp_path}/x"
    with pytest.raises(StorageError, match="az://bucket/x: only local paths, s3:// and gs:// are supported"):
        resolve("az://bucket/x")


def test_the_folder_of_a_dataset_follows_from_config_and_parents(tmp_path):
    first, second = make(str(tmp_path / "a")), make(str(tmp_path / "b"), ROWS.slice(1))
    uri = dataset_uri("runs", "r", "made", {"x": 1, "y": 2}, {"p": first})
    assert uri.startswith("runs/r/made/")
    assert uri == dataset_uri("runs", "r", "made", {"y": 2, "x": 1}, {"p": first})
    assert len({uri, dataset_uri("runs", "r", "made", {"x": 1}, {"p": first})}) == 2
    assert len({uri, dataset_uri("runs", "r", "made", {"x": 1, "y": 2}, {"p": second})}) == 2


def test_what_json_cannot_hold_has_no_digest():
    with pytest.raises(ValueError, match="JSON"):
        digest({"x": float("nan")})


def test_small_files_are_replaced_whole(tmp_path):
    uri = str(tmp_path / "run" / "run.json")
    write_bytes(uri, b"one")
    write_bytes(uri, b"two")
    assert contents(tmp_path) == {"run/run.json": b"two"}  # and no temporary file beside it


def test_listing_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(StorageError, match="no such folder; check the path"):
        list_files(str(tmp_path / "gone"))
    delete_folder(str(tmp_path / "gone"))  # deleting it twice is no error


def test_a_file_is_found_by_its_name(tmp_path):
    with publish(str(tmp_path / "d"), "made", {}, {}) as publication:
        publication.write_file("weights/model.bin", b"1")
    dataset = open_dataset(str(tmp_path / "d"))
    assert read_bytes(dataset.file_uri("model.bin")) == b"1"
    with pytest.raises(StorageError, match=r"has no file 'other\.bin'"):
        dataset.file_uri("other.bin")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    where = tmp_path / "small_disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True, text=True)
    if mounted.returncode:
        # only root mounts, and not in every container
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_named_with_the_fix_and_finished_datasets_stay(small_disk):
    make(str(small_disk / "finished"))
    before = contents(small_disk)
    noise = np.random.default_rng(0)
    writes = {
        "table": lambda publication: publication.write_table(pa.table({"x": noise.random(400_000)})),
        "file": lambda publication: publication.write_file("x", noise.bytes(3 << 20)),
    }
    for name, write in writes.items():
        uri = str(small_disk / name)
        fix = "the disk is full: free space or set --storage"
        with pytest.raises(OSError, match=fix) as caught, publish(uri, "made", {}, {}) as publication:
            write(publication)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.strerror).startswith(uri)
        assert find_dataset(uri) is None
        assert contents(small_disk) == before  # nothing half written keeps the space
    assert open_dataset(str(small_disk / "finished")).read().equals(ROWS)


def test_a_disk_that_fills_up_in_a_worker_is_named_alike(small_disk, ray_cluster):
    """Ray wraps the error and loses its number: the fix must be named all the same."""
    uri = str(small_disk / "d")
    rows = ray.data.from_arrow(pa.table({"x": np.random.default_rng(0).random(400_000)}))
    with pytest.raises(OSError, match="the disk is full") as caught, publish(uri, "made", {}, {}) as publication:
        dataflow.write(rows, publication)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.strerror).startswith(f"{uri}: ")
    assert contents(small_disk) == {}


@pytest.fixture(scope="module")
def bucket():
    """An S3 that starts in a second; not a proof of any real one, only the same protocol."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import botocore.session

        botocore.session.get_session().create_client("s3").create_bucket(Bucket="tiles")
        yield "s3://tiles"
    server.stop()


def test_s3_publishes_opens_and_reads(bucket):
    uri = join(bucket, "runs", "one")
    assert find_dataset(uri) is None
    dataset = make(uri)
    assert dataset.read().equals(ROWS)
    assert dataset.parquet_paths()[0].startswith("tiles/runs/one/data-")
    (entry,) = dataset.manifest.files
    assert entry.sha256 == hashlib.sha256(read_bytes(join(uri, entry.path))).hexdigest()
    assert [info.path for info in list_files(uri)] == [f"tiles/runs/one/{entry.path}", f"tiles/runs/one/{MANIFEST}"]
    with pytest.raises(StorageError, match="s3://tiles/gone: no such folder"):
        list_files(join(bucket, "gone"))


def test_on_s3_the_second_writer_loses_and_leaves_nothing(bucket):
    uri = join(bucket, "runs", "two")
    with publish(uri, "made", {}, {}) as slow:
        slow.write_table(ROWS)
        first = make(uri, ROWS.slice(2))
    assert open_dataset(uri).sha256 == first.sha256
    assert open_dataset(uri).read().equals(ROWS.slice(2))
    assert not any(slow.attempt in info.path for info in list_files(uri))


def test_on_s3_a_failure_leaves_no_files(bucket):
    uri = join(bucket, "runs", "three")
    with pytest.raises(ValueError, match="ours"):
        fail(uri, ValueError("ours"))
    with pytest.raises(MissingDatasetError):
        open_dataset(uri)
    assert not any("runs/three" in info.path for info in list_files(bucket))


def test_on_s3_a_repeated_put_of_the_same_manifest_is_not_another_writer(bucket):
    """A client repeats a request whose answer was lost: the second one finds what the first has written."""
    uri = join(bucket, "runs", "four", MANIFEST)
    assert storage.create_exclusively(uri, b"mine")
    assert storage.create_exclusively(uri, b"mine")
    assert not storage.create_exclusively(uri, b"theirs")
    assert read_bytes(uri) == b"mine"


def test_a_bucket_that_is_not_there_is_refused_by_name(bucket):
    with (
        pytest.raises(StorageError, match="there is no bucket 'nobucket': create it"),
        publish("s3://nobucket/x", "made", {}, {}) as publication,
    ):
        publication.write_table(ROWS)
