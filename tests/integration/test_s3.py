"""Object storage on a real server: datasets, racing writers, public beside private, a crash, and what is said of errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from s3_server import Keys, S3Server
from small_run import NUM_COLUMNS, NUM_ROWS, ROOT, city_options, run_job, write_city

sys.path.append(str(ROOT / "tests" / "distributed"))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_checkpoints import RUN_FACTS, WIDTH, settle, start, step, write_in_rank, write_large_alone

from urbanclip_ray.config import StoreConfig
from urbanclip_ray.filesystems import STORES_VARIABLE, check_access, resolve, use_stores
from urbanclip_ray.storage import (
    MANIFEST,
    Dataset,
    MissingDatasetError,
    StorageError,
    delete_folder,
    exists,
    find_dataset,
    join,
    list_files,
    open_dataset,
    publish,
    read_bytes,
    write_bytes,
)
from urbanclip_ray.train.checkpoint import fill_weights, find_checkpoint
from urbanclip_ray.train.checkpoint_files import list_checkpoints

BUCKET = "tiles"
OUTAGE_S = 6
NUM_TILES = NUM_COLUMNS * NUM_ROWS


@pytest.fixture(scope="module")
def owner(s3_server) -> Keys:
    """The user whose bucket the tests write to."""
    keys = s3_server.add_user("owner")
    s3_server.client(keys).create_bucket(Bucket=BUCKET)
    return keys


@pytest.fixture(scope="module")
def stranger(s3_server) -> Keys:
    return s3_server.add_user("stranger")


@pytest.fixture(autouse=True)
def environment(s3_server, owner, monkeypatch, tmp_path) -> None:
    """The owner's AWS variables and no others; what a test sets is undone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # a search for keys on a cloud that this is not
    monkeypatch.setenv(STORES_VARIABLE, "[]")
    for name, value in s3_server.environment(owner).items():
        monkeypatch.setenv(name, value)


def rows_of(writer: int) -> pa.Table:
    return pa.table({"writer": [writer] * 3, "value": [1, 2, 3]})


def write(uri: str, rows: pa.Table) -> Dataset:
    with publish(uri, "made", {}, {}) as publication:
        publication.write_table(rows)
    return open_dataset(uri)


def test_a_dataset_is_written_read_listed_and_deleted():
    uri = f"s3://{BUCKET}/round/trip"
    assert find_dataset(uri) is None
    large = pa.table({"noise": np.random.default_rng(0).random(2_000_000)})  # 16 MB: sent in several parts
    dataset = write(uri, large)
    assert dataset.read().equals(large)
    assert exists(join(uri, MANIFEST))
    assert [info.base_name for info in list_files(uri)] == ["part-00000.parquet", MANIFEST]
    delete_folder(uri)
    with pytest.raises(MissingDatasetError):
        open_dataset(uri)
    with pytest.raises(StorageError, match="no such folder"):
        list_files(uri)


