"""What saving costs the training: the same steps with a checkpoint every 50 of them, uploaded to an S3 server, and without."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "distributed")]

import ranks
from figures import Figure, interleaved
from s3_server import BUCKET, S3Server, missing_programs

from urbanclip_ray.config import ModelConfig, TrainConfig

NUM_RANKS = 2
NUM_STEPS, SAVE_EVERY_STEPS = 150, 50
NUM_RUNS = 3
TIMEOUT_S = 3600  # of all runs
ROWS = 128  # over both ranks; a step of about half a second on 2 cores
VOCAB_SIZE, NUM_TOKENS = 2000, 32
MODEL = ModelConfig(architecture="coca_tiny_27", vocab_size=VOCAB_SIZE)
CONFIG = TrainConfig(micro_batch_size=ROWS // NUM_RANKS, contrastive_batch_size=ROWS, global_batch_size=ROWS)
LIMIT = 0.03  # of the training time


@contextmanager
def storage() -> Iterator[tuple[str, str]]:
    """A URI to save to, and what it is."""
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_bench_") as folder:
        if missing := missing_programs():
            yield f"{folder}/checkpoints", f"a local folder, as there is no S3 server here ({missing[0]} missing: make s3)"
            return
        server = S3Server(Path(folder) / "server")
        try:
            server.start()
            keys = server.add_user("bench")
            server.client(keys).create_bucket(Bucket=BUCKET)
            os.environ |= server.environment(keys)
            yield f"s3://{BUCKET}/checkpoints", "Ceph's S3 gateway on the same cores"
        finally:
            server.stop()


def train_in_rank(root: str) -> dict[str, float]:
    """Median seconds of a run with saving and of one without, in turn, by one engine."""
    import torch
    import torch.distributed as dist

    from urbanclip_ray.model.architectures import open_clip_config
    from urbanclip_ray.model.coca import build_model
    from urbanclip_ray.train.batches import TrainBatch, TrainStep
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
    from urbanclip_ray.train.engine import start_engine
    from urbanclip_ray.train.step import take_step

    model = build_model(open_clip_config(MODEL, VOCAB_SIZE), seed=0)
    engine = start_engine(model, CONFIG)
    rows = ROWS // NUM_RANKS
    random = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randint(0, 256, (rows, model.image_px, model.image_px, 3), dtype=torch.uint8, generator=random)
    tokens = torch.randint(4, VOCAB_SIZE, (rows, NUM_TOKENS), generator=random)
    batch = TrainBatch(images, tokens, torch.arange(rows) + rows * dist.get_rank(), torch.arange(rows))
    taken = 0

    def train(writer: CheckpointWriter | None) -> float:
        nonlocal taken
        dist.barrier()
        before = time.perf_counter()
        for number in range(1, NUM_STEPS + 1):
            take_step(engine, TrainStep(number, 0, rows * (NUM_TOKENS - 1), [batch]), 10 * NUM_STEPS, CONFIG)
            if writer is not None and number % SAVE_EVERY_STEPS == 0:
                writer.save(engine, taken + number, history={"train": [], "validation": []}, progress={}, files={})
        if writer is not None:
            writer.close()  # so that the last upload counts in full
        dist.barrier()
        taken += NUM_STEPS
        return time.perf_counter() - before

    writer = CheckpointWriter(root, keep=2)
    train(None)  # the first steps are slower
    found = interleaved(NUM_RUNS, saving=lambda: train(writer), plain=lambda: train(None))
    return found | {"parameters": float(sum(value.numel() for value in model.parameters()))}


def measure() -> list[Figure]:
    ranks.RESULT_TIMEOUT_S = TIMEOUT_S
    with storage() as (root, what):
        found: dict[str, Any] = ranks.run_ranks(train_in_rank, NUM_RANKS, root)[0]
    ratio = found["saving"] / found["plain"] - 1
    note = (
        f"{NUM_RANKS} ranks, {MODEL.architecture}, {NUM_STEPS} steps, {3 * 4 * found['parameters'] / 1e6:.0f} MB every "
        f"{SAVE_EVERY_STEPS} to {what}; ratio: extra share of the training time"
    )
    return [Figure("checkpoint_stall", found["saving"], found["plain"], ratio, "s", LIMIT, note)]
