"""What the caption store lacks of a run's tiles, found by key: the driver knows it before any actor starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


class Asked(NamedTuple):
    """One prompt, and what its store has of the tiles that are asked it.

    With a `reason` it cannot be filled for them: a model is not asked, and nothing is stored.
    """

    prompt: str
    store: CaptionStore
    known: Missing
    reason: str | None = None

    def refusals(self) -> dict[str, str]:
        """The reason by the tiles' sha256."""
        return {} if self.reason is None else dict.fromkeys(self.known.hashes.to_pylist(), self.reason)


class Questions(NamedTuple):
    """What the tiles of an index are asked: every prompt as it reads once its fields are filled, and each tile's places in
    that list, [tiles, prompts of a tile], in the order of the config.
    """

    index: pa.Table
    asked: list[Asked]
    places: np.ndarray

    def to_do(self) -> list[Asked]:
        """Prompts to which answers are missing."""
        return [each for each in self.asked if each.reason is None and each.known.num_missing]

    def wanted(self) -> Wanted:
        """What is to be generated."""
        to_do = self.to_do()
        tile_ids = [each.known.missing_tile_ids() for each in to_do]
        numbers = np.repeat(np.arange(len(to_do), dtype=np.int32), [len(each) for each in tile_ids])
        pairs = pa.table({"tile_id": pa.chunked_array(tile_ids, pa.string()), "number": numbers})
        by_tile = pairs.group_by("tile_id", use_threads=False).aggregate([("number", "list")]).combine_chunks()
        return Wanted(by_tile["tile_id"], by_tile["number_list"], [each.prompt for each in to_do])


class Wanted(NamedTuple):
    """Tiles that lack texts, and for each the numbers of the prompts that it is to be asked."""

    tile_ids: pa.ChunkedArray
    numbers: pa.ChunkedArray
    prompts: Sequence[str]

    def choose(self, rows: pa.Table) -> pa.Table:
        """Those of the rows (with `tile_id`) that lack texts, with their `prompts`."""
        chosen = rows.filter(pc.is_in(rows["tile_id"], value_set=self.tile_ids))
        numbers = self.numbers.take(pc.index_in(chosen["tile_id"], value_set=self.tile_ids)).to_pylist()
        prompts = [[self.prompts[number] for number in each] for each in numbers]
        return chosen.append_column("prompts", pa.array(prompts, pa.list_(pa.string())))


def read_index(tiles: Dataset, more_columns: Sequence[str] = ()) -> pa.Table:
    """`tile_id`, `sha256`, `error` of every tile, in the dataset's order."""
    return tiles.read(["tile_id", "sha256", "error", *more_columns])


def find_missing(store: CaptionStore | None, index: pa.Table, num_samples: int, given: Iterable[str] = ()) -> Missing:
    """Which of the readable tiles have no text; tiles that are `given` one elsewhere, by id, are not asked for."""
    index = index.filter(pc.is_null(index["error"]))
    index = index.filter(pc.invert(pc.is_in(index["tile_id"], value_set=pa.array(list(given), pa.string()))))
    first = index.group_by("sha256", use_threads=False).aggregate([("tile_id", "first"), ("tile_id", "count")])
    hashes, tile_ids = (first[name].combine_chunks() for name in ("sha256", "tile_id_first"))
    nothing = np.zeros((len(hashes), num_samples), bool)
    are_stored = nothing if store is None or not len(hashes) else store.samples_of(hashes, num_samples)
    return Missing(hashes, tile_ids, first["tile_id_count"].to_numpy(), are_stored)
