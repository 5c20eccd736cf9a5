"""Real tiles for benchmarks, and shards of them: pieces of NASA's Blue Marble, which the demo's packages bring."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
from PIL import Image

from urbanclip_ray.config import WorldSource
from urbanclip_ray.schema import SHARDS, TILES
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, open_dataset, publish

ROWS_PER_FILE = 1024


def world_shards(folder: Path, num_rows: int, tile_px: int = 27, image_px: int | None = None) -> Dataset:
    """`num_rows` training rows, as many of them different as there are tiles, each with a short text of its own.

    Tiles are enlarged to `image_px`, so that decoding costs what it does for real ones of that size.
    """
    images = world_images(num_rows, tile_px, image_px)
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


def numbered_world_tiles(folder: Path, num_tiles: int, tiles_per_file: int, tile_px: int = 27) -> Dataset:
    """`num_tiles` tiles under new ids, each with bytes of its own: its number is a comment in the JPEG."""
    images = world_images(num_tiles, tile_px)
    with publish(str(folder), "tiles", {}, {}) as publication:
        for first in range(0, num_tiles, tiles_per_file):
            rows = []
            for number in range(first, min(first + tiles_per_file, num_tiles)):
                image = with_comment(images[number % len(images)], str(number).encode())
                row = {"tile_id": f"world/{number:06d}", "region": "world", "scheme": "none", "image": image}
                rows.append(row | {"sha256": hashlib.sha256(image).hexdigest(), "width": tile_px, "height": tile_px})
            publication.write_table(pa.Table.from_pylist(rows, schema=TILES), f"part-{first:06d}.parquet")
        publication.count(unit="tiles", rows_in=num_tiles, rows_out=num_tiles, rejects={})
    return open_dataset(str(folder))


def world_images(num_images: int, tile_px: int, image_px: int | None = None) -> list[bytes]:
    """JPEGs of different places, as many as there are and at most `num_images`; enlarged to `image_px` where it is given."""
    source = open_source(WorldSource(tile_px=tile_px, stride_px=tile_px))
    return [jpeg(source.read(tile.location), image_px) for tile in source.tiles()[:num_images]]


def with_comment(data: bytes, comment: bytes) -> bytes:
    """A JPEG with a comment segment behind its first marker."""
    return data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]


def jpeg(data: bytes, image_px: int | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image_px is not None:
        image = image.resize((image_px, image_px), Image.Resampling.BICUBIC)
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
