"""Jobs submitted to an autoscaling cluster of this machine: nodes come and go, exit codes and output are the job's."""

from __future__ import annotations

import http.client
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from small_run import ROOT, city_options, write_city

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "cluster" / "local_cluster.py"
RAY = Path(sys.executable).parent / "ray"
REFUSED_S = 60
LEAVE_S = 120  # the idle timeout is 30 s
WHERE = """
import ray, urbanclip_ray
from urbanclip_ray import dataflow
dataflow.connect()
seen = ray.remote(lambda: __import__("urbanclip_ray").__file__)
print("driver", urbanclip_ray.__file__)
print("worker", ray.get(seen.remote()))
"""


class LocalCluster(NamedTuple):
    folder: Path
    environment: dict[str, str]  # a client's

    def submit(self, *entrypoint: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [str(RAY), "job", "submit", "--working-dir", ".", "--", *entrypoint],
            env=environment | self.environment | changes,
            capture_output=True,
            text=True,
            timeout=500,
            cwd=ROOT,
        )

    def num_nodes(self) -> int:
        """Nodes alive, the head among them."""
        address = urlsplit(self.environment["RAY_API_SERVER_ADDRESS"])
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
        try:
            connection.request("GET", "/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
            nodes = json.loads(connection.getresponse().read())["data"]["result"]["result"]
        finally:
            connection.close()
        return sum(node["state"] == "ALIVE" for node in nodes)


def run_script(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), action, "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def read_exports(folder: Path) -> dict[str, str]:
    script = f"source {folder}/environment && env"
    shell = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in shell.stdout.splitlines() if line.startswith("RAY_"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, ray_cluster) -> Iterator[LocalCluster]:
    """Beside the Ray of `ray_cluster`: a job must find its own cluster, not any."""
    folder = tmp_path_factory.mktemp("local") / "cluster"
    started = run_script("start", folder)
    assert started.returncode == 0, started.stdout + started.stderr
    yield LocalCluster(folder, read_exports(folder))
    run_script("stop", folder)


def test_nothing_but_the_owner_reads_the_token_and_a_second_start_is_refused(cluster):
    for name in ("auth_token", "environment", "state.json"):
        assert stat.S_IMODE((cluster.folder / name).stat().st_mode) == 0o600
    again = run_script("start", cluster.folder)
    assert again.returncode == 1
    assert f"source {cluster.folder}/environment to use it" in again.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Authentication required: Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Authentication failed: Forbidden: Invalid authentication token"),
    ],
)
def test_a_job_without_the_token_is_refused_at_once(cluster, changes, message):
    begin = time.monotonic()
    result = cluster.submit("python", "jobs/pipeline.py", "--help", **changes)
    assert time.monotonic() - begin < REFUSED_S
    assert result.returncode != 0
    assert message in result.stderr


def test_a_failed_job_says_why_and_fails_the_submission(cluster):
    result = cluster.submit("python", "jobs/pipeline.py", "--recipe", "moon")
    assert result.returncode == 1
    assert "error: --recipe 'moon' is not known; choose one of" in result.stdout
    assert "Traceback" not in result.stdout


def test_driver_and_workers_run_the_uploaded_code(cluster):
    result = cluster.submit("python", "-c", WHERE)
    assert result.returncode == 0, result.stdout[-3000:]
    places = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith(("driver ", "worker ")))
    assert set(places) == {"driver", "worker"}
    for place in places.values():
        assert "working_dir_files/_ray_pkg_" in place


def test_workers_come_for_a_pipeline_and_leave_after_it(cluster, tmp_path):
    counts = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            counts.append(cluster.num_nodes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        options = city_options(write_city(tmp_path / "city"), tmp_path / "storage")
        result = cluster.submit("python", "jobs/pipeline.py", *options)
    finally:
        done.set()
        watcher.join()
    assert result.returncode == 0, result.stdout[-4000:]
    assert max(counts) >= 3  # the head and a node for each of two training ranks
    for word in ("R² on held-out tiles", "population", f"report: {tmp_path}/storage/tiny_test/report/report.html", "succeeded"):
        assert word in result.stdout
    assert (tmp_path / "storage" / "tiny_test" / "run.json").exists()

    deadline = time.monotonic() + LEAVE_S
    while cluster.num_nodes() > 1 and time.monotonic() < deadline:
        time.sleep(2)
    assert cluster.num_nodes() == 1


def test_stopping_ends_this_cluster_and_no_other(cluster):
    import ray

    state = json.loads((cluster.folder / "state.json").read_text())
    assert run_script("stop", cluster.folder).returncode == 0
    marked = f"URBANCLIP_LOCAL_CLUSTER={state['mark']}".encode()
    alive = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            alive += [environment.parent.name] if marked in environment.read_bytes() else []
        except OSError:  # it has ended meanwhile
            continue
    assert alive == []
    assert not cluster.folder.exists()
    assert not Path(state["sessions"]).exists()
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    assert "holds no cluster" in run_script("stop", cluster.folder).stdout
