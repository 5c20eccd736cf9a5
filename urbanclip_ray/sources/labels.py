"""All indicators of a run in one `labels` dataset: those that the source brings, those of a CSV, those of rasters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from urbanclip_ray.config import LabelsConfig
from urbanclip_ray.geo.boxes import boxes_around
from urbanclip_ray.sources.base import SourceError
from urbanclip_ray.sources.ingest import collect_labels
from urbanclip_ray.sources.label_csv import read_csv_labels
from urbanclip_ray.sources.label_rasters import measure_rasters
from urbanclip_ray.storage import Dataset, Publication

BOX = ["west", "south", "east", "north"]


def publish_labels(given: pa.Table | None, config: LabelsConfig, tiles: Dataset, publication: Publication) -> None:
    """Write the `labels` dataset; `given` are the source's own labels.

    Raises :class:`SourceError` where two indicators have one name, and where one of the three says nothing of these tiles.
    """
    parts = {} if given is None else {"the source": given}
    if not config.is_empty:
        places = tiles.read(["tile_id", "lon", "lat", *BOX])
        tile_ids, boxes = places["tile_id"].combine_chunks(), footprints_of(places, config.tile_side_m)
        if config.csv:
            parts[config.csv], publication.facts["csv"] = read_csv_labels(config, tile_ids.to_pylist(), boxes)
        if config.rasters:
            parts["labels.rasters"], publication.facts["rasters"] = measure_rasters(config, tile_ids, boxes)
        _refuse_strangers(parts, tile_ids)
    collect_labels(_join(parts), tiles, publication)


def footprints_of(places: pa.Table, side_m: float | None) -> np.ndarray:
    """Boxes in WGS84 degrees, float64 [tiles, 4]: a tile's own, else one of `side_m` around its centre, else NaN."""
    boxes = np.stack([places[name].to_numpy() for name in BOX], axis=1)
    if side_m is None:
        return boxes
    around = boxes_around(places["lon"].to_numpy(), places["lat"].to_numpy(), side_m)
    return np.where(np.isnan(boxes).any(axis=1, keepdims=True), around, boxes)


def raster_table(facts: dict[str, dict[str, Any]]) -> Table:
    """What to know of each raster before its labels are believed."""
    table = Table(title="labels from rasters", title_justify="left")
    for column in ("indicator", "labelled", "partly covered", "not covered", "no footprint", "cells per tile", "share a cell"):
        table.add_column(column, justify="left" if column == "indicator" else "right", overflow="fold")
    for name, fact in facts.items():
        counts = [f"{fact[key]:,}" for key in ("labelled", "partly_covered", "not_covered", "without_footprint")]
        shared = f"{fact['tiles_sharing_a_cell']:,} (up to {fact['most_tiles_in_a_cell']:,} in one)"
        table.add_row(f"{name} ({fact['operation']})", *counts, f"{fact['cells_per_tile']:.3g}", shared)
    table.caption = "Tiles that share a cell share a label, so that a random split gives test labels away: use blocks."
    return table


def _refuse_strangers(parts: dict[str, pa.Table], tile_ids: pa.Array) -> None:
    """Raise where no row of a part is of a tile: rows of the others would hide it."""
    for where, part in parts.items():
        if not pc.any(pc.is_in(part["tile_id"], value_set=tile_ids)).as_py():
            raise SourceError(
                f"{where}: none of its {part.num_rows} rows of labels is of a tile of this run, whose tiles are named such as "
                f"{tile_ids[0].as_py()!r}: make the names of both agree"
            )


def _join(parts: dict[str, pa.Table]) -> pa.Table:
    """All columns in one table, a row for every tile id that any part has, in their order."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    owner: dict[str, str] = {}
    for where, part in parts.items():
        for name in part.column_names:
            if name != "tile_id" and (other := owner.setdefault(name, where)) != where:
                raise SourceError(
                    f"the indicator {name!r} comes from {other} and from {where}: rename or leave out one of them"
                )
    tile_ids = pc.unique(pa.chunked_array([chunk for part in parts.values() for chunk in part["tile_id"].chunks]))
    columns: dict[str, Any] = {"tile_id": tile_ids}
    for part in parts.values():
        rows = pc.index_in(tile_ids, value_set=part["tile_id"].combine_chunks())
        columns |= {name: part[name].combine_chunks().take(rows) for name in part.column_names if name != "tile_id"}
    return pa.table(columns)
