"""Captioning on a cluster whose parts die one after another, storage on the real S3 server: every tile is described once."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from counted_captions import TILES_PER_BATCH, make_work
from slow_down import SlowDownProxy

from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import open_dataset, publish

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
NODES = HERE.parent / "distributed" / "several_nodes.py"
BUCKET = "captioning"
TILES_URI = f"s3://{BUCKET}/tiles"
NUM_TILES = 20
BATCH_S = 3.0  # of one batch; what is killed is killed in its first two thirds, before it has described anything
AWAY_S, REFUSES_S = 6.0, 10.0
WAIT_S = 400.0
QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3", "RAY_AUTH_MODE": "disabled"}


class Job:
    """One captioning job, from its start to the end of its process; `folder` is of its own."""

    def __init__(self, name: str, folder: Path, address: str) -> None:
        self.notes = folder
        self.store = f"s3://{BUCKET}/{name}/caption_store"
        self.captions = f"s3://{BUCKET}/{name}/captions"
        self._log = folder / "log"
        self._environment = os.environ | {"RAY_ADDRESS": address}

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        arguments = [TILES_URI, self.store, self.captions, str(self.notes), str(BATCH_S)]
        command = [sys.executable, str(HERE / "counted_captions.py"), *arguments]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self) -> None:
        with self.running() as process:
            self.wait_for_end(process)

    def wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait(WAIT_S) == 0, self._log.read_text()[-4000:]

    def said(self) -> Counter[str]:
        return Counter(line for file in self.notes.glob("said-*") for line in file.read_text().splitlines())

    def inside(self) -> dict[int, float]:
        """Processes that describe a batch, and since how many seconds."""
        found = {}
        for note in self.notes.glob("inside-*"):
            pid = int(note.name.partition("-")[2])
            try:
                age_s = time.time() - note.stat().st_mtime
            except FileNotFoundError:  # it has just ended
                continue
            if Path(f"/proc/{pid}").exists():
                found[pid] = age_s
        return found

    def wait_until_inside(
        self, num_said: int, chosen: Callable[[int], bool] = lambda pid: True, num_inside: int = 1
    ) -> list[int]:
        """Wait until so many tiles are described and so many of the chosen processes are in the first part of a batch.

        They need not have begun together: two processes may stay out of step to the end.
        """

        def begun() -> list[int]:
            pids = [pid for pid, age_s in self.inside().items() if chosen(pid) and age_s < BATCH_S * 2 / 3]
            return pids if len(pids) >= num_inside and self.said().total() >= num_said else []

        deadline_s = time.monotonic() + WAIT_S
        while not (pids := begun()):
            assert time.monotonic() < deadline_s, self._log.read_text()[-4000:]
            time.sleep(0.01)
        return pids

    def assert_every_tile_is_described_once(self) -> None:
        assert self.said() == {f"r/{number}": 1 for number in range(NUM_TILES)}
        rows = open_dataset(self.captions).read().to_pylist()
        assert [row["tile_id"] for row in rows] == [f"r/{number}" for number in range(NUM_TILES)]
        assert all(row["text"] and row["error"] is None for row in rows)
        work = make_work(TILES_URI, self.store)
        store = work.store_of(work.config.prompt)
        parts = [store.folder.read_part(part.name) for part in store.folder.parts()]  # all of them are whole
        assert sum(part.num_rows for part in parts) == NUM_TILES
        assert work.look_up(work.read_index()).to_do() == []
        assert store.read_failed().num_rows == 0


@pytest.fixture(scope="module")
def proxy(s3_server) -> Iterator[SlowDownProxy]:
    """All requests of this module go through it; it is told to refuse them by one test only."""
    keys = s3_server.add_user("captioning")
    s3_server.client(keys).create_bucket(Bucket=BUCKET)
    proxy = SlowDownProxy(s3_server.port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.environment(keys) | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            patch.setenv(name, value)
        yield proxy
    proxy.stop()


@pytest.fixture(scope="module")
def address(proxy) -> Iterator[str]:
    """A cluster of two nodes whose processes have the keys of the server."""
    write_tiles()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(NODES), "2", "--cpus", "2", "--no-dashboard"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | QUICK) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("address "))
        process.communicate(timeout=60)


@pytest.fixture
def job(address, tmp_path, request, monkeypatch) -> Job:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    return Job(request.node.name.replace("_", "-"), tmp_path, address)


def write_tiles() -> None:
    rows = []
    for number in range(NUM_TILES):
        stream = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        row = {"tile_id": f"r/{number}", "region": "r", "scheme": "none", "image": stream.getvalue()}
        rows.append(row | {"sha256": hashlib.sha256(stream.getvalue()).hexdigest()})
    table = pa.Table.from_pylist(rows, schema=TILES)
    with publish(TILES_URI, "tiles", {}, {}) as publication:
        for first in range(0, NUM_TILES, 7):  # files that do not end with a batch
            publication.write_table(table.slice(first, 7), f"part-{first:05d}.parquet")
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES, rejects={})


def raylet_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_on_head(pid: int) -> bool:
    return "--head" in Path(f"/proc/{raylet_of(pid)}/cmdline").read_text()


def test_a_server_that_refuses_requests_for_ten_seconds_delays_the_job_only(job, proxy):
    with job.running() as process:
        job.wait_until_inside(num_said=TILES_PER_BATCH)
        proxy.refuse_for(REFUSES_S)
        job.wait_for_end(process)
    assert proxy.num_refused > 0
    job.assert_every_tile_is_described_once()


def test_a_server_that_is_away_for_six_seconds_delays_the_job_only(job, s3_server):
    with job.running() as process:
        job.wait_until_inside(num_said=TILES_PER_BATCH)
        s3_server.kill_gateway()
        time.sleep(AWAY_S)
        s3_server.start_gateway()
        job.wait_for_end(process)
    job.assert_every_tile_is_described_once()


def test_a_driver_an_actor_and_a_node_are_killed_and_every_tile_is_described_once(job):
    with job.running() as driver:
        job.wait_until_inside(num_said=2 * TILES_PER_BATCH, num_inside=2)  # and none of the two is writing what it said
        driver.kill()
    with job.running() as driver:
        actor = job.wait_until_inside(num_said=4 * TILES_PER_BATCH)[0]
        os.kill(actor, signal.SIGKILL)
        others = job.wait_until_inside(num_said=5 * TILES_PER_BATCH, chosen=lambda pid: not is_on_head(pid))
        os.kill(raylet_of(others[0]), signal.SIGKILL)
        for pid in others:  # of the same node: its processes end with it
            os.kill(pid, signal.SIGKILL)
        job.wait_for_end(driver)
    job.assert_every_tile_is_described_once()
    before = job.said()
    job.captions += "-again"
    job.finish()
    assert job.said() == before
    job.assert_every_tile_is_described_once()
