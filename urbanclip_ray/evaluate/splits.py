"""Splits as data: which tile trains, selects and tests, seeded and written to storage before anything is pretrained.

The outer split has one test part for all draws, because one pretraining belongs to it; only train and validation are
redrawn inside the rest. The further kinds of `split.also` redraw all three parts: weights pretrained on the outer split
have seen some of their test tiles, so their scores are transductive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import SplitConfig, SplitKind
from urbanclip_ray.errors import UserError
from urbanclip_ray.schema import SPLITS
from urbanclip_ray.storage import Dataset, Publication

PARTS = ("train", "val", "test")
COLUMNS = ["tile_id", "lon", "lat", "group", "error"]  # all that a split may depend on
UNREADABLE = "unreadable tile"
EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG

MORE_OF = {
    "random": "bring more tiles or change split.test_share and split.val_share",
    "blocks": "make split.block_km smaller or change split.test_share and split.val_share",
    "group": "use finer groups, or another kind of split such as split.outer=random",
    "source": "correct the source's parts, or use another kind of split such as split.outer=random",
}


class SplitError(UserError, ValueError):
    """Tiles that cannot be split as asked; the message names the count and the fix."""


def assign_splits(tiles: pa.Table, config: SplitConfig, source_parts: pa.Table | None) -> tuple[pa.Table, dict[str, int]]:
    """Every usable tile's part in every split and draw, and the rejected tiles by reason.

    `tiles` has `tile_id`, `lon`, `lat` (degrees), `group` and `error`; `source_parts` has `tile_id` and `part`, or is
    None where the source brings no split of its own. Returns rows of :data:`schema.SPLITS`, ordered by split, draw,
    tile. The result depends on tile ids, coordinates, groups, source parts and config, not on the order of rows.

    Raises :class:`SplitError` when a kind lacks what it needs or a part would be empty.
    """
    kinds: tuple[SplitKind, ...] = (config.outer, *config.also)
    if len(set(kinds)) < len(kinds):
        raise SplitError(f"split.outer and split.also name a kind twice ({', '.join(kinds)}): name each once")
    tiles = tiles.sort_by("tile_id")
    if pc.count_distinct(tiles["tile_id"]).as_py() < tiles.num_rows:
        raise SplitError("tile ids repeat: every tile needs its own id; ingest the source again with unique names")
    usable = tiles.filter(pc.is_null(tiles["error"]))
    num_rejected = tiles.num_rows - usable.num_rows
    if usable.num_rows == 0:
        raise SplitError(f"none of {tiles.num_rows} tiles is readable: correct the source and ingest it again")
    rows = [
        _rows(usable["tile_id"], kind, draw, parts)
        for kind in kinds
        for draw, parts in enumerate(_draws(kind, usable, config, source_parts))
    ]
    return pa.concat_tables(rows).combine_chunks(), {UNREADABLE: num_rejected} if num_rejected else {}


def publish_splits(tiles: Dataset, config: SplitConfig, source_parts: pa.Table | None, publication: Publication) -> None:
    """Read the small columns of the tiles, assign the splits and write them. Accounts in tiles."""
    table = tiles.read(COLUMNS)
    rows, rejects = assign_splits(table, config, source_parts)
    publication.write_table(rows)
    num_rejected = sum(rejects.values())
    publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows - num_rejected, rejects=dict(rejects))
    if source_parts is not None:
        unknown = pc.invert(pc.is_in(source_parts["tile_id"], value_set=table["tile_id"].combine_chunks()))
        publication.facts["source_parts_without_tile"] = pc.sum(unknown).as_py() or 0


def block_codes(lon: np.ndarray, lat: np.ndarray, block_km: float) -> np.ndarray:
    """The number of the square block that each point lies in, int64.

    Latitude bands about `block_km` high, cut into columns about `block_km` wide at the band's middle latitude. Both are
    rounded to whole numbers over the globe, so that no block at the date line or a pole is a thin remainder.
    """
    circumference_km = 2 * np.pi * EARTH_RADIUS_KM
    num_bands = max(1, round(circumference_km / 2 / block_km))
    band = np.minimum(((lat + 90) / 180 * num_bands).astype(np.int64), num_bands - 1)
    middle_lat = np.radians((band + 0.5) / num_bands * 180 - 90)
    num_columns = np.maximum(1, np.rint(circumference_km * np.cos(middle_lat) / block_km)).astype(np.int64)
    column = np.minimum(((lon + 180) % 360 / 360 * num_columns).astype(np.int64), num_columns - 1)
    most_columns = max(1, round(circumference_km / block_km)) + 1
    return band * most_columns + column


def _draws(kind: SplitKind, tiles: pa.Table, config: SplitConfig, source_parts: pa.Table | None) -> Iterator[np.ndarray]:
    """The part of every tile (strings), one array per draw."""
    own_parts = _source_parts(tiles, source_parts) if kind == "source" else None
    units = _units(kind, tiles, config)
    for draw in range(config.num_draws):
        if own_parts is not None:
            test, val = own_parts == "test", own_parts == "val"
        else:
            everything = np.ones(len(units), dtype=bool)
            # One pretraining holds out one test part, so the outer split always takes the first draw's.
            test_draw = 0 if kind == config.outer else draw
            test = _choose(units, everything, config.test_share, _generator(config, kind, "test", test_draw))
            val = np.zeros_like(test)
        if not val.any():
            val = _choose(units, ~test, config.val_share, _generator(config, kind, "val", draw))
        parts = np.where(test, "test", np.where(val, "val", "train"))
        if missing := [part for part in PARTS if not (parts == part).any()]:
            raise SplitError(
                f"split {kind!r}, draw {draw}: {' and '.join(missing)} would be empty, with {len(parts)} tiles in "
                f"{len(np.unique(units))} pieces that stay whole: {MORE_OF[kind]}"
            )
        yield parts


def _units(kind: SplitKind, tiles: pa.Table, config: SplitConfig) -> np.ndarray:
    """What stays whole: one code per tile; tiles of equal code are never separated."""
    if kind == "blocks":
        lon, lat = (tiles[name].to_numpy().astype(np.float64) for name in ("lon", "lat"))
        num_lacking = int((~np.isfinite(lon) | ~(np.abs(lat) <= 90)).sum())
        _require(kind, "lon and lat", num_lacking, tiles.num_rows, config)
        return block_codes(lon, lat, config.block_km)
    if kind == "group":
        _require(kind, "a group", tiles["group"].null_count, tiles.num_rows, config)
        codes: np.ndarray = np.unique(tiles["group"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
        return codes
    return np.arange(tiles.num_rows)


def _require(kind: SplitKind, what: str, num_lacking: int, num_tiles: int, config: SplitConfig) -> None:
    if num_lacking:
        fix = "set split.outer=random" if kind == config.outer else f"take {kind!r} out of split.also"
        raise SplitError(
            f"split {kind!r} needs {what} of every tile, but {num_lacking} of {num_tiles} tiles lack it: "
            f"bring it with the source, or {fix}"
        )


def _source_parts(tiles: pa.Table, source_parts: pa.Table | None) -> np.ndarray:
    if source_parts is None:
        raise SplitError("split 'source': this source brings no split of its own; set split.outer=blocks or random")
    if pc.count_distinct(source_parts["tile_id"]).as_py() < source_parts.num_rows:
        raise SplitError("split 'source': the source places a tile in two parts; correct it")
    where = pc.index_in(tiles["tile_id"], value_set=source_parts["tile_id"].combine_chunks())
    parts = source_parts["part"].take(where)
    if parts.null_count:
        raise SplitError(
            f"split 'source': {parts.null_count} of {tiles.num_rows} tiles have no part in the source; "
            "complete it, or set split.outer=blocks or random"
        )
    if unknown := sorted(set(parts.unique().to_pylist()) - set(PARTS)):
        raise SplitError(f"split 'source': unknown parts {unknown}; the source must use {', '.join(PARTS)}")
    found: np.ndarray = parts.to_numpy().astype(str)
    return found


def _choose(units: np.ndarray, candidates: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Whole units among the candidates, in random order, each taken when it brings the share of all tiles closer."""
    num_wanted = share * len(units)
    codes, sizes = np.unique(units[candidates], return_counts=True)
    taken: list[int] = []
    num_taken = 0
    for index in generator.permutation(len(codes)).tolist():
        if num_taken >= num_wanted:
            break
        size = int(sizes[index])
        if abs(num_taken + size - num_wanted) < abs(num_taken - num_wanted):
            taken.append(index)
            num_taken += size
    if not taken and len(codes):
        taken = [int(np.argmin(sizes))]  # every unit overshoots: the smallest does so least
    chosen: np.ndarray = candidates & np.isin(units, codes[taken])
    return chosen


def _generator(config: SplitConfig, kind: SplitKind, part: str, draw: int) -> np.random.Generator:
    key = hashlib.sha256(f"{config.seed}/{kind}/{part}/{draw}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:16], "big"))


def _rows(tile_ids: pa.ChunkedArray, kind: SplitKind, draw: int, parts: np.ndarray) -> pa.Table:
    num_tiles = len(parts)
    return pa.table(
        [
            tile_ids.combine_chunks(),
            pa.repeat(pa.scalar(str(kind)), num_tiles),
            pa.repeat(pa.scalar(draw, pa.int32()), num_tiles),
            pa.repeat(pa.scalar(0, pa.int32()), num_tiles),
            pa.array(parts, pa.string()),
        ],
        schema=SPLITS,
    )
