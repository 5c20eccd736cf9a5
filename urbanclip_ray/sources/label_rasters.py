"""Indicators from rasters: what lies inside each tile's footprint, measured by Ray tasks.

One tile's way: its box of degrees becomes an outline in the raster's own coordinate reference system; a task reads the block of
cells around it and its neighbours, and takes the sum or the mean of the cells' shares inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from pyproj import CRS

from urbanclip_ray import dataflow
from urbanclip_ray.config import LabelsConfig, RasterConfig
from urbanclip_ray.geo.boxes import are_boxes, outlines, project_outlines
from urbanclip_ray.geo.zonal import Block, Grid, Measured, count_shared_cells, measure_block, plan_blocks, shape_blocks
from urbanclip_ray.sources.base import SourceError
from urbanclip_ray.sources.raster_files import crs_of, open_raster

TOUCHED = 1e-6  # share of a footprint: less is the rounding of an edge that it shares with a cell
MAX_WAITING_TASKS = 64  # each holds its outlines in the object store


class RasterGrid(NamedTuple):
    """A raster by its header."""

    grid: Grid
    crs: CRS
    is_flipped: bool  # its first row is its most southern one
    is_striped: bool  # the file holds whole rows together, not squares


def measure_rasters(config: LabelsConfig, tile_ids: pa.Array, boxes: np.ndarray) -> tuple[pa.Table, dict[str, Any]]:
    """`tile_id` and a float64 column for every raster, null where it is not known, and what to know of each raster.

    `boxes` are west, south, east, north in WGS84 degrees, float64 [tiles, 4], NaN where a footprint is not known. Raises
    :class:`SourceError` naming the raster where it has no place, no such band, or covers no tile.
    """
    known = are_boxes(boxes)
    if not known.any():
        raise SourceError(
            f"labels.rasters: none of {len(boxes)} tiles has a footprint: set labels.tile_side_m to their size on the ground "
            "where their centres are known (source.metadata with lon and lat), or use a source that places its tiles"
        )
    dataflow.connect()
    columns, facts = {}, {}
    for name, raster in config.rasters.items():
        values, facts[name] = _measure_raster(name, raster, boxes, known, config.footprints_per_task)
        columns[name] = pa.array(values, pa.float64(), from_pandas=True)
    return pa.table({"tile_id": tile_ids, **columns}), facts


def _measure_raster(
    name: str, raster: RasterConfig, boxes: np.ndarray, known: np.ndarray, per_task: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels float64 [tiles], NaN where they are not known, and facts."""
    described = describe_raster(name, raster)
    grid = described.grid
    rings = _around_globe(project_outlines(outlines(boxes[known]), described.crs), described)
    blocks = plan_blocks(rings, grid, shape_blocks(grid, described.is_striped))
    measured = Measured(np.full(len(boxes), np.nan), np.zeros(len(boxes)))
    places = np.flatnonzero(known)
    for members, result in _run_tasks(raster, described, blocks, rings, per_task):
        measured.value[places[members]] = result.value
        measured.covered[places[members]] = result.covered
    touched = measured.covered > TOUCHED
    if not touched.any():
        raise SourceError(
            f"labels.rasters.{name}: {raster.uri} has data under none of {int(known.sum())} tiles: it lies elsewhere, or its "
            f"cells there hold no data. Its {grid.num_columns} x {grid.num_rows} cells begin at ({grid.left:g}, {grid.top:g}) "
            f"in {described.crs.name}; the first tile lies at {boxes[known][0].round(4).tolist()} (west, south, east, north)"
        )
    enough = measured.covered >= raster.min_covered_share
    shared = count_shared_cells(rings, grid)
    facts = {
        "operation": raster.operation,
        "cell": [grid.cell_width, grid.cell_height],
        "crs": described.crs.name,
        "labelled": int(enough.sum()),
        "partly_covered": int((touched & ~enough).sum()),
        "not_covered": int((known & ~touched).sum()),
        "without_footprint": int((~known).sum()),
        "cells_per_tile": round(shared.cells_per_tile, 3),
        "tiles_sharing_a_cell": shared.num_sharing,
        "most_tiles_in_a_cell": shared.most_in_one,
    }
    return np.where(enough, measured.value, np.nan), facts


