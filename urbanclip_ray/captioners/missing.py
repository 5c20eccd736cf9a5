"""What the caption store lacks of a run's tiles, found by key: the driver knows it before any actor starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.storage import Dataset


class Missing(NamedTuple):
    """What a store has of some tiles: their sha256, each once, one tile's id for each, and which texts are there."""

    hashes: pa.Array
    tile_ids: pa.Array
    num_rows: np.ndarray  # [tiles]: how many rows of the tiles have these bytes
    are_stored: np.ndarray  # booleans [tiles, samples]

    @property
    def is_missing(self) -> np.ndarray:
        """Booleans [tiles]: whether any text of the tile is."""
        return np.logical_not(np.all(self.are_stored, axis=1))

    @property
    def num_missing(self) -> int:
        return int(self.is_missing.sum())

    @property
    def num_stored_captions(self) -> int:
        """Of tiles with all their texts, a text for every row."""
        return int(self.num_rows[~self.is_missing].sum()) * self.are_stored.shape[1]

    def missing_tile_ids(self) -> pa.Array:
        return self.tile_ids.filter(pa.array(self.is_missing))


def read_index(tiles: Dataset) -> pa.Table:
    """`tile_id`, `sha256`, `error` of every tile, in the dataset's order."""
    return tiles.read(["tile_id", "sha256", "error"])


def find_missing(store: CaptionStore | None, index: pa.Table, num_samples: int, given: Iterable[str] = ()) -> Missing:
    """Which of the readable tiles have no text; tiles that are `given` one elsewhere, by id, are not asked for."""
    index = index.filter(pc.is_null(index["error"]))
    index = index.filter(pc.invert(pc.is_in(index["tile_id"], value_set=pa.array(list(given), pa.string()))))
    first = index.group_by("sha256", use_threads=False).aggregate([("tile_id", "first"), ("tile_id", "count")])
    hashes, tile_ids = (first[name].combine_chunks() for name in ("sha256", "tile_id_first"))
    nothing = np.zeros((len(hashes), num_samples), bool)
    are_stored = nothing if store is None else store.samples_of(hashes, num_samples)
    return Missing(hashes, tile_ids, first["tile_id_count"].to_numpy(), are_stored)
