"""The captioner `given`: the source brings its captions (RSICD's people, a CSV's column)."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from urbanclip_ray.captioners.base import Origin, Tile
from urbanclip_ray.captioners.texts import TooLongError, clean_texts

ORIGIN = Origin("given", "1", "", {})


class GivenCaptioner:
    """Looks captions up by tile id. `captions` has the columns `tile_id` and `text`, in the source's order."""

    def __init__(self, captions: pa.Table) -> None:
        self._texts = by_tile(captions)

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        return [self._texts.get(tile.tile_id) or LookupError("the source gives no caption") for tile in tiles]


def by_tile(captions: pa.Table | None) -> dict[str, list[str] | TooLongError]:
    """The texts of every tile by its id, clean, in the source's order; the error of a tile with one that is too long."""
    texts: dict[str, list[str]] = {}
    if captions is not None:
        for tile_id, text in zip(captions["tile_id"].to_pylist(), captions["text"].to_pylist(), strict=True):
            texts.setdefault(tile_id, []).append(text or "")
    return {tile_id: clean_texts(each) for tile_id, each in texts.items()}
