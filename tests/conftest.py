"""What several tests share: one private Ray, one private S3 server and small vision-language models, for the whole session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from chromium import find_browser, open_browser
from s3_server import S3Server, missing_programs


def pytest_configure() -> None:
    """A Ray that runs on this machine, or that the environment names, belongs to somebody else: never join it."""
    os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2)
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
