"""From a start to the first batch: at 90% of an epoch of 200,000 rows, over that at its beginning.

The reader is opened anew each time, and the progress comes from the JSON of a checkpoint, so that its checks count too.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from figures import Figure, interleaved
from PIL import Image

from urbanclip_ray.config import AugmentConfig, PixelsConfig, TrainConfig
from urbanclip_ray.model.tokenize import TextTokenizer, train_bpe
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, list_files, open_dataset, publish
from urbanclip_ray.train.batches import BatchMaker, train_steps
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.parts import ROWS_OF_FILES, describe_files
from urbanclip_ray.train.progress import Progress
from urbanclip_ray.train.shards import ShardReader

NUM_ROWS, ROWS_PER_FILE = 200_000, 1024
NUM_RANKS, OTHER_RANKS = 4, 2
RESUMED_AT = 0.9  # of the epoch
NUM_RUNS = 15
LIMIT = 1.2
TILE_PX, IMAGE_PX = 64, 32
CONFIG = TrainConfig(epochs=1, augment=AugmentConfig(min_area_share=0.5))


def tile(number: int) -> bytes:
    """A JPEG of blurred noise, about 1 kB; every fourth is a PNG."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(noise).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    image.save(stream, "PNG" if number % 4 == 0 else "JPEG")
    return stream.getvalue()


def make_shards(uri: str) -> Dataset:
    """Packed rows of 512 different tiles, repeated."""
    images = [tile(number) for number in range(512)]
    texts = [[f"tile {number} beside a river", f"{number} houses and fields"] for number in range(512)]
    with publish(uri, "shards", {}, {}) as publication:
        for number, first in enumerate(range(0, NUM_ROWS, ROWS_PER_FILE)):
            row_ids = range(first, min(first + ROWS_PER_FILE, NUM_ROWS))
            columns: list[Any] = [
                list(row_ids),
                [f"r/{row}" for row in row_ids],
                [images[row % 512] for row in row_ids],
                [texts[row % 512] for row in row_ids],
                ["train"] * len(row_ids),
            ]
            table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SHARDS, strict=True)], SHARDS)
            publication.write_table(table, f"part-{number:06d}.parquet")
        names = [f"{publication.attempt}/{info.base_name}" for info in list_files(publication.data_uri)]
        publication.facts[ROWS_OF_FILES] = describe_files(uri, names)
    return open_dataset(uri)


def time_start(uri: str, tokenizer: TextTokenizer, num_ranks: int, written: str | None) -> float:
    """Seconds until rank 0 has its first step, as the pretraining loop starts."""
    start = time.perf_counter()
    reader = ShardReader(open_dataset(uri), "train", CONFIG.shuffle_window_rows)
    progress = Progress.from_json(json.loads(written)) if written else None
    order = Order(reader.rows_per_file, CONFIG, num_ranks, progress)
    maker = BatchMaker(CONFIG, PixelsConfig(), tokenizer, IMAGE_PX)
    step = next(iter(train_steps(reader, maker, order, rank=0)))
    assert step.step == order.first_step
    assert sum(len(batch.images) for batch in step.micro_batches) == CONFIG.global_batch_size // num_ranks
    return time.perf_counter() - start


def measure() -> list[Figure]:
    """Resumed by as many ranks as before, and by half of them."""
    tokenizer = train_bpe(["tile beside a river", "houses and fields"], 300, 24)
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "shards")
        make_shards(uri)
        reader = ShardReader(open_dataset(uri), "train", CONFIG.shuffle_window_rows)
        order = Order(reader.rows_per_file, CONFIG, NUM_RANKS)
        written = json.dumps(order.progress_after(int(order.num_steps * RESUMED_AT)).to_json())
        time_start(uri, tokenizer, NUM_RANKS, written)  # whatever is loaded once
        found = interleaved(
            NUM_RUNS,
            begun=lambda: time_start(uri, tokenizer, NUM_RANKS, None),
            resumed=lambda: time_start(uri, tokenizer, NUM_RANKS, written),
            begun_by_others=lambda: time_start(uri, tokenizer, OTHER_RANKS, None),
            resumed_by_others=lambda: time_start(uri, tokenizer, OTHER_RANKS, written),
        )
    figures = []
    for suffix, ranks in (("", f"{NUM_RANKS} ranks again"), ("_by_others", f"{OTHER_RANKS} ranks instead of {NUM_RANKS}")):
        ours, peer = found[f"resumed{suffix}"], found[f"begun{suffix}"]
        note = f"first batch at {RESUMED_AT:.0%} of {NUM_ROWS} rows over the first of all; {ranks}"
        figures.append(Figure(f"resume_seek{suffix}", ours, peer, ours / peer, "s", LIMIT, note))
    return figures
