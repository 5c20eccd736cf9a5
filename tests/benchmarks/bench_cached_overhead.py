"""Time per sample of a contrastive batch in four cached forwards over the same batch in one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from figures import Figure, interleaved
from one_rank import VOCAB_SIZE, make_engine, process_group

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train.batches import TrainBatch, TrainStep
from urbanclip_ray.train.step import take_step

BATCH, NUM_PIECES, NUM_PLACES, IMAGE_PX = 256, 4, 24, 96
NUM_RUNS = 7
LIMIT = 1.45
STAGES = (1, 3)


def fixed_step(num_pieces: int) -> TrainStep:
    """The same rows in so many micro-batches."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, IMAGE_PX, IMAGE_PX, 3), dtype=torch.uint8, generator=random)
    tokens = torch.randint(4, VOCAB_SIZE, (BATCH, NUM_PLACES), generator=random)
    tokens[:, -1] = 0
    columns = (images, tokens, torch.arange(BATCH), torch.arange(BATCH))
    pieces = [TrainBatch(*parts) for parts in zip(*(column.chunk(num_pieces) for column in columns), strict=True)]
    return TrainStep(0, 0, BATCH * (NUM_PLACES - 2), pieces)


def seconds_per_sample(engine: Any, step: TrainStep, config: TrainConfig) -> float:
    start = time.perf_counter()
    take_step(engine, step, 100, config)
    return (time.perf_counter() - start) / BATCH


def measure_stage(stage: int) -> dict[str, float]:
    """In a process of its own, as ZeRO-3 changes torch for the rest of it. ms per sample."""
    with process_group(num_threads=2):
        functions = {}
        for name, num_pieces in (("plain", 1), ("cached", NUM_PIECES)):
            config = TrainConfig(
                micro_batch_size=BATCH // num_pieces,
                contrastive_batch_size=BATCH,
                global_batch_size=BATCH,
                lr=1e-4,
                zero_stage=stage,
            )
            engine, step = make_engine("coca_tiny_96", config), fixed_step(num_pieces)
            seconds_per_sample(engine, step, config)  # the first step allocates
            functions[name] = lambda engine=engine, step=step, config=config: 1000 * seconds_per_sample(engine, step, config)
        return interleaved(NUM_RUNS, **functions)


def measure() -> list[Figure]:
    figures = []
    for stage in STAGES:
        command = [sys.executable, __file__, str(stage)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("{"))
        found = json.loads(line)
        note = f"ZeRO {stage}, one rank, coca_tiny_96 in bf16, a batch of {BATCH} in {NUM_PIECES} forwards"
        name = "cached_overhead" if stage == 1 else f"cached_overhead_zero{stage}"
        figures.append(
            Figure(name, found["cached"], found["plain"], found["cached"] / found["plain"], "ms/sample", LIMIT, note)
        )
    return figures


if __name__ == "__main__":
    print(json.dumps(measure_stage(int(sys.argv[1]))))
