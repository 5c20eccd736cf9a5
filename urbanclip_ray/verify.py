"""Whether the whole walk runs on the hardware at hand, and how fast: caption ─▶ pretrain ─▶ embed ─▶ probe, as one record.

The figures say that the code runs on this device. They do not say how good the method is, nor how fast a large run is: the
first steps of a GPU are its slowest.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
from typing import Any

import ray

from urbanclip_ray import dataflow
from urbanclip_ray.config import ResourcesConfig, RunConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.libraries import library_versions
from urbanclip_ray.pipeline import run_stage
from urbanclip_ray.representations import stages_of
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import read_bytes
from urbanclip_ray.terminal import open_console
from urbanclip_ray.train.device import DEVICE_FILE

WARM_UP_STEPS = 3  # compile, allocate and fill caches: left out of the training speed
SAID_BY_CPU = "CPU: this says nothing of GPUs"


class VerificationError(UserError, RuntimeError):
    """Hardware that is not there, or a run on it that is not sound; the message says what to do."""


def verify(config: RunConfig) -> dict[str, Any]:
    """Make every stage of a recipe and say on what, how fast and how well; JSON-ready.

    `checks` maps what must hold to whether it does. Stages that were complete before have no seconds. Raises
    :class:`VerificationError` where the config asks for a GPU and none can be used.
    """
    dataflow.connect()
    device = find_device(config.resources)
    run, seconds = _make_stages(config)
    trained_on = _read_json(run, "pretrain", DEVICE_FILE)
    steps = _read_json(run, "pretrain", "history.json")["train"]
    return {
        "device": device,
        "libraries": library_versions(),
        "config": config.model_dump(mode="json"),
        "stages": {name: _speed(run, name, made_s) for name, made_s in seconds.items()},
        "training": trained_on
        | {
            "nccl": trained_on["backend"] == "nccl",
            "steps": len(steps),
            "images_per_s": _training_speed(steps),
            "first_step": _losses(steps[0]),
            "last_step": _losses(steps[-1]),
        },
        "retrieval": _read_json(run, "retrieval", "retrieval.json"),
        "r2": _r2(run),
        "checks": _checks(run, steps, device, trained_on),
    }


def find_device(resources: ResourcesConfig) -> dict[str, Any]:
    """What the run will use; raises :class:`VerificationError` where a GPU is asked for and Ray or torch sees none."""
    if not resources.use_gpu:
        return {"kind": "cpu", "name": platform.machine(), "num_cpus": os.cpu_count(), "note": SAID_BY_CPU}
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if num_gpus < resources.min_workers:
        raise VerificationError(
            f"{num_gpus:g} GPUs are visible to Ray and {resources.min_workers} needed: see whether nvidia-smi lists one on a "
            "node and CUDA_VISIBLE_DEVICES does not hide it (a cluster that adds GPU nodes on demand must have one up first). "
            "The same code runs without a GPU by: python jobs/verify_gpu.py --cpu"
        )
    device: dict[str, Any] = ray.get(ray.remote(num_gpus=1)(_describe_gpu).remote())
    if device["kind"] != "cuda":
        raise VerificationError(
            f"Ray has {num_gpus:g} GPUs, but torch {device['torch']} (built for CUDA {device['cuda']}) can use none of them: "
            f"the driver is {device['driver'] or 'not found'}; install a driver that this CUDA accepts"
        )
    return device


def _describe_gpu() -> dict[str, Any]:
    """The first GPU that this process may use."""
    import torch

    record: dict[str, Any] = {"kind": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda, "driver": _driver()}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        record |= {
            "kind": "cuda",
            "name": found.name,
            "memory_bytes": found.total_memory,
            "compute_capability": f"{found.major}.{found.minor}",
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return record


def _driver() -> str | None:
    """The version of NVIDIA's driver, None where its tool is not installed or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=30)  # noqa: S603  a fixed command
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _make_stages(config: RunConfig) -> tuple[Run, dict[str, float | None]]:
    """The run and the seconds that each stage took, None where it was complete before."""
    console = open_console()
    run = Run(config)
    seconds = {stage.name: run_stage(run, stage, console, make=True) for stage in stages_of(config) if stage.wanted(run)}
    return run, seconds


def _speed(run: Run, stage: str, made_s: float | None) -> dict[str, Any]:
    """Rows that came out of a stage per second, start of its processes included."""
    manifest = run.datasets[stage].manifest
    speed = manifest.rows_out / made_s if made_s else None
    return {"unit": manifest.unit, "rows": manifest.rows_out, "seconds": made_s, "rows_per_s": speed}


def _training_speed(steps: list[dict[str, float]]) -> float:
    """Images per second of the middle step, on all ranks together."""
    return statistics.median(step["samples_per_s"] for step in steps[WARM_UP_STEPS:] or steps)


def _losses(step: dict[str, float]) -> dict[str, float]:
    return {name: step[name] for name in ("step", "loss", "contrastive", "caption", "logit_scale")}


def _r2(run: Run) -> list[dict[str, Any]]:
    scores = _read_json(run, "probe", "scores.json")["probe"]
    return [score for score in scores if score["metric"] == "r2"]


def _checks(run: Run, steps: list[dict[str, float]], device: dict[str, Any], trained_on: dict[str, Any]) -> dict[str, bool]:
    manifests = {name: dataset.manifest for name, dataset in run.datasets.items()}
    checks = {
        "every loss is finite": all(math.isfinite(step["loss"]) for step in steps),
        "the loss fell": steps[-1]["loss"] < steps[0]["loss"],
        "every tile has a vector": manifests["embeddings"].rows_out == manifests["tiles"].rows_out,
    }
    if device["kind"] == "cuda":
        checks["trained on a GPU, over NCCL"] = trained_on["device"] == "cuda" and trained_on["backend"] == "nccl"
    return checks


def _read_json(run: Run, stage: str, name: str) -> Any:
    return json.loads(read_bytes(run.datasets[stage].file_uri(name)))
