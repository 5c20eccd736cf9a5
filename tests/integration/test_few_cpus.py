"""Reading tasks and actors share few CPUs: neither waits for what the other holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_run import NUM_COLUMNS, NUM_ROWS, ROOT, city_options, run_job, write_city

NODES = ROOT / "tests" / "distributed" / "several_nodes.py"


@contextmanager
def cluster(num_nodes: int, num_gpus: int) -> Iterator[str]:
    """The address of nodes with one CPU each, the last of them with so many GPUs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(NODES), str(num_nodes), "--gpus", str(num_gpus)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | {"RAY_AUTH_MODE": "disabled"}
    ) as nodes:
        assert nodes.stdout is not None
        yield next(line.split()[1] for line in nodes.stdout if line.startswith("address "))
        nodes.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "gpus_per_actor"), [((1, 0), 0), ((2, 1), 1)], ids=["one CPU", "one node of two with a GPU"])
def test_captions_are_made_where_actors_could_hold_every_cpu(nodes, gpus_per_actor, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    options = city_options(write_city(tmp_path / "city"), tmp_path / "storage")
    options += ["--set", "caption.num_actors=2", "--set", f"caption.gpus_per_actor={gpus_per_actor}"]
    options += ["--set", "caption.tiles_per_batch=8", "--set", "resources.shared_filesystem=true"]
    with cluster(*nodes) as address:
        for job in ("ingest", "caption", "refine"):
            result = run_job(job, *options, ray_address=address)
            assert result.returncode == 0, result.stderr[-4000:]
    (manifest,) = (tmp_path / "storage" / "tiny_test" / "pairs").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["facts"]["tiles"] == NUM_COLUMNS * NUM_ROWS
