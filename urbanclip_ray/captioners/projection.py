"""From the caption store to rows of captions: a dataset `captions` is a projection of what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.captioners import given as source_captions
from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.captioners.tally import UNREADABLE
from urbanclip_ray.schema import CAPTIONS
from urbanclip_ray.storage import StorageError

TILES_PER_PASS = 200_000  # the texts of so many are in memory at a time, about 100 MB; each pass reads the store once
TILES_PER_FILE = 8_192  # all captions of a tile lie in one file


class Described(NamedTuple):
    """The texts of one origin, and why some tiles have none, by their sha256."""

    store: CaptionStore
    num_samples: int
    errors: Mapping[str, str]


class TextsOfPass(NamedTuple):
    """What one origin says of some tiles: texts [tiles * samples], and the tiles' places by their sha256."""

    described: Described
    texts: pa.Array
    place_of: Mapping[str, int]

    def rows(self, tile: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of a readable tile: its texts, or why it has none."""
        (store, num_samples, errors), sha256 = self.described, tile["sha256"]
        if sha256 in errors:
            return rows_of(tile, store.origin, errors[sha256])
        texts = self.texts.slice(self.place_of[sha256] * num_samples, num_samples)
        if texts.null_count:
            raise StorageError(f"{store.folder.uri} has lost the text of {tile['tile_id']}: run the same command again")
        return rows_of(tile, store.origin, texts.to_pylist())


def project(
    index: pa.Table, described: Sequence[Described], given: Mapping[str, list[str]], places: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """`CAPTIONS` of the tiles of an index (`tile_id`, `sha256`, `error`), in its order, some tiles at a time.

    A tile has what is `given`, by its id, else what its origins say of it, else a row with the error; one that cannot be read
    has one row. Its origins are those at its `places` in `described`, [tiles, origins of a tile]; without places, all of them.
    """
    if places is None:
        places = np.tile(np.arange(len(described), dtype=np.int32), (index.num_rows, 1))
    step = max(1, TILES_PER_PASS // max(1, places.shape[1]))
    for at in range(0, max(index.num_rows, 1), step):  # no tiles are one empty table
        tiles, of_pass = index.slice(at, step), places[at : at + step]
        texts = {int(place): _read_texts(described[place], tiles, of_pass == place) for place in np.unique(of_pass)}
        for first in range(0, max(tiles.num_rows, 1), TILES_PER_FILE):
            rows: list[dict[str, Any]] = []
            file = tiles.slice(first, TILES_PER_FILE).to_pylist()
            for tile, own in zip(file, of_pass[first : first + TILES_PER_FILE].tolist(), strict=True):
                if tile["error"] is not None:
                    rows += rows_of(tile, described[own[0]].store.origin, f"{UNREADABLE}: {tile['error']}")
                elif tile["tile_id"] in given:
                    rows += rows_of(tile, source_captions.ORIGIN, given[tile["tile_id"]])
                else:
                    rows += [row for place in dict.fromkeys(own) for row in texts[place].rows(tile)]
            yield as_captions(rows)


def _read_texts(described: Described, tiles: pa.Table, are_asked: np.ndarray) -> TextsOfPass:
    """The texts of those tiles that have this origin, by booleans [tiles, origins of a tile]."""
    hashes = pc.unique(tiles["sha256"].filter(pa.array(are_asked.any(axis=1))).drop_null())
    place_of = {key: place for place, key in enumerate(hashes.to_pylist())}
    return TextsOfPass(described, described.store.texts_of(hashes, described.num_samples), place_of)


def rows_of(tile: Mapping[str, Any], origin: Origin, texts: Sequence[str] | str) -> list[dict[str, Any]]:
    """Rows of one tile (`tile_id`, `sha256`): its texts, or one row with the error."""
    common = {"tile_id": tile["tile_id"], "model": origin.model, "prompt": origin.prompt}
    name = tile["sha256"] or tile["tile_id"]
    if isinstance(texts, str):
        return [common | {"caption_key": origin.key(name, 0), "text": None, "error": texts}]
    return [
        common | {"caption_key": origin.key(name, sample), "text": text, "error": None} for sample, text in enumerate(texts)
    ]


def as_captions(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=CAPTIONS)
