"""The chunked caption loss beside F.cross_entropy on all logits at once: peak memory and time, forward and backward.

The shapes are coca_ViT-B-32's decoder over CLIP's vocabulary, 64 captions of full length. Every run is a process of its own on
one core, as a training worker has by default, with the memory settings of one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from figures import Figure, interleaved

BATCH, PLACES, WIDTH, VOCABULARY = 64, 76, 512, 49_408
NUM_MEMORY_RUNS, NUM_TIME_RUNS = 3, 5
NUM_TIMED_CALLS = 3  # in one process, after a first one
KINDS = ("chunked", "plain")


def measure() -> list[Figure]:
    shape = f"batch {BATCH} x {PLACES} places, width {WIDTH}, vocabulary {VOCABULARY:,}; plain: cross_entropy of all logits"
    memory = interleaved(NUM_MEMORY_RUNS, **{kind: partial(run_child, kind, "fp32", "peak") for kind in KINDS})
    # CPU time, which on a core of one's own is the time that passes, and says the same on a busy machine
    seconds = interleaved(NUM_TIME_RUNS, **{kind: partial(run_child, kind, "bf16", "time") for kind in KINDS})
    return [
        as_figure("caption_loss_memory", memory, "MiB", 0.25, f"peak beyond inputs, fp32; {shape}"),
        as_figure("caption_loss_time", seconds, "CPU s", 1.0, f"one core, bf16 autocast, as training; {shape}"),
    ]


def as_figure(name: str, medians: dict[str, float], unit: str, limit: float, note: str) -> Figure:
    ours, peer = medians["chunked"], medians["plain"]
    return Figure(name, ours, peer, ours / peer, unit, limit, note)


def run_child(kind: str, precision: str, what: str) -> float:
    """Peak memory in MiB beyond what was held before, or CPU seconds of one call."""
    from urbanclip_ray.train.launch import CPU_ENVIRONMENT

    environment = os.environ | CPU_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind, precision, what]
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(found.stdout))


def in_child(kind: str, precision: str, what: str) -> float:
    import torch
    from torch.nn import functional as F

    from urbanclip_ray.model.losses import caption_loss

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, PLACES, WIDTH, generator=random).requires_grad_()
    projection = (torch.randn(WIDTH, VOCABULARY, generator=random) * WIDTH**-0.5).requires_grad_()
    labels = torch.randint(1, VOCABULARY, (BATCH, PLACES), generator=random)

    def plain() -> Any:
        valid = labels != 0
        return F.cross_entropy((hidden[valid] @ projection).float(), labels[valid], reduction="sum")

    def call() -> None:
        hidden.grad = projection.grad = None
        autocast: AbstractContextManager[Any] = nullcontext()
        if precision == "bf16":
            autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast:
            total = caption_loss(hidden, projection, labels, pad_id=0).total if kind == "chunked" else plain()
        (total / labels.numel()).backward()

    def timed() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    if what == "time":
        timed()
        return statistics.median(timed() for _ in range(NUM_TIMED_CALLS))
    before = held_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from what is held now
    call()
    return held_mib("VmHWM") - before


def held_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    print(json.dumps(in_child(*sys.argv[1:])))
