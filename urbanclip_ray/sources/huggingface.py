"""A Hugging Face dataset as a source: its Parquet files are read as they lie; no script of it is run.

The driver reads every column but the image; a worker reads the row group that a tile lies in and keeps a few of them, for
its next tiles are mostly neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from urbanclip_ray import storage
from urbanclip_ray.config import HuggingFaceSource
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.sources.base import MAX_IMAGE_BYTES, SourceError, relative_path, stem
from urbanclip_ray.sources.pairs import (
    PART_OF_SPLIT,
    PairFiles,
    Sample,
    check_facts,
    check_texts,
    check_tile_id,
)
from urbanclip_ray.sources.sample_names import FACTS

TEXT_COLUMNS = ("texts", "text", "captions", "caption")
ROWS_PER_BATCH = 64  # decoded at once: a small file may stand for very many bytes, which are counted as they come
MAX_GROUP_BYTES = 1 << 30  # of the images of one row group, which a worker holds
MAX_TEXT_BYTES = 1 << 30  # of the other columns of one file, which the driver holds
GROUPS_KEPT = 4
NUM_READERS = 8  # files at a time
SPLIT_OF_FILE = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test)(?=[-_./])")
GROUP_LOCK = Lock()


class HuggingFaceTiles(PairFiles):
    """Tiles are the rows; without a column of tile ids a tile is `FOLDER/FILE_ROW`."""

    extension = ".parquet"
    _config: HuggingFaceSource

    def _list_samples(self) -> list[Sample]:
        others = [path for path in self._folder.listing if path.lower().endswith((".arrow", ".py", ".pkl", ".pickle"))]
        for path in others:
            self._ignored[f"file .{path.rpartition('.')[2]}"] += 1
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return [sample for samples in readers.map(self._scan, self._files) for sample in samples]

    def _read_image(self, location: str) -> bytes:
        path, _, place = location.rpartition("#")
        group, row = (int(number) for number in place.split("/"))
        uri = storage.join(self._config.uri, relative_path(path))
        with GROUP_LOCK:  # the threads of a worker wait for one reading instead of each doing its own
            images = _read_group(uri, group, self._config.image_column)
        data: bytes | None = images[row].as_py()
        if data is None:
            raise TileImageError("no bytes", f"{path} only names an image that lies elsewhere: embed images in the dataset")
        if len(data) > MAX_IMAGE_BYTES:
            raise TileImageError("too large", f"{len(data)} bytes are more than {MAX_IMAGE_BYTES}")
        return data

    def _scan(self, path: str) -> list[Sample]:
        uri = storage.join(self._config.uri, path)
        with _open(uri) as file:
            columns = self._columns(file.schema_arrow, uri)
            rows: list[dict[str, Any]] = []
            num_bytes = 0
            for batch in file.iter_batches(columns=[name for name in columns if name != self._config.image_column]):
                num_bytes += batch.nbytes
                if num_bytes > MAX_TEXT_BYTES:
                    raise SourceError(f"{uri}: its texts are more than {MAX_TEXT_BYTES} bytes: write it in several files")
                rows += batch.to_pylist()
            has_image = self._config.image_column in columns
            if not rows and has_image:  # only images
                rows = [{} for _ in range(file.metadata.num_rows)]
            places = _places(file.metadata) if has_image else iter([None] * len(rows))
        split = SPLIT_OF_FILE.search(path)
        part = PART_OF_SPLIT.get(split.group(1)) if split else None
        return [
            self._sample(f"{uri}, row {number}", path, number, row, place, part)
            for number, (row, place) in enumerate(zip(rows, places, strict=True))
        ]

    def _columns(self, schema: pa.Schema, uri: str) -> list[str]:
        """The columns that are there of those that mean something; raises :class:`SourceError` where one must be."""
        config = self._config
        _check_image(schema, config.image_column, uri)
        wanted = {config.image_column, config.tile_id_column, config.region_column, "part", *FACTS}
        text = config.text_column or next((name for name in TEXT_COLUMNS if name in schema.names), "")
        if config.text_column and text not in schema.names:
            raise SourceError(
                f"{uri} has no column {text!r}: correct source.text_column; its columns are {', '.join(schema.names)}"
            )
        if not text and config.image_column not in schema.names:
            raise SourceError(
                f"{uri} has neither images nor texts: set source.image_column and source.text_column to two of its columns "
                f"({', '.join(schema.names)})"
            )
        return [name for name in schema.names if name in wanted or name == text]

    def _sample(
        self, where: str, path: str, number: int, row: dict[str, Any], place: str | None, file_part: str | None
    ) -> Sample:
        config = self._config
        found = row.get(config.tile_id_column)
        tile_id = f"{self._folder.name}/{stem(path)}_{number:06d}" if found is None else check_tile_id(found, where)
        region = row.get(config.region_column) or tile_id.rpartition("/")[0] or self._folder.name
        if not isinstance(region, str):
            raise SourceError(f"{where}: {config.region_column}={region!r:.100} is not text: correct source.region_column")
        names = (config.text_column,) if config.text_column else TEXT_COLUMNS
        text: Any = next((row[name] for name in names if row.get(name) is not None), [])
        facts = check_facts(row, where)
        facts["part"] = facts["part"] if "part" in row else file_part
        location = None if place is None else f"{path}#{place}"
        return Sample(tile_id, region, location, check_texts(text, where), where=where, **facts)


def _check_image(schema: pa.Schema, name: str, uri: str) -> None:
    if name not in schema.names:
        return
    kind = schema.field(name).type
    kinds = [kind.field(at) for at in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    data = next((field.type for field in kinds if field.name == "bytes"), kind)
    if not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
        raise SourceError(
            f"{uri}: the column {name!r} holds {kind}, not images ({{bytes, path}} or bytes): set source.image_column, or "
            "write the dataset with its images embedded"
        )


def _places(metadata: pq.FileMetaData) -> Iterator[str | None]:
    """`GROUP/ROW` of every row of a file."""
    for group in range(metadata.num_row_groups):
        for row in range(metadata.row_group(group).num_rows):
            yield f"{group}/{row}"


@lru_cache(maxsize=GROUPS_KEPT)
def _read_group(uri: str, group: int, column: str) -> pa.ChunkedArray:
    """The encoded images of one row group; raises TileImageError where they are more than a worker should hold."""
    chunks: list[pa.Array] = []
    with _open(uri) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, row_groups=[group], columns=[column]):
            images = batch.column(0)
            chunks.append(pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images)
            if sum(chunk.nbytes for chunk in chunks) > MAX_GROUP_BYTES:
                raise TileImageError(
                    "too large", f"row group {group} of {uri} has more than {MAX_GROUP_BYTES} bytes: write smaller ones"
                )
    return pa.chunked_array(chunks)


@contextmanager
def _open(uri: str) -> Iterator[pq.ParquetFile]:
    """Raises :class:`SourceError` for what is no Parquet file or damaged."""
    with storage.open_file(uri) as file:
        try:
            yield pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise SourceError(f"{uri} is no Parquet file, or damaged ({error}): download it again") from None
