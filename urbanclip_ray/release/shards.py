"""One shard of an export, written as its tiles are read: a tar of KEY.jpg, KEY.txt, KEY.json, or a Parquet file.

The bytes follow from the tiles, the texts and the options alone: members have no times and no owners.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from urbanclip_ray import storage
from urbanclip_ray.manifest import FileEntry
from urbanclip_ray.parquet_files import open_parquet, read_parquet
from urbanclip_ray.release.plan import Format, ShardPlan
from urbanclip_ray.schema import TILES
from urbanclip_ray.sources.sample_names import FACTS, image_extension, key_of

ROWS_PER_GROUP = 128  # tiles in memory at once; what a reader of one tile of a Parquet file has to read
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])  # what Hugging Face's Image feature holds
TEXTS = pa.list_(pa.string())


class ShardSettings(NamedTuple):
    """What a shard is written as, and where from and to."""

    kind: Format
    pixels: bool  # whether images are in it
    output: str  # the export's URI
    tiles_uri: str  # only for their filesystems
    pairs_uri: str


class HashedFile(io.RawIOBase):
    """A file that is written once, with the size and sha256 of what was written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self.num_bytes += len(view)
        return len(view)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def write_shard(plan: ShardPlan, settings: ShardSettings) -> FileEntry:
    """Write one shard; a shard that is there already, from a task that failed, is written over."""
    with storage.open_output(storage.join(settings.output, plan.name)) as file:
        hashed = HashedFile(file)
        write = _write_tar if settings.kind == "webdataset" else _write_parquet
        num_rows = write(hashed, _rows(plan, settings), plan.part)
    if num_rows != len(plan.tile_ids):
        raise AssertionError(f"{plan.name}: {len(plan.tile_ids)} tiles planned, {num_rows} written")
    return FileEntry(path=plan.name, num_bytes=hashed.num_bytes, sha256=hashed.sha256)


def _rows(plan: ShardPlan, settings: ShardSettings) -> Iterator[pa.Table]:
    """The shard's tiles with their texts, in tables of `ROWS_PER_GROUP` rows wherever files of ours end."""
    pairs, _ = storage.resolve(settings.pairs_uri)
    texts = read_parquet(pairs, plan.pair_paths, ["tile_id", "texts"])
    texts = texts.filter(pc.is_in(texts["tile_id"], value_set=plan.tile_ids))
    waiting: list[pa.Table] = []
    for tiles in _tiles(plan, settings):
        place = pc.index_in(tiles["tile_id"], value_set=texts["tile_id"].combine_chunks())
        waiting.append(tiles.append_column("texts", texts["texts"].take(place)))
        if sum(table.num_rows for table in waiting) >= ROWS_PER_GROUP:
            table = pa.concat_tables(waiting)
            yield table.slice(0, ROWS_PER_GROUP)
            waiting = [table.slice(ROWS_PER_GROUP)]
    rest = pa.concat_tables(waiting)
    if rest.num_rows:
        yield rest


def _tiles(plan: ShardPlan, settings: ShardSettings) -> Iterator[pa.Table]:
    filesystem, _ = storage.resolve(settings.tiles_uri)
    columns = ["tile_id", *FACTS, *(["image"] if settings.pixels else [])]
    for path in plan.tile_paths:
        with open_parquet(filesystem, path) as file:
            for rows in file.batches(columns, ROWS_PER_GROUP):
                yield rows.filter(pc.is_in(rows["tile_id"], value_set=plan.tile_ids))


def _write_tar(file: HashedFile, tables: Iterator[pa.Table], part: str | None) -> int:
    num_rows = 0
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for table in tables:
            for row in table.to_pylist():
                key, image, texts = key_of(row["tile_id"]), row.pop("image", None), row["texts"]
                facts = {name: value for name, value in (row | {"part": part}).items() if value is not None}
                if image is not None:
                    _add(archive, f"{key}.{image_extension(image)}", image)
                _add(archive, f"{key}.json", json.dumps(facts, ensure_ascii=False, sort_keys=True).encode())
                _add(archive, f"{key}.txt", "\n".join(texts).encode())
                num_rows += 1
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
    return num_rows


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # with no time and no owner
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _write_parquet(file: HashedFile, tables: Iterator[pa.Table], part: str | None) -> int:
    num_rows = 0
    writer: pq.ParquetWriter | None = None
    for table in tables:
        group = _as_huggingface(table, part)
        writer = writer or pq.ParquetWriter(pa.PythonFile(file, mode="w"), group.schema)
        writer.write_table(group)
        num_rows += group.num_rows
    if writer is not None:
        writer.close()
    return num_rows


def _as_huggingface(table: pa.Table, part: str | None) -> pa.Table:
    """A group of rows in the columns of the export, with what tells `datasets` that `image` is an image."""
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    if "image" in table.column_names:
        images = table["image"].combine_chunks()
        keys = zip(table["tile_id"].to_pylist(), images, strict=True)
        names = [f"{key_of(tile_id)}.{image_extension(image.as_py()[:12])}" for tile_id, image in keys]
        columns["image"] = pa.StructArray.from_arrays([images, pa.array(names)], fields=list(IMAGE))
        features["image"] = {"_type": "Image"}
    columns["texts"] = table["texts"].combine_chunks().cast(TEXTS)
    for name in ("tile_id", *FACTS):
        columns[name] = table[name].combine_chunks().cast(TILES.field(name).type)
    columns["part"] = pa.array([part] * table.num_rows, pa.string())
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    return pa.table(list(columns.values()), schema=pa.schema(fields, metadata=metadata))
