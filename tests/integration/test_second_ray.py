"""Another Ray that starts on the same machine is nobody's business: a pretraining goes on as if it were not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist
from small_run import ROOT, write_city

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.storage import publish
from urbanclip_ray.train.launch import pretrain

NODES = ROOT / "tests" / "distributed" / "several_nodes.py"
WATCHED_S = 20  # Ray Train's watchdog looks every second, but the second Ray answers only after some


@pytest.mark.slow
def test_training_is_left_alone_when_a_second_ray_starts(tmp_path, ray_cluster):
    starts = tmp_path / "starts"
    starts.mkdir()

    def start_a_second_ray(engine: Any, taken: int, num_steps: int) -> None:
        if taken != 2 or dist.get_rank() != 0:
            return
        (starts / str(os.getpid())).touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [sys.executable, str(NODES), "1"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | {"RAY_AUTH_MODE": "disabled"}
        ) as second:
            assert second.stdout is not None
            assert any(line.startswith("address ") for line in second.stdout)
            time.sleep(WATCHED_S)
            second.communicate()

    city = [f"source.uri={write_city(tmp_path / 'city')}", "source.metadata=tiles.csv", f"storage={tmp_path / 'storage'}"]
    config = apply_overrides(load_recipe("tiny_test"), city)
    shards = run_stages(config, ["tiles", "labels", "captions", "pairs", "splits", "shards"]).datasets["shards"]
    with publish(str(tmp_path / "pretrained"), "pretrain", {}, {"shards": shards}) as publication:
        pretrain(config, shards, publication, start_a_second_ray)
    assert len(list(starts.iterdir())) == 1  # the ranks were started once
