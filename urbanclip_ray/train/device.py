"""What a rank trained on, and how much memory that took: written beside the weights."""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.distributed as dist

DEVICE_FILE = "device.json"


def describe_rank(device: torch.device, precision: str) -> dict[str, Any]:
    """This rank's device, the precision and the collectives' backend, and peak memory in bytes: of the process, and of torch on
    a GPU."""
    record: dict[str, Any] = {
        "device": device.type,
        "precision": precision,
        "backend": dist.get_backend(),
        "num_ranks": dist.get_world_size(),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
    }
    if device.type == "cuda":
        record |= {
            "name": torch.cuda.get_device_name(device),
            "peak_device_bytes": torch.cuda.max_memory_allocated(device),
        }
    return record
