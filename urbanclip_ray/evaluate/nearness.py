"""How near tiles lie to each other: the buffer around test tiles, and the figures that every split is published with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG


def are_placed(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Whether tiles have a place on the globe, bool [tiles]; degrees."""
    placed: np.ndarray = np.isfinite(lon) & (np.abs(lat) <= 90)
    return placed


def nearest_km(to_lon: np.ndarray, to_lat: np.ndarray, lon: np.ndarray, lat: np.ndarray, rank: int = 1) -> np.ndarray:
    """Great-circle distance of every point to the nearest (`rank` 1), second nearest ... of others, km [points]; degrees."""
    distance, _ = _nearest(to_lon, to_lat, lon, lat, rank)
    return distance


def describe_nearness(rows: pa.Table, tiles: pa.Table, block_km: float) -> dict[str, dict[str, Any]]:
    """How near the test tiles of every split are to what is learned from, by split; the mean over folds, of the first draw.

    `rows` are of :data:`schema.SPLITS`; `tiles` have `tile_id`, `lon`, `lat` (degrees). `median_km`, `p5_km`: distance of
    a test tile's centre to the nearest training tile's, median and 5th percentile. `within_block_km`: share of test tiles
    nearer than a block's side. `nearest_in_train`: share of test tiles whose nearest other tile of all is a training tile.
    Splits with tiles that have no place are described as such.
    """
    where = pc.index_in(rows["tile_id"], value_set=tiles["tile_id"].combine_chunks())
    lon, lat = (tiles[name].take(where).to_numpy().astype(np.float64) for name in ("lon", "lat"))
    part = rows["part"].to_numpy(zero_copy_only=False).astype(str)
    frame = rows.select(["split", "seed", "fold"]).to_pandas()
    described: dict[str, dict[str, Any]] = {}
    for split, own in frame[frame["seed"] == 0].groupby("split", sort=False):
        folds = [index.to_numpy() for index in own.groupby("fold").groups.values()]
        if not are_placed(lon[own.index], lat[own.index]).all():
            described[str(split)] = {"unknown": "tiles have no lon and lat"}
            continue
        figures = [_describe_fold(lon[fold], lat[fold], part[fold], block_km) for fold in folds]
        described[str(split)] = {name: float(np.mean([found[name] for found in figures])) for name in figures[0]}
    return described


def _describe_fold(lon: np.ndarray, lat: np.ndarray, part: np.ndarray, block_km: float) -> dict[str, float]:
    train, test = part == "train", part == "test"
    distance, _ = _nearest(lon[train], lat[train], lon[test], lat[test], 1)
    _, neighbour = _nearest(lon, lat, lon[test], lat[test], min(2, len(lon)))  # the nearest is the tile itself
    return {
        "median_km": float(np.median(distance)),
        "p5_km": float(np.percentile(distance, 5)),
        "within_block_km": float((distance < block_km).mean()),
        "nearest_in_train": float(train[neighbour].mean()),
    }


def _nearest(
    to_lon: np.ndarray, to_lat: np.ndarray, lon: np.ndarray, lat: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in km and places in `to_lon` of the points of this rank, [points] each."""
    from sklearn.neighbors import BallTree

    tree = BallTree(np.radians(np.stack([to_lat, to_lon], axis=1)), metric="haversine")
    distance, place = tree.query(np.radians(np.stack([lat, lon], axis=1)), k=rank)
    return distance[:, -1] * EARTH_RADIUS_KM, place[:, -1]
