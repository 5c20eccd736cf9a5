"""What the page's maps and scatters are drawn from: places, parts, truth and prediction of tiles, as JSON.

The page draws maps on a canvas of its own: a plot of plotly's is an element per tile, and its faster kind needs a content
security policy that lets the page make code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from plotly.colors import sample_colorscale

from urbanclip_ray.evaluate import plots
from urbanclip_ray.evaluate.findings import SPACE_NAMES
from urbanclip_ray.evaluate.thumbnails import Sheets
from urbanclip_ray.storage import Dataset

Json = dict[str, Any]

MOST_AREAS = 12
NUM_COLOURS = 256
PART_LETTERS = {"train": "t", "val": "v", "test": "e", "buffer": "b"}
NO_PART = "-"
PLACE_COLUMNS = ["tile_id", "region", "lon", "lat", "west", "south", "east", "north"]


class Maps(NamedTuple):
    """`data` is what the page draws from; `panels` and `areas` are what the template lays out."""

    data: Json
    panels: list[Json]
    areas: list[Json]
    splits: list[str]


def make_maps(
    datasets: Mapping[str, Dataset], record: Json, method: str, sheets: Sheets, figures: dict[str, plots.Figure]
) -> Maps:
    """A panel per indicator and area, and a map of the parts per area. Scatter plots go to `figures`."""
    held_out = _held_out(datasets["probe"], record, method)
    areas = _areas(datasets["tiles"])
    known = pd.unique(pd.concat([held_out["tile_id"], *(rows["tile_id"] for rows in areas.values())]))
    number = {tile_id: at for at, tile_id in enumerate(known)}
    splits, parts = _parts(datasets["splits"], record["outer"])
    data: Json = {
        "tiles": {"ids": list(known), "thumb": [sheets.place.get(tile_id, -1) for tile_id in known]},
        "areas": [_area(rows, number, parts) for rows in areas.values()],
        "panels": [],
        "scales": {"values": _colours("Viridis"), "signed": _colours("RdBu")[::-1]},
        "sheets": {"cells": sheets.cells, "columns": sheets.columns, "side": sheets.side_px},
    }
    panels: list[Json] = []
    for indicator in held_out["indicator"].unique():
        rows = held_out[held_out["indicator"] == indicator]
        space = str(rows["space"].iloc[0])
        test = rows[rows["space"] == space].groupby("tile_id", as_index=False)[["y", "y_pred"]].mean()
        for at, (area, tiles) in enumerate(areas.items() or [("", None)]):
            here = test if tiles is None else tiles[["tile_id"]].assign(at=range(len(tiles))).merge(test, on="tile_id")
            if here.empty:
                continue
            index = len(panels)
            figures[f"scatter-{index}"] = plots.truth_scatter(here, space)
            data["panels"].append(_panel(here, number))
            panels.append(
                {
                    "indicator": str(indicator),
                    "area": area,
                    "area_index": None if tiles is None else at,
                    "space": SPACE_NAMES.get(space, space),
                    "scatter": f"scatter-{index}",
                    "num_tiles": len(here),
                    "num_points": min(len(here), plots.MOST_POINTS),
                }
            )
    return Maps(data, panels, [{"name": name, "num_tiles": len(rows)} for name, rows in areas.items()], splits)


def _held_out(probe: Dataset, record: Json, method: str) -> pd.DataFrame:
    filters = [("method", "=", method), ("split", "=", record["outer"])]
    return probe.read(columns=["tile_id", "indicator", "y", "y_pred", "space"], filters=filters).to_pandas()


def _areas(tiles: Dataset) -> dict[str, pd.DataFrame]:
    """Tiles with coordinates, as one area, or one per region where regions lie far apart (cities of a country)."""
    frame = tiles.read(columns=PLACE_COLUMNS).to_pandas().dropna(subset=["lon", "lat"])
    if frame.empty:
        return {}
    spans = frame.groupby("region")[["lon", "lat"]].agg(np.ptp)
    if 1 < len(spans) <= MOST_AREAS and spans.prod(axis=1).sum() < 0.25 * np.ptp(frame["lon"]) * np.ptp(frame["lat"]):
        return {str(region): rows for region, rows in frame.groupby("region")}
    return {"": frame}


def _area(rows: pd.DataFrame, number: dict[str, int], parts: dict[str, dict[str, str]]) -> Json:
    """Places in degrees; `stretch` is the length of a degree of latitude over one of longitude."""
    width, height = (rows["east"] - rows["west"]).median(), (rows["north"] - rows["south"]).median()
    if not np.isfinite([width, height]).all():  # no footprints: as if the tiles filled the area
        width, height = (max(np.ptp(rows[name]), 1e-3) / max(1.0, len(rows) ** 0.5) for name in ("lon", "lat"))
    box = [rows["lon"].min() - width, rows["lat"].min() - height, rows["lon"].max() + width, rows["lat"].max() + height]
    return {
        "tile": [number[tile_id] for tile_id in rows["tile_id"]],
        "lon": rows["lon"].round(5).tolist(),
        "lat": rows["lat"].round(5).tolist(),
        "width": plots.significant(float(width)),
        "height": plots.significant(float(height)),
        "box": [round(float(side), 5) for side in box],
        "stretch": 1 / float(np.cos(np.radians(np.clip((box[1] + box[3]) / 2, -85, 85)))),
        "parts": {split: "".join(of.get(tile_id, NO_PART) for tile_id in rows["tile_id"]) for split, of in parts.items()},
    }


def _parts(splits: Dataset, outer: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The names of the splits, the outer one first, and the letter of each tile's part in the first draw of each."""
    rows = splits.read(["tile_id", "split", "seed", "fold", "part"]).to_pandas()
    names = sorted(rows["split"].unique(), key=lambda split: (split != outer, split))
    found = {}
    for split in names:
        own = rows[rows["split"] == split]
        first = own[(own["seed"] == own["seed"].min()) & (own["fold"] == own["fold"].min())]
        letters = (PART_LETTERS.get(part, NO_PART) for part in first["part"])
        found[split] = dict(zip(first["tile_id"], letters, strict=True))
    return names, found


def _panel(here: pd.DataFrame, number: dict[str, int]) -> Json:
    """Truth and prediction share the colours from `low` to `high`, the 2nd to the 98th percentile of both; the residual
    spans zero by `reach` either way.
    """
    low, high = (float(bound) for bound in np.percentile(np.concatenate([here["y"], here["y_pred"]]), [2, 98]))
    return {
        "tile": [number[tile_id] for tile_id in here["tile_id"]],
        "at": here["at"].tolist() if "at" in here else [],
        "y": [plots.significant(value) for value in here["y"]],
        "y_pred": [plots.significant(value) for value in here["y_pred"]],
        "low": low,
        "high": high if high > low else low + 1.0,
        "reach": float(np.percentile((here["y_pred"] - here["y"]).abs(), 98)) or 1.0,
    }


def _colours(name: str) -> list[str]:
    return list(sample_colorscale(name, np.linspace(0, 1, NUM_COLOURS)))
