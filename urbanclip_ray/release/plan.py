"""Which tiles an export has, and which shard each of them lies in; no pixels and no texts are read for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import ConfigError
from urbanclip_ray.parquet_files import read_parquet
from urbanclip_ray.sources.sample_names import DATA_FOLDER, SPLIT_NAMES, UNASSIGNED
from urbanclip_ray.storage import Dataset, resolve

Format = Literal["webdataset", "huggingface"]
EXTENSIONS: dict[Format, str] = {"webdataset": "tar", "huggingface": "parquet"}
NUM_READERS = 16  # of files' columns: round trips, not bandwidth


class ShardPlan(NamedTuple):
    """One file of the export: its tiles in order, and the files of ours that they and their texts are read from."""

    name: str  # relative to the export
    part: str | None
    tile_ids: pa.Array
    tile_paths: list[str]
    pair_paths: list[str]

    def as_table(self) -> pa.Table:
        """One row, for a task."""
        row = self._asdict() | {"tile_ids": self.tile_ids.to_pylist()}
        fields = {name: pa.array([value], _TYPES[name]) for name, value in row.items()}
        return pa.table(fields)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ShardPlan:
        return cls(**row | {"tile_ids": pa.array(row["tile_ids"], pa.string())})


_TYPES = {name: pa.string() if name in ("name", "part") else pa.list_(pa.string()) for name in ShardPlan._fields}


class ExportPlan(NamedTuple):
    """All shards, and what every tile of the run came to."""

    shards: list[ShardPlan]
    num_exported: int
    num_unreadable: int
    num_without_text: int
    num_by_split: dict[str, int]  # by the names that the files bear


def plan_export(tiles: Dataset, pairs: Dataset, parts: pa.Table | None, kind: Format, rows_per_shard: int) -> ExportPlan:
    """Cut the tiles that have a text into shards, in the order of the tiles, each shard of one part.

    `parts` has `tile_id` and `part`; without it everything is `train`, as Hugging Face's loaders expect. Raises ConfigError
    where no tile has a text.
    """
    found = _read_columns(tiles, ["tile_id", "error"])
    texts = _read_columns(pairs, ["tile_id", "texts"])
    readable = found.filter(pc.is_null(found["error"]))
    at = pc.index_in(readable["tile_id"], value_set=texts["tile_id"].combine_chunks())
    has_text = pc.and_kleene(pc.is_valid(at), pc.greater(texts["num_texts"].take(at), 0))
    has_text = pc.fill_null(has_text, False)
    exported = readable.filter(has_text).append_column("pair_file", texts["file"].take(at.filter(has_text)))
    if exported.num_rows == 0:
        raise ConfigError("no tile has an accepted sentence, so there is nothing to export: look at the rejects of refine")
    exported = exported.append_column("part", _parts_of(exported["tile_id"], parts))
    shards: list[ShardPlan] = []
    by_split: dict[str, int] = {}
    for part in sorted(pc.unique(exported["part"]).to_pylist(), key=lambda part: part or "~"):
        chosen = pc.is_null(exported["part"]) if part is None else pc.equal(exported["part"], part)
        rows = exported.filter(pc.fill_null(chosen, False))
        split = SPLIT_NAMES["train"] if parts is None else SPLIT_NAMES.get(part, UNASSIGNED)
        by_split[split] = rows.num_rows
        shards += _cut(rows, part, split, EXTENSIONS[kind], rows_per_shard, tiles.parquet_paths(), pairs.parquet_paths())
    return ExportPlan(
        shards,
        exported.num_rows,
        found.num_rows - readable.num_rows,
        readable.num_rows - exported.num_rows,
        by_split,
    )


def _parts_of(tile_ids: pa.ChunkedArray, parts: pa.Table | None) -> pa.ChunkedArray:
    if parts is None:
        return pa.chunked_array([pa.nulls(len(tile_ids), pa.string())])
    return parts["part"].take(pc.index_in(tile_ids, value_set=parts["tile_id"].combine_chunks()))


def _cut(
    rows: pa.Table,
    part: str | None,
    split: str,
    extension: str,
    rows_per_shard: int,
    tile_paths: list[str],
    pair_paths: list[str],
) -> Iterator[ShardPlan]:
    num_shards = -(-rows.num_rows // rows_per_shard)
    for number in range(num_shards):
        share = rows.slice(number * rows_per_shard, rows_per_shard)
        yield ShardPlan(
            f"{DATA_FOLDER}/{split}-{number:05d}-of-{num_shards:05d}.{extension}",
            part,
            share["tile_id"].combine_chunks(),
            [tile_paths[at] for at in np.unique(share["file"].to_numpy())],
            [pair_paths[at] for at in np.unique(share["pair_file"].to_numpy())],
        )


def _read_columns(dataset: Dataset, columns: list[str]) -> pa.Table:
    """These columns of all files in order, with `file`, the number of the file; of texts only how many (`num_texts`)."""
    filesystem, _ = resolve(dataset.uri)

    def read(item: tuple[int, str]) -> pa.Table:
        number, path = item
        table = read_parquet(filesystem, [path], columns)
        if "texts" in columns:
            lengths = pc.list_value_length(table["texts"])
            table = table.drop_columns("texts").append_column("num_texts", lengths)
        return table.append_column("file", pa.array(np.full(table.num_rows, number, np.int32)))

    with ThreadPoolExecutor(NUM_READERS) as readers:
        return pa.concat_tables(readers.map(read, enumerate(dataset.parquet_paths())))
