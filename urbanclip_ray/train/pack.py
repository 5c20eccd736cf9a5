"""tiles + pairs + splits ─pack─▶ shards: shuffled training rows with pixels, in files sized for streaming.

Only the training and validation parts of the outer split's first draw are packed: test tiles, and those in the buffer around
them, stay out of pretraining, images and texts, unless the recipe says `split.transductive`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConfigError, PackConfig
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, Publication, list_files
from urbanclip_ray.train.parts import ROWS_OF_FILES, describe_files

TILES_PER_BATCH = 256


def pack_shards(
    tiles: Dataset,
    pairs: Dataset,
    splits: Dataset,
    outer: str,
    config: PackConfig,
    publication: Publication,
    transductive: bool = False,
) -> None:
    """Row ids are places in a seeded shuffle, training rows first; files hold consecutive row ids of mixed tiles.

    `transductive` packs the outer test tiles, and those in the buffer around them, as training rows.
    """
    rows = _number_rows(pairs, splits, outer, config.seed, transductive)
    if rows.num_rows == 0:
        raise ConfigError("no tile has both a place in the split and an accepted sentence: look at the rejects of refine")
    dataflow.connect()
    lookup = ray.put(rows)

    def attach(batch: pa.Table) -> pa.Table:
        table = ray.get(lookup)
        place = pc.index_in(batch["tile_id"], value_set=table["tile_id"])
        known = pc.is_valid(place)
        batch, place = batch.filter(known), place.filter(known)
        chosen = table.take(place)
        columns = {name: chosen[name] for name in ("row_id", "tile_id", "texts", "part")} | {"image": batch["image"]}
        return dataflow.conform({name: column.combine_chunks() for name, column in columns.items()}, SHARDS)

    packed = dataflow.map_tables(dataflow.read(tiles, ["tile_id", "image"]), attach, batch_size=TILES_PER_BATCH)
    num_files = -(-rows.num_rows // config.rows_per_file)
    packed = packed.repartition(num_files).sort("row_id").repartition(target_num_rows_per_block=config.rows_per_file)
    dataflow.write(packed, publication, max_rows_per_file=config.rows_per_file)
    _count(publication, tiles, rows, outer_parts(splits, outer, transductive))


def _number_rows(pairs: Dataset, splits: Dataset, outer: str, seed: int, transductive: bool = False) -> pa.Table:
    """Tiles with a text and a place in train or val: row_id, tile_id, texts, part."""
    parts = outer_parts(splits, outer, transductive)
    texts = pairs.read(["tile_id", "texts"])
    texts = texts.filter(pc.greater(pc.list_value_length(texts["texts"]), 0))
    place = pc.index_in(texts["tile_id"], value_set=parts["tile_id"])
    texts, place = texts.filter(pc.is_valid(place)), place.filter(pc.is_valid(place))
    joined = texts.append_column("part", parts["part"].take(place))
    joined = joined.filter(pc.is_in(joined["part"], value_set=pa.array(["train", "val"]))).sort_by("tile_id")
    order = np.random.default_rng(seed).permutation(joined.num_rows)
    is_val = (joined["part"].to_numpy() == "val")[order]
    order = order[np.argsort(is_val, kind="stable")]  # training rows first, so that their files hold nothing else
    return joined.take(order).append_column("row_id", pa.array(np.arange(joined.num_rows), pa.int64()))


def outer_parts(splits: Dataset, outer: str, transductive: bool = False) -> pa.Table:
    """The parts that one pretraining belongs to: draw 0 of the outer split (tile_id, part).

    Where it is `transductive`, what else is kept out of it is `train`.
    """
    chosen = (pc.field("split") == outer) & (pc.field("seed") == 0)
    parts = splits.read(["tile_id", "part"], filters=chosen)
    if not transductive:
        return parts
    return parts.set_column(1, "part", pc.if_else(pc.equal(parts["part"], "val"), "val", "train"))


def _count(publication: Publication, tiles: Dataset, rows: pa.Table, parts: pa.Table) -> None:
    written = publication.read(["row_id", "part"])
    if sorted(written["row_id"].to_pylist()) != list(range(rows.num_rows)):
        raise AssertionError(f"{publication.uri}: {written.num_rows} rows written, {rows.num_rows} expected")
    readable = set(tiles.read(["tile_id"], filters=pc.field("error").is_null())["tile_id"].to_pylist())
    held_out, near = (
        readable & set(parts.filter(pc.field("part") == part)["tile_id"].to_pylist()) for part in ("test", "buffer")
    )
    packed = set(rows["tile_id"].to_pylist())
    without_text = len(readable - packed - held_out - near)
    publication.count(
        unit="tiles",
        rows_in=tiles.manifest.rows_in,
        rows_out=len(packed),
        rejects={
            "held out for test": len(held_out),
            **({"in the buffer around test": len(near)} if near else {}),
            "no accepted sentence or no place in the split": without_text,
            "unreadable tile": tiles.manifest.rows_in - len(readable),
        },
    )
    publication.facts["parts"] = {part: int(pc.sum(pc.equal(written["part"], part)).as_py() or 0) for part in ("train", "val")}
    written_files = [f"{publication.attempt}/{info.base_name}" for info in list_files(publication.data_uri)]
    publication.facts[ROWS_OF_FILES] = describe_files(publication.uri, written_files)  # so that readers open no file to know
