"""Tiles a second from Parquet, decoded and resized: Ray Data over a plain loop on one core, and over torch's DataLoader.

Two figures, because pixels cost twice: once to make and once to carry. Our stages make them where they are used (an actor, a
rank), so the first figure has tasks that decode and keep a checksum. For the second the pixels are carried to this process, in
batches, by ours and by a DataLoader with as many workers, whose dataset holds the same encoded bytes.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from figures import Figure, interleaved
from PIL import Image

from urbanclip_ray import dataflow
from urbanclip_ray.config import WorldSource
from urbanclip_ray.imagery import decode, to_square
from urbanclip_ray.schema import TILES
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_TILES = int(os.environ.get("BENCH_TILES", "16000"))
TILE_PX, IMAGE_PX = 256, 224
ROWS_PER_FILE = 256
BATCH_SIZE = 64
NUM_CORES = 2
NUM_RUNS = 3
LEAST_OVER_CORES, LEAST_OVER_LOADER = 0.75, 1.5


def make_tiles(folder: Path) -> Dataset:
    """JPEGs of 256 px from pieces of NASA's Blue Marble, enlarged, so that decoding costs what it does for real tiles."""
    source = open_source(WorldSource(tile_px=54, stride_px=27, max_tiles=1000))
    images = []
    for tile in source.tiles():
        stream = io.BytesIO()
        decode(source.read(tile.location)).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        images.append(stream.getvalue())
    with publish(str(folder / "tiles"), "tiles", {}, {}) as publication:
        for number, first in enumerate(range(0, NUM_TILES, ROWS_PER_FILE)):
            rows = [
                {"tile_id": f"world/{row}", "region": "world", "image": images[row % len(images)], "scheme": "none"}
                for row in range(first, min(NUM_TILES, first + ROWS_PER_FILE))
            ]
            publication.write_table(pa.Table.from_pylist(rows, schema=TILES), f"part-{number:05d}.parquet")
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES, rejects={})
    return open_dataset(str(folder / "tiles"))


def pixels_of(batch: pa.Table) -> np.ndarray:
    """uint8 [rows, IMAGE_PX, IMAGE_PX, 3]."""
    return np.stack([to_square(decode(image), IMAGE_PX) for image in batch["image"].to_pylist()])


def checksum(batch: pa.Table) -> pa.Table:
    return pa.table({"sum": [int(pixels_of(batch).sum(dtype=np.int64))], "num_tiles": [batch.num_rows]})


def carry(batch: pa.Table) -> pa.Table:
    pixels = pixels_of(batch)
    return pa.table({"pixels": pa.FixedSizeListArray.from_arrays(pixels.ravel(), pixels[0].size)})


def as_pixels(batch: pa.Table) -> np.ndarray:
    """uint8 [rows, IMAGE_PX, IMAGE_PX, 3], a view where the batch is one chunk."""
    values = batch["pixels"].combine_chunks().flatten().to_numpy(zero_copy_only=True)
    return values.reshape(-1, IMAGE_PX, IMAGE_PX, 3)


def rate(start: float, num_tiles: int) -> float:
    assert num_tiles == NUM_TILES
    return num_tiles / (time.perf_counter() - start)


def plain_loop(tiles: Dataset) -> float:
    """One process, one thread, as a script has it."""
    start, num_tiles = time.perf_counter(), 0
    for path in tiles.parquet_paths():
        for batch in pq.ParquetFile(path).iter_batches(BATCH_SIZE, columns=["image"], use_threads=False):
            num_tiles += checksum(pa.Table.from_batches([batch]))["num_tiles"][0].as_py()
    return rate(start, num_tiles)


def ours_in_place(tiles: Dataset) -> float:
    start = time.perf_counter()
    made = dataflow.map_files(tiles, ["image"], checksum, rows_per_batch=BATCH_SIZE)
    return rate(start, sum(pc.sum(block["num_tiles"]).as_py() for block in dataflow.collect(made)))


def ours_carried(tiles: Dataset) -> float:
    start, num_tiles = time.perf_counter(), 0
    rows = dataflow.map_files(tiles, ["image"], carry, rows_per_batch=BATCH_SIZE)
    for batch in rows.iter_batches(batch_size=BATCH_SIZE, batch_format="pyarrow"):
        num_tiles += len(as_pixels(batch))
    return rate(start, num_tiles)


class EncodedTiles(torch.utils.data.Dataset):
    """A map-style dataset as torch's users write it; its encoded bytes are in memory, which spares it the reading."""

    def __init__(self, tiles: Dataset) -> None:
        self._images = tiles.read(["image"])["image"].combine_chunks()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(to_square(decode(self._images[row].as_py()), IMAGE_PX))


def data_loader(dataset: EncodedTiles) -> float:
    start, num_tiles = time.perf_counter(), 0
    for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=NUM_CORES):
        num_tiles += len(batch)
    return rate(start, num_tiles)


def measure() -> list[Figure]:
    ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False)
    dataflow.connect()
    with tempfile.TemporaryDirectory() as folder:
        tiles = make_tiles(Path(folder))
        dataset = EncodedTiles(tiles)
        ours_in_place(tiles)  # workers start and import
        found = interleaved(
            NUM_RUNS,
            plain=lambda: plain_loop(tiles),
            in_place=lambda: ours_in_place(tiles),
            carried=lambda: ours_carried(tiles),
            loader=lambda: data_loader(dataset),
        )
    ray.shutdown()
    size = f"{NUM_TILES:,} JPEGs of {TILE_PX} px to {IMAGE_PX} px"
    in_place, all_cores = found["in_place"], NUM_CORES * found["plain"]
    note = f"{size}, decoded where they are used, over {NUM_CORES} times a plain loop on one core"
    carried = f"{size}, carried to one process, over a DataLoader with {NUM_CORES} workers"
    return [
        Figure("tile_reading", in_place, all_cores, in_place / all_cores, "tiles/s", LEAST_OVER_CORES, note, at_most=False),
        Figure(
            "tile_reading, carried",
            found["carried"],
            found["loader"],
            found["carried"] / found["loader"],
            "tiles/s",
            LEAST_OVER_LOADER,
            carried,
            at_most=False,
        ),
    ]
