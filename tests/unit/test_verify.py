"""The verification of hardware: refused where there is no GPU, the same code on a CPU, and a record that says which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from urbanclip_ray.config import ResourcesConfig
from urbanclip_ray.verify import VerificationError, find_device

ROOT = Path(__file__).parents[2]


def verify(*arguments: str, ray_address: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": ray_address} if ray_address else {}
    command = [sys.executable, str(ROOT / "jobs" / "verify_gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=ROOT)


@pytest.fixture
def no_gpu(ray_cluster) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU: what is refused without one cannot be seen here")


def test_without_a_gpu_it_is_refused_with_the_way_out(no_gpu, tmp_path):
    result = verify("--output", str(tmp_path / "gpu.json"), ray_address=ray.get_runtime_context().gcs_address)
    assert result.returncode == 1
    assert "error: 0 GPUs are visible to Ray and 1 needed" in result.stderr
    assert "python jobs/verify_gpu.py --cpu" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_more_gpus_than_there_are_is_refused_with_both_numbers(no_gpu):
    with pytest.raises(VerificationError, match="0 GPUs are visible to Ray and 4 needed"):
        find_device(ResourcesConfig(use_gpu=True, num_workers=4))


@pytest.mark.slow
def test_the_same_code_on_a_cpu_writes_a_record_that_says_so(tmp_path):
    result = verify("--cpu", "--output", str(tmp_path / "cpu.json"))
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["device"]["kind"] == "cpu"
    assert "says nothing of GPUs" in record["device"]["note"]
    assert record["training"]["nccl"] is False
    assert record["training"]["images_per_s"] > 0
    assert record["training"]["last_step"]["loss"] < record["training"]["first_step"]["loss"]
    assert record["training"]["last_step"]["step"] == record["training"]["steps"]
    assert set(record["checks"].values()) == {True}
    assert {"captions", "pretrain", "embeddings", "probe"} <= set(record["stages"])
    assert record["stages"]["embeddings"]["rows"] == 200
    assert all(stage["rows_per_s"] > 0 for stage in record["stages"].values())
    assert {entry["part"] for entry in record["retrieval"]} == {"val", "test"}
    assert {entry["method"] for entry in record["r2"]} >= {"pretrained", "coordinates", "mean"}
