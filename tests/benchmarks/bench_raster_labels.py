"""Labels of 100,000 footprints from a raster of 10,000 × 10,000 cells, against a loop of rasterio's `mask`.

The loop takes whole cells, those with their centre inside, so both are compared where that is exact: footprints whose edges
lie on the cells' edges. What is timed are footprints that lie anywhere, where cells count by their share inside; these are
compared with shares worked out by hand.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import rasterio
import rasterio.mask
import ray
from figures import Figure, interleaved

from urbanclip_ray.config import LabelsConfig, RasterConfig
from urbanclip_ray.sources.label_rasters import measure_rasters

NUM_FOOTPRINTS, NUM_MASKED = 100_000, 1_000
SIDE_CELLS, CELL_DEG = 10_000, 0.001  # about 100 m, as WorldPop's
LEFT, TOP = 110.0, 45.0
WIDTH_CELLS, HEIGHT_CELLS = 9.3, 7.2  # of a footprint, about 800 m
NUM_RUNS = 3
NUM_CPUS = 2
TOLERANCE = 1e-6
LIMIT = 20


def make_raster(path: Path) -> np.ndarray:
    """Amounts as a map of people has them: float32 in compressed strips, a tenth without data, NaN here."""
    random = np.random.default_rng(0)
    cells = random.gamma(0.5, 20.0, (SIDE_CELLS, SIDE_CELLS)).astype(np.float32)
    cells[random.random(cells.shape, np.float32) < 0.1] = -99999
    transform = rasterio.Affine(CELL_DEG, 0, LEFT, 0, -CELL_DEG, TOP)
    options = {"driver": "GTiff", "dtype": "float32", "count": 1, "nodata": -99999, "compress": "lzw"}
    with rasterio.open(path, "w", width=SIDE_CELLS, height=SIDE_CELLS, crs="EPSG:4326", transform=transform, **options) as file:
        file.write(cells, 1)
    cells[cells < 0] = np.nan
    return cells


def boxes_at(column: np.ndarray, row: np.ndarray, width: float, height: float) -> np.ndarray:
    """West, south, east, north of footprints whose upper left corners lie at these cells."""
    west, north = LEFT + column * CELL_DEG, TOP - row * CELL_DEG
    return np.stack([west, north - height * CELL_DEG, west + width * CELL_DEG, north], axis=1)


def ours(uri: str, boxes: np.ndarray) -> np.ndarray:
    raster = RasterConfig(uri=uri, operation="sum", min_covered_share=0.01)
    config = LabelsConfig(rasters={"people": raster})
    ids = pa.array([str(number) for number in range(len(boxes))])
    return measure_rasters(config, ids, boxes)[0]["people"].to_numpy()


def masked(uri: str, boxes: np.ndarray) -> np.ndarray:
    """The loop: one window read, one polygon drawn, one sum for every footprint."""
    sums = []
    with rasterio.open(uri) as dataset:
        for west, south, east, north in boxes.tolist():
            ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
            cells, _ = rasterio.mask.mask(dataset, [{"type": "Polygon", "coordinates": [ring]}], crop=True, filled=False)
            sums.append(float(cells.astype(np.float64).sum()))
    return np.array(sums)


def by_hand(cells: np.ndarray, column: float, row: float) -> float:
    """The sum over a footprint whose cells count by their share inside."""

    def shares(start: float, length: float) -> tuple[slice, np.ndarray]:
        first, last = int(np.floor(start)), int(np.ceil(start + length))
        edges = np.arange(first, last)
        return slice(first, last), np.minimum(edges + 1, start + length) - np.maximum(edges, start)

    rows, down = shares(row, HEIGHT_CELLS)
    columns, across = shares(column, WIDTH_CELLS)
    return float(np.nansum(down[:, None] * across * cells[rows, columns].astype(np.float64)))


def refuse_difference(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference < TOLERANCE:
        raise SystemExit(
            f"raster_labels: {difference:.2e} of the largest label between both on {where}: not equal to {TOLERANCE}"
        )


def timed(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure() -> list[Figure]:
    """Ours on all footprints; the loop on a hundredth of them, times a hundred."""
    random = np.random.default_rng(1)
    column, row = random.uniform(0, SIDE_CELLS - 10, (2, NUM_FOOTPRINTS))
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "people.tif")
        cells = make_raster(Path(uri))
        anywhere = boxes_at(column, row, WIDTH_CELLS, HEIGHT_CELLS)
        aligned = boxes_at(np.floor(column[:NUM_MASKED]), np.floor(row[:NUM_MASKED]), 9, 7)
        ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False)
        try:
            refuse_difference(ours(uri, aligned), masked(uri, aligned), "footprints that are whole cells")
            places = list(zip(column[:NUM_MASKED], row[:NUM_MASKED], strict=True))
            expected = np.array([by_hand(cells, *place) for place in places])
            refuse_difference(ours(uri, anywhere)[:NUM_MASKED], expected, "footprints that lie anywhere")
            found = interleaved(
                NUM_RUNS,
                ours=lambda: timed(ours, uri, anywhere),
                loop=lambda: timed(masked, uri, anywhere[:NUM_MASKED]) * NUM_FOOTPRINTS / NUM_MASKED,
            )
        finally:
            ray.shutdown()
    note = (
        f"{NUM_FOOTPRINTS:,} footprints on {SIDE_CELLS:,} x {SIDE_CELLS:,} cells; the loop extrapolated from {NUM_MASKED:,} of "
        f"them; equal to {TOLERANCE:g} where it is exact"
    )
    ratio = found["loop"] / found["ours"]
    return [Figure("raster_labels", found["ours"], found["loop"], ratio, f"s, {NUM_CPUS} CPUs", LIMIT, note, at_most=False)]
