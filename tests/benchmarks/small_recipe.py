"""The small recipe's training on ranks of one core each, with its real reader: samples a second, and the wait for data."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import ranks
from real_tiles import world_shards

from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.train.launch import CPU_ENVIRONMENT

RECIPE = load_recipe("rsicd_small")
ROWS = 128  # of a rank and step
NUM_STEPS, NUM_WARM_UP = 12, 2
TILE_PX, IMAGE_PX = 54, 224  # Blue Marble, enlarged to the size of RSICD's images
TIMEOUT_S = 1800


def train(num_ranks: int) -> dict[str, float]:
    """Medians over steps and ranks."""
    ranks.RESULT_TIMEOUT_S = TIMEOUT_S
    os.environ |= CPU_ENVIRONMENT
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_bench_") as folder:
        world_shards(Path(folder), num_ranks * ROWS * NUM_STEPS, TILE_PX, IMAGE_PX)
        found = ranks.run_ranks(train_in_rank, num_ranks, f"{folder}/shards")
    return {name: median(rank[name] for rank in found) for name in found[0]}


def train_in_rank(shards_uri: str) -> dict[str, float]:
    import torch.distributed as dist
    from one_rank import make_engine, make_steps

    from urbanclip_ray.storage import open_dataset
    from urbanclip_ray.train.speed import Speedometer
    from urbanclip_ray.train.step import take_step

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})  # what prepares the data has no core of its own
    rows = ROWS * dist.get_world_size()
    config = RECIPE.train.model_copy(
        update={"epochs": 1, "micro_batch_size": ROWS, "contrastive_batch_size": rows, "global_batch_size": rows}
    )
    engine = make_engine(RECIPE.model.architecture, config, RECIPE.model.patch_dropout)
    steps = make_steps(open_dataset(shards_uri), engine, config)
    speed = Speedometer(engine.device, config, NUM_STEPS, 0)
    figures = [speed.tick(take_step(engine, step, NUM_STEPS, config).num_tokens) for step in speed.waits(steps)]
    return {name: median(step[name] for step in figures[NUM_WARM_UP:]) for name in ("samples_per_s", "data_wait_share")}
