"""From the caption store to rows of captions: a dataset `captions` is a projection of what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


def project(index: pa.Table, described: Sequence[Described], given: Mapping[str, list[str]]) -> Iterator[pa.Table]:
    """`CAPTIONS` of the tiles of an index (`tile_id`, `sha256`, `error`), in its order, some tiles at a time.

    A tile has what is `given`, by its id, else what each origin says of it, else a row with the error.
    """
    for at in range(0, max(index.num_rows, 1), TILES_PER_PASS):  # no tiles are one empty table
        tiles = index.slice(at, TILES_PER_PASS)
        hashes = pc.unique(tiles["sha256"].combine_chunks().drop_null())
        place_of = {key: place for place, key in enumerate(hashes.to_pylist())}
        texts = [each.store.texts_of(hashes, each.num_samples) for each in described]
        for first in range(0, max(tiles.num_rows, 1), TILES_PER_FILE):
            rows: list[dict[str, Any]] = []
            for tile in tiles.slice(first, TILES_PER_FILE).to_pylist():
                if tile["tile_id"] in given and tile["error"] is None:
                    rows += rows_of(tile, source_captions.ORIGIN, given[tile["tile_id"]])
                    continue
                for each, stored in zip(described, texts, strict=True):
                    rows += rows_of(tile, each.store.origin, _find(tile, each, stored, place_of))
            yield as_captions(rows)


def _find(tile: dict[str, Any], described: Described, stored: pa.Array, place_of: dict[str, int]) -> list[str] | str:
    """The texts of a tile, or why it has none."""
    if tile["error"] is not None:
        return f"{UNREADABLE}: {tile['error']}"
    first = place_of[tile["sha256"]] * described.num_samples
    texts = stored.slice(first, described.num_samples)
    if texts.null_count and tile["sha256"] not in described.errors:
        raise StorageError(f"{described.store.folder.uri} has lost the text of {tile['tile_id']}: run the same command again")
    if texts.null_count:
        return described.errors[tile["sha256"]]
    return list(texts.to_pylist())


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
