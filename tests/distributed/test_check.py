"""Checks and refusals through the real jobs, on a real cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from urbanclip_ray.dataflow import JOB_CONFIG_VARIABLE

ROOT = Path(__file__).parents[2]
LIMIT_S = 60  # every check and every refusal ends within it
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def clean_environment(**more: str) -> dict[str, str]:
    """Ours without what tells Ray where to go and who we are: a Ray in this process may have set it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *AUTHENTICATION)}
    return kept | more


@contextmanager
def several_nodes(num_nodes: int, environment: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("several_nodes.py")), str(num_nodes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        addresses = (line.split()[1] for line in process.stdout if line.startswith("address "))
        yield next(addresses)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with several_nodes(2, clean_environment(RAY_AUTH_MODE="disabled")) as found:
        yield found


@pytest.fixture
def city(tmp_path) -> Path:
    folder = tmp_path / "city"
    folder.mkdir()
    for at in range(12):
        Image.fromarray(np.full((16, 16, 3), at, np.uint8)).save(folder / f"{at}.png")
    return folder


def words(table: str) -> str:
    """What a table says, without its lines."""
    return " ".join(table.replace("│", " ").split())


def run_pipeline(city: Path, *options: str, storage: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--recipe", "tiny_test", "--set", f"source.uri={city}"]
    start = time.monotonic()
    result = subprocess.run(
        [*command, "--storage", storage or str(city.parent / "storage"), *options],
        capture_output=True,
        text=True,
        timeout=150,
        env=clean_environment(COLUMNS="200", **environment),
        cwd=city.parent,
    )
    assert time.monotonic() - start < LIMIT_S
    return result


@pytest.mark.slow
def test_a_cluster_that_can_do_the_run_passes_every_check(city, address):
    result = run_pipeline(city, "--check", RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert result.returncode == 0, result.stdout + result.stderr
    shown = words(result.stdout)
    assert "FAILED" not in shown
    for part in ("2 nodes on 1 host,", "conditionally put from 2 nodes", "2 fit on 2 nodes (2 CPU)", "2 workers over gloo"):
        assert part in shown
    assert list((city.parent / "storage").rglob("*")) == []  # nothing is left behind


def test_more_workers_than_can_ever_be_had_are_refused_before_any_work(city, address):
    options = ["--set", "resources.num_workers=4", "--set", "train.micro_batch_size=4"]
    result = run_pipeline(city, *options, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    assert "error: 4 training workers of 1 CPU each: 2 fit on 2 nodes (2 CPU): lower resources.num_workers" in result.stderr
    assert "Traceback" not in result.stderr
    assert list((city.parent / "storage").rglob("*")) == []


def test_a_storage_that_cannot_be_written_fails_the_check_with_its_fix(city, address):
    blocked = city.parent / "a_file"
    blocked.write_text("in the place of a folder")
    result = run_pipeline(city, "--check", storage=str(blocked), RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    shown = words(result.stdout)
    assert "storage FAILED" in shown
    assert "set --storage to a place that every node can write" in shown
    assert "not tried: mend the above first" in shown


def test_a_relative_path_in_an_uploaded_directory_is_refused_before_any_ray_is_sought(city):
    job = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}})
    environment = {JOB_CONFIG_VARIABLE: job, "RAY_ADDRESS": "127.0.0.1:1"}
    result = run_pipeline(city, storage="runs", **environment)
    assert result.returncode == 1
    assert result.stderr.startswith("error: storage=runs lies in the working directory that was uploaded with this job")


@contextmanager
def node_of_another_host(address: str, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """A node of the cluster that runs under another host name, which a namespace of its own allows."""
    ray = Path(sys.executable).parent / "ray"
    start = f"hostname another-host && exec {ray} start --address={address} --num-cpus=1 --block"
    with (
        (folder / "node.log").open("w+") as log,
        subprocess.Popen(
            ["unshare", "--map-root-user", "--uts", "sh", "-c", start], env=environment, stdout=log, stderr=subprocess.STDOUT
        ) as node,
    ):
        deadline = time.monotonic() + LIMIT_S
        while "--block" not in (said := (folder / "node.log").read_text()) and time.monotonic() < deadline:
            if node.poll() is not None:
                pytest.skip(f"this machine lets nobody run a node under another host name: {said.strip()}")
            time.sleep(0.2)
        yield
        node.terminate()


@pytest.mark.slow
def test_local_paths_on_two_hosts_are_refused(city, tmp_path):
    environment = clean_environment(RAY_AUTH_MODE="disabled")
    with several_nodes(1, environment) as address, node_of_another_host(address, environment, tmp_path):
        result = run_pipeline(city, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
        assert result.returncode == 1
        assert f"source.uri={city}: local paths, but the cluster has 2 hosts: another-host (" in result.stderr
        assert "Use s3://bucket/prefix" in result.stderr


def test_an_address_where_no_ray_answers_is_named(city):
    result = run_pipeline(city, RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    assert "no Ray cluster can be joined at RAY_ADDRESS=127.0.0.1:1" in result.stderr


@pytest.mark.slow  # Ray tries a wrong token for half a minute
def test_a_cluster_that_asks_for_a_token_says_so(city, tmp_path):
    right, wrong = secrets.token_hex(32), secrets.token_hex(32)
    home = {"HOME": str(tmp_path)}  # where nobody's token lies
    with several_nodes(1, clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=right, **home)) as found:
        fine = run_pipeline(
            city,
            "--check",
            "--set",
            "resources.num_workers=1",
            "--set",
            "train.micro_batch_size=16",
            RAY_ADDRESS=found,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=right,
            **home,
        )
        assert fine.returncode == 0, fine.stdout + fine.stderr
        for credentials in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": wrong}):
            result = run_pipeline(city, RAY_ADDRESS=found, **credentials, **home)
            assert result.returncode == 1
            assert "RAY_AUTH_TOKEN_PATH" in result.stderr
            assert right not in result.stderr + result.stdout
