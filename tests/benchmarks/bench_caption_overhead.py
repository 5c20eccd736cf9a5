"""The captioning job over a bare loop of the same model on the same batches, after start-up.

Start-up (Ray, the actor, its model) is excluded by difference: a job over few batches is taken from one over many, so that
what is left is what the further batches cost: reading, describing, keeping texts, writing and counting. One actor and one
thread of torch on both sides; every tile is another one, so that nothing is found in the store.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import ray
import torch
from figures import Figure, interleaved

from urbanclip_ray.captioners.base import Tile
from urbanclip_ray.captioners.caption import TILE_COLUMNS, CaptionWork, caption_tiles
from urbanclip_ray.captioners.model_files import resolve_model
from urbanclip_ray.captioners.vision_language import VisionLanguageCaptioner
from urbanclip_ray.config import CaptionConfig, DecodingConfig, IngestConfig, PixelsConfig, WorldSource
from urbanclip_ray.sources import open_source
from urbanclip_ray.sources.ingest import ingest_tiles
from urbanclip_ray.storage import Dataset, open_dataset, publish

sys.path.insert(0, str(Path(__file__).parents[1]))
from vision_language_models import make_blip

TILES_PER_BATCH = 16
FEW, MANY = 2, int(os.environ.get("BENCH_BATCHES", "22"))  # batches
NUM_RUNS = 3
LIMIT = 1.08
BLIP = {"num_hidden_layers": 6, "num_attention_heads": 6, "hidden_size": 384, "intermediate_size": 1536}
IMAGE_PX = 192


def make_tiles(folder: Path, num_tiles: int) -> Dataset:
    with publish(str(folder), "tiles", {}, {}) as publication:
        source = open_source(WorldSource(tile_px=54, stride_px=27, max_tiles=num_tiles))
        ingest_tiles(source, IngestConfig(tiles_per_batch=TILES_PER_BATCH), publication)
    return open_dataset(str(folder))


def time_job(tiles: Dataset, config: CaptionConfig) -> float:
    """Seconds of a whole job with a store of its own, so that every caption is generated."""
    model = resolve_model(config)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, publish(f"{folder}/captions", "captions", {}, {}) as publication:
        caption_tiles(CaptionWork(tiles, config, PixelsConfig(), None, model, f"{folder}/store"), publication)
        seconds = time.perf_counter() - start
        assert publication.facts["captions"]["generated"] > 0
    return seconds


def time_loop(rows: pa.Table, config: CaptionConfig, captioner: VisionLanguageCaptioner) -> float:
    """Seconds of as many batches as the longer job has more than the shorter one."""
    tiles = [Tile(row["tile_id"], row["image"], PixelsConfig()) for row in rows.to_pylist()]
    start = time.perf_counter()
    for first in range(FEW * TILES_PER_BATCH, len(tiles), TILES_PER_BATCH):
        described = captioner.describe(tiles[first : first + TILES_PER_BATCH])
        assert not any(isinstance(texts, Exception) for texts in described)
    return time.perf_counter() - start


def measure() -> list[Figure]:
    torch.set_num_threads(1)  # as Ray has it in an actor
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        model = make_blip(Path(folder) / "blip", size=BLIP, image_px=IMAGE_PX)
        config = CaptionConfig(
            captioner="transformers",
            model=str(model),
            prompt="",
            dtype="float32",
            decoding=DecodingConfig(max_new_tokens=32),
            tiles_per_batch=TILES_PER_BATCH,
            num_actors=1,
        )
        few, many = (make_tiles(Path(folder) / f"{number}", number * TILES_PER_BATCH) for number in (FEW, MANY))
        reference = resolve_model(config)
        assert reference is not None
        captioner = VisionLanguageCaptioner(config, reference)
        rows = many.read(TILE_COLUMNS)
        found = interleaved(
            NUM_RUNS,
            few=lambda: time_job(few, config),
            many=lambda: time_job(many, config),
            loop=lambda: time_loop(rows, config, captioner),
        )
    ray.shutdown()
    ours, batches = found["many"] - found["few"], MANY - FEW
    note = (
        f"{batches} batches of {TILES_PER_BATCH} tiles more, BLIP with random weights, {found['loop'] / batches:.2f} s each, "
        f"one actor; a job of {FEW} batches takes {found['few']:.0f} s with its start"
    )
    return [Figure("caption_overhead", ours, found["loop"], ours / found["loop"], "s", LIMIT, note)]
