"""Captioning on a cluster whose parts die one after another, storage on the real S3 server: every tile is described once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from captioning_job import Job, write_tiles
from counted_captions import GREEDY, GREEDY_BYTES, TILES_PER_BATCH
from faulty_proxy import EXPIRED, FaultyProxy
from nodes import is_on_head, raylet_of, several_nodes

from urbanclip_ray.storage import list_folders, open_dataset, read_bytes, write_bytes

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

BUCKET = "captioning"
TILES_URI = f"s3://{BUCKET}/tiles"
AWAY_S, REFUSES_S, SLOW_S = 10.0, 10.0, 0.2
NUM_RESETS = 6
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
NOTHING_SAID = "nothing: the job went on"


@pytest.fixture(scope="module")
def proxy(s3_server) -> Iterator[FaultyProxy]:
    """All requests of this module go through it; a test may tell it to answer otherwise."""
    keys = s3_server.add_user("captioning")
    s3_server.client(keys).create_bucket(Bucket=BUCKET)
    proxy = FaultyProxy(s3_server.port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.environment(keys) | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            patch.setenv(name, value)
        yield proxy
    proxy.stop()


@pytest.fixture(scope="module")
def address(proxy) -> Iterator[str]:
    """A cluster of two nodes whose processes have the keys of the server."""
    write_tiles(TILES_URI)
    with several_nodes(2, "--cpus", "2", "--no-dashboard") as nodes:
        yield nodes.address


@pytest.fixture
def job(address, proxy, tmp_path, request) -> Iterator[Job]:
    proxy.counts.clear()
    yield Job(TILES_URI, f"s3://{BUCKET}/{request.node.name.replace('_', '-')}", tmp_path, address)
    proxy.answer_again()


@pytest.fixture
def own_tiles(job) -> str:
    """Tiles that this test alone damages; the URI of their second file."""
    job.tiles = job.captions.replace("/captions", "/tiles")
    write_tiles(job.tiles)
    return open_dataset(job.tiles).file_uri("part-00007.parquet")


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group with memory for one tile of the greedy batch, and not for two."""
    group = MEMORY_GROUPS / f"urbanclip_ray_{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(GREEDY_BYTES * 3 // 2))
    except OSError as error:
        pytest.skip(f"a memory limit needs root and the first version of control groups: {error}")
    yield group
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:  # a process of it is still there
            for pid in (group / "cgroup.procs").read_text().split():
                (MEMORY_GROUPS / "cgroup.procs").write_text(pid)
            time.sleep(0.1)
        else:
            return


def test_503_slow_down_delays_the_job_only(job, proxy, record):
    with job.running() as process:
        job.wait_until_inside(num_said=TILES_PER_BATCH)
        proxy.refuse_for(REFUSES_S)
        job.wait_for_end(process)
    assert proxy.counts["refused"] > 0
    record("503 SlowDown for 10 s", NOTHING_SAID, job.seconds_lost(), job.rows_lost())


def test_s3_down_for_ten_seconds_delays_the_job_only(job, s3_server, record):
    with job.running() as process:
        job.wait_until_inside(num_said=TILES_PER_BATCH)
        s3_server.kill_gateway()
        time.sleep(AWAY_S)
        s3_server.start_gateway()
        job.wait_for_end(process)
    record("S3 down 10 s", NOTHING_SAID, job.seconds_lost(), job.rows_lost())


def test_slow_s3_delays_the_job_only(job, proxy, record):
    proxy.delay_s = SLOW_S
    job.finish()
    assert proxy.counts["delayed"] > 0
    record("slow S3 (200 ms)", NOTHING_SAID, job.seconds_lost(), job.rows_lost())


def test_connections_reset_in_uploads_delay_the_job_only(job, proxy, record):
    with job.running() as process:
        job.wait_until_inside(num_said=TILES_PER_BATCH)
        proxy.num_resets_left = NUM_RESETS
        job.wait_for_end(process)
    assert proxy.counts["reset"] == NUM_RESETS
    record("connection reset in uploads", NOTHING_SAID, job.seconds_lost(), job.rows_lost())


def test_an_actor_out_of_memory_is_started_again_and_its_batch_cut_into_tiles(job, limited_group, record):
    job._limited_group = str(limited_group)
    job.finish()
    kills = int(dict(line.split() for line in (limited_group / "memory.oom_control").read_text().splitlines())["oom_kill"])
    assert kills >= 1
    assert job.said()[GREEDY] == 1
    record("out-of-memory actor", "Ray: an actor died unexpectedly, restarting", job.seconds_lost(), job.rows_lost())


def test_expired_credentials_end_the_job_with_the_fix_and_it_goes_on_with_new_ones(job, proxy, record):
    with job.running() as process:
        job.wait_until_said(2 * TILES_PER_BATCH)
        proxy.refuse_from_now_on(EXPIRED)
        printed = job.wait_for_failure(process)
    fix = "the session is over: renew AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert fix in printed
    proxy.answer_again()
    job.finish()
    record("expired credentials", f"{fix}; the same command then went on", job.seconds_lost(), job.rows_lost_of_the_end())


def test_a_truncated_part_ends_the_job_with_its_name_and_it_goes_on_when_it_is_whole_again(job, own_tiles, record):
    start_s, whole = time.monotonic(), read_bytes(own_tiles)
    write_bytes(own_tiles, whole[: len(whole) // 2])
    printed = job.fail()
    assert "part-00007.parquet" in printed
    assert "is damaged" in printed
    lost_s = time.monotonic() - start_s
    write_bytes(own_tiles, whole)
    job.finish()
    record(
        "truncated Parquet part", "its path, is damaged; the same command went on when it was whole", lost_s, job.rows_lost()
    )


def test_of_two_jobs_to_one_output_the_second_is_told(job, record):
    with job.running() as first, job.running() as second:
        job.wait_for_end(first)
        job.wait_for_end(second)
    assert job.printed().count("another run has finished it first") == 1
    assert len(list_folders(job.captions)) == 1
    saw = "by the second: another run has finished it first; its result stands"
    record("two captioning jobs to one output", saw, job.seconds_lost(), job.rows_lost_of_the_end())


def test_a_driver_an_actor_and_a_node_are_killed_and_every_tile_is_described_once(job, record):
    with job.running() as driver:
        job.wait_until_inside(num_said=2 * TILES_PER_BATCH, num_inside=2)  # and none of the two is writing what it said
        driver.kill()
    with job.running() as driver:
        # of the two nodes' actors that of the head: the other node then still has one, wherever this one starts again
        actor = job.wait_until_inside(num_said=4 * TILES_PER_BATCH, chosen=is_on_head)[0]
        driver_lost_s = job.seconds_lost()
        os.kill(actor, signal.SIGKILL)
        others = job.wait_until_inside(num_said=5 * TILES_PER_BATCH, chosen=lambda pid: not is_on_head(pid))
        os.kill(raylet_of(others[0]), signal.SIGKILL)
        for pid in others:  # of the same node: its processes end with it
            os.kill(pid, signal.SIGKILL)
        killed_s = time.time()
        job.wait_for_end(driver)
    record("driver SIGKILL", "the job ended; the same command went on", driver_lost_s, job.rows_lost())
    record("raylet SIGKILL", "Ray: a node died; the job went on", job.seconds_lost(killed_s), job.rows_lost())
    before = job.said()
    job.captions += "-again"
    job.finish()
    assert job.said() == before
    job.rows_lost()