def test_neither_region_nor_checksum_variables_are_needed(monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    code = f"from urbanclip_ray.storage import *; write_bytes('s3://{BUCKET}/plain', b'1'); print(read_bytes('s3://{BUCKET}/plain'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout == "b'1'\n", result.stderr


def test_of_racing_writers_one_wins_and_the_others_leave_nothing():
    uri, num_writers = f"s3://{BUCKET}/race", 6
    barrier = Barrier(num_writers)

    def race(writer: int) -> None:
        with publish(uri, "made", {"writer": writer}, {}) as publication:
            publication.write_table(rows_of(writer))
            barrier.wait()

    with ThreadPoolExecutor(num_writers) as pool:
        list(pool.map(race, range(num_writers)))
    winner = open_dataset(uri)
    assert winner.read().equals(rows_of(winner.manifest.config["writer"]))
    assert len(list_files(uri)) == 2  # the winner's table and the manifest


def crash(server: S3Server) -> None:
    """The gateway is killed, is away for a while, and comes back with the objects that it had."""
    server.kill_gateway()
    time.sleep(OUTAGE_S)
    server.start_gateway()


def crash_during(server: S3Server, work: Callable[[Event], Any]) -> Any:
    """Run work that sets the event when it is well under way; the crash begins then."""
    under_way = Event()

    def wait_and_crash() -> None:
        assert under_way.wait(60)
        crash(server)

    thread = Thread(target=wait_and_crash)
    thread.start()
    start = time.monotonic()
    result = work(under_way)
    took_s = time.monotonic() - start
    thread.join()
    assert took_s > OUTAGE_S, "the work ended before the crash could touch it"
    return result


def test_a_crash_while_files_are_written_loses_none(s3_server):
    uri, num_files = f"s3://{BUCKET}/crash/write", 200
    noise = np.random.default_rng(0).bytes(6 << 20)  # more than one part

    def work(under_way: Event) -> None:
        def write_one(number: int) -> None:
            if number == 20:
                under_way.set()
            data = noise if number % 20 == 5 else f"file {number}".encode() * 1000
            publication.write_file(f"{number:03}.bin", data)
            time.sleep(0.01)

        with publish(uri, "made", {}, {}) as publication, ThreadPoolExecutor(4) as pool:
            list(pool.map(write_one, range(num_files)))

    crash_during(s3_server, work)
    files = open_dataset(uri).manifest.files
    assert len(files) == num_files
    for entry in files:
        number = int(Path(entry.path).stem)
        expected = noise if number % 20 == 5 else f"file {number}".encode() * 1000
        assert read_bytes(join(uri, entry.path)) == expected


@pytest.mark.slow
def test_a_crash_while_files_are_read_loses_none(s3_server):
    uri = f"s3://{BUCKET}/crash/read"
    large = pa.table({"noise": np.random.default_rng(0).random(1_000_000)})
    dataset = write(uri, large)

    def work(under_way: Event) -> list[bool]:
        equal = []
        for number in range(30):
            if number == 5:
                under_way.set()
            equal.append(dataset.read().equals(large))
            time.sleep(0.05)
        return equal

    assert all(crash_during(s3_server, work))


@pytest.mark.slow
def test_a_crash_before_the_manifest_is_put_is_outlasted(s3_server):
    uri = f"s3://{BUCKET}/crash/manifest"
    write_bytes(join(uri, "there"), b"1")
    thread = Thread(target=crash, args=(s3_server,))
    thread.start()
    time.sleep(0.5)
    write(uri, rows_of(0))
    thread.join()
    assert open_dataset(uri).read().equals(rows_of(0))


RAY_JOB = """
import sys, time
import pyarrow as pa
from urbanclip_ray import dataflow
from urbanclip_ray.object_storage import S3Files
from urbanclip_ray.storage import open_dataset, publish, resolve, write_bytes

def slowly(table):
    time.sleep(1.0)
    filesystem, _ = resolve("s3://{bucket}")
    assert isinstance(filesystem, S3Files)
    return table

dataflow.connect()
first = open_dataset("s3://{bucket}/ray/in")
with publish("s3://{bucket}/ray/out", "made", {{}}, {{"in": first}}) as publication:
    rows = dataflow.map_files(first, ["x"], slowly, rows_per_batch=10)
    write_bytes("s3://{bucket}/ray/started", b"1")
    dataflow.write(rows, publication, max_rows_per_file=10)
"""


@pytest.mark.slow
def test_a_crash_while_ray_workers_read_and_write_loses_no_row(s3_server):
    with publish(f"s3://{BUCKET}/ray/in", "made", {}, {}) as publication:
        for number in range(20):
            publication.write_table(pa.table({"x": range(number * 10, number * 10 + 10)}), f"part-{number:02}.parquet")
    command = [sys.executable, "-c", RAY_JOB.format(bucket=BUCKET)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 90
        while not exists(f"s3://{BUCKET}/ray/started") and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(4)  # the first workers are at it
        assert process.poll() is None, process.stdout
        crash(s3_server)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    values = open_dataset(f"s3://{BUCKET}/ray/out").read()["x"].to_pylist()
    assert sorted(values) == list(range(200))


def make_public(server: S3Server, keys: Keys, bucket: str) -> None:
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": resources}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    server.client(keys).put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))


@pytest.fixture(scope="module")
def public_city(s3_server, owner, tmp_path_factory) -> str:
    """The tiles of a small city in a bucket that everybody may read."""
    client = s3_server.client(owner)
    client.create_bucket(Bucket="public")
    city = write_city(tmp_path_factory.mktemp("city"))
    for path in sorted(city.rglob("*.*")):
        client.put_object(Bucket="public", Key=f"city/{path.relative_to(city)}", Body=path.read_bytes())
    make_public(s3_server, owner, "public")
    return "s3://public/city"


def public_and_private(server: S3Server) -> list[str]:
    """Stores: everything by the keys in two variables, the public bucket without any."""
    stores = [
        {"endpoint": server.endpoint, "key_id_variable": "PRIVATE_KEY", "secret_variable": "PRIVATE_SECRET"},
        {"root": "s3://public", "endpoint": server.endpoint, "anonymous": True},
    ]
    return ["--set", f"stores={json.dumps(stores)}"]


def without_aws(monkeypatch, keys: Keys) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PRIVATE_KEY", keys.key_id)
    monkeypatch.setenv("PRIVATE_SECRET", keys.secret)


@pytest.mark.slow
def test_a_job_reads_a_public_bucket_without_keys_and_writes_a_private_one(s3_server, owner, public_city, monkeypatch):
    without_aws(monkeypatch, owner)
    result = run_job("ingest", *city_options(public_city, f"s3://{BUCKET}/stores"), *public_and_private(s3_server))
    assert result.returncode == 0, result.stderr[-4000:]
    assert owner.secret not in result.stdout + result.stderr
    use_stores([StoreConfig(endpoint=s3_server.endpoint, key_id_variable="PRIVATE_KEY", secret_variable="PRIVATE_SECRET")])
    (manifest,) = (info for info in list_files(f"s3://{BUCKET}/stores/tiny_test/tiles") if info.base_name == MANIFEST)
    tiles = open_dataset(f"s3://{manifest.path}".removesuffix(f"/{MANIFEST}"))
    assert tiles.manifest.rows_out == NUM_TILES
    assert tiles.read(["image"])["image"][0].as_py()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_object_storage(s3_server, owner, public_city, monkeypatch):
    without_aws(monkeypatch, owner)
    options = [*city_options(public_city, f"s3://{BUCKET}/whole"), *public_and_private(s3_server)]
    result = run_job("pipeline", *options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"report: s3://{BUCKET}/whole/tiny_test/report/report.html" in result.stdout
    again = run_job("pipeline", *options)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "made in" not in again.stdout
    use_stores([StoreConfig(endpoint=s3_server.endpoint, key_id_variable="PRIVATE_KEY", secret_variable="PRIVATE_SECRET")])
    run = f"s3://{BUCKET}/whole/tiny_test"
    assert b"</html>" in read_bytes(join(run, "report", "report.html"))
    assert owner.secret.encode() not in read_bytes(join(run, "run.json"))
    assert any("events" in info.base_name for info in list_files(join(run, "pretrain")))


def refuse_at_once(uri: str) -> str:
    """What is said before the work, and that it is said within a minute."""
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        check_access(uri)
    assert time.monotonic() - start < 60
    message = str(caught.value)
    assert message.startswith(f"{uri}: ")
    return message


WRONG = {  # AWS variables that are changed (None: not set), and what is said
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret is not that of the key id: correct AWS_ACCESS_KEY_ID and"),
    "key id": ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "the key id is not known there: correct AWS_ACCESS_KEY_ID and"),
    "no keys": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no keys: set AWS_ACCESS_KEY_ID and"),
    "endpoint": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached: correct AWS_ENDPOINT_URL"),
    "host": ({"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, "http://nowhere.invalid cannot be reached: correct"),
    "region": ({"AWS_ENDPOINT_URL": None, "AWS_DEFAULT_REGION": "nowhere-1"}, "in the region nowhere-1 cannot be reached"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_are_named_with_the_fix_and_without_the_secret(what, owner, monkeypatch):
    for name, value in WRONG[what][0].items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    message = refuse_at_once(f"s3://{BUCKET}/x")
    assert WRONG[what][1] in message
    assert owner.secret not in message
    assert "wrong" not in message


def test_a_missing_bucket_and_missing_permission_are_named_with_the_fix(s3_server, stranger, public_city, monkeypatch):
    assert "there is no bucket 'nobucket': create it, or correct its name" in refuse_at_once("s3://nobucket/x")
    for name, value in s3_server.environment(stranger).items():
        monkeypatch.setenv(name, value)
    assert "no permission: allow it to AWS_ACCESS_KEY_ID and" in refuse_at_once(f"s3://{BUCKET}/x")
    use_stores([StoreConfig(anonymous=True)])
    assert "anonymous access is not enough: give its store a profile, or" in refuse_at_once(f"s3://{BUCKET}/x")


def test_errors_in_the_middle_of_the_work_are_explained_alike(s3_server, stranger, public_city, monkeypatch):
    """pyarrow's own errors carry no reason where the server answers without a body."""
    with pytest.raises(StorageError, match="s3://nobucket/x: there is no bucket 'nobucket': create it"):
        write("s3://nobucket/x", rows_of(0))
    with pytest.raises(StorageError, match="s3://nobucket/x: there is no bucket 'nobucket': create it"):
        write_bytes("s3://nobucket/x", b"1")
    write_bytes(f"s3://{BUCKET}/secret", b"1")
    for name, value in s3_server.environment(stranger).items():
        monkeypatch.setenv(name, value)
    for read in (read_bytes, exists, list_files, find_dataset):
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/secret.*: no permission: allow it to AWS_ACCESS_KEY_ID"):
            read(f"s3://{BUCKET}/secret")
    assert read_bytes(f"{public_city}/tiles.csv")
    with pytest.raises(StorageError, match="s3://public/x: no permission: allow it to AWS_ACCESS_KEY_ID"):
        write("s3://public/x", rows_of(0))  # it may be read, not written
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=f"s3://{BUCKET}/secret: the secret is not that of the key id"):
        read_bytes(f"s3://{BUCKET}/secret")


@pytest.mark.slow
def test_a_server_that_is_gone_is_named_within_a_minute(monkeypatch):
    filesystem, _ = resolve("s3://gone/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        read_bytes(f"s3://{BUCKET}/x")
    assert time.monotonic() - start < 60
    assert resolve("s3://gone/x")[0] is not filesystem


@pytest.mark.parametrize(
    ("variable", "value", "bucket", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", BUCKET, "the secret is not that of the key id: correct AWS_ACCESS_KEY_ID and"),
        ("AWS_DEFAULT_REGION", "us-east-1", "nobucket", "there is no bucket 'nobucket': create it, or correct its name"),
    ],
)
def test_a_job_ends_with_the_fix_before_it_begins(variable, value, bucket, words, owner, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    start = time.monotonic()
    result = run_job("ingest", *city_options(write_city(tmp_path / "city", 2, 2), f"s3://{bucket}/runs"))
    assert time.monotonic() - start < 60
    assert result.returncode != 0
    assert f"error: s3://{bucket}/runs: {words}" in result.stderr
    assert "Traceback" not in result.stderr
    assert owner.secret not in result.stdout + result.stderr


def fill_in_rank(root: str) -> list[Any]:
    """The step that is found, and the weights."""
    from torch import nn

    found, model = find_checkpoint(root, pytest.fail), nn.Linear(6, 6)
    assert found is not None
    fill_weights(model, found)
    return [found.step, model.weight.tolist()]


@pytest.mark.slow
def test_checkpoints_of_two_ranks_are_kept_pruned_and_read_by_three(tmp_path):
    for root in (f"s3://{BUCKET}/checkpoints/pruned", str(tmp_path)):
        run_ranks(write_in_rank, 2, root, [1, 2, 3], 2)
    root = f"s3://{BUCKET}/checkpoints/pruned"
    assert [uri.split("-")[1] for uri in list_checkpoints(root)] == ["00000003", "00000002"]
    files = [str(info.path) for info in list_files(root)]
    assert len(files) == 2 * 6  # nothing is left of the first
    found = run_ranks(fill_in_rank, 3, root)
    assert found == [fill_in_rank(str(tmp_path))] * 3
    assert found[0][0] == 3


def test_a_damaged_checkpoint_on_object_storage_is_named_and_the_one_before_is_used():
    root = f"s3://{BUCKET}/checkpoints/damaged"
    run_ranks(write_in_rank, 2, root, [1, 2], 2)
    damaged = join(list_checkpoints(root)[0], "rank-00001.safetensors")
    write_bytes(damaged, read_bytes(damaged)[:-1] + b"?")
    warnings: list[str] = []
    found = find_checkpoint(root, warnings.append)
    assert found is not None
    assert found.step == 1
    assert warnings == [f"{damaged} is damaged: its checksum is not the committed one; trying the checkpoint before it"]


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_an_upload_leaves_nothing_that_is_loaded(s3_server, owner, tmp_path):
    root, client = f"s3://{BUCKET}/checkpoints/killed", s3_server.client(owner)
    process = multiprocessing.get_context("spawn").Process(target=write_large_alone, args=(root, [1, 2], str(tmp_path)))
    process.start()
    try:
        deadline = time.monotonic() + 120
        uploading: list[str] = []
        while not any("step-00000002" in key for key in uploading):
            assert time.monotonic() < deadline
            assert process.is_alive()
            uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix="checkpoints/killed/")
            uploading = [upload["Key"] for upload in uploads.get("Uploads", [])]
    finally:
        process.kill()
        process.join()
    warnings: list[str] = []
    found = find_checkpoint(root, warnings.append)
    assert found is not None
    assert found.step == 1
    assert not [info for info in list_files(root) if "step-00000002" in info.path and info.size > 0]


def save_through_a_crash(root: str, started: str) -> bool:
    """Checkpoints before and after a server's crash; training goes on meanwhile."""
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    engine, writer = start(WIDTH), CheckpointWriter(root, 2)
    step(engine, 1)
    writer.save(engine, 1, **RUN_FACTS)
    Path(started).touch()
    for number in range(2, 6):
        time.sleep(2)
        step(engine, number)
        writer.save(engine, number, **RUN_FACTS)
    settle(writer)
    return True


@pytest.mark.slow
def test_a_crash_while_checkpoints_are_uploaded_loses_none(s3_server, tmp_path):
    root, started = f"s3://{BUCKET}/checkpoints/crash", tmp_path / "started"

    def crash_when_started() -> None:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        crash(s3_server)

    thread = Thread(target=crash_when_started)
    thread.start()
    assert run_ranks(save_through_a_crash, 2, root, str(started)) == [True, True]
    thread.join()
    assert [uri.split("-")[1] for uri in list_checkpoints(root)] == ["00000005", "00000004"]
    found = find_checkpoint(root, pytest.fail)
    assert found is not None
    assert found.step == 5
