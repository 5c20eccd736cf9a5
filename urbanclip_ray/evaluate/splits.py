"""Splits as data: which tile trains, selects and tests, seeded and written to storage before anything is pretrained.

The outer split has one test part for all draws, because one pretraining belongs to it; only train and validation are
redrawn inside the rest. The further kinds of `split.also` redraw all three parts: weights pretrained on the outer split
have seen some of their test tiles, so their scores are transductive.

With `split.num_folds` every tile is in test once, in one of the folds; `city` has a fold for every region, and `transfer`
one for every ordered pair of them. A pretraining belongs to one fold of the outer split, `split.outer_fold`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import SplitConfig, SplitKind
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.nearness import EARTH_RADIUS_KM, are_placed, describe_nearness, nearest_km
from urbanclip_ray.schema import SPLITS
from urbanclip_ray.storage import Dataset, Publication

PARTS = ("train", "val", "test")
BUFFER = "buffer"  # the part of tiles that are too near to a test tile to be learned from
COLUMNS = ["tile_id", "region", "lon", "lat", "group", "error"]  # all that a split may depend on
UNREADABLE = "unreadable tile"
BUFFERED = ("blocks", "group", "city", "transfer")  # any other test tile has its neighbours in train by design
MIN_BLOCKS = 3  # of a city, to take whole ones of it for validation

MORE_OF = {
    "random": "bring more tiles or change split.test_share and split.val_share",
    "blocks": "make split.block_km smaller, or split.buffer_km, or change split.test_share and split.val_share",
    "group": "use finer groups, make split.buffer_km smaller, or take another kind of split such as split.outer=random",
    "source": "correct the source's parts, or use another kind of split such as split.outer=random",
    "city": "bring more tiles of the other cities, or use another kind of split such as split.outer=blocks",
    "transfer": "bring more tiles of that city, take it out of the source, or take transfer out of split.also",
}


class SplitError(UserError, ValueError):
    """Tiles that cannot be split as asked; the message names the count and the fix."""


class Fold(NamedTuple):
    """One test part of a kind of split; `inside` are the tiles that take part at all, bool [tiles] both."""

    number: int
    name: str
    inside: np.ndarray
    test: np.ndarray


def assign_splits(tiles: pa.Table, config: SplitConfig, source_parts: pa.Table | None) -> tuple[pa.Table, dict[str, int]]:
    """Every usable tile's part in every split, fold and draw, and the rejected tiles by reason.

    `tiles` has `tile_id`, `lon`, `lat` (degrees), `group`, `error` and, for splits by city, `region`; `source_parts` has
    `tile_id` and `part`, or is None where the source brings no split of its own. Returns rows of :data:`schema.SPLITS`,
    ordered by split, draw, fold, tile. The result depends on tile ids, places, groups, regions, source parts and config, not
    on the order of rows.

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
        _rows(usable["tile_id"], kind, draw, fold, parts)
        for kind in kinds
        for draw, fold, parts in _draws(kind, usable, config, source_parts)
    ]
    return pa.concat_tables(rows).combine_chunks(), {UNREADABLE: num_rejected} if num_rejected else {}


def publish_splits(tiles: Dataset, config: SplitConfig, source_parts: pa.Table | None, publication: Publication) -> None:
    """Read the small columns of the tiles, assign the splits and write them. Accounts in tiles.

    The facts say how near test tiles are to training tiles, how many tiles the buffers leave out, and what folds are called.
    """
    table = tiles.read(COLUMNS)
    rows, rejects = assign_splits(table, config, source_parts)
    publication.write_table(rows)
    num_rejected = sum(rejects.values())
    publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows - num_rejected, rejects=dict(rejects))
    publication.facts["folds"] = {
        kind: _fold_names(kind, table) for kind in (config.outer, *config.also) if kind in ("city", "transfer")
    }
    publication.facts["nearness"] = describe_nearness(rows, table, config.block_km)
    publication.facts["buffer"] = _count_buffered(rows)
    if source_parts is not None:
        unknown = pc.invert(pc.is_in(source_parts["tile_id"], value_set=table["tile_id"].combine_chunks()))
        publication.facts["source_parts_without_tile"] = pc.sum(unknown).as_py() or 0


