"""Optimizer steps on one CUDA GPU: ours and the released loop's, the largest contrastive batch, and generation.

    python tests/benchmarks/gpu_steps.py gpu_steps.json

It is no part of `make bench`, which needs no GPU. Captions are the paper's released ones, as in `large_steps.py`; pixels are
random, so the time is that of the step alone and not of reading tiles.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from large_steps import released_captions
from released_loop import CONTEXT, released_step

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.tokenize import open_clip_tokenizer
from urbanclip_ray.train.batches import TrainBatch, TrainStep, count_labels
from urbanclip_ray.train.engine import start_engine
from urbanclip_ray.train.speed import count_flops, measure_matrix_peak
from urbanclip_ray.train.step import take_step

BATCH, NUM_BATCHES, NUM_TIMED = 256, 4, 20
LARGE_BATCH = 128  # of coca_ViT-L-14
NEGATIVES, ROWS_PER_FORWARD = 32_768, 1_024
GENERATED_ROWS, GENERATED_TOKENS = 256, 40
CUDA = torch.device("cuda")


@contextmanager
def process_group() -> Iterator[None]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_model(architecture: str) -> CoCa:
    return build_model(open_clip_config(ModelConfig(architecture=architecture, tokenizer="open_clip"), None), seed=0)


def make_batches(rows: int) -> list[TrainBatch]:
    texts = released_captions(rows * NUM_BATCHES)
    texts = (texts * NUM_BATCHES)[: rows * NUM_BATCHES]
    tokenizer, random = open_clip_tokenizer(CONTEXT), torch.Generator().manual_seed(0)
    numbers = torch.arange(rows)
    return [
        TrainBatch(
            torch.randint(0, 256, (rows, 224, 224, 3), dtype=torch.uint8, generator=random),
            tokenizer.encode(texts[at * rows : (at + 1) * rows]),
            numbers,
            numbers,
        )
        for at in range(NUM_BATCHES)
    ]


def train_config(rows: int, rows_per_forward: int, precision: str) -> TrainConfig:
    sizes = {"contrastive_batch_size": rows, "global_batch_size": rows, "micro_batch_size": rows_per_forward}
    return TrainConfig(**sizes, lr=3e-5, precision=precision, zero_stage=0)


def seconds_per_step(step: Callable[[int], Any], num_steps: int = NUM_TIMED) -> float:
    """The median of steps timed one by one, after three that warm up."""
    taken = []
    for number in range(num_steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[3:])


def run_ours(architecture: str, rows: int, precision: str) -> dict[str, float]:
    config = train_config(rows, rows, precision)
    steps = [TrainStep(0, 0, count_labels(batch.tokens), [batch]) for batch in make_batches(rows)]
    engine = start_engine(make_model(architecture), config)
    result, num_flops = count_flops(partial(take_step, engine, steps[0], 100, config))
    for step in steps[1:]:
        num_flops += count_flops(partial(take_step, engine, step, 100, config))[1]
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_step(lambda number: take_step(engine, steps[number % NUM_BATCHES], 100, config))
    peak = measure_matrix_peak(CUDA, precision)
    return {
        "loss": result.record["loss"],
        "samples_per_s": rows / seconds,
        "tflops_per_s": num_flops / NUM_BATCHES / seconds / 1e12,
        "peak_tflops_per_s": peak / 1e12,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def run_released(rows: int, precision: str) -> dict[str, float]:
    """The peer, from the same weights and on the same batches."""
    released = released_step(make_model("coca_ViT-B-32"), precision, CUDA)
    batches = make_batches(rows)
    losses = []

    def step(number: int) -> None:
        batch = batches[number % NUM_BATCHES]
        losses.append(released(normalise(batch.images.to(CUDA)), batch.tokens.to(CUDA)))

    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_step(step)
    return {
        "loss": losses[0],
        "samples_per_s": rows / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def run_negatives() -> dict[str, float]:
    """One contrastive batch in many forwards, its embeddings cached."""
    config = train_config(NEGATIVES, ROWS_PER_FORWARD, "bf16")
    (first, *_) = make_batches(ROWS_PER_FORWARD)
    pieces = []
    for number in range(NEGATIVES // ROWS_PER_FORWARD):
        rows = first.row_ids + number * ROWS_PER_FORWARD
        pieces.append(first._replace(text_keys=rows, row_ids=rows))
    step = TrainStep(0, 0, sum(count_labels(piece.tokens) for piece in pieces), pieces)
    engine = start_engine(make_model("coca_ViT-B-32"), config)
    take_step(engine, step, 100, config)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    take_step(engine, step, 100, config)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "seconds_per_step": seconds,
        "samples_per_s": NEGATIVES / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def run_generation() -> dict[str, float]:
    """Greedy, with keys and values kept; no text ends before its last token."""
    from urbanclip_ray.model.generation import likeliest, special_tokens, write
    from urbanclip_ray.model.text_cache import CachedTexts

    model = make_model("coca_ViT-B-32").to(CUDA, torch.bfloat16).eval()
    images = torch.randn(GENERATED_ROWS, 3, 224, 224, device=CUDA, dtype=torch.bfloat16)
    special = special_tokens(open_clip_tokenizer(CONTEXT))
    special = special._replace(never=(*special.never, special.end_id))

    @torch.inference_mode()
    def describe(_: int) -> None:
        texts = CachedTexts(model, model.encode_image(images)[1], 1, GENERATED_TOKENS)
        start = torch.full((GENERATED_ROWS,), special.start_id, device=CUDA)
        write(texts, start, special, GENERATED_TOKENS, likeliest)

    seconds = seconds_per_step(describe, num_steps=5)
    return {"captions_per_s": GENERATED_ROWS / seconds, "tokens_per_s": GENERATED_ROWS * GENERATED_TOKENS / seconds}


def main(output: str) -> None:
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours_fp32": partial(run_ours, "coca_ViT-B-32", BATCH, "fp32"),
        "released_fp32": partial(run_released, BATCH, "fp32"),
        "released_autocast": partial(run_released, BATCH, "bf16"),
        "ours_bf16": partial(run_ours, "coca_ViT-B-32", BATCH, "bf16"),
        "ours_bf16_ViT-L-14": partial(run_ours, "coca_ViT-L-14", LARGE_BATCH, "bf16"),
        "negatives": run_negatives,
        "generation": run_generation,
    }
    with process_group():
        for name, run in runs.items():
            try:
                record[name] = run()
            except Exception as error:  # the others are still worth their time on a GPU
                record[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, record[name], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            Path(output).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
