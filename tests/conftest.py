"""What several tests share: one private Ray, one private S3 server and small vision-language models, for the whole session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
from chromium import find_browser, open_browser
from moto.server import ThreadedMotoServer
from s3_server import S3Server, missing_programs

from urbanclip_ray.dataflow import OWN_RAY


def pytest_configure() -> None:
    """A Ray that runs on this machine, or that the environment names, belongs to somebody else: never join it."""
    os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, **OWN_RAY)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def vision_language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a BLIP (`blip`) and a Qwen2-VL (`qwen2_vl`), small and with random weights."""
    from vision_language_models import make_blip, make_qwen2_vl

    folder = tmp_path_factory.mktemp("models")
    return {"blip": make_blip(folder / "blip"), "qwen2_vl": make_qwen2_vl(folder / "qwen2_vl")}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server. Where it is not installed the test is skipped, but `make test-all` has installed it."""
    if missing := missing_programs():
        message = f"no S3 server here ({', '.join(missing)} missing): `make test-all` installs it where it can"
        if os.environ.get("URBANCLIP_RAY_NEEDS_S3"):
            pytest.fail(message)
        pytest.skip(message)  # a stranger need not have apt or be root
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_s3_") as folder:
        server = S3Server(Path(folder) / "server")
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points this test's AWS variables to an endpoint."""

    def point(endpoint: str) -> None:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)

    return point


@pytest.fixture
def moto_s3(use_s3: Callable[[str], None]) -> Iterator[Any]:
    """boto3's client of an S3 that starts in a second, which this test's AWS variables point to; no proof of a real one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    use_s3(f"http://{host}:{port}")
    yield boto3.client("s3")
    server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Playwright's Browser. Where no Chromium is installed the test is skipped, but `make test-all` has installed one."""
    if find_browser() is None:
        message = "no Chromium here: `make test-all` installs it where it can"
        if os.environ.get("URBANCLIP_RAY_NEEDS_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)  # as above
    with open_browser() as opened:
        yield opened
