"""Optimizer steps of coca_ViT-B-32 on the paper's released captions: ours, and the released code's (`released_loop.py`).

Every run is a process of its own, as two such models and their optimizers do not fit side by side: `run_child` starts it, and
this file is its program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH, NUM_BATCHES = 16, 3
NUM_THREADS = os.cpu_count() or 1
PEAK_SIDE = 2048
DATA = Path(os.environ.get("URBANCLIP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "urbanclip"


def run_child(who: str, precision: str) -> dict[str, float]:
    """Of `ours` or `theirs`: samples a second, the loss of the first step, and for ours FLOP/s over the matrix peak."""
    from urbanclip_ray.train.launch import CPU_ENVIRONMENT

    environment = os.environ | CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(NUM_THREADS)}
    found = subprocess.run(
        [sys.executable, __file__, who, precision], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("{"))
    record: dict[str, float] = json.loads(line)
    return record


def released_captions(count: int) -> list[str]:
    """Different ones of Beijing, as they come."""
    file = DATA / "Beijing_captions.json"
    if not file.exists():
        raise SystemExit(
            f"the released captions are not at {file}: set URBANCLIP_SHARED_DATA to the folder that holds urbanclip/"
        )
    (items,) = json.loads(file.read_text())
    return list(dict.fromkeys(item["caption"] for item in items))[:count]


def make_batches() -> list[tuple[Any, Any]]:
    """Pixels uint8 [rows, px, px, 3] and token ids trimmed to the batch's longest text."""
    import torch
    from released_loop import CONTEXT

    from urbanclip_ray.model.tokenize import open_clip_tokenizer

    texts, tokenizer = released_captions(BATCH * NUM_BATCHES), open_clip_tokenizer(CONTEXT)
    pixels = torch.randint(
        0, 256, (NUM_BATCHES, BATCH, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return [(pixels[at], tokenizer.encode(texts[at * BATCH : (at + 1) * BATCH])) for at in range(NUM_BATCHES)]


def make_model() -> Any:
    from urbanclip_ray.config import ModelConfig
    from urbanclip_ray.model.architectures import open_clip_config
    from urbanclip_ray.model.coca import build_model

    return build_model(open_clip_config(ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip"), None), seed=0)


def run_ours(precision: str) -> dict[str, float]:
    from functools import partial

    import torch
    from one_rank import process_group

    from urbanclip_ray.config import TrainConfig
    from urbanclip_ray.train.batches import TrainBatch, TrainStep, count_labels
    from urbanclip_ray.train.engine import start_engine
    from urbanclip_ray.train.speed import count_flops, measure_matrix_peak
    from urbanclip_ray.train.step import take_step

    config = TrainConfig(
        micro_batch_size=BATCH,
        contrastive_batch_size=BATCH,
        global_batch_size=BATCH,
        lr=3e-5,
        precision=precision,
        zero_stage=0,  # one rank has nobody to share with
    )
    rows = torch.arange(BATCH)
    steps = [
        TrainStep(0, 0, count_labels(tokens), [TrainBatch(pixels, tokens, rows, rows)]) for pixels, tokens in make_batches()
    ]
    with process_group(NUM_THREADS):
        engine = start_engine(make_model(), config)
        counted = [count_flops(partial(take_step, engine, step, 100, config)) for step in steps]
        peak = measure_matrix_peak(engine.device, precision, PEAK_SIDE)
        start = time.perf_counter()
        for step in steps:
            take_step(engine, step, 100, config)
        seconds = time.perf_counter() - start
        peak = max(peak, measure_matrix_peak(engine.device, precision, PEAK_SIDE))
    flops = sum(num_flops for _, num_flops in counted)
    return {
        "samples_per_s": BATCH * len(steps) / seconds,
        "loss": counted[0][0].record["loss"],
        "flops_per_s": flops / seconds,
        "peak_flops_per_s": peak,
    }


def run_theirs(precision: str) -> dict[str, float]:
    import torch
    from released_loop import released_step

    from urbanclip_ray.model.preprocess import normalise

    torch.set_num_threads(NUM_THREADS)
    step = released_step(make_model(), precision, torch.device("cpu"))
    batches = [(normalise(pixels), tokens) for pixels, tokens in make_batches()]
    first_loss = step(*batches[0])
    start = time.perf_counter()
    for batch in batches:
        step(*batch)
    return {"samples_per_s": BATCH * len(batches) / (time.perf_counter() - start), "loss": first_loss}


if __name__ == "__main__":
    print(json.dumps({"ours": run_ours, "theirs": run_theirs}[sys.argv[1]](sys.argv[2])))
