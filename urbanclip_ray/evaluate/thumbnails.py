"""Small pictures of tiles for the report: single ones, and sheets of all tiles for the pointer on a map.

Every picture is encoded anew, so that no foreign bytes enter the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from urbanclip_ray import imagery
from urbanclip_ray.parquet_files import open_parquet
from urbanclip_ray.storage import Dataset, resolve

TILES_PER_BATCH = 256  # of one read: bounds the memory that encoded tiles take
CELLS_PER_SIDE = 24  # of a sheet: few enough that the browser decodes one within a frame or two
SIZES = ((112, 75), (96, 75), (80, 70), (64, 70), (48, 65), (32, 60), (24, 50))  # side in px, WebP quality; larger first
NUM_PROBED = 96  # tiles that are encoded to find the size that fits
JPEG_QUALITY = 85


class Sheets(NamedTuple):
    """Square thumbnails in a grid of `columns`, row by row, `cells` on each sheet but the last. All of one size."""

    sheets: list[bytes]  # WebP
    side_px: int
    columns: int
    place: dict[str, int]  # tile -> its number over all sheets; tiles that cannot be shown have none
    num_tiles: int  # that could have been asked for

    @property
    def cells(self) -> int:
        return self.columns**2

    @property
    def num_bytes(self) -> int:
        return sum(len(sheet) for sheet in self.sheets)


def read_images(tiles: Dataset, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`image` and `error` of some tiles, by id."""
    columns = ["tile_id", "image", "error"]
    rows = tiles.read(columns=columns, filters=[("tile_id", "in", list(ids))]) if ids else None
    return {row["tile_id"]: row for row in rows.to_pylist()} if rows is not None else {}


def thumbnail_uri(tile: dict[str, Any] | None, side_px: int) -> str | None:
    """A data URI of a JPEG whose longer side has `side_px`; None for an unusable tile."""
    image = None if tile is None or tile["error"] is not None else _decoded(tile["image"])
    if image is None:
        return None
    image.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_sheets(tiles: Dataset, max_tiles: int, max_bytes: float) -> Sheets:
    """Thumbnails of all readable tiles, or of a seeded choice of `max_tiles`, as large as `max_bytes` allows.

    Where not even the smallest size fits, fewer tiles are taken.
    """
    ids = [row["tile_id"] for row in tiles.read(["tile_id", "error"]).to_pylist() if row["error"] is None]
    order = np.random.default_rng(0).permutation(len(ids))
    sample = read_images(tiles, [ids[at] for at in order[:NUM_PROBED]])
    if not sample or max_tiles == 0:
        return Sheets([], SIZES[-1][0], CELLS_PER_SIDE, {}, len(ids))
    images = [image for row in sample.values() if (image := _decoded(row["image"])) is not None]
    (side_px, quality), bytes_per_tile = _largest_size(images, max_bytes / min(len(ids), max_tiles))
    num_tiles = min(len(ids), max_tiles, int(max_bytes / bytes_per_tile))
    while True:
        chosen = {ids[at] for at in order[:num_tiles]}
        found = _encode_sheets(_squares(tiles, chosen, side_px), side_px, quality)
        if sum(map(len, found[0])) <= max_bytes or num_tiles <= 1:
            return Sheets(found[0], side_px, CELLS_PER_SIDE, found[1], len(ids))
        num_tiles = int(0.95 * num_tiles * max_bytes / sum(map(len, found[0])))  # the sample was lighter than the rest


def _largest_size(images: list[Image.Image], budget: float) -> tuple[tuple[int, int], float]:
    """The first of :data:`SIZES` whose pictures take at most `budget` bytes each, and what they take; else the last."""
    largest_px = max((max(image.size) for image in images), default=0)
    for side_px, quality in SIZES:
        squares = [_square(image, side_px) for image in images]
        # a sheet of few tiles has a file's overhead that one of many has not, so this is on the safe side
        bytes_per_tile = 1.1 * len(_encode_sheet(squares, side_px, quality)) / max(1, len(squares))
        if bytes_per_tile <= budget and (side_px <= largest_px or (side_px, quality) == SIZES[-1]):
            break
    return (side_px, quality), bytes_per_tile


def _squares(tiles: Dataset, chosen: set[str], side_px: int) -> Iterator[tuple[str, np.ndarray]]:
    """Id and uint8 [side, side, 3] of the chosen tiles that can be decoded, in the order of the dataset."""
    filesystem, _ = resolve(tiles.uri)

    def square(row: dict[str, Any]) -> np.ndarray | None:
        image = _decoded(row["image"])
        return None if image is None else _square(image, side_px)

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        for path in tiles.parquet_paths():
            with open_parquet(filesystem, path) as file:
                for batch in file.batches(["tile_id", "image", "error"], TILES_PER_BATCH):
                    rows = [row for row in batch.to_pylist() if row["tile_id"] in chosen and row["error"] is None]
                    for row, pixels in zip(rows, pool.map(square, rows), strict=True):
                        if pixels is not None:
                            yield row["tile_id"], pixels


def _encode_sheets(squares: Iterator[tuple[str, np.ndarray]], side_px: int, quality: int) -> tuple[list[bytes], dict[str, int]]:
    sheets, place, waiting = [], dict[str, int](), list[np.ndarray]()
    for tile_id, pixels in squares:
        place[tile_id] = len(place)
        waiting.append(pixels)
        if len(waiting) == CELLS_PER_SIDE**2:
            sheets.append(_encode_sheet(waiting, side_px, quality))
            waiting = []
    if waiting:
        sheets.append(_encode_sheet(waiting, side_px, quality))
    return sheets, place


def _encode_sheet(squares: list[np.ndarray], side_px: int, quality: int) -> bytes:
    num_rows = -(-len(squares) // CELLS_PER_SIDE)
    grid = np.zeros((num_rows * CELLS_PER_SIDE, side_px, side_px, 3), dtype=np.uint8)
    grid[: len(squares)] = squares
    sheet = grid.reshape(num_rows, CELLS_PER_SIDE, side_px, side_px, 3).swapaxes(1, 2)
    sheet = sheet.reshape(num_rows * side_px, CELLS_PER_SIDE * side_px, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _square(image: Image.Image, side_px: int) -> np.ndarray:
    """uint8 [side, side, 3]; an oblong tile keeps its shape on black."""
    small = image.copy()
    small.thumbnail((side_px, side_px))
    if small.width < side_px > small.height:  # a tile smaller than the cell is enlarged
        scale = side_px / max(small.size)
        small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
    canvas = Image.new("RGB", (side_px, side_px))
    canvas.paste(small, ((side_px - small.width) // 2, (side_px - small.height) // 2))
    return np.asarray(canvas)


def _decoded(data: bytes | None) -> Image.Image | None:
    """None where the bytes are no image by our limits, which may be stricter than those of the ingest."""
    try:
        return imagery.decode(data or b"")
    except imagery.TileImageError:
        return None
