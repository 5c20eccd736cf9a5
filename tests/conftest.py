"""What several tests share: one private Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