def _around_globe(rings: np.ndarray, raster: RasterGrid) -> np.ndarray:
    """Rings in the degrees that the raster counts in: some count eastward from 0 to 360."""
    if raster.crs.is_geographic:
        rings[..., 0] += np.where(rings[..., 0].max(axis=1) <= raster.grid.left, 360.0, 0.0)[:, None]
    return rings


def describe_raster(name: str, raster: RasterConfig) -> RasterGrid:
    """Where its cells lie; raises :class:`SourceError` naming the raster."""
    try:
        with open_raster(raster.uri) as dataset:
            crs = crs_of(dataset, raster.uri)
            if raster.band > dataset.count:
                raise SourceError(f"labels.rasters.{name}: {raster.uri} has {dataset.count} bands, not {raster.band}")
            if np.dtype(dataset.dtypes[raster.band - 1]).kind not in "uif":
                raise SourceError(f"labels.rasters.{name}: {raster.uri} holds complex numbers: make amplitudes of them first")
            transform, (width, height) = dataset.transform, (dataset.width, dataset.height)
            flipped = transform.e > 0
            striped = dataset.block_shapes[raster.band - 1][1] == width
            top = transform.f + (transform.e * height if flipped else 0)
            return RasterGrid(Grid(transform.c, top, transform.a, abs(transform.e), width, height), crs, flipped, striped)
    except FileNotFoundError:
        raise SourceError(f"labels.rasters.{name}: {raster.uri} is not there: correct its uri") from None


def _run_tasks(
    raster: RasterConfig, described: RasterGrid, blocks: list[Block], rings: np.ndarray, per_task: int
) -> list[tuple[np.ndarray, Measured]]:
    """The members of all tasks and what these found, with few tasks waiting at a time."""
    task = ray.remote(measure_blocks)
    waiting: list[Any] = []
    found = []
    for group in _group(blocks, per_task):
        if len(waiting) == MAX_WAITING_TASKS:
            done, waiting = ray.wait(waiting)
            found += ray.get(done)
        waiting.append(task.remote(raster, described, group, [rings[block.members] for block in group]))
    return found + ray.get(waiting)


def _group(blocks: list[Block], per_task: int) -> list[list[Block]]:
    """Blocks in their order, as many as hold `per_task` footprints; a block with more is cut."""
    groups: list[list[Block]] = []
    held = per_task
    for block in blocks:
        for first in range(0, len(block.members), per_task):
            part = block._replace(members=block.members[first : first + per_task])
            if held + len(part.members) > per_task:
                groups.append([])
                held = 0
            groups[-1].append(part)
            held += len(part.members)
    return groups


def measure_blocks(
    raster: RasterConfig, described: RasterGrid, blocks: list[Block], rings: list[np.ndarray]
) -> tuple[np.ndarray, Measured]:
    """In a worker: the footprints of some blocks, and their labels."""
    from rasterio.windows import Window

    results = []
    with open_raster(raster.uri) as dataset:
        for block, outline in zip(blocks, rings, strict=True):
            row = block.row
            if described.is_flipped:
                row = described.grid.num_rows - block.row - block.num_rows
            window = Window(block.column, row, block.num_columns, block.num_rows)
            cells = _read_cells(dataset, raster, window)
            if described.is_flipped:
                cells = cells[::-1]
            grid, in_degrees = described.grid, described.crs.is_geographic
            results.append(measure_block(cells, block, outline, grid, raster.operation, in_degrees))
    members = np.concatenate([block.members for block in blocks])
    return members, Measured(*(np.concatenate(parts) for parts in zip(*results, strict=True)))


def _read_cells(dataset: Any, raster: RasterConfig, window: Any) -> np.ndarray:
    """float [rows, columns] in the raster's unit, NaN where a cell holds no data."""
    found = dataset.read(raster.band, window=window, masked=True)
    kind = np.float32 if found.dtype == np.float32 else np.float64
    cells = np.ascontiguousarray(found.data, kind)
    if np.ma.is_masked(found):
        cells[np.ma.getmaskarray(found)] = np.nan
    if raster.nodata is not None:
        cells[found.data == np.asarray(raster.nodata).astype(found.dtype)] = np.nan
    cells[~np.isfinite(cells)] = np.nan
    scale, offset = dataset.scales[raster.band - 1], dataset.offsets[raster.band - 1]
    return cells if (scale, offset) == (1.0, 0.0) else cells * scale + offset
