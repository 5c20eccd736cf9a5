"""Means and sums of a raster's cells over footprints, each cell counted by the share of it that lies inside (exactextract).

Cells are read in blocks: footprints that lie near each other share one read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from urbanclip_ray.geo.boxes import areas

Operation = Literal["mean", "sum"]
BLOCK_CELLS = 1 << 22  # of the rectangles by which footprints are sorted
MAX_BLOCK_CELLS = 1 << 26  # read at once; footprints that spread wider are read one by one
POLYGON = b"\x01\x03\x00\x00\x00\x01\x00\x00\x00"  # well-known binary: little endian, polygon, one ring


class Grid(NamedTuple):
    """Where a north-up raster's cells lie, in the units of its coordinate reference system."""

    left: float
    top: float
    cell_width: float
    cell_height: float
    num_columns: int
    num_rows: int


class Block(NamedTuple):
    """A window of a raster's cells, and the footprints that are measured on it."""

    column: int
    row: int
    num_columns: int
    num_rows: int
    members: np.ndarray  # int64: indices of the footprints


class Measured(NamedTuple):
    """float64 [footprints] each."""

    value: np.ndarray  # NaN where no cell with data is touched
    covered: np.ndarray  # share of the footprint over cells with data


def shape_blocks(grid: Grid, is_striped: bool) -> tuple[int, int]:
    """Columns and rows of the rectangles that are read at once: whole rows where the file holds its cells in strips."""
    columns = grid.num_columns if is_striped else min(grid.num_columns, math.isqrt(BLOCK_CELLS))
    return columns, max(1, BLOCK_CELLS // columns)


def plan_blocks(rings: np.ndarray, grid: Grid, block_shape: tuple[int, int]) -> list[Block]:
    """The reads that cover all footprints [footprints, points, 2]; those beside the raster, or not finite, are in none.

    Footprints are sorted by the rectangle of `block_shape` (columns, rows) that holds their upper left corner; a read reaches
    as far beyond it as they do.
    """
    bounds = cell_bounds(rings, grid)
    with np.errstate(invalid="ignore"):
        first = np.floor(bounds[:, :2])
        last = np.ceil(bounds[:, 2:])
        size = (grid.num_columns, grid.num_rows)
        inside = np.flatnonzero(np.isfinite(bounds).all(axis=1) & (last > 0).all(axis=1) & (first < size).all(axis=1))
    first = np.clip(first[inside], 0, size).astype(np.int64)
    last = np.clip(last[inside], 0, size).astype(np.int64)
    rectangle = first // block_shape
    order = np.lexsort((rectangle[:, 0], rectangle[:, 1]))
    starts = np.flatnonzero(np.any(np.diff(rectangle[order], axis=0), axis=1)) + 1
    blocks: list[Block] = []
    for group in np.split(order, starts) if len(order) else []:
        block = _around(first[group], last[group], inside[group])
        if block.num_columns * block.num_rows <= MAX_BLOCK_CELLS:
            blocks.append(block)
        else:
            blocks += [_around(first[[one]], last[[one]], inside[[one]]) for one in group]
    return blocks


def _around(first: np.ndarray, last: np.ndarray, members: np.ndarray) -> Block:
    column, row = first.min(axis=0).tolist()
    end_column, end_row = last.max(axis=0).tolist()
    return Block(column, row, end_column - column, end_row - row, members)


def cell_bounds(rings: np.ndarray, grid: Grid) -> np.ndarray:
    """First column, first row, last column, last row of footprints as fractions, float64 [footprints, 4]."""
    columns = (rings[..., 0] - grid.left) / grid.cell_width
    rows = (grid.top - rings[..., 1]) / grid.cell_height
    return np.stack([columns.min(axis=1), rows.min(axis=1), columns.max(axis=1), rows.max(axis=1)], axis=-1)


def measure_block(
    cells: np.ndarray, block: Block, rings: np.ndarray, grid: Grid, operation: Operation, in_degrees: bool
) -> Measured:
    """The mean or the sum of `cells` [rows, columns], the block's window, over its members' rings [members, points, 2].

    A sum takes the amount of a cell to be spread evenly over it. A mean weights cells by their area inside the footprint;
    where the raster is in degrees that is the area on a sphere. NaN cells hold no data and count in neither.
    """
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    left, top = grid.left + block.column * grid.cell_width, grid.top - block.row * grid.cell_height
    right, bottom = left + block.num_columns * grid.cell_width, top - block.num_rows * grid.cell_height
    source = NumPyRasterSource(cells, left, bottom, right, top)
    weighting = "coverage_weight=area_spherical_m2" if in_degrees else "coverage_weight=fraction"
    statistic = f"value={operation}" + (f"({weighting})" if operation == "mean" else "")
    statistics = [statistic, "cells=count"]
    table = exact_extract(source, _rings_source(rings), statistics, output="pandas", strategy="raster-sequential")
    value = table["value"].to_numpy(np.float64)
    covered = table["cells"].to_numpy(np.float64) * grid.cell_width * grid.cell_height / areas(rings)
    return Measured(np.where(covered > 0, value, np.nan), np.minimum(covered, 1.0))


def _rings_source(rings: np.ndarray) -> Any:
    """Polygons as exactextract asks for them, without the detour over GeoJSON that its own sources take."""
    from exactextract.feature import Feature, FeatureSource

    class Polygon(Feature):
        """A footprint without properties."""

        def __init__(self, binary: bytes) -> None:
            super().__init__()
            self._binary = binary

        def geometry(self) -> bytes:
            return self._binary

        def fields(self) -> list[str]:
            return []

    class Polygons(FeatureSource):
        """All footprints of a block."""

        def count(self) -> int:
            return len(rings)

        def __iter__(self) -> Iterator[Polygon]:
            head = POLYGON + np.uint32(rings.shape[1]).tobytes()
            points = np.ascontiguousarray(rings, "<f8")
            return (Polygon(head + ring.tobytes()) for ring in points)

        def srs_wkt(self) -> None:
            return None  # rings and cells are in one system

    return Polygons()


class SharedCells(NamedTuple):
    """How far a raster tells footprints apart: those whose centres lie in one cell have nearly one label."""

    num_tiles: int  # with their centre on the raster
    num_sharing: int  # of them, whose cell holds another one's centre too
    most_in_one: int
    cells_per_tile: float  # median of the footprints' areas in cells


def count_shared_cells(rings: np.ndarray, grid: Grid) -> SharedCells:
    """Count footprints [footprints, points, 2] by the cell of their centres."""
    bounds = cell_bounds(rings, grid)
    centres = np.floor((bounds[:, :2] + bounds[:, 2:]) / 2)
    with np.errstate(invalid="ignore"):
        inside = np.isfinite(bounds).all(axis=1) & (centres >= 0).all(axis=1)
        inside &= (centres < (grid.num_columns, grid.num_rows)).all(axis=1)
    if not inside.any():
        return SharedCells(0, 0, 0, 0.0)
    _, counts = np.unique(centres[inside], axis=0, return_counts=True)
    in_cells = areas(rings[inside]) / (grid.cell_width * grid.cell_height)
    return SharedCells(int(inside.sum()), int(counts[counts > 1].sum()), int(counts.max()), float(np.median(in_cells)))