def cluster_units(kind: str, tiles: pa.Table, block_km: float) -> tuple[str, np.ndarray]:
    """What a bootstrap must draw whole in a split of this kind, and its code for every tile [tiles].

    Tiles nearby have like values and like errors, so they are no independent draws, whatever the split: groups where these
    were held out, else blocks where all tiles have a place, else single tiles.
    """
    if kind == "group" and not tiles["group"].null_count:
        return "group", np.unique(tiles["group"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]
    lon, lat = (tiles[name].to_numpy().astype(np.float64) for name in ("lon", "lat"))
    if are_placed(lon, lat).all():
        return "block", np.unique(block_codes(lon, lat, block_km), return_inverse=True)[1]
    return "tile", np.arange(tiles.num_rows)


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


def _draws(
    kind: SplitKind, tiles: pa.Table, config: SplitConfig, source_parts: pa.Table | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Draw, fold and the part of every tile (strings; empty for a tile that takes no part)."""
    own_parts = _source_parts(tiles, source_parts) if kind == "source" else None
    units = _units(kind, tiles, config)
    for draw in range(config.num_draws):
        # One pretraining holds out one test part, so the outer split always takes the first draw's.
        test_draw = 0 if kind == config.outer else draw
        for fold in _folds(kind, tiles, units, config, test_draw, own_parts):
            val = np.zeros_like(fold.test) if own_parts is None else own_parts == "val"
            if not val.any():
                candidates = fold.inside & ~fold.test
                val = _choose_val(kind, tiles, units, candidates, config, _generator(config, kind, "val", draw, fold.number))
            parts = np.where(fold.test, "test", np.where(val, "val", np.where(fold.inside, "train", "")))
            parts = parts.astype(object)  # numpy's own strings would cut a longer name off
            if config.buffer_km and kind in BUFFERED:
                parts[_near_test(kind, tiles, parts, config)] = BUFFER
            if missing := [part for part in PARTS if not (parts == part).any()]:
                raise SplitError(
                    f"split {kind!r}, draw {draw}{f', {fold.name}' * bool(fold.name)}: {' and '.join(missing)} would be "
                    f"empty, with {int(fold.inside.sum())} tiles in {len(np.unique(units[fold.inside]))} pieces that stay "
                    f"whole: {MORE_OF[kind]}"
                )
            yield draw, fold.number, parts


def _folds(
    kind: SplitKind, tiles: pa.Table, units: np.ndarray, config: SplitConfig, draw: int, own_parts: np.ndarray | None
) -> Iterator[Fold]:
    """The test parts of one draw; of the outer split the one that the pretraining keeps out."""
    chosen = config.outer_fold if kind == config.outer else None
    names = _fold_names(kind, tiles) if kind in ("city", "transfer") else []
    if chosen is not None and names and chosen >= len(names):
        raise SplitError(f"split.outer_fold={chosen}, but there are {len(names)} cities, from 0 on: {', '.join(names)}")
    folds = _region_folds(kind, tiles, config, draw) if names else _unit_folds(kind, units, config, draw, own_parts)
    yield from (fold for fold in folds if chosen is None or fold.number == chosen or own_parts is not None)


def _unit_folds(
    kind: SplitKind, units: np.ndarray, config: SplitConfig, draw: int, own_parts: np.ndarray | None
) -> Iterator[Fold]:
    everything = np.ones(len(units), dtype=bool)
    if own_parts is not None:
        yield Fold(0, "", everything, own_parts == "test")
    elif config.num_folds == 1:
        test = _choose(units, everything, config.test_share * len(units), _generator(config, kind, "test", draw))
        yield Fold(0, "", everything, test)
    else:
        from sklearn.model_selection import GroupKFold

        if (num_units := len(np.unique(units))) < config.num_folds:
            raise SplitError(
                f"split {kind!r}: {num_units} pieces that stay whole cannot fill split.num_folds={config.num_folds}: lower "
                f"it, or {MORE_OF[kind]}"
            )
        random_state = int(_generator(config, kind, "folds", draw).integers(2**31))
        folds = GroupKFold(config.num_folds, shuffle=True, random_state=random_state).split(units, groups=units)
        for number, (_, rows) in enumerate(folds):
            test = np.zeros(len(units), dtype=bool)
            test[rows] = True
            yield Fold(number, f"fold {number}", everything, test)


def _region_folds(kind: SplitKind, tiles: pa.Table, config: SplitConfig, draw: int) -> Iterator[Fold]:
    """`city`: every region is held out once. `transfer`: every region is learned from and held out, itself in part."""
    regions = tiles["region"].to_numpy(zero_copy_only=False).astype(str)
    names = np.unique(regions)
    if len(names) < 2:
        raise SplitError(f"split {kind!r} needs two cities, but all tiles are of {str(names[0])!r}: take another kind of split")
    if kind == "city":
        for number, name in enumerate(names):
            yield Fold(number, str(name), np.ones(len(regions), dtype=bool), regions == name)
        return
    for number, (known, unseen) in enumerate((known, unseen) for known in names for unseen in names):
        inside, test = (regions == known) | (regions == unseen), regions == unseen
        if known == unseen:
            pieces = _pieces(tiles, inside, config.block_km)
            generator = _generator(config, kind, "test", draw, number)
            test = _choose(pieces, inside, config.test_share * int(inside.sum()), generator)
        yield Fold(number, transfer_name(str(known), str(unseen)), inside, test)


def transfer_name(known: str, unseen: str) -> str:
    """What the fold of `transfer` is called that learns from one city and is judged on another."""
    return f"{known} → {unseen}"


def _fold_names(kind: SplitKind, tiles: pa.Table) -> list[str]:
    names = sorted(set(tiles["region"].to_pylist()))
    return names if kind == "city" else [transfer_name(known, unseen) for known in names for unseen in names]


def _choose_val(
    kind: SplitKind,
    tiles: pa.Table,
    units: np.ndarray,
    candidates: np.ndarray,
    config: SplitConfig,
    generator: np.random.Generator,
) -> np.ndarray:
    """Validation among the candidates: whole units, `val_share` of all tiles.

    Where whole cities are held out there may be one other alone: its blocks, and as large a share of the rest as elsewhere.
    """
    if kind not in ("city", "transfer"):
        return _choose(units, candidates, config.val_share * len(units), generator)
    share = config.val_share / (1 - config.test_share)
    return _choose(_pieces(tiles, candidates, config.block_km), candidates, share * int(candidates.sum()), generator)


def _pieces(tiles: pa.Table, candidates: np.ndarray, block_km: float) -> np.ndarray:
    """Blocks, where the candidates have a place and fill some; else single tiles."""
    _, pieces = cluster_units("blocks", tiles, block_km)
    return pieces if len(np.unique(pieces[candidates])) >= MIN_BLOCKS else np.arange(tiles.num_rows)


def _near_test(kind: SplitKind, tiles: pa.Table, parts: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Which tiles of train and val lie within the buffer around a test tile, bool [tiles]."""
    lon, lat = (tiles[name].to_numpy().astype(np.float64) for name in ("lon", "lat"))
    _require(kind, "lon and lat for split.buffer_km", int((~are_placed(lon, lat)).sum()), tiles.num_rows, config)
    rest, test = np.isin(parts, ("train", "val")), parts == "test"
    near = np.zeros(len(parts), dtype=bool)
    near[rest] = nearest_km(lon[test], lat[test], lon[rest], lat[rest]) < config.buffer_km
    return near


def _count_buffered(rows: pa.Table) -> dict[str, float]:
    """Tiles in the buffer by split, the mean over folds and draws; splits without a buffer are left out."""
    frame = rows.to_pandas()
    sizes = (frame["part"] == BUFFER).groupby([frame["split"], frame["fold"], frame["seed"]]).sum().groupby("split").mean()
    return {str(split): float(size) for split, size in sizes.items() if size}


def _units(kind: SplitKind, tiles: pa.Table, config: SplitConfig) -> np.ndarray:
    """What stays whole: one code per tile; tiles of equal code are never separated."""
    if kind == "blocks":
        lon, lat = (tiles[name].to_numpy().astype(np.float64) for name in ("lon", "lat"))
        _require(kind, "lon and lat", int((~are_placed(lon, lat)).sum()), tiles.num_rows, config)
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


def _choose(units: np.ndarray, candidates: np.ndarray, num_wanted: float, generator: np.random.Generator) -> np.ndarray:
    """Whole units among the candidates, in random order, each taken when it brings the number of tiles closer."""
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


def _generator(config: SplitConfig, kind: SplitKind, part: str, draw: int, fold: int = 0) -> np.random.Generator:
    key = hashlib.sha256(f"{config.seed}/{kind}/{part}/{draw}{f'/{fold}' * bool(fold)}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:16], "big"))


def _rows(tile_ids: pa.ChunkedArray, kind: SplitKind, draw: int, fold: int, parts: np.ndarray) -> pa.Table:
    inside = parts != ""
    num_tiles = int(inside.sum())
    columns: list[Any] = [
        tile_ids.combine_chunks().filter(pa.array(inside)),
        pa.repeat(pa.scalar(str(kind)), num_tiles),
        pa.repeat(pa.scalar(draw, pa.int32()), num_tiles),
        pa.repeat(pa.scalar(fold, pa.int32()), num_tiles),
        pa.array(parts[inside].tolist(), pa.string()),
    ]
    return pa.table(columns, schema=SPLITS)
