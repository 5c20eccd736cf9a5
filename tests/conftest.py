"""What several tests share: one private Ray, and small vision-language models, for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray


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
