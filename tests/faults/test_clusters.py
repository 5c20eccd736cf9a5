"""Captioning while its cluster comes and goes, and rows that do not fit in the memory of a cluster; storage on S3."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

sys.path.append(str(Path(__file__).parent))

from captioning_job import Job, write_tiles
from counted_captions import TILES_PER_BATCH
from nodes import QUICK, several_nodes

from urbanclip_ray import dataflow
from urbanclip_ray.storage import open_dataset, publish

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

BUCKET = "clusters"
TILES_URI = f"s3://{BUCKET}/tiles"
OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray takes
ROW_BYTES, NUM_ROWS, ROWS_PER_FILE = 1 << 20, 160, 20


@pytest.fixture(scope="module", autouse=True)
def environment(s3_server) -> Iterator[None]:
    keys = s3_server.add_user("clusters")
    s3_server.client(keys).create_bucket(Bucket=BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment(keys).items():
            patch.setenv(name, value)
        write_tiles(TILES_URI)
        yield


def test_a_job_goes_on_in_a_new_cluster_after_the_loss_of_the_head(tmp_path, record):
    job = Job(TILES_URI, f"s3://{BUCKET}/head", tmp_path, "")
    with several_nodes(1, "--cpus", "3", "--no-dashboard") as nodes:
        job.address = nodes.address
        with job.running() as driver:
            job.wait_until_inside(num_said=2 * TILES_PER_BATCH, num_inside=2)  # and none is writing what it said
            nodes.kill()
            driver.kill()  # on the head's machine, as a submitted job is
    with several_nodes(1, "--cpus", "3", "--no-dashboard") as nodes:
        job.address = nodes.address
        job.finish()
    saw = "the job ended with its cluster; the same command went on in a new one"
    record("head restart, job resubmitted", saw, job.seconds_lost(), job.rows_lost())


def test_a_job_takes_nodes_that_come_and_outlives_those_that_go(tmp_path, record):
    job = Job(TILES_URI, f"s3://{BUCKET}/scaled", tmp_path, "")
    with several_nodes(1, "--head-cpus", "0", "--cpus", "1", "--no-dashboard") as nodes:
        job.address = nodes.address
        with job.running() as driver:
            for expected in (2, 3, 4):
                assert nodes.add() == expected
            job.wait_until_said(2 * TILES_PER_BATCH)
            assert nodes.remove() == 3
            assert nodes.remove() == 2
            job.wait_until_said(4 * TILES_PER_BATCH)
            assert nodes.add() == 3
            job.wait_for_end(driver)
        assert nodes.remove() == 2
        assert nodes.remove() == 1
    saw = "the job waited for its first node, and went on after Ray's word of those that left"
    record("0 to 3 nodes in mid-run and back", saw, job.seconds_lost(), job.rows_lost_of_the_end())


def test_rows_that_do_not_fit_in_the_object_store_are_spilled_and_all_are_written(tmp_path, monkeypatch, record):
    source, target = f"s3://{BUCKET}/large", f"s3://{BUCKET}/sorted"
    random = np.random.default_rng(0)
    with publish(source, "made", {}, {}) as publication:
        for first in range(0, NUM_ROWS, ROWS_PER_FILE):
            numbers = [number * 7 % NUM_ROWS for number in range(first, first + ROWS_PER_FILE)]
            rows = pa.table({"number": numbers, "image": [random.bytes(ROW_BYTES) for _ in numbers]})
            publication.write_table(rows, f"part-{first:05d}.parquet")
        publication.count(unit="rows", rows_in=NUM_ROWS, rows_out=NUM_ROWS, rejects={})
    ray.shutdown()  # of another test's
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    with several_nodes(1, "--cpus", "2", "--object-store-bytes", str(OBJECT_STORE_BYTES), "--no-dashboard") as nodes:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        dataflow.connect()
        with publish(target, "sorted", {}, {}) as publication:
            rows = dataflow.map_files(open_dataset(source), ["number", "image"], lambda rows: rows)
            dataflow.write(rows.sort("number"), publication)  # which holds all of them at once
            publication.count(unit="rows", rows_in=NUM_ROWS, rows_out=NUM_ROWS, rejects={})
        said = ray._private.internal_api.memory_summary(address=nodes.address, stats_only=True)
        ray.shutdown()
    spilled_mib = int(re.findall(r"Spilled (\d+) MiB", said)[0])
    assert spilled_mib > OBJECT_STORE_BYTES >> 20
    found, expected = open_dataset(target).read(), open_dataset(source).read().sort_by("number")
    assert found.to_pydict() == expected.to_pydict()
    saw = f"Ray's word of {spilled_mib} MiB spilled to the disk"
    record("object store full, spilling", saw, None, NUM_ROWS - found.num_rows)
