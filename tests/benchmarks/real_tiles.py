"""Shards of real tiles for benchmarks: pieces of NASA's Blue Marble, which the demo's packages bring."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
from PIL import Image

from urbanclip_ray.config import WorldSource
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, open_dataset, publish

ROWS_PER_FILE = 1024


def world_shards(folder: Path, num_rows: int, tile_px: int = 27) -> Dataset:
    """`num_rows` training rows, as many of them different as there are tiles, each with a short text of its own."""
    source = open_source(WorldSource(tile_px=tile_px, stride_px=tile_px))
    images = [jpeg(source.read(tile.location)) for tile in source.tiles()[:num_rows]]
    rows = [
        {
            "row_id": row,
            "tile_id": f"world/{row}",
            "image": images[row % len(images)],
            "texts": [
                f"Land number {row % len(images)} with forest, water and bare soil, seen from above in {row % 12} parts."
            ],
            "part": "train",
        }
        for row in range(num_rows)
    ]
    with publish(str(folder / "shards"), "shards", {}, {}) as publication:
        for number, first in enumerate(range(0, num_rows, ROWS_PER_FILE)):
            table = pa.Table.from_pylist(rows[first : first + ROWS_PER_FILE], schema=SHARDS)
            publication.write_table(table, f"part-{number:05d}.parquet")
        publication.facts["parts"] = {"train": num_rows, "val": 0}
        publication.count(unit="tiles", rows_in=num_rows, rows_out=num_rows, rejects={})
    return open_dataset(str(folder / "shards"))


def jpeg(data: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()
