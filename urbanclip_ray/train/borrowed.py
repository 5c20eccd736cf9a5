"""Training rows of other runs' shards that join a pretraining: what `pack.also` names.

A tile of this run, by its id or by its pixels, is never borrowed: it has texts of its own, or is kept out on purpose. How near
a borrowed tile lies to a test tile of this run is not known, for shards hold no places: borrow from other cities, or from
a run that was split alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray import dataflow
from urbanclip_ray.storage import Dataset

DIGESTED = pa.schema(
    [pa.field("tile_id", pa.string()), pa.field("texts", pa.list_(pa.string())), pa.field("sha256", pa.string())]
)


class Borrowed(NamedTuple):
    """`rows` (tile_id, texts, part) of `shards` that join, and why others do not."""

    shards: Dataset
    rows: pa.Table
    rejects: dict[str, int]


def borrow_rows(also: Sequence[Dataset], tiles: Dataset) -> list[Borrowed]:
    """The training rows of every shards dataset whose tiles are neither this run's nor those of one before it."""
    if not also:
        return []
    own = tiles.read(["tile_id", "sha256"])
    known_ids, known_pixels = set(own["tile_id"].to_pylist()), set(own["sha256"].to_pylist())
    found = []
    for shards in also:
        digested = _digest(shards)
        ids, pixels = digested["tile_id"].to_pylist(), digested["sha256"].to_pylist()
        new = [a not in known_ids and b not in known_pixels for a, b in zip(ids, pixels, strict=True)]
        rows = digested.filter(pa.array(new, pa.bool_())).drop_columns("sha256")
        rows = rows.append_column("part", pa.array(["train"] * rows.num_rows, pa.string()))
        num_val = shards.manifest.rows_out - digested.num_rows
        rejects = {"borrowed, but held out by its own run": num_val, "borrowed, but there already": len(ids) - rows.num_rows}
        found.append(Borrowed(shards, rows, {reason: count for reason, count in rejects.items() if count}))
        known_ids |= set(ids)
        known_pixels |= set(pixels)
    return found


def _digest(shards: Dataset) -> pa.Table:
    """Training rows with the sha256 of their pixels, as tiles have it."""

    def digest(batch: pa.Table) -> pa.Table:
        batch = batch.filter(pc.equal(batch["part"], "train"))
        digests = [hashlib.sha256(image).hexdigest() for image in batch["image"].to_pylist()]
        return dataflow.conform({"tile_id": batch["tile_id"], "texts": batch["texts"], "sha256": digests}, DIGESTED)

    rows = dataflow.map_files(shards, ["tile_id", "texts", "part", "image"], digest)
    return pa.concat_tables([DIGESTED.empty_table(), *dataflow.collect(rows)])
