"""A pretraining that loses a node goes on with the workers that are left, from its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from small_run import ROOT, write_city

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.storage import publish
from urbanclip_ray.train.device import DEVICE_FILE
from urbanclip_ray.train.launch import pretrain

pytestmark = pytest.mark.fault

NODES = ROOT / "tests" / "distributed" / "several_nodes.py"
LOST_AFTER_STEP = 5
# what Ray otherwise waits before it takes a silent node for dead is half a minute
QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3", "RAY_AUTH_MODE": "disabled"}


@contextmanager
def nodes_of_one_cpu(num_nodes: int) -> Iterator[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(NODES), str(num_nodes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | QUICK) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("address "))
        process.communicate(timeout=60)


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    import ray

    ray.shutdown()  # of another test's: this process joins the cluster below
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    with nodes_of_one_cpu(2) as found:
        monkeypatch.setenv("RAY_ADDRESS", found)
        yield found
        ray.shutdown()


def test_a_lost_node_leads_to_a_restart_at_the_size_that_is_left(tmp_path, address):
    notes = tmp_path / "notes"
    notes.mkdir()

    def lose_a_node(engine: Any, taken: int, num_steps: int) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        (notes / f"{num_ranks}-{rank}-{taken}").touch()
        on_head = "--head" in Path(f"/proc/{os.getppid()}/cmdline").read_text()  # its loss would end the cluster
        if num_ranks > 1 and taken == LOST_AFTER_STEP and not on_head:
            os.kill(os.getppid(), signal.SIGKILL)  # the raylet, and at once its worker: the whole node is gone
            os.kill(os.getpid(), signal.SIGKILL)

    city = [f"source.uri={write_city(tmp_path / 'city')}", "source.metadata=tiles.csv", f"storage={tmp_path / 'storage'}"]
    config = apply_overrides(
        load_recipe("tiny_test"), [*city, "resources.num_workers=[1, 2]", "train.epochs=6", "train.checkpoint_every_steps=2"]
    )
    shards = run_stages(config, ["tiles", "labels", "captions", "pairs", "splits", "shards"]).datasets["shards"]
    with publish(str(tmp_path / "pretrained"), "pretrain", {}, {"shards": shards}) as publication:
        pretrain(config, shards, publication, lose_a_node)
    folder = Path(publication.data_uri)
    history = json.loads((folder / "history.json").read_text())
    steps = [record["step"] for record in history["train"]]
    assert steps == list(range(1, len(steps) + 1))
    assert json.loads((folder / DEVICE_FILE).read_text())["num_ranks"] == 1
    taken_by = {(int(num_ranks), int(taken)) for num_ranks, _, taken in (note.name.split("-") for note in notes.iterdir())}
    assert max(taken for num_ranks, taken in taken_by if num_ranks == 2) == LOST_AFTER_STEP
    resumed_at = min(taken for num_ranks, taken in taken_by if num_ranks == 1)
    assert resumed_at in (3, 5)  # after the checkpoint of step 2 or 4, which may still have been on its way
