"""Sheets of thumbnails: every readable tile once, within the bytes they may take."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from report_data import make

from urbanclip_ray.evaluate import thumbnails
from urbanclip_ray.evaluate.thumbnails import SIZES, make_sheets, thumbnail_uri
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import Dataset

NUM_TILES = 700  # more than one sheet


def png(red: int, size=(60, 60), noise: int = 0) -> bytes:
    random = np.random.default_rng(red)
    pixels = np.full((*size[::-1], 3), (red, 90, 255 - red)) + random.integers(-noise, noise + 1, (*size[::-1], 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def store(root, images: list[bytes | None]) -> Dataset:
    empty = dict.fromkeys(TILES.names)
    rows = [
        empty
        | {"tile_id": f"t{at:04d}", "region": "r", "scheme": "none", "image": image, "error": None if image else "zero bytes"}
        for at, image in enumerate(images)
    ]
    return make(root, "tiles", [pa.Table.from_pylist(rows, schema=TILES)])


def cell(sheets, number: int) -> np.ndarray:
    sheet = np.asarray(Image.open(io.BytesIO(sheets.sheets[number // sheets.cells])).convert("RGB"), dtype=float)
    row, column = divmod(number % sheets.cells, sheets.columns)
    side = sheets.side_px
    return sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]


def test_every_tile_has_a_cell_with_its_own_picture(tmp_path):
    reds = np.random.default_rng(0).integers(0, 256, NUM_TILES).tolist()
    images = [png(red) for red in reds]
    images[3], images[5] = None, b"no image"
    sheets = make_sheets(store(tmp_path, images), 10_000, 1e7)
    assert len(sheets.sheets) == 2
    assert sheets.side_px == 48  # the largest size that enlarges no tile
    assert len(sheets.place) == NUM_TILES - 2
    assert sheets.num_tiles == NUM_TILES - 1  # the broken one is known only when it is opened
    for at in (0, 4, 575, 576, NUM_TILES - 1):
        colour = cell(sheets, sheets.place[f"t{at:04d}"]).mean(axis=(0, 1))
        assert colour == pytest.approx((reds[at], 90, 255 - reds[at]), abs=12)


def test_pictures_get_smaller_and_then_fewer_until_they_fit(tmp_path):
    tiles = store(tmp_path, [png(at % 256, noise=60) for at in range(300)])
    sizes = {}
    for budget in (1e7, 1.2e5, 4e3):
        sheets = make_sheets(tiles, 10_000, budget)
        assert sheets.num_bytes <= budget
        sizes[budget] = (sheets.side_px, len(sheets.place))
    assert sizes[1e7] == (48, 300)
    assert sizes[1e7][0] > sizes[1.2e5][0] > sizes[4e3][0] == SIZES[-1][0]
    assert 0 < sizes[4e3][1] < sizes[1.2e5][1] == 300


def test_a_cap_takes_a_seeded_choice(tmp_path):
    tiles = store(tmp_path, [png(at) for at in range(50)])
    first, second = make_sheets(tiles, 10, 1e6), make_sheets(tiles, 10, 1e6)
    assert first.place == second.place
    assert len(first.place) == 10
    assert first.num_tiles == 50
    assert set(first.place) != {f"t{at:04d}" for at in range(10)}
    assert make_sheets(tiles, 0, 1e6).sheets == []


def test_no_readable_tile_gives_no_sheet(tmp_path):
    sheets = make_sheets(store(tmp_path, [None, None]), 10, 1e6)
    assert (sheets.sheets, sheets.place, sheets.num_tiles) == ([], {}, 0)


def test_an_oblong_tile_keeps_its_shape_on_black():
    square = thumbnails._square(Image.new("RGB", (80, 20), (255, 255, 255)), 40)
    assert square.shape == (40, 40, 3)
    assert square[20].min() > 250
    assert square[2].max() == 0


def test_foreign_bytes_give_no_data_uri():
    assert thumbnail_uri(None, 10) is None
    assert thumbnail_uri({"image": b"<script>", "error": None}, 10) is None
    assert thumbnail_uri({"image": png(3), "error": "too small"}, 10) is None
    assert thumbnail_uri({"image": png(3), "error": None}, 10).startswith("data:image/jpeg;base64,")
