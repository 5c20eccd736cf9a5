"""Indicators from a CSV: its rows join tiles by their id, or by the place that their coordinates name."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from urbanclip_ray.config import LabelsConfig, MetadataColumns
from urbanclip_ray.geo.boxes import are_boxes
from urbanclip_ray.sources.base import SourceError
from urbanclip_ray.sources.label_files import read_csv
from urbanclip_ray.sources.metadata import MetadataTable

Facts = dict[str, int]


def read_csv_labels(config: LabelsConfig, tile_ids: list[str], boxes: np.ndarray) -> tuple[pa.Table, Facts]:
    """`tile_id` and a float64 column for every indicator, and what became of the rows.

    `boxes` are the tiles' footprints in WGS84 degrees, float64 [tiles, 4]. By id, rows of other tiles are kept, for them to be
    counted. Everything that cannot be joined as asked raises :class:`SourceError` naming the row or column.
    """
    table = MetadataTable(config.csv, read_csv(config.csv), _columns(config), section="labels")
    if config.id_column in table.column_names:
        indicators = _indicators(table, {config.id_column})
        ids = table.texts(config.id_column)
        row_of: dict[str, int] = {}
        for row, tile_id in zip(table.rows, ids, strict=True):
            if (first := row_of.setdefault(tile_id, row)) != row:
                raise SourceError(f"{table.uri}: rows {first} and {row} both describe the tile {tile_id!r}: remove one")
        columns = {name: pa.array(table.numbers(name), from_pandas=True) for name in indicators}
        return pa.table({"tile_id": pa.array(ids, pa.string()), **columns}), {"rows": len(ids)}
    if None in table.coordinate_columns:
        raise SourceError(
            f"{table.uri} has neither a column {config.id_column!r} nor longitude and latitude: set labels.id_column, or "
            f"labels.lon_column and labels.lat_column; its columns are {', '.join(table.column_names)}"
        )
    return _join_places(table, config, tile_ids, boxes)


def _columns(config: LabelsConfig) -> MetadataColumns:
    return MetadataColumns(lon_column=config.lon_column, lat_column=config.lat_column, indicators=config.indicators)


def _indicators(table: MetadataTable, taken: set[str | None]) -> tuple[str, ...]:
    found = table.indicators({*taken, *table.coordinate_columns, "tile_id"})
    if not found:
        raise SourceError(f"{table.uri} has no column of numbers to be an indicator: give one, or remove labels.csv")
    return found


def _join_places(table: MetadataTable, config: LabelsConfig, tile_ids: list[str], boxes: np.ndarray) -> tuple[pa.Table, Facts]:
    """Rows go to every tile in whose footprint they lie; `config.rows_per_tile` says what becomes of several."""
    known = np.flatnonzero(are_boxes(boxes))
    if not len(known):
        raise SourceError(
            f"{table.uri} is to be joined by coordinates, but no tile has a footprint: set labels.tile_side_m to their size on "
            f"the ground where their centres are known, or give the CSV a column {config.id_column!r}"
        )
    points = np.array(table.places(), np.float64)  # NaN where a row has no place
    row, tile = _find_tiles(points, boxes[known])
    lon, lat = table.coordinate_columns
    hits, swapped_hits = len(np.unique(row)), len(np.unique(_find_tiles(points[:, ::-1], boxes[known])[0]))
    if swapped_hits > hits:
        raise SourceError(
            f"{table.uri}: {hits} of {len(points)} rows lie in a tile as they are, {swapped_hits} when longitude and latitude "
            f"are swapped: set labels.lon_column={lat} and labels.lat_column={lon}, or swap the columns"
        )
    if not hits:
        raise SourceError(f"{table.uri}: none of {len(points)} rows lies in a tile: its coordinates must be WGS84 degrees")
    tile = known[tile]
    rows_of_tile = np.bincount(tile, minlength=len(boxes))
    if config.rows_per_tile == "one" and rows_of_tile.max() > 1:
        crowded = int(np.argmax(rows_of_tile))
        first, second = (table.rows[number] for number in row[tile == crowded][:2])
        raise SourceError(
            f"{table.uri}: rows {first} and {second} both lie in the tile {tile_ids[crowded]!r}: set labels.rows_per_tile to "
            "mean or sum, or keep one row per tile"
        )
    columns = {
        name: _combine(table.numbers(name)[row], tile, len(boxes), config.rows_per_tile) for name in _indicators(table, set())
    }
    kept = np.flatnonzero(rows_of_tile)
    arrays = {name: pa.array(values[kept], pa.float64(), from_pandas=True) for name, values in columns.items()}
    facts = {
        "rows": len(points),
        "rows_in_no_tile": len(points) - hits,
        "rows_without_place": int(np.isnan(points).any(1).sum()),
    }
    return pa.table({"tile_id": pa.array([tile_ids[place] for place in kept], pa.string()), **arrays}), facts


def _combine(values: np.ndarray, tile: np.ndarray, num_tiles: int, how: str) -> np.ndarray:
    """Sum or mean of the known values of each tile, NaN where there is none."""
    known = np.isfinite(values)
    counts = np.bincount(tile[known], minlength=num_tiles)
    sums = np.bincount(tile[known], weights=values[known], minlength=num_tiles)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts if how == "mean" else sums, np.nan)


def _find_tiles(points: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (point, box) of points [points, 2] that lie in boxes [boxes, 4]: west and south edges count as inside."""
    from scipy.spatial import cKDTree

    centres, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    placed = np.flatnonzero(np.isfinite(points).all(axis=1))
    near = cKDTree(centres).query_ball_point(points[placed], half.max() * (1 + 1e-9), p=np.inf)
    row = np.repeat(placed, [len(found) for found in near])
    box = np.concatenate([np.asarray(found, np.int64) for found in near]) if len(near) else np.zeros(0, np.int64)
    inside = ((boxes[box, :2] <= points[row]) & (points[row] < boxes[box, 2:])).all(axis=1)
    return row[inside], box[inside]
