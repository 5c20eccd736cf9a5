"""A run of a dozen tiles with captions, pairs and splits as finished datasets: what an export starts from."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from urbanclip_ray.config import FolderSource, RunConfig
from urbanclip_ray.schema import CAPTIONS, PAIRS, SPLITS, TILES
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import Dataset, open_dataset, publish

ROWS_PER_FILE = 5
NUM_TILES = 12
BROKEN, SILENT = 3, 7  # which tile is unreadable, and which one has no accepted sentence
STEMS = ["a.b", "c d", "東", "100%", "e~f", "g#h"]  # what a key must survive
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, FORMATS[seed % len(FORMATS)])
    return stream.getvalue()


def texts_of(seed: int) -> list[str]:
    return [] if seed == SILENT else [f'Tile {seed} has many trees, "parks" and water.', "Roads cross it."][: 1 + seed % 2]


def part_of(seed: int) -> str | None:
    return None if seed == 10 else ("train", "val", "test", "train")[seed % 4]


def tile_rows() -> list[dict]:
    rows = []
    for seed in range(NUM_TILES):
        region = ("paris", "rome/north")[seed % 2]
        image = encoded(seed)
        known = {"lon": 2.0 + seed, "lat": 48.5, "west": 1.9, "south": 48.4, "east": 2.1, "north": 48.6, "scheme": "baidu"}
        rows.append(
            {
                "tile_id": f"{region}/{STEMS[seed % len(STEMS)]}{seed}",
                "region": region,
                "image": image,
                "sha256": hashlib.sha256(image).hexdigest(),
                "width": 16,
                "height": 16,
                "scheme": "none",
                "error": "truncated or damaged: x" if seed == BROKEN else None,
            }
            | (known if seed % 3 else {})
        )
    return rows


def make_released_run(folder: Path, splits: bool = True) -> Run:
    """The run, its datasets found; tiles and pairs lie in files that end at different rows."""
    rows = tile_rows()
    readable = [seed for seed in range(NUM_TILES) if seed != BROKEN]
    captions = [
        {
            "tile_id": rows[seed]["tile_id"],
            "caption_key": str(seed),
            "text": " ".join(texts_of(seed)),
            "model": "m",
            "prompt": "",
        }
        for seed in readable
    ]
    pairs = [
        {
            "tile_id": rows[seed]["tile_id"],
            "texts": texts_of(seed),
            "rejected": [{"text": "No.", "reason": "too short"}] if seed == SILENT else [],
        }
        for seed in reversed(readable)
    ]
    placed = [
        {"tile_id": rows[seed]["tile_id"], "split": "blocks", "seed": 0, "fold": 0, "part": part_of(seed)}
        for seed in range(NUM_TILES)
        if part_of(seed) is not None
    ]
    config = RunConfig(run="twelve", storage=str(folder), source=FolderSource(uri=str(folder / "city")))
    run = Run(config)
    made: dict[str, Dataset] = {}
    made["tiles"] = _publish(folder, "tiles", pa.Table.from_pylist(rows, schema=TILES), ROWS_PER_FILE)
    made["captions"] = _publish(folder, "captions", pa.Table.from_pylist(captions, schema=CAPTIONS), NUM_TILES)
    made["pairs"] = _publish(folder, "pairs", pa.Table.from_pylist(pairs, schema=PAIRS), ROWS_PER_FILE + 2)
    if splits:
        made["splits"] = _publish(folder, "splits", pa.Table.from_pylist(placed, schema=SPLITS), NUM_TILES)
    run.datasets.update(made)
    return run


def _publish(folder: Path, stage: str, table: pa.Table, rows_per_file: int) -> Dataset:
    uri = str(folder / stage)
    config = (
        {"caption": {"captioner": "transformers", "prompt": "Say `what` is there.\n~~~\nNow."}} if stage == "captions" else {}
    )
    with publish(uri, stage, config, {}) as publication:
        for number, first in enumerate(range(0, table.num_rows, rows_per_file)):
            publication.write_table(table.slice(first, rows_per_file), f"part-{number:05d}.parquet")
        rejects = {"too short": 1} if stage == "pairs" else {}
        total = table.num_rows + len(rejects)
        publication.count(unit="rows", rows_in=total, rows_out=table.num_rows, rejects=rejects)
        publication.facts |= {"regions": {"paris": 6, "rome/north": 6}} if stage == "tiles" else {}
        publication.facts |= {"model": {"name": "m", "revision": "abc"}} if stage == "captions" else {}
    return open_dataset(uri)
