"""tiles + pairs + splits ─pack─▶ shards: shuffled training rows with pixels, in files sized for streaming.

Only the training and validation parts of the outer split's first draw are packed: test tiles, and those in the buffer around
them, stay out of pretraining, images and texts, unless the recipe says `split.transductive`. Rows of other runs may join.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConfigError, PackConfig
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, Publication, list_files
from urbanclip_ray.train.borrowed import Borrowed, borrow_rows
from urbanclip_ray.train.parts import ROWS_OF_FILES, describe_files


def pack_shards(
    tiles: Dataset,
    pairs: Dataset,
    splits: Dataset,
    outer: str,
    config: PackConfig,
    publication: Publication,
    transductive: bool = False,
    also: Sequence[Dataset] = (),
) -> None:
    """Row ids are places in a seeded shuffle, training rows first; files hold consecutive row ids of mixed tiles.

    `transductive` packs the outer test tiles, and those in the buffer around them, as training rows. `also` are shards of
    other runs, whose training rows join.
    """
    own = _own_rows(pairs, splits, outer, transductive)
    if own.num_rows == 0:
        raise ConfigError("no tile has both a place in the split and an accepted sentence: look at the rejects of refine")
    dataflow.connect()
    borrowed = borrow_rows(also, tiles)
    rows = _number_rows([own, *(item.rows for item in borrowed)], config.seed)
    images = [tiles, *(item.shards for item in borrowed)]
    packed, *others = (_attach(dataset, _rows_from(rows, origin)) for origin, dataset in enumerate(images))
    if others:
        packed = packed.union(*others)
    # Training goes through rows file by file: with bounds that Ray samples, the same seed would be another order every time.
    bounds = list(range(config.rows_per_file, rows.num_rows, config.rows_per_file)) or [rows.num_rows]  # none: Ray samples
    packed = packed.sort("row_id", boundaries=bounds)
    dataflow.write(packed, publication, max_rows_per_file=config.rows_per_file)
    _count(publication, tiles, rows, outer_parts(splits, outer, transductive), borrowed)


def _own_rows(pairs: Dataset, splits: Dataset, outer: str, transductive: bool = False) -> pa.Table:
    """Tiles with a text and a place in train or val: tile_id, texts, part."""
    parts = outer_parts(splits, outer, transductive)
    texts = pairs.read(["tile_id", "texts"])
    texts = texts.filter(pc.greater(pc.list_value_length(texts["texts"]), 0))
    place = pc.index_in(texts["tile_id"], value_set=parts["tile_id"])
    texts, place = texts.filter(pc.is_valid(place)), place.filter(pc.is_valid(place))
    joined = texts.append_column("part", parts["part"].take(place))
    return joined.filter(pc.is_in(joined["part"], value_set=pa.array(["train", "val"])))


def _number_rows(tables: Sequence[pa.Table], seed: int) -> pa.Table:
    """All rows in a seeded order, with their row_id and with the number of the table that each comes from as `origin`."""
    numbered = [
        table.append_column("origin", pa.array(np.full(table.num_rows, origin), pa.int64()))
        for origin, table in enumerate(tables)
    ]
    joined = pa.concat_tables(numbered, promote_options="permissive").sort_by("tile_id")
    order = np.random.default_rng(seed).permutation(joined.num_rows)
    is_val = (joined["part"].to_numpy() == "val")[order]
    order = order[np.argsort(is_val, kind="stable")]  # training rows first, so that their files hold nothing else
    return joined.take(order).append_column("row_id", pa.array(np.arange(joined.num_rows), pa.int64()))


def _rows_from(rows: pa.Table, origin: int) -> pa.Table:
    return rows.filter(pc.equal(rows["origin"], origin))


def _attach(images: Dataset, rows: pa.Table) -> ray.data.Dataset:
    """The rows in SHARDS, each with the image of its tile; tiles without a row are left out."""
    lookup = ray.put(rows)

    def attach(batch: pa.Table) -> pa.Table:
        table = ray.get(lookup)
        place = pc.index_in(batch["tile_id"], value_set=table["tile_id"])
        known = pc.is_valid(place)
        batch, place = batch.filter(known), place.filter(known)
        chosen = table.take(place)
        columns = {name: chosen[name] for name in ("row_id", "tile_id", "texts", "part")} | {"image": batch["image"]}
        return dataflow.conform({name: column.combine_chunks() for name, column in columns.items()}, SHARDS)

    return dataflow.map_files(images, ["tile_id", "image"], attach)


def outer_parts(splits: Dataset, outer: str, transductive: bool = False) -> pa.Table:
    """The parts that one pretraining belongs to: draw 0 of the outer split (tile_id, part).

    Where it is `transductive`, what else is kept out of it is `train`.
    """
    chosen = (pc.field("split") == outer) & (pc.field("seed") == 0)
    parts = splits.read(["tile_id", "part"], filters=chosen)
    if not transductive:
        return parts
    return parts.set_column(1, "part", pc.if_else(pc.equal(parts["part"], "val"), "val", "train"))


def _count(publication: Publication, tiles: Dataset, rows: pa.Table, parts: pa.Table, borrowed: Sequence[Borrowed]) -> None:
    written = publication.read(["row_id", "part"])
    if sorted(written["row_id"].to_pylist()) != list(range(rows.num_rows)):
        raise AssertionError(f"{publication.uri}: {written.num_rows} rows written, {rows.num_rows} expected")
    readable = set(tiles.read(["tile_id"], filters=pc.field("error").is_null())["tile_id"].to_pylist())
    held_out, near = (
        readable & set(parts.filter(pc.field("part") == part)["tile_id"].to_pylist()) for part in ("test", "buffer")
    )
    packed = set(_rows_from(rows, 0)["tile_id"].to_pylist())
    without_text = len(readable - packed - held_out - near)
    not_borrowed: Counter[str] = Counter()
    for item in borrowed:
        not_borrowed.update(item.rejects)
    publication.count(
        unit="tiles",
        rows_in=tiles.manifest.rows_in + sum(item.shards.manifest.rows_out for item in borrowed),
        rows_out=rows.num_rows,
        rejects={
            "held out for test": len(held_out),
            **({"in the buffer around test": len(near)} if near else {}),
            "no accepted sentence or no place in the split": without_text,
            "unreadable tile": tiles.manifest.rows_in - len(readable),
            **not_borrowed,
        },
    )
    publication.facts["parts"] = {part: int(pc.sum(pc.equal(written["part"], part)).as_py() or 0) for part in ("train", "val")}
    if borrowed:
        publication.facts["borrowed"] = {item.shards.uri: item.rows.num_rows for item in borrowed}
    written_files = [f"{publication.attempt}/{info.base_name}" for info in list_files(publication.data_uri)]
    publication.facts[ROWS_OF_FILES] = describe_files(publication.uri, written_files)  # so that readers open no file to know
